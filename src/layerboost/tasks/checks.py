"""Checks that lm-eval can score the items of a task, before a model runs, and that a model's scores are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.probes.metrics import check_values
from layerboost.rows import read_lines
from layerboost.runtime import warn_once
from layerboost.tasks.quiet import quiet

if TYPE_CHECKING:
    from layerboost.tasks.lm_eval import BenchTask

# lm-eval's defaults: tokens per answer, and the seed of the examples before a question.
GENERATED_TOKENS, EXAMPLES_SEED = 256, 1234
# Kinds of items that lm-eval scores in a special way.
FIXED = "have the same score whatever a model answers: no right answer among their choices, or only one choice"
CUT = "are longer than the model's context: their start is truncated"


def check_items(tasks: list[BenchTask], tokenizer: Any, context_tokens: int) -> None:
    """Read every item of the tasks as lm-eval will, for a model that takes `context_tokens`.

    Raise ConfigError for items that lm-eval cannot score (it would fail after the model has run), with their number and
    the file and line of the first, and for tasks on which every model has the same score. Warn of items that are scored
    in a special way.
    """
    if not tasks:  # importing lm-eval takes seconds
        return
    with quiet():
        for task in tasks:
            _check_task(task, tokenizer, context_tokens)


def _check_task(task: BenchTask, tokenizer: Any, context_tokens: int) -> None:
    wrong: list[str] = []
    odd: dict[str, list[tuple[str, int]]] = {}
    for name, leaf in task.leaves.items():
        _check_generation(name, leaf, context_tokens)
        leaf.set_fewshot_seed(EXAMPLES_SEED)
        samples = task.samples[name] if task.samples else None
        docs = leaf.task_docs.select(samples) if samples else leaf.task_docs
        for item, doc in zip(samples or range(len(docs)), docs, strict=True):
            try:
                for kind in set(_kinds(task, leaf, doc, tokenizer, context_tokens)):
                    odd.setdefault(kind, []).append((name, item))
            except Exception as error:  # the task's own templates and functions may raise anything
                raised = "" if isinstance(error, _Unscorable) else f"{type(error).__name__}: "
                wrong.append(f"{'' if wrong else _place(task, name, item)}: {raised}{first_line(error)}")
        leaf.set_fewshot_seed(EXAMPLES_SEED)
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {task.items} items of task {task.name} cannot be scored",
            found=f"the first is {wrong[0]}",
            do="correct or remove them, or drop the task",
        )
    for kind, places in odd.items():
        which = f"{len(places)} of {task.items} items of task {task.name}"
        first = f"the first is {_place(task, *places[0])}"
        if kind == FIXED and len(places) == task.items:
            raise ConfigError(f"{which} {kind}", found=first, do="correct its choices and answers, or drop the task")
        warn_once(f"{which} {kind}; {first}")


class _Unscorable(Exception):
    """The reason why lm-eval cannot score an item."""


def _check_fields(leaf: Any, doc: Any) -> None:
    """Raise _Unscorable for a null field that a template turns into the word None."""
    null = [name for name, value in doc.items() if value is None]
    if not null:
        return
    parts = [leaf.doc_to_text, leaf.doc_to_target, *([leaf.doc_to_choice] if leaf.config.doc_to_choice else [])]
    texts = [(part, part(doc)) for part in parts]
    for name in null:
        for part, text in texts:
            if "None" in str(text) and text is not None and part(doc | {name: ""}) != text:
                raise _Unscorable(f"its {name!r} is null, which is read as 'None'")


def answer_of(leaf: Any, doc: Any) -> Any:
    """Return an item's answer: lm-eval reads it from doc_to_text if every choice has its own context."""
    return (leaf.doc_to_text if leaf.multiple_input else leaf.doc_to_target)(doc)


def right_choice(gold: Any, choices: list[str]) -> int | None:
    """Return the index of the right choice by an item's answer; None if the answer is not among the choices."""
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _check_choices(leaf: Any, doc: Any) -> None:
    """Raise _Unscorable, or what lm-eval will raise, for choices and answers that it cannot use."""
    if callable(leaf.config.process_results):
        return
    if leaf.OUTPUT_TYPE == "multiple_choice":
        choices = leaf.doc_to_choice(doc)
        if isinstance(leaf.config.doc_to_choice, list) and any("{{" in str(choice) for choice in choices):
            given = _short(choices)
            raise _Unscorable(f"its choices are {given}, which lm-eval does not fill in: write them as one text")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise _Unscorable(f"its choices are {_short(choices)}, not a list of texts")
    elif leaf.OUTPUT_TYPE == "generate_until":
        answer = leaf.doc_to_target(doc)
        if leaf.config.doc_to_choice is not None:
            leaf.doc_to_choice(doc)[answer]
        elif leaf.multiple_target:
            list(answer)


def _is_fixed(metric: str, leaf: Any, doc: Any, answers: int) -> bool:
    """Return whether the score is the same whichever answer is the likeliest; raise _Unscorable if there is none."""
    scores: set[float] = set()
    try:
        for best in range(answers):
            outcome = [(0.0 if number == best else -1.0, number == best) for number in range(answers)]
            scores.add(float(leaf.process_results(doc, outcome)[metric]))
            if len(scores) > 1:
                return False
    except Exception as error:
        answer = _short(answer_of(leaf, doc))
        raise _Unscorable(f"{metric} of its answer {answer} raises {type(error).__name__}: {error}") from None
    return True


def _kinds(task: BenchTask, leaf: Any, doc: Any, tokenizer: Any, context_tokens: int) -> Iterator[str]:
    """Yield what is unusual about an item; raise what lm-eval would raise, or _Unscorable."""
    _check_fields(leaf, doc)
    _check_choices(leaf, doc)
    examples = leaf.config.num_fewshot or 0
    prompt = leaf.fewshot_context(doc, num_fewshot=examples, gen_prefix=leaf.doc_to_prefix(doc))
    found = leaf.construct_requests(doc=doc, ctx=prompt, metadata=("", 0, 1))
    requests = found if isinstance(found, list) else [found]
    if leaf.OUTPUT_TYPE != "generate_until":  # metrics of generated text may run code, or take long
        fixed = _is_fixed(task.metric, leaf, doc, len(requests))
        if fixed and leaf.OUTPUT_TYPE == "multiple_choice":
            yield FIXED
    for request in requests:
        context, asked = request.args[:2]
        if isinstance(asked, dict):
            room = context_tokens - _generated_tokens(asked)
            if not context.strip() and not tokenizer(context)["input_ids"]:
                raise _Unscorable("its prompt is empty")
            if len(context.encode()) > room and len(tokenizer(context)["input_ids"]) > room:
                yield CUT
        elif _needs_tokens(context, asked, context_tokens):
            before, answer = _pair_tokens(tokenizer, context, asked)
            if answer < 1:
                raise _Unscorable(f"its answer {_short(asked)} has no tokens of its own")
            if before < 1:
                raise _Unscorable("its prompt is empty")
            if answer > context_tokens:
                raise _Unscorable(f"an answer of {answer:,} tokens, in a model with a context of {context_tokens:,}")
            if before + answer > context_tokens + 1:
                yield CUT


def _needs_tokens(context: str, answer: Any, context_tokens: int) -> bool:
    """Return whether a request may be empty or too long, by its characters, since tokenizing takes time."""
    if not isinstance(answer, str):
        raise _Unscorable(f"its answer is {_short(answer)}, not a text")
    spaced = answer[:1].isspace() or context[-1:].isspace()
    return not context.strip() or not answer.strip() or not spaced or len((context + answer).encode()) > context_tokens


def _pair_tokens(tokenizer: Any, context: str, answer: str) -> tuple[int, int]:
    """Return the tokens of prompt and answer as lm-eval counts them: spaces between the two belong to the answer."""
    if context == "":
        return 1, len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    before = len(tokenizer(context.rstrip())["input_ids"])
    return before, len(tokenizer(context + answer)["input_ids"]) - before


def _check_generation(name: str, leaf: Any, context_tokens: int) -> None:
    if leaf.OUTPUT_TYPE != "generate_until":
        return
    settings = leaf.config.generation_kwargs or {}
    try:
        generated = _generated_tokens(settings)
    except (TypeError, ValueError):
        raise ConfigError(f"task {name} has generation_kwargs that lm-eval cannot read", found=str(settings)) from None
    if not 0 < generated < context_tokens:
        raise ConfigError(
            f"task {name} lets a model generate {generated:,} tokens",
            found=f"a context of {context_tokens:,} tokens, prompt included",
            do="change max_gen_toks in the task's generation_kwargs (in a YAML file of your own), or drop the task",
        )


def _generated_tokens(settings: dict[str, Any]) -> int:
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(settings, GENERATED_TOKENS)["max_gen_toks"])


def _place(task: BenchTask, name: str, item: int) -> str:
    """Return the place of an item: its number in its task, and the line if the items are in one JSONL file."""
    leaf = task.leaves[name]
    files = (leaf.config.dataset_kwargs or {}).get("data_files", task.origin)
    if isinstance(files, dict):
        files = files.get(leaf.config.test_split or leaf.config.validation_split)
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    where = f"item {item + 1} of {name}"
    if len(task.leaves) > 1 or not str(files).endswith(".jsonl") or not Path(str(files)).is_file():
        return f"{where} ({task.origin})"
    if leaf.config.process_docs is not None:  # it may leave items out
        return f"{where} ({files})"
    rows = (where for where, line in read_lines(Path(str(files))) if line.strip())
    return next(islice(rows, item, None), f"{where} ({files})")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


@contextmanager
def finite_logits(task: BenchTask, model: Any, name: str) -> Iterator[None]:
    """Raise LayerboostError in the block if a model generates from logits that are not finite."""

    def refuse(_: Any, __: Any, output: Any) -> None:
        # A logit of −inf rules a token out.
        greatest = output.logits[:, -1].amax(-1)
        if not greatest.isfinite().all():
            found = float(greatest[~greatest.isfinite()][0])
            do = "evaluate it on text (evaluate.perplexity_tokens): that names the layer"
            raise LayerboostError(f"logits of {name} are {found} in task {task.name}", do=do)

    generates = any(leaf.OUTPUT_TYPE == "generate_until" for leaf in task.leaves.values())
    hook = model.register_forward_hook(refuse) if generates else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def check_scores(task: BenchTask, result: dict[str, Any], model: Any, tokenizer: Any, name: str) -> None:
    """Raise LayerboostError for an item with a log-likelihood or score that is not finite: lm-eval accepts it."""
    for leaf in task.leaves:
        for sample in result["samples"][leaf]:
            what = f"{task.name} of {name}, item {sample['doc_id'] + 1} of {leaf}"
            for pair, request in zip(sample["filtered_resps"], sample["arguments"], strict=False):
                if isinstance(pair, tuple | list) and not math.isfinite(pair[0]):
                    ids = tokenizer("".join(request[:2]), return_tensors="pt")["input_ids"]
                    ids = ids[:, -model.config.get_text_config().max_position_embeddings :]
                    check_values(f"log-likelihood in {what}", torch.tensor([pair[0]]), model, ids)
            if not math.isfinite(float(sample[task.metric])):
                raise LayerboostError(f"{what} has a score of {sample[task.metric]}", do="correct the task's metric")
