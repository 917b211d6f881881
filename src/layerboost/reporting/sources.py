"""The files of a run folder as the report reads them; a missing file is None, a broken one a ConfigError."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerboost.errors import ConfigError
from layerboost.files import file_hash
from layerboost.recipe import Recipe, load_recipe
from layerboost.schemas.artifact import Record, read_json
from layerboost.schemas.benchmark import Comparison as BenchComparison
from layerboost.schemas.evaluation import EvalComparison
from layerboost.schemas.healing import MetricLine, read_metrics
from layerboost.schemas.plan import Frontier, PlanFile, read_plan
from layerboost.schemas.run import RunFile
from layerboost.schemas.sensitivity import Sensitivity, Stability

# The order of every table and legend; a model of another name comes after these.
MODELS = ("base", "converted", "healed")

# Which command makes a file of the run folder.
MADE_BY = {
    "run.json": "layerboost run",
    "recipe.yaml": "layerboost run",
    "sensitivity.json": "layerboost measure",
    "plan.yaml": "layerboost plan",
    "frontier.json": "layerboost plan --frontier",
    "stability.json": "layerboost measure --compare OTHER",
    "heal/metrics.jsonl": "layerboost heal",
    "eval/comparison.json": "layerboost evaluate",
    "bench/comparison.json": "layerboost bench",
    "bench/decode_sweep.json": "layerboost bench --decode-sweep",
}


@dataclass(frozen=True)
class Sources:
    """Everything a report is derived from."""

    run: Path
    history: RunFile | None
    recipe: Recipe | None
    sensitivity: Sensitivity | None
    plan: PlanFile | None
    plan_is_stale: bool
    sensitivity_hash: str | None
    frontier: Frontier | None
    stability: Stability | None
    metrics: list[MetricLine] | None
    quality: EvalComparison | None
    bench: BenchComparison | None
    sweep: BenchComparison | None

    @property
    def changed_since_bench(self) -> list[str]:
        """Benchmarked models whose directory in the run folder is no longer what was benchmarked."""
        hashes = self.bench.models if self.bench else {}
        configs = {name: self.run / name / "config.json" for name in hashes}
        return [name for name, file in configs.items() if file.is_file() and file_hash(file) != hashes[name]]


def read_sources(run: Path) -> Sources:
    """Read the files of `run`.

    Raises ConfigError when the folder is missing, a file is truncated or foreign, or two files are of different models.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not a run folder", do="give the folder of an earlier `layerboost run` with --run")
    sensitivity = _artifact(run, "sensitivity.json", Sensitivity)
    plan = read_plan(run / "plan.yaml") if (run / "plan.yaml").is_file() else None
    if plan and sensitivity and plan.model.fingerprint != sensitivity.model.fingerprint:
        raise ConfigError(
            f"plan.yaml and sensitivity.json in {run} are of different models",
            found=f"{plan.model.name} ({plan.model.fingerprint}), "
            f"{sensitivity.model.name} ({sensitivity.model.fingerprint})",
            do="run `layerboost measure` and `layerboost plan` again for one model",
        )
    found_hash = file_hash(run / "sensitivity.json") if sensitivity else None
    metrics = run / "heal" / "metrics.jsonl"
    return Sources(
        run=run,
        history=_artifact(run, "run.json", RunFile),
        recipe=load_recipe([run / "recipe.yaml"], {}) if (run / "recipe.yaml").is_file() else None,
        sensitivity=sensitivity,
        plan=plan,
        plan_is_stale=bool(plan and plan.sensitivity and found_hash and plan.sensitivity != found_hash),
        sensitivity_hash=found_hash,
        frontier=_artifact(run, "frontier.json", Frontier),
        stability=_artifact(run, "stability.json", Stability),
        metrics=read_metrics(metrics) if metrics.is_file() else None,
        quality=_artifact(run, "eval/comparison.json", EvalComparison),
        bench=_artifact(run, "bench/comparison.json", BenchComparison),
        sweep=_artifact(run, "bench/decode_sweep.json", BenchComparison),
    )


def absent(name: str) -> str:
    """What a panel says where the file `name` is missing."""
    return f"no {name}: run `{MADE_BY[name]}`"


def model_order(names: set[str] | list[str] | dict[str, Any]) -> list[str]:
    """Model names as the report lists them: base, converted, healed, then any other by name."""
    return [name for name in MODELS if name in names] + sorted(set(names) - set(MODELS))


def _artifact(run: Path, name: str, kind: type[Record]) -> Record | None:
    return read_json(run / name, kind, MADE_BY[name]) if (run / name).is_file() else None
