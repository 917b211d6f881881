from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RUNTIME, boosted, info, layer_plans, plan_file, save_text, save_tiny, tiny_model

from layerboost import check as estimate
from layerboost.check import copied_experts, estimate_healing, matmul_flops_per_s
from layerboost.errors import ConfigError
from layerboost.healing.distillers import AttentionDistiller, LogitDistiller
from layerboost.healing.student import adapted_layers, shared_student, train_only, with_adapters
from layerboost.model.base import find_model
from layerboost.recipe import Recipe, parse_recipe
from layerboost.runtime import GIB, Runtime
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN


def recipe(**heal: object) -> Recipe:
    return parse_recipe({"heal": {"fit_tokens": 0, "tokens": 1_000_000, "attention_tokens": 0, **heal}}, "the test")


def test_the_estimate_follows_the_plan_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "matmul_flops_per_s", lambda *_: 1e9)
    config = tiny_model(layers=4).config
    facts = info(4).model_copy(update={"parameters": 1_000_000})

    def found(letters: str = "ssss", **heal: object) -> estimate.HealingEstimate:
        return estimate_healing(recipe(**heal), config, facts, RUNTIME, layer_plans(letters))

    body, head = 1_000_000 - 2 * 64 * 200, 64 * 200
    assert found().tokens_per_s == pytest.approx(0.7e9 / (2 * 3 * (body + head)), rel=1e-2)
    assert found().hours == pytest.approx(1e6 / found().tokens_per_s / 3600, abs=0.02)
    assert found("fffs").tokens_per_s > 1.5 * found().tokens_per_s
    by_kind = [found(batch_sequences=64, activation_checkpointing=kind) for kind in ("none", "selective", "full")]
    assert by_kind[0].memory_gib > by_kind[1].memory_gib > by_kind[2].memory_gib
    assert by_kind[0].tokens_per_s == by_kind[1].tokens_per_s > by_kind[2].tokens_per_s


def test_a_sharded_run_holds_its_share_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "matmul_flops_per_s", lambda *_: 1e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config, facts = tiny_model(layers=4).config, info(4).model_copy(update={"parameters": 1 << 34})
    whole_gib = facts.parameters * facts.bytes_per_element / GIB

    def memory_gib(device: str, shard: bool) -> float:
        runtime = Runtime(torch.device(device), torch.float32)
        return estimate_healing(recipe(shard=shard), config, facts, runtime, None).memory_gib

    # Three of four layers are whole on each GPU, and so are the embeddings, which are small here.
    assert memory_gib("cuda", False) - memory_gib("cuda", True) == pytest.approx(whole_gib * (1 / 4 - 1 / 8), abs=0.02)
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert memory_gib("cuda", False) - memory_gib("cuda", True) == pytest.approx(whole_gib * (1 / 4 - 1 / 5), abs=0.02)
    assert memory_gib("cpu", True) == memory_gib("cpu", False)


def test_what_repeats_keep_is_counted_for_many_processes_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "matmul_flops_per_s", lambda *_: 1e9)
    config, facts = tiny_model(layers=4).config, info(4).model_copy(update={"hidden_size": 1 << 20})

    def memory_gib(**heal: object) -> float:
        return estimate_healing(recipe(gradient_accumulation=64, **heal), config, facts, RUNTIME, None).memory_gib

    once, thrice = memory_gib(), memory_gib(attention_repeats=3)
    assert memory_gib(attention_repeats=3, shard=True) == thrice > 2 * once
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert once < memory_gib(attention_repeats=3) < thrice / 2


def test_the_matrix_product_is_measured() -> None:
    assert matmul_flops_per_s(RUNTIME, 256) > 1e8


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "llava"])
def test_what_adapters_are_put_on_is_checked_before_anything_is_measured(family: str, tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model", family))
    values = {
        "model": model,
        "text": {"source": str(save_text(tmp_path / "text.jsonl")), "sequence_tokens": 48},
        "measure": {"windows": [8], "tokens": 192, "retrieval_prompts": 0},
    }

    def checked(*targets: str) -> None:
        heal = {"fit_tokens": 0, "attention_tokens": 0, "tokens": 192, "lora_targets": targets}
        estimate.check(parse_recipe({**values, "heal": heal}, "the test"), tmp_path / "run")

    with pytest.raises(ConfigError, match=r"adapted: q_prog\nfound: this model has \S+, [^$]+q_proj, [^$]*v_proj"):
        checked("q_prog", "v_proj")
    (tmp_path / "run").mkdir()
    write_plan(tmp_path / "run" / PLAN, plan_file("ffnn", model=find_model(model, RUNTIME).info))
    with pytest.raises(ConfigError, match=r"leave stage 2 nothing to train\nfound: none of q_proj, o_proj"):
        checked("q_proj", "o_proj")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", [None, ("experts",)])
def test_the_copies_of_adapted_experts_are_counted(checkpointing: Any, targets: Any, tmp_path: Path) -> None:
    """What autograd keeps for the backward passes of both stages, and a gradient of one layer's."""
    plans, asked = (
        layer_plans("fnsn"),
        recipe(attention_tokens=96, activation_checkpointing=checkpointing, lora_targets=targets),
    )
    teacher = tiny_model("qwen3_moe", layers=4)
    boosted("fnsn", "qwen3_moe").save_pretrained(tmp_path)
    adapted = adapted_layers(teacher, plans, targets)
    student = shared_student(teacher, tmp_path, plans)
    with_adapters(student, adapted["attention"] | adapted["lora"], rank=2)
    models = student, teacher, plans
    stages = {
        "attention": AttentionDistiller(*models),
        "lora": LogitDistiller(*models, checkpointing=checkpointing),
    }
    own = {value.untyped_storage().data_ptr() for value in (*teacher.parameters(), *student.parameters())}
    one = sum(
        value.numel() for value in student.get_submodule("model.layers.1.mlp.experts").parameters() if value.dim() == 3
    )
    most = 0
    for stage, distiller in stages.items():
        train_only(student, stage, adapted[stage])
        kept: dict[int, int] = {}

        def keep(value: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            place = value.untyped_storage()
            if place.data_ptr() not in own and place.nbytes() // 4 in (one * 2 // 3, one // 3):
                kept[place.data_ptr()] = place.nbytes() // 4
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            distiller(torch.arange(3, 43)[None])
        most = max(most, sum(kept.values()))
    found = copied_experts(teacher.config, asked, plans)
    # The first layer's input has no gradient either.
    assert max(most, one) <= found - one <= max(most, one) + one
    assert copied_experts(teacher.config, recipe(tokens=0), plans) == 0
