from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forked, finish, ranks, run_module
from safetensors.torch import load_file
from tiny import RUNTIME, layer_plans, plan_file, save_text, save_tiny
from transformers import AutoModelForCausalLM

from layerboost.errors import ConfigError
from layerboost.healing.stage import load_text
from layerboost.model.base import find_model
from layerboost.pipeline import run_stage
from layerboost.recipe import Recipe, Text, parse_recipe
from layerboost.schemas.healing import read_metrics
from layerboost.schemas.plan import read_plan, write_plan
from layerboost.schemas.run import HEALED, PLAN


def recipe_of(folder: Path, **heal: Any) -> Recipe:
    settings = {"fit_tokens": 4800, "attention_tokens": 300, "tokens": 500, "batch_sequences": 2, "lr": 3e-3}
    values = {
        "model": str(folder / "model"),
        "text": {"source": str(folder / "text.jsonl"), "sequence_tokens": 48},
        "measure": {"windows": [8], "tokens": 192},
        "heal": {**settings, "save_steps": 2, "validation_steps": 2, **heal},
    }
    return parse_recipe(values, "the test")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder up to the convert stage, model and text beside it."""
    folder = tmp_path_factory.mktemp("heal")
    save_tiny(folder / "model", layers=4)
    save_text(folder / "text.jsonl")
    (folder / "run").mkdir()
    write_plan(folder / "run" / PLAN, plan_file("fSns", 8, find_model(str(folder / "model"), RUNTIME).info))
    run_stage("convert", recipe_of(folder), folder / "run")
    return folder


def copy_of(converted: Path, target: Path) -> Path:
    return shutil.copytree(converted / "run", target)


@pytest.fixture
def run(converted: Path, tmp_path: Path) -> Path:
    return copy_of(converted, tmp_path / "run")


@pytest.mark.pipeline
def test_healing_ends_with_the_best_step_merged(run: Path, converted: Path) -> None:
    healed = run_stage("heal", recipe_of(converted), run)
    rows = read_metrics(run / "heal" / "metrics.jsonl")
    tokens = {line.stage: line.tokens for line in rows}
    assert tokens == {"fit": 4800, "attention": 300, "lora": 500}
    validated = [line.validation_kl for line in rows if line.stage == "lora" and line.validation_kl is not None]
    assert min(validated) < validated[0]
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert "LoRA distillation" in (healed / "README.md").read_text()
    assert load_file(run / "heal" / "fit.safetensors")
    assert "by least squares" in (healed / "README.md").read_text()
    states = load_file(run / "converted" / "model.safetensors")
    names = {name for name, value in model.state_dict().items() if not torch.equal(value, states[name])}
    # Layer 0 is below the first change; stage 1 taught q and k of the sliding layers and the MLP of layer 2.
    assert names == {
        *(f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (1, 3) for name in "qkvo"),
        *(f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (1, 2, 3) for name in ("gate", "up", "down")),
        "model.layers.1.self_attn.sinks",
    }
    before = (healed / "model.safetensors").stat().st_mtime_ns
    run_stage("heal", recipe_of(converted), run)
    assert (healed / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.pipeline
def test_thinned_mlps_are_healed(converted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    plan = read_plan(converted / "run" / PLAN)
    write_plan(run / PLAN, plan.model_copy(update={"layers": layer_plans("tuoz", 8)}))
    run_stage("convert", recipe_of(converted), run)
    healed = run_stage("heal", recipe_of(converted), run)
    rows = read_metrics(run / "heal" / "metrics.jsonl")
    assert {line.stage: line.tokens for line in rows} == {"fit": 4800, "attention": 300, "lora": 500}
    validated = [line.validation_kl for line in rows if line.validation_kl is not None]
    assert min(validated) < validated[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "converted", healed))
    assert after["model.layers.0.mlp.up_proj.weight"].shape[0] == 48
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    mlps = {f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1, 2) for name in ("gate", "up", "down")}
    assert changed == mlps | {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"
    }
    assert read_plan(healed / PLAN).layers == layer_plans("tuoz", 8)


def test_a_fit_alone_heals(run: Path, converted: Path) -> None:
    healed = run_stage("heal", recipe_of(converted, attention_tokens=0, tokens=0), run)
    fitted, states = (load_file(file) for file in (run / "heal" / "fit.safetensors", healed / "model.safetensors"))
    before, after = (line.validation_kl or 0.0 for line in read_metrics(run / "heal" / "metrics.jsonl"))
    assert after < before
    assert fitted
    for layer, weight in fitted.items():
        assert torch.equal(states[f"model.layers.{layer}.self_attn.o_proj.weight"], weight)
    base = load_file(run / "converted" / "model.safetensors")
    others = {name for name, value in states.items() if not torch.equal(value, base[name])}
    assert others == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in fitted}


@pytest.mark.pipeline
def test_other_settings_are_named_and_refused_but_a_step_may_be_cut_differently(run: Path, converted: Path) -> None:
    run_stage("heal", recipe_of(converted, attention_tokens=0), run)
    shutil.rmtree(run / HEALED)
    with pytest.raises(ConfigError, match="started with other settings") as caught:
        run_stage("heal", recipe_of(converted, attention_tokens=0, lr=1e-4, lora_rank=4), run)
    assert "heal.lr: 0.003 there, 0.0001 here; heal.lora_rank: 16 there, 4 here" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"heal\.fit_tokens: 4800 there, 0 here; heal\.attention_repeats: 1 there, 2 here"
    ):
        run_stage("heal", recipe_of(converted, attention_tokens=0, fit_tokens=0, attention_repeats=2), run)
    half = recipe_of(converted, attention_tokens=0).model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="dtype: float32 there, bfloat16 here"):
        run_stage("heal", half, run)
    smaller = {"batch_sequences": 1, "gradient_accumulation": 2, "activation_checkpointing": "full"}
    assert run_stage("heal", recipe_of(converted, attention_tokens=0, **smaller), run).is_dir()


@pytest.mark.pipeline
def test_a_text_that_has_changed_since_is_refused(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, text = copy_of(converted, tmp_path / "run"), tmp_path / "text.jsonl"
    shutil.copy(converted / "text.jsonl", text)
    recipe = recipe_of(converted, attention_tokens=0).model_copy(
        update={"text": Text(source=str(text), sequence_tokens=48)}
    )
    for _ in range(2):
        run_stage("heal", recipe, run)
    assert "has changed since" not in caplog.text
    text.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    run_stage("heal", recipe, run)
    assert f"{text} has changed since {run / HEALED} was healed on it" in caplog.text
    shutil.rmtree(run / HEALED)
    with pytest.raises(ConfigError, match="started on another text"):
        run_stage("heal", recipe, run)


def test_sequences_that_ask_are_part_of_the_text(converted: Path, tmp_path: Path) -> None:
    settings = {"fit_tokens": 0, "attention_tokens": 1024, "tokens": 1024, "sequence_tokens": (256, 512)}
    recipes = [recipe_of(converted, **settings, retrieval_share=share) for share in (0.0, 1.0)]
    plan, tokenizer = read_plan(converted / "run" / PLAN), find_model(str(converted / "model"), RUNTIME).tokenizer
    plain, asking = (load_text(recipe, tmp_path, plan, tokenizer) for recipe in recipes)
    for text in (plain, asking):
        assert {stage: [len(ids) for ids in text.sequences[stage]] for stage in text.stages} == {
            stage: [256, 256, 512] for stage in ("attention", "lora")
        }
    assert not any(answers.any() for answers in plain.answers)
    assert any(answers.any() for answers in asking.answers)
    assert plain.validation.fingerprint == asking.validation.fingerprint
    assert plain.fingerprint != asking.fingerprint
    assert asking.asking is None


def test_answers_that_weigh_more_are_validated(converted: Path, tmp_path: Path) -> None:
    settings = {"fit_tokens": 0, "attention_tokens": 0, "tokens": 2048, "retrieval_share": 0.5, "answer_weight": 9.0}
    recipe = recipe_of(converted, **settings)
    recipe = recipe.model_copy(update={"text": recipe.text.model_copy(update={"sequence_tokens": 248})})
    tokenizer = find_model(str(converted / "model"), RUNTIME).tokenizer
    asking = load_text(recipe, tmp_path, read_plan(converted / "run" / PLAN), tokenizer).asking
    assert asking is not None
    for ids, scored in zip(asking.ids.tolist(), asking.scored.tolist(), strict=True):
        answer = [token for token, counts in zip(ids, scored, strict=True) if counts]
        assert set(answer) <= set(ids[: scored.index(True)])
    run = copy_of(converted, tmp_path / "run")
    run_stage("heal", recipe, run)
    rows = [line for line in read_metrics(run / "heal" / "metrics.jsonl") if line.validation_kl is not None]
    assert all(line.validation_answer_kl for line in rows)
    assert rows[0].validation_answer_kl != rows[0].validation_kl


@pytest.mark.parametrize(
    ("words", "length", "warned"), [(5, 48, True), (200, 48, False), (200, 24, False), (200, 16, False)]
)
def test_documents_within_the_window_are_warned_of(
    words: int, length: int, warned: bool, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Packed documents do not see each other: on short ones a window drops nothing, and the loss is zero."""
    lines = [
        " ".join(f"w{3 + (row * 7 + word * (1 + row // 190)) % 190}" for word in range(words)) for row in range(2000)
    ]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    text = Text(source=str(tmp_path / "text.jsonl"), sequence_tokens=48)
    recipe = recipe_of(converted, fit_tokens=0, sequence_tokens=(length,)).model_copy(update={"text": text})
    load_text(
        recipe, tmp_path, read_plan(converted / "run" / PLAN), find_model(str(converted / "model"), RUNTIME).tokenizer
    )
    assert ("further than the window of 8" in caplog.text) == warned


@pytest.mark.parametrize(
    ("heal", "message"),
    [
        ({"tokens": 0, "attention_tokens": 0, "fit_tokens": 0}, "nothing to train"),
        ({"fit_tokens": 95}, "the fit needs one sequence and another to judge it"),
        ({"fit_tokens": 96, "sequence_tokens": (16, 64)}, "the fit needs one sequence and another to judge it"),
        ({"fit_tokens": 0, "sequence_tokens": (48, 9600)}, "within the model's context"),
        ({"fit_tokens": 96, "shard": True}, "processes of torchrun"),
        ({"fit_tokens": 10**7}, "train text is too short"),
        ({"tokens": 10**7}, "train text is too short"),
        ({"lora_targets": ("q_prog",)}, "q_prog"),
        ({"shard": True}, "processes of torchrun"),
    ],
)
def test_refused_before_anything_is_written(run: Path, converted: Path, heal: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_stage("heal", recipe_of(converted, **heal), run)
    assert not (run / "heal").exists()
    assert not (run / HEALED).exists()


def test_negative_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heal\.tokens"):
        parse_recipe({"heal": {"tokens": -5}}, "the test")


def two_processes(run: Path, *settings: str) -> list[Forked]:
    """Heal a run folder with two processes."""
    words = [part for setting in settings for part in ("--set", setting)]
    return ranks(run_module, "layerboost.cli", "heal", "--run", str(run), *words, folder=run.parent)


def check_same_healing(run: Path, other: Path) -> None:
    rows = [read_metrics(folder / "heal" / "metrics.jsonl") for folder in (run, other)]
    assert [line.step for line in rows[0]] == [line.step for line in rows[1]]
    for key in ("loss", "validation_kl"):
        values = [[value for line in found if (value := getattr(line, key)) is not None] for found in rows]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    ours, theirs = (load_file(folder / HEALED / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("accumulation", "shard", "lengths"),
    [(1, False, (16, 48)), (4, False, None), (1, True, None), (4, True, (16, 48))],
)
def test_two_processes_give_what_one_gives(
    converted: Path, tmp_path: Path, accumulation: int, shard: bool, lengths: tuple[int, ...] | None
) -> None:
    recipe = recipe_of(
        converted,
        gradient_accumulation=accumulation,
        lr=1e-3,
        fit_tokens=0 if shard else 4800,
        attention_repeats=2,
        sequence_tokens=lengths,
    )
    alone, together = copy_of(converted, tmp_path / "alone"), copy_of(converted, tmp_path / "together")
    run_stage("heal", recipe, alone)
    shutil.copy(alone / "recipe.yaml", together / "recipe.yaml")
    finish(two_processes(together, f"heal.shard={str(shard).lower()}"))
    check_same_healing(alone, together)
    history = json.loads((together / "run.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["convert", "heal"]


@pytest.mark.exhaustive
def test_a_killed_sharded_run_goes_on_sharded_or_whole(converted: Path, tmp_path: Path) -> None:
    recipe = recipe_of(converted, lr=1e-3, tokens=1500, fit_tokens=0, attention_repeats=2)
    alone, killed = copy_of(converted, tmp_path / "alone"), copy_of(converted, tmp_path / "killed")
    run_stage("heal", recipe, alone)
    shutil.copy(alone / "recipe.yaml", killed / "recipe.yaml")
    for stage, step in (("attention", 3), ("lora", 3), ("lora", 7)):
        group = two_processes(killed, "heal.shard=true")
        group[0].wait_until(
            lambda: any(
                (line.stage, line.step) >= (stage, step)  # noqa: B023
                for line in read_metrics(killed / "heal" / "metrics.jsonl")
            )
        )
        for process in group:
            process.send(signal.SIGKILL)
        for process in group:
            process.wait()
        assert not (killed / HEALED).exists()
    run_stage("heal", recipe, killed)
    check_same_healing(alone, killed)
