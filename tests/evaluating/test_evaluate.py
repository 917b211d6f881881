from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RUNTIME, change_weights, info, plan_file, save_checkpoint, save_tiny
from tiny_bench import TEXT, rows, tiny_model, tiny_tokenizer, write_jsonl

from layerboost.errors import ConfigError, LayerboostError
from layerboost.evaluating.held_out import compare_text
from layerboost.evaluating.stage import check, run_evaluate
from layerboost.model.base import find_model
from layerboost.model.surgery import apply_plan
from layerboost.recipe import Recipe, parse_recipe
from layerboost.schemas.artifact import read_json, write_json
from layerboost.schemas.evaluation import EvalComparison
from layerboost.schemas.sensitivity import Score, Sensitivity

TASKS = ("piqa", "mmlu_anatomy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "piqa.jsonl", rows("piqa", 9))
    write_jsonl(folder / "mmlu.jsonl", rows("mmlu", 3))
    (folder / "text.txt").write_text("\n".join(f"{n} {TEXT}" for n in range(2000)))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a boosted checkpoint of it, and a copy of the base under another name."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for name in ("base", "same"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    plan = plan_file("sn", 4, find_model(str(folder / "base"), RUNTIME).info)
    save_checkpoint(folder / "healed", apply_plan(model, plan.layers), plan, tokenizer)
    return {name: folder / name for name in ("base", "healed", "same")}


def recipe(data: Path, **evaluate: Any) -> Recipe:
    settings = {
        "tasks": TASKS,
        "limit": 6,
        "bench_data": str(data),
        "perplexity_tokens": 200,
        "position_tokens": 192,
        "position_sequences": 3,
        "retrieval_tokens": [320],
        "retrieval_prompts": 2,
    } | evaluate
    return parse_recipe(
        {"text": {"source": str(data / "text.txt"), "sequence_tokens": 64}, "evaluate": settings}, "test"
    )


def evaluate(recipe: Recipe, run: Path, models: dict[str, Path]) -> EvalComparison:
    return run_evaluate(recipe, run, {name: find_model(str(folder), RUNTIME) for name, folder in models.items()})


@pytest.fixture(scope="module")
def done(data: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvalComparison]:
    run = tmp_path_factory.mktemp("run")
    return run, evaluate(recipe(data), run, models)


def stamps(run: Path) -> dict[str, int]:
    results = (file for file in (run / "eval").glob("*.*.json"))
    return {file.name: file.stat().st_mtime_ns for file in results}


def test_the_comparison_holds_every_model_and_task(done: tuple[Path, EvalComparison]) -> None:
    run, found = done
    assert read_json(run / "eval" / "comparison.json", EvalComparison, "layerboost evaluate") == found
    assert list(found.models) == ["base", "healed", "same"]
    assert found.models["base"] == found.models["same"] != found.models["healed"]
    assert found.text
    assert found.average
    assert found.text.tokens == 256
    assert {name: task.items for name, task in found.tasks.items()} == {"piqa": 6, "mmlu_anatomy": 3}
    for task in (*found.tasks.values(), found.average):
        assert set(task.models) == {"base", "healed", "same"}
        assert set(task.difference) == {"healed", "same"}
    raw = json.loads((run / "eval" / "healed.piqa.json").read_text())
    assert raw["results"]["piqa"]["acc,none"] == found.tasks["piqa"].models["healed"].value
    assert len(raw["samples"]["piqa"]) == 6


def test_differences_are_paired_by_item(done: tuple[Path, EvalComparison]) -> None:
    run, found = done
    base, healed = (
        torch.tensor(
            [
                sample["acc"]
                for sample in json.loads((run / "eval" / f"{name}.piqa.json").read_text())["samples"]["piqa"]
            ]
        )
        for name in ("base", "healed")
    )
    difference = found.tasks["piqa"].difference["healed"]
    assert difference.mean == pytest.approx(float((healed - base).mean()))
    assert difference.standard_error == pytest.approx(float((healed - base).std()) / 6**0.5)


def test_the_same_weights_lose_nothing(done: tuple[Path, EvalComparison]) -> None:
    _, found = done
    assert found.perplexity["same"].nll == found.perplexity["base"].nll
    assert found.perplexity["same"].kl.high == 0
    assert found.perplexity["healed"].kl.low > 0
    assert found.positions
    assert all(bucket.mean == 0 for bucket in found.positions.difference["same"])
    assert all(bucket.mean != 0 for bucket in found.positions.difference["healed"])
    for task in found.tasks.values():
        assert task.margin
        assert task.difference["same"].mean == task.margin.difference["same"].high == 0
        assert task.difference["same"].high > 0


def test_long_contexts_are_in_the_comparison(done: tuple[Path, EvalComparison]) -> None:
    run, found = done
    assert found.positions
    assert found.retrieval
    assert found.positions.edges == [0, 128, 192]
    assert found.positions.sequences == 3
    assert [group.kind for group in found.retrieval.groups] == ["code", "copy", "json", "key_value", "passkey", "prose"]
    # A random model retrieves nothing, so nothing is judged; log-probabilities are measured.
    assert found.retrieval.able is None
    for group in found.retrieval.groups:
        assert set(group.log_probability) == {"base", "healed", "same"}
        assert group.log_probability_difference["same"].mean == 0
    raw = json.loads((run / "eval" / "healed.retrieval.json").read_text())
    assert len(raw["answers"]) == 12


def test_tasks_that_chose_layers_are_marked(
    done: tuple[Path, EvalComparison], data: Path, models: dict[str, Path]
) -> None:
    run, found = done
    score = Score(mean=1.0, standard_error=0.1)
    measured = Sensitivity(
        model=info(), text="t", settings={"tasks": ["mmlu"]}, sequences=2, tokens=64, base_nll=score, layers=[]
    )
    write_json(run / "sensitivity.json", measured)
    again = evaluate(recipe(data), run, models)
    (run / "sensitivity.json").unlink()
    assert again.selection == ["mmlu"]
    assert again.tasks["mmlu_anatomy"] == found.tasks["mmlu_anatomy"].model_copy(update={"selection": True})
    assert again.average
    assert again.average.tasks == ["piqa"]


def test_a_model_of_another_vocabulary_is_refused(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    save_tiny(tmp_path / "other")
    with pytest.raises(ConfigError, match="other cannot be compared with the base: another vocabulary"):
        evaluate(recipe(data), tmp_path, models | {"other": tmp_path / "other"})
    assert not (tmp_path / "eval").exists()


def test_only_a_missing_result_is_made_again(
    done: tuple[Path, EvalComparison], data: Path, models: dict[str, Path]
) -> None:
    run, found = done
    before = stamps(run)
    assert len(before) == 15
    (run / "eval" / "healed.piqa.json").unlink()
    assert evaluate(recipe(data), run, models) == found
    assert {name for name, stamp in stamps(run).items() if before[name] != stamp} == {"healed.piqa.json"}


def test_results_of_other_settings_are_refused(
    done: tuple[Path, EvalComparison], data: Path, models: dict[str, Path]
) -> None:
    run, _ = done
    with pytest.raises(ConfigError, match=r"base\.piqa\.json \(limit: 6 there, 5 now(.|\n)*delete .*base\.piqa\.json"):
        evaluate(recipe(data, limit=5), run, models)
    with pytest.raises(ConfigError, match=r"same\.text\.json \(model: "):
        evaluate(recipe(data), run, models | {"same": models["healed"]})
    with pytest.raises(ConfigError, match=r"base\.text\.json \(text: "):
        evaluate(recipe(data, perplexity_tokens=400), run, models)


def test_a_damaged_result_is_named(done: tuple[Path, EvalComparison], data: Path, models: dict[str, Path]) -> None:
    run, found = done
    file = run / "eval" / "base.piqa.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*base\.piqa\.json(.|\n)*delete"):
        evaluate(recipe(data), run, models)
    file.unlink()
    assert evaluate(recipe(data), run, models) == found


def test_text_and_tasks_can_be_left_out(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    short: dict[str, Any] = {"position_tokens": 0, "retrieval_tokens": []}
    only_text = evaluate(recipe(data, tasks=(), **short), tmp_path / "a", models)
    assert (only_text.tasks, only_text.average) == ({}, None)
    assert (only_text.positions, only_text.retrieval, only_text.gate) == (None, None, None)
    assert set(only_text.perplexity) == set(models)
    only_tasks = evaluate(
        recipe(data, tasks=("piqa",), limit=2, perplexity_tokens=0, **short),
        tmp_path / "b",
        {"base": models["base"]},
    )
    assert (only_tasks.text, only_tasks.perplexity) == (None, {})


@pytest.mark.pipeline
def test_validation_finds_mistakes_without_a_model(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    base = find_model(str(models["base"]), RUNTIME)
    check(recipe(data), tmp_path, base)
    with pytest.raises(ConfigError, match="unknown lm-eval task"):
        check(recipe(data, tasks=("piqqa",)), tmp_path, base)
    with pytest.raises(ConfigError, match="held_out text is too short"):
        check(recipe(data, perplexity_tokens=10**7), tmp_path, base)
    with pytest.raises(ConfigError, match=r"no text 'nowhere\.txt'"):
        check(recipe(data, perplexity_text="nowhere.txt"), tmp_path, base)
    with pytest.raises(ConfigError, match=r"within the model's context(.|\n)*1,024 tokens, a context of 512"):
        check(recipe(data, retrieval_tokens=(1024,)), tmp_path, base)
    with pytest.raises(ConfigError, match="max_average_drop is set"):
        check(recipe(data, tasks=(), max_average_drop=0.1), tmp_path, base)
    assert not list(tmp_path.iterdir())


def test_an_extra_checkpoint_is_checked(data: Path, models: dict[str, Path], tmp_path: Path) -> None:
    base = find_model(str(models["base"]), RUNTIME)

    def look(folder: Path) -> None:
        check(recipe(data, checkpoints={"other": str(folder)}), tmp_path / "run", base)

    look(models["healed"])
    with pytest.raises(ConfigError, match=r"not finite[^$]+mlp.down_proj.weight"):
        look(damaged(models, tmp_path / "damaged"))
    other = Path(shutil.copytree(models["same"], tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    moved = "|".join(f"'{a}' is {vocabulary[a]}, {vocabulary[b]}" for a, b in ((one, two), (two, one)))
    with pytest.raises(ConfigError, match=rf"another vocabulary\nfound: ({moved}) in the base"):
        look(other)


def damaged(models: dict[str, Path], folder: Path) -> Path:
    """The healed model with a weight that is not finite."""
    shutil.copytree(models["healed"], folder)
    change_weights(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"][0, 0].fill_(math.nan))
    return folder


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({}, "NLL of healed on held-out text is nan"),
    "positions": ({"perplexity_tokens": 0}, "NLL of healed by position is nan"),
    "retrieval": (
        {"perplexity_tokens": 0, "position_tokens": 0},
        r"log-probability of an answer \(passkey\) of healed",
    ),
    "piqa": (
        {"perplexity_tokens": 0, "position_tokens": 0, "retrieval_tokens": []},
        "log-likelihood in piqa of healed",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_is_not_finite_is_named_and_nothing_of_it_written(
    part: str, data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    settings, message = PARTS[part]
    broken = damaged(models, tmp_path / "healed")
    with pytest.raises(LayerboostError, match=rf"{message}(.|\n)*first in layer 1 (.|\n)*mlp.down_proj.weight"):
        evaluate(recipe(data, **settings), tmp_path, {"base": models["base"], "healed": broken})
    written = [file.name for file in (tmp_path / "eval").iterdir()]
    assert not [name for name in written if name.startswith(("healed", "comparison"))]
    for name in written:
        json.loads((tmp_path / "eval" / name).read_text(), parse_constant=pytest.fail)


def test_a_perplexity_too_large_for_a_float_is_still_a_number() -> None:
    losses = {"base": {"nll": [800.0, 900.0], "kl": [0.0, 0.0]}}
    assert math.isfinite(compare_text(losses)["base"].perplexity)


def test_text_longer_than_the_context_is_refused(data: Path, tmp_path: Path) -> None:
    short = find_model(str(save_tiny(tmp_path / "short", max_position_embeddings=48)), RUNTIME)
    with pytest.raises(ConfigError, match=r"text.sequence_tokens(.|\n)*64 tokens, a context of 48"):
        check(recipe(data, position_tokens=0, retrieval_tokens=[]), tmp_path, short)


def test_items_that_cannot_be_scored_are_found_without_a_model(
    data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    items = rows("piqa", 9)
    items[4]["sol1"] = "x" * 600
    write_jsonl(tmp_path / "piqa.jsonl", items)
    changed = recipe(data, tasks=("piqa",), limit=None, bench_data=str(tmp_path))
    with pytest.raises(ConfigError, match=r"1 of 9 items of task piqa(.|\n)*line 5 of .*piqa.jsonl: an answer of"):
        check(changed, tmp_path, find_model(str(models["base"]), RUNTIME))
