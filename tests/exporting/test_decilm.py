from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import boosted, info, layer_plans, tiny_tokenizer
from transformers import AutoConfig

from layerboost.exporting.stage import run_export
from layerboost.model.card import Origin
from layerboost.model.checkpoint import save_boosted
from layerboost.schemas.plan import PlanFile


def plan_of(letters: str) -> PlanFile:
    return PlanFile(model=info(len(letters)), method="by hand", layers=layer_plans(letters))


def saved(folder: Path, letters: str) -> Path:
    origin = Origin(base_model="some/model", licence=(("license", "apache-2.0"),))
    model = boosted(letters, tie_word_embeddings=True)
    save_boosted(model, tiny_tokenizer(), plan_of(letters), folder, recipe_yaml="schema_version: 1\n", origin=origin)
    return folder


def test_thinned_mlps_keep_their_width(tmp_path: Path) -> None:
    folder = saved(tmp_path / "converted", "fton")
    run_export(folder, "decilm", tmp_path / "exported")
    config = AutoConfig.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert [block.ffn.intermediate_size for block in config.block_configs] == [96, 48, 48, 96]
    assert config.intermediate_size == 96
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "exported"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_tensors_under_vllms_own_class(tmp_path: Path) -> None:
    folder, target = saved(tmp_path / "converted", "fnfn"), tmp_path / "exported"
    run_export(folder, "decilm", target)
    plain = json.loads((target / "config.json").read_text())
    assert plain["architectures"] == ["DeciLMForCausalLM"]
    assert not {"layer_types", "sliding_window", "per_layer_config", "attention_sink_layers"} & plain.keys()
    config = AutoConfig.from_pretrained(target, trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False, True]
    assert config.block_configs[0].attention.n_heads_in_group == 2
    assert config.block_configs[1].ffn.intermediate_size == 96
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")
    # vLLM hashes and copies it.
    assert json.loads(config.to_json_string())["block_configs"] == plain["block_configs"]
    before, after = (load_file(path / "model.safetensors") for path in (folder, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {"tokenizer.json", "plan.yaml", "configuration_decilm.py"} <= {file.name for file in target.iterdir()}
    assert not (target / "modeling_layerboost.py").exists()
    card = ModelCard((target / "README.md").read_text())
    assert (card.data.to_dict()["base_model"], card.data.to_dict()["license"]) == ("some/model", "apache-2.0")
    assert "vllm serve PATH --trust-remote-code" in card.text
    assert "AutoModelForCausalLM" not in card.text
    assert "keeps a window" not in card.text
    assert "| 1 | none |  |  |" in card.text
