"""The files of a run folder as the report reads them: a missing file is None, a damaged one a ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerboost.errors import ConfigError
from layerboost.files import file_hash
from layerboost.recipe import load_recipe
from layerboost.reporting.page import Panel
from layerboost.schemas.artifact import Record, read_json
from layerboost.schemas.benchmark import Comparison as BenchComparison
from layerboost.schemas.evaluation import EvalComparison
from layerboost.schemas.healing import read_metrics
from layerboost.schemas.plan import Frontier, read_plan
from layerboost.schemas.run import RunFile
from layerboost.schemas.sensitivity import Sensitivity, Stability

# The order of every table and legend; a model of another name comes after these.
MODELS = ("base", "converted", "healed")

# The command that makes each file of the run folder.
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


class Sources:
    """The files that a report is made from."""

    def __init__(self, run: Path) -> None:
        """Read the files of a run folder.

        Raise ConfigError if it is missing, a file is truncated or foreign, or two files are of different models.
        """
        if not run.is_dir():
            raise ConfigError(f"{run} is not a run folder", do="give the folder of an earlier `layerboost run`: --run")
        self.run = run
        self.history = self._read("run.json", RunFile)
        self.recipe = load_recipe([run / "recipe.yaml"], {}) if (run / "recipe.yaml").is_file() else None
        self.sensitivity = self._read("sensitivity.json", Sensitivity)
        self.sensitivity_hash = file_hash(run / "sensitivity.json") if self.sensitivity else None
        self.plan = read_plan(run / "plan.yaml") if (run / "plan.yaml").is_file() else None
        self.frontier = self._read("frontier.json", Frontier)
        self.stability = self._read("stability.json", Stability)
        self.metrics = read_metrics(run / "heal" / "metrics.jsonl")
        self.quality = self._read("eval/comparison.json", EvalComparison)
        self.bench = self._read("bench/comparison.json", BenchComparison)
        self.sweep = self._read("bench/decode_sweep.json", BenchComparison)
        models = [each.model for each in (self.plan, self.sensitivity) if each]
        if len({model.fingerprint for model in models}) > 1:
            raise ConfigError(
                f"plan.yaml and sensitivity.json in {run} are of different models",
                found=", ".join(f"{model.name} ({model.fingerprint})" for model in models),
                do="run `layerboost measure` and `layerboost plan` again for one model",
            )
        self.model = models[0] if models else None

    def _read(self, name: str, kind: type[Record]) -> Record | None:
        return read_json(self.run / name, kind, MADE_BY[name]) if (self.run / name).is_file() else None

    def panel(self, name: str, title: str, *files: str) -> Panel:
        """Return an empty panel of these files, which names the missing ones and the commands that make them."""
        return Panel(name, title, [*files], [absent(file) for file in files if not (self.run / file).is_file()])


def absent(name: str) -> str:
    """Return what to do about the missing file `name`."""
    return f"no {name}: run `{MADE_BY[name]}`"


def model_order(names: set[str] | list[str] | dict[str, Any]) -> list[str]:
    """Return model names in order: base, converted, healed, then others by name."""
    return [name for name in MODELS if name in names] + sorted(set(names) - set(MODELS))
