from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import boosted, fitted, info, layer_plans, save_tiny, tiny_model, tiny_tokenizer

from layerboost.artifacts import PLAN, PlanFile, write_plan
from layerboost.errors import ConfigError
from layerboost.model import checkpoint
from layerboost.model.checkpoint import find_model, load_model, save_boosted
from layerboost.model.families import FAMILIES
from layerboost.model.integrity import INDEX, check_checkpoint, is_intact
from layerboost.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
LETTERS = "nfSs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A boosted checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    plan = PlanFile(model=info(len(LETTERS)), method="by hand", layers=layer_plans(LETTERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "MAX_SHARD_SIZE", "100KB")
        save_boosted(boosted(LETTERS), tiny_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def replace(folder: Path, old: str, new: str) -> None:
    text = (folder / "plan.yaml").read_text()
    assert old in text
    (folder / "plan.yaml").write_text(text.replace(old, new))


def shard_of(folder: Path, tensor: str) -> Path:
    name: str = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / name


def change_tensors(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the shard that holds a tensor."""
    file = shard_of(folder, tensor)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def test_shards_and_plan_and_config_that_agree(whole: Path) -> None:
    assert len(list(whole.glob("*.safetensors"))) > 2
    assert check_checkpoint(whole)["model_type"] == "llama"
    assert is_intact(whole)
    ids = torch.arange(3, 43)[None]
    assert torch.equal(load_model(find_model(str(whole)), RUNTIME)(ids).logits, boosted(LETTERS)(ids).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("letters", ["", "nfSsf", "fffff"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_we_write_is_intact(model_type: str, letters: str, tied: bool, tmp_path: Path) -> None:
    letters = fitted(letters, model_type) if letters else ""
    folder = save_tiny(tmp_path, model_type, letters, layers=5, tie_word_embeddings=tied)
    if letters:
        write_plan(folder / PLAN, PlanFile(model=info(5), method="by hand", layers=layer_plans(letters)))
    check_checkpoint(folder)


SINKS, UP = "model.layers.2.self_attn.sinks", "model.layers.1.mlp.up_proj.weight"
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: shard_of(f, UP).unlink(), r"lacks 1 of \d+ shards\nfound: no model-0000"),
    "shard truncated": (lambda f: truncate(shard_of(f, UP)), r"safetensors is damaged\nfound: .+\ndo: "),
    "shard empty": (lambda f: shard_of(f, UP).write_bytes(b""), "safetensors is damaged"),
    "index missing": (lambda f: (f / INDEX).unlink(), "has shards but no model.safetensors.index.json"),
    "index truncated": (lambda f: truncate(f / INDEX), "index.json cannot be read"),
    "index no mapping": (lambda f: (f / INDEX).write_text("[]"), "index.json cannot be read"),
    "tensor not where the index says": (
        lambda f: change_tensors(f, UP, lambda t: t.pop(UP)),
        f"does not hold what {INDEX} says\nfound: no {UP}",
    ),
    "another shape": (
        lambda f: change_tensors(f, UP, lambda t: t.update({UP: torch.zeros(90, 64)})),
        rf"disagree\nfound: {UP} is \[90, 64\], by the configuration \[96, 64\]",
    ),
    "sizes edited": (lambda f: edit_config(f, intermediate_size=128), r"disagree\nfound: .*up_proj.*\[128, 64\]"),
    "window edited": (
        lambda f: edit_config(f, sliding_window=8),
        "disagree\nfound: layer 2: sliding 16 with sink in plan.yaml, sliding 8 with sink in config.json; layer 3",
    ),
    "sink edited": (
        lambda f: edit_config(f, attention_sink_layers=[2, 3]),
        "layer 3: sliding 16 in plan.yaml, sliding 16 with sink in config.json",
    ),
    "none edited": (
        lambda f: edit_config(f, per_layer_config={}),
        "layer 0: none in plan.yaml, full in config.json",
    ),
    "layer types edited": (
        lambda f: edit_config(f, layer_types=["full_attention"] * 4),
        "layer 2: sliding 16 with sink in plan.yaml, full with sink in config.json",
    ),
    "layer types too short": (lambda f: edit_config(f, layer_types=["full_attention"]), "cannot read the config"),
    "per_layer_config of no layer": (
        lambda f: edit_config(f, per_layer_config={"7": {"skip": ["attention"]}}),
        "cannot read the configuration",
    ),
    "architectures edited": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"]),
        r"no longer names LayerBoostForCausalLM\nfound: architectures \['LlamaForCausalLM'\]",
    ),
    "layer types removed": (lambda f: edit_config(f, layer_types=None), "cannot read the configuration"),
    "sinks of nonsense": (lambda f: edit_config(f, attention_sink_layers=2), "cannot read the configuration"),
    "base layer types too short": (
        lambda f: edit_config(f, base_layer_types=["full_attention"]),
        "cannot read the con",
    ),
    "window of nonsense": (lambda f: edit_config(f, sliding_window="16"), "sliding_window '16', where 1 to 512 tokens"),
    "window of nothing": (lambda f: edit_config(f, sliding_window=0), "sliding_window 0, where 1 to 512 tokens"),
    "config of nonsense": (lambda f: edit_config(f, num_attention_heads="many"), "cannot read the configuration"),
    "plan edited": (
        lambda f: replace(f, "attention: sliding, window: 16, sink: true", "attention: none"),
        "disagree\nfound: layer 2: none in plan.yaml, sliding 16 with sink in config.json",
    ),
    "plan of nonsense": (lambda f: replace(f, "attention: full", "attention: some"), "plan.yaml is not a valid"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_one_message_before_any_weight_is_loaded(case: str, folder: Path) -> None:
    spoil, message = SPOILED[case]
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        check_checkpoint(folder)
    assert not is_intact(folder)
    with pytest.raises(ConfigError, match=message):
        load_model(find_model(str(folder)), RUNTIME)


def test_weights_that_disagree_where_no_plan_travels(folder: Path) -> None:
    (folder / "plan.yaml").unlink()
    check_checkpoint(folder)
    edit_config(folder, per_layer_config={})
    with pytest.raises(ConfigError, match=r"disagree\nfound: no model\.layers\.0\.input_layernorm"):
        check_checkpoint(folder)
    edit_config(folder, per_layer_config={"0": {"skip": ["attention"]}, "1": {"skip": ["attention"]}})
    with pytest.raises(ConfigError, match=r"layers\.1\.input_layernorm\.weight is not in the configuration's model"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "is not a model directory"),
        ({"config.json": "{}"}, "names no model_type"),
        ({"config.json": '{"model_type": "llama"}'}, "has no weights"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_checkpoint(tmp_path)


def test_a_stock_model_with_other_weights_than_safetensors(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert check_checkpoint(tmp_path)["model_type"] == "llama"
