"""Silences lm-eval and the libraries it uses."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache, partial
from typing import Any

import numpy as np

from layerboost.runtime import git_revision

CHATTY = ("lm_eval", "datasets", "transformers", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval, datasets and Transformers in the block, except for errors, unless LAYERBOOST_DEBUG=1."""
    if os.environ.get("LAYERBOOST_DEBUG"):
        yield
        return
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import lm_eval.utils

    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    bars_off = datasets.are_progress_bars_disabled()
    with ExitStack() as restored:
        # Its search for a batch size prints; standard output is for results.
        restored.enter_context(redirect_stdout(io.StringIO()))
        # It divides by the length of empty choices.
        restored.enter_context(np.errstate(divide="ignore", invalid="ignore"))
        for logger, level in zip(loggers, levels, strict=True):
            restored.callback(logger.setLevel, level)
            logger.setLevel(logging.ERROR)
        # lm-eval has no switch for its bars, and runs git in the current directory, which fails outside a checkout.
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            restored.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = partial(_hidden, module.tqdm)
        restored.callback(setattr, lm_eval.evaluator, "get_git_commit_hash", lm_eval.evaluator.get_git_commit_hash)
        lm_eval.evaluator.get_git_commit_hash = git_revision
        # It compiles the template again for every item.
        restored.callback(setattr, lm_eval.utils.env, "from_string", lm_eval.utils.env.from_string)
        lm_eval.utils.env.from_string = cache(lm_eval.utils.env.from_string)
        if not bars_off:
            restored.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
        yield


def _hidden(bar: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **kwargs | {"disable": True})
