from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import info, layer_plans, save_tiny, tiny_model, tiny_tokenizer

from layerboost.artifacts import PlanFile, read_plan
from layerboost.errors import ConfigError
from layerboost.model import checkpoint
from layerboost.model.checkpoint import (
    find_model,
    load_model,
    model_fingerprint,
    model_info,
    modeling_source,
    plan_in,
    save_boosted,
)
from layerboost.model.linear import OneDNNLinear
from layerboost.model.surgery import apply_plan
from layerboost.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
IDS = torch.arange(3, 43)[None]


def saved(folder: Path, letters: str = "nfSs", **changes: Any) -> tuple[Path, torch.Tensor]:
    """A boosted checkpoint and its logits."""
    model = apply_plan(tiny_model(layers=len(letters), **changes), layer_plans(letters), {2: torch.randn(4)})
    plan = PlanFile(model=info(len(letters)), method="by hand", layers=layer_plans(letters))
    save_boosted(model, tiny_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    with torch.no_grad():
        return folder, model(IDS).logits


def test_a_checkpoint_is_complete_and_speaks_hugging_face(tmp_path: Path) -> None:
    folder, logits = saved(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert config["sliding_window"] == 16
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}}
    assert {"plan.yaml", "recipe.yaml", "README.md", "modeling_layerboost.py", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    card = (folder / "README.md").read_text()
    assert "| 2 | sliding | 16 | yes |" in card
    assert plan_in(folder) == read_plan(folder / "plan.yaml")
    loaded = load_model(find_model(str(folder)), RUNTIME)
    assert torch.equal(loaded(IDS).logits, logits)


ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerboost":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(3, 43)[None]
torch.save((model(ids).logits.detach(), model.generate(ids, max_new_tokens=5, do_sample=False)), sys.argv[2])
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_it_loads_by_its_own_file_where_layerboost_is_not_installed(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "100KB")
    folder, logits = saved(tmp_path / "out", tie_word_embeddings=tied)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_model(find_model(str(folder)), RUNTIME)(IDS).logits, logits)
    subprocess.run([sys.executable, "-c", ALONE, folder, tmp_path / "logits.pt"], check=True, capture_output=True)
    alone, generated = torch.load(tmp_path / "logits.pt")
    assert torch.equal(alone, logits)
    assert generated.shape == (1, 45)
    assert not any("import" in line and "layerboost" in line for line in modeling_source().splitlines())


def test_stock_checkpoints_keep_their_stock_class(tmp_path: Path) -> None:
    model = load_model(find_model(str(save_tiny(tmp_path))), RUNTIME)
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {OneDNNLinear}
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


def test_weights_that_disagree_with_the_plan(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    sinks = weights.pop("model.layers.2.self_attn.sinks")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"disagree[\s\S]*sinks"):
        load_model(find_model(str(folder)), RUNTIME)
    weights |= {"model.layers.2.self_attn.sinks": sinks, "model.layers.0.self_attn.q_proj.weight": torch.zeros(128, 64)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"disagree[\s\S]*q_proj"):
        load_model(find_model(str(folder)), RUNTIME)


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a directory, a GGUF file nor a Hub id"):
        find_model("nobody/nothing")
    with pytest.raises(ConfigError, match="no such GGUF file"):
        find_model(str(tmp_path / "x.gguf"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="package no-such-package is not installed"):
        find_model("package:no-such-package")
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no weights"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(("model_type", "message"), [("bert", "not supported"), ("t5", "encoder-decoder")])
def test_other_kinds_of_models_are_refused(model_type: str, message: str, tmp_path: Path) -> None:
    import transformers

    transformers.CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        load_model(find_model(str(tmp_path)), RUNTIME)


def test_a_truncated_config_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_model(find_model(str(folder)), RUNTIME)


def test_model_info(tmp_path: Path) -> None:
    source = find_model(str(save_tiny(tmp_path)))
    model = load_model(source, RUNTIME)
    found = model_info(source, model.config, torch.float32)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.kv_bytes_per_token == 2 * 2 * 32 * 4
    before = model_fingerprint(source)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][40, 40] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(source) != before
