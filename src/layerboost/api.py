"""The Python API: the stages on objects, without a run folder.

Settings are the sections of a recipe (docs/reference/recipe.md). Every function raises ConfigError for what it cannot
use. A run folder that resumes after a kill, torchrun, serving and reports are for the command line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from layerboost import converting
from layerboost.errors import ConfigError
from layerboost.evaluating.stage import run_evaluate
from layerboost.exporting.stage import run_export
from layerboost.healing.stage import HEALED_BY, run_heal
from layerboost.measuring import stage as measuring
from layerboost.model import base as models
from layerboost.model.base import Base, find_model
from layerboost.model.card import CARD, origin_of
from layerboost.model.checkpoint import check_same_model, save_boosted
from layerboost.model.surgery import check_plan
from layerboost.planning import stage as planning
from layerboost.planning.methods import MEASURING
from layerboost.recipe import Card, Evaluate, Heal, Measure, Plan, Recipe, Text, recipe_yaml
from layerboost.runtime import start_runtime
from layerboost.schemas.evaluation import EvalComparison
from layerboost.schemas.plan import PlanFile, write_plan
from layerboost.schemas.run import CONVERTED, HEALED, PLAN
from layerboost.schemas.sensitivity import Sensitivity


@dataclass(frozen=True)
class Boosted:
    """A model with a plan applied, in memory, and the base that it was made from; `healing`: how it was trained."""

    base: Base
    plan: PlanFile
    model: PreTrainedModel
    recipe: Recipe
    healing: str = ""

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face checkpoint with tokenizer, plan and model card; return its directory.

        Raise ConfigError for a directory that holds something else.
        """
        save_boosted(
            self.model,
            self.base.tokenizer,
            self.plan,
            Path(folder),
            recipe_yaml=recipe_yaml(self.recipe),
            origin=origin_of(self.base.folder, self.base.name, Card()),
            healing=self.healing,
        )
        return Path(folder)


def open_base(
    model: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
    folder: str | Path = "layerboost-run",
) -> Base:
    """Open a base: a Hub id, a directory, a GGUF file or `package:NAME`.

    Its facts, tokenizer and weights are read when they are asked for. `folder`: where a GGUF file or a
    quantised model is unpacked.
    """
    recipe = Recipe(model=str(model), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return models.open_base(recipe, Path(folder), start_runtime(recipe))


def measure(base: Base, text: Text, settings: Measure | None = None, *, seed: int = 0) -> Sensitivity:
    """Measure what each replacement of each layer's attention costs, by KL, NLL, retrieval and more."""
    recipe = _recipe(base, text=text, measure=settings or Measure(), seed=seed)
    measuring.validate_measure(recipe)
    measuring.check_config(recipe, base.config)
    return measuring.measure(recipe, base)


def plan(sensitivity: Sensitivity, settings: Plan | None = None, *, seed: int = 0) -> PlanFile:
    """Choose a strategy for each layer. Raise InfeasibleBudget, with the nearest plan, if no plan meets the budget."""
    settings = settings or Plan()
    if settings.method in MEASURING:
        raise ConfigError(f"plan.method {settings.method} measures whole plans", do="use `layerboost plan` for it")
    return planning.choose(Recipe(plan=settings, seed=seed), sensitivity)


def convert(base: Base, plan: PlanFile, text: Text | None = None, settings: Measure | None = None) -> Boosted:
    """Apply a plan to the base's weights. Sinks and thinned MLPs are fitted on the calibration part of `text`."""
    check_plan(base.config, plan.layers)
    check_same_model(plan, base.info, Path(PLAN))
    if text is None and any(map(converting.needs_text, plan.layers)):
        found = "sinks" if any(entry.sink for entry in plan.layers) else "thinned MLPs"
        raise ConfigError(f"the plan has {found}, which are fitted on text", do="give the text that was measured on")
    recipe = _recipe(base, text=text or Text(), measure=settings or Measure())
    return Boosted(base, plan, converting.boost(recipe, base, plan), recipe)


def heal(
    converted: Boosted, text: Text, settings: Heal | None = None, *, seed: int = 0, folder: str | Path | None = None
) -> Boosted:
    """Train a converted model against its base, by attention distillation and LoRA distillation.

    `folder`: for checkpoints, from which the same call goes on after a kill; without one they are temporary.
    """
    base, recipe = converted.base, _recipe(converted.base, text=text, heal=settings or Heal(), seed=seed)
    with _folder(folder) as run:
        write_plan(run / PLAN, converted.plan)
        if not (run / CONVERTED).exists():
            converted.save(run / CONVERTED)
        card = (run_heal(recipe, run) / CARD).read_text(encoding="utf-8")
        healing = next(line for line in card.splitlines() if line.startswith(HEALED_BY))
        return Boosted(base, converted.plan, find_model(str(run / HEALED), base.runtime).load(), recipe, healing)


def evaluate(
    models: Mapping[str, Base | Boosted | str | Path],
    text: Text,
    settings: Evaluate | None = None,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
) -> EvalComparison:
    """Compare models with the one named `base`: perplexity and KL, tasks, retrieval, each with a paired interval.

    `folder`: where results are kept, so that the same call only evaluates what is missing.
    """
    base = models.get("base")
    if not isinstance(base, Base):
        raise ConfigError("nothing to compare with: models['base'] must be a base", do="open it with open_base")
    recipe = _recipe(base, text=text, evaluate=settings or Evaluate(), seed=seed)
    with _folder(folder) as run, _folder(None) as saved:
        opened: dict[str, Base] = {}
        for name, model in models.items():
            if isinstance(model, Base):
                opened[name] = model
            else:
                place = model.save(saved / name) if isinstance(model, Boosted) else model
                opened[name] = find_model(str(place), base.runtime, run, base.trust_remote_code)
        return run_evaluate(recipe, run, opened)


def export(model: Boosted | str | Path, folder: str | Path, to: str = "auto", type: str | None = None) -> Path:
    """Write a boosted model or checkpoint in a stock format (`layerboost ls targets`); return the directory or file.

    `type`: of a GGUF file's matrices. Raise ConfigError if the format, or any for `auto`, cannot hold the plan, or if
    the directory exists.
    """
    with _folder(None) as saved:
        place = model.save(saved / "model") if isinstance(model, Boosted) else Path(model)
        return Path(run_export(place, to, Path(folder), type).folder)


def _recipe(base: Base, **sections: Any) -> Recipe:
    """Return a recipe of the base, on its device and in its type."""
    runtime = base.runtime
    where = {"device": runtime.device.type, "dtype": runtime.dtype_name, "trust_remote_code": base.trust_remote_code}
    return Recipe(model=str(base.folder), **where, **sections)


@contextmanager
def _folder(given: str | Path | None) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="layerboost-") as folder:
        yield Path(folder)
