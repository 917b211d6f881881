from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from layerboost.errors import ConfigError
from layerboost.files import parse_yaml
from layerboost.measuring.stage import validate_measure
from layerboost.recipe import (
    RECIPES,
    Recipe,
    Text,
    described_settings,
    find_recipe,
    load_recipe,
    parse_recipe,
    recipe_yaml,
    set_option,
)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_parses_round_trips_and_can_be_measured(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe([file], {})
    assert recipe.model
    validate_measure(recipe)
    (tmp_path / "again.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe([tmp_path / "again.yaml"], {}) == recipe


def test_command_line_over_yaml_over_default(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("heal: {lr: 0.5, lora_rank: 4}\nseed: 3\n")
    recipe = load_recipe([file], dict([set_option("heal.lr=1e-4"), set_option("measure.windows=[8, 9]")]))
    assert (recipe.heal.lr, recipe.heal.lora_rank, recipe.seed) == (1e-4, 4, 3)
    assert recipe.measure.windows == (8, 9)
    assert recipe.heal.save_steps == Recipe().heal.save_steps


def test_a_setting_that_is_a_mapping_is_replaced_whole(tmp_path: Path) -> None:
    run, given = tmp_path / "recipe.yaml", tmp_path / "given.yaml"
    run.write_text("text: {source: {old.jsonl: 0.7, self: 0.3}, sequence_tokens: 64}\n")
    given.write_text("text: {source: {new.jsonl: 1.0}}\n")
    text = load_recipe([run, given], {}).text
    assert (text.sources, text.sequence_tokens) == ({"new.jsonl": 1.0}, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heal.lrr": "1"}, r"unknown key heal\.lrr \(did you mean heal\.lr\?\)"),
        ({"plan.method": "best"}, r"plan\.method"),
        ({"measure.tokens": "-3"}, r"measure\.tokens"),
        *[
            ({key: value}, rf"{key}[^:]*: Input should be a finite number \(got -?{text}\)")
            for key in ("heal.lr", "heal.ce_weight", "plan.max_kl", "plan.full_above", "evaluate.max_task_drop")
            for value, text in ((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf"))
        ],
        ({"text.source": {"a.jsonl": math.nan}}, r"text\.source.*finite number"),
        ({"bench.requests_per_concurrency": math.inf}, r"requests_per_concurrency: Input should be a finite number"),
        ({"heal.tokens": math.inf}, r"heal\.tokens: Input should be a finite number"),
    ],
)
def test_bad_settings_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe([], overrides)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_recipe([tmp_path / "list.yaml"], {})
    (tmp_path / "twice.yaml").write_text("heal:\n  lr: 1.0e-4\nseed: 1\nheal:\n  tokens: 5\n")
    with pytest.raises(ConfigError, match="heal is given twice, the second time in line 4"):
        load_recipe([tmp_path / "twice.yaml"], {})
    (tmp_path / "merged.yaml").write_text("heal: &a\n  lr: 1.0e-4\nplan:\n  <<: *a\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match="seed is given twice, the second time in line 6"):
        load_recipe([tmp_path / "merged.yaml"], {})
    with pytest.raises(ConfigError, match="no such recipe"):
        find_recipe("demoo")
    with pytest.raises(ConfigError, match="key=value"):
        set_option("heal.lr")
    assert find_recipe("demo") == RECIPES / "demo.yaml"


def test_a_key_stands_in_place_of_a_merged_one() -> None:
    """Also where a mapping that merges another is merged in turn, before it is read itself."""
    first = "first:\n  inner: &first\n    x: 1\n    y: 1\n"
    second = "second:\n  inner: &second\n    <<: *first\n    x: 2\n"
    found = parse_yaml(f"{first}{second}third:\n  <<: [*second, *first]\n  y: 3\nfourth: *second\n")
    assert found["second"]["inner"] == found["fourth"] == {"x": 2, "y": 1}
    assert found["third"] == {"x": 2, "y": 3}


def test_every_setting_is_described() -> None:
    assert not [key for key, cells in described_settings().items() if not cells["meaning"]]


def test_the_tables_of_settings_are_generated(request: pytest.FixtureRequest) -> None:
    tables: dict[str, str] = {}
    for key, cells in described_settings().items():
        section = key.partition(".")[0] if "." in key else ""
        about = Recipe.model_fields[section].annotation.__doc__ if section else "Settings that every stage reads."
        head = f"\n## {section or 'General'}\n\n{about}\n\n| key | default | meaning |\n|---|---|---|\n"
        tables[section] = tables.get(section, head) + f"| `{key}` | {cells['default']} | {cells['meaning']} |\n"
    page = Path(__file__).parents[1] / "docs" / "reference" / "recipe.md"
    text = page.read_text()
    wanted = text.partition("\n## ")[0] + "".join(tables.values())
    if request.config.getoption("--update-golden"):
        page.write_text(wanted)
        return
    assert text == wanted, "pytest tests/test_recipe.py --update-golden, and read the difference"


def test_what_is_on_this_disk_is_kept_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "self", "piqa", "t.txt", "mine.yaml", "-odd [name] %s"):
        (tmp_path / name).mkdir()
    recipe = parse_recipe(
        {
            "model": "model",
            "text": {"source": {"t.txt": 0.5, "some/data": 0.5}},
            "measure": {"traffic": "-odd [name] %s", "plan": "nowhere"},
            "evaluate": {"tasks": ["piqa", "mine.yaml"], "checkpoints": {"a": "~/model"}, "bench_data": "package:x"},
        },
        "test",
    )
    assert recipe.model == str(tmp_path / "model")
    assert recipe.text.sources == {str(tmp_path / "t.txt"): 0.5, "some/data": 0.5}
    assert (recipe.measure.traffic, recipe.measure.plan) == (str(tmp_path / "-odd [name] %s"), "nowhere")
    # A name of the task, a word and a package, whatever lies beside.
    assert recipe.evaluate.tasks == ("piqa", str(tmp_path / "mine.yaml"))
    assert (Text(source="self").source, recipe.evaluate.bench_data) == ("self", "package:x")
    assert recipe.evaluate.checkpoints == {"a": str(tmp_path / "model")}
    assert load_recipe([], {"text.source": "x" * 5000, "model": "~nobody-here/m"}).model == "~nobody-here/m"
    with pytest.raises(ConfigError, match=r"text\.source\.str: Input should be a valid string"):
        load_recipe([], {"text.source": 3})


@pytest.mark.parametrize("text", ["heal.lr=nan", "heal.lr=.nan", "heal.lr=inf", "heal.lr=1e999", "heal.lr=-.inf"])
def test_numbers_on_the_command_line_are_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=r"heal\.lr: Input should be a finite number"):
        load_recipe([], dict([set_option(text)]))
