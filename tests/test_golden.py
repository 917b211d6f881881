"""What users and other programs read, word by word: config.json, the modeling file, the schemas, --help.

A change here is a change of what is on users' disks. `pytest tests/test_golden.py --update-golden` accepts it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from tiny import boosted, fitted

from layerboost.cli import cli
from layerboost.model.checkpoint import modeling_source
from layerboost.recipe import Recipe
from layerboost.schemas.benchmark import Comparison
from layerboost.schemas.evaluation import EvalComparison
from layerboost.schemas.healing import MetricLine
from layerboost.schemas.plan import Frontier, PlanFile
from layerboost.schemas.run import RunFile
from layerboost.schemas.sensitivity import Sensitivity, Stability

Hold = Callable[[str, str], None]
# A family whose config knows no layer types, one with flags for its window, one whose layers slide already, and so on.
KINDS = ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family", KINDS)
def test_the_config_of_a_converted_model(golden: Hold, family: str) -> None:
    config = boosted(fitted("fSnsS", family), family).config.to_dict()
    config.pop("transformers_version")
    golden(f"config-{family}.json", json.dumps(config, indent=1, sort_keys=True) + "\n")


def test_the_modeling_file_that_travels_in_a_checkpoint(golden: Hold) -> None:
    golden("modeling_layerboost.py.txt", modeling_source())


@pytest.mark.parametrize(
    "schema", [Recipe, PlanFile, Sensitivity, Frontier, Stability, EvalComparison, Comparison, RunFile, MetricLine]
)
def test_the_schemas_of_files(golden: Hold, schema: type[BaseModel]) -> None:
    golden(f"schema-{schema.__name__}.json", json.dumps(schema.model_json_schema(), indent=1, sort_keys=True) + "\n")


def test_help(golden: Hold) -> None:
    shown = [
        CliRunner().invoke(cli, [*words, "--help"], prog_name="layerboost", terminal_width=100).output
        for words in ([], *([name] for name in cli.commands))
    ]
    golden("help.txt", "\n\n".join(shown))
