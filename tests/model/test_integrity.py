from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    RUNTIME,
    boosted,
    change_weights,
    edit_config,
    families,
    fitted,
    plan_file,
    save_checkpoint,
    save_tiny,
    tiny_model,
)

from layerboost.errors import ConfigError, LayerboostError
from layerboost.model import checkpoint
from layerboost.model.base import find_model
from layerboost.model.files import INDEX, read_weights
from layerboost.model.integrity import check_base, check_checkpoint, is_intact
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN

LETTERS = "nfSs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A boosted checkpoint in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "MAX_SHARD_SIZE", "100KB")
        return save_checkpoint(tmp_path_factory.mktemp("whole") / "model", boosted(LETTERS), plan_file(LETTERS))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shard_of(folder: Path, tensor: str) -> Path:
    name: str = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / name


def change_tensors(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the shard that holds a tensor."""
    change_weights(shard_of(folder, tensor), change)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def edit_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_shards_and_plan_and_config_that_agree(whole: Path) -> None:
    assert len(list(whole.glob("*.safetensors"))) > 2
    assert check_checkpoint(whole)["model_type"] == "llama"
    assert is_intact(whole)
    ids = torch.arange(3, 43)[None]
    assert torch.equal(find_model(str(whole), RUNTIME).load()(ids).logits, boosted(LETTERS)(ids).logits)


@pytest.mark.parametrize("model_type", families())
@pytest.mark.parametrize("letters", ["", "nfSsf", "fffff"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_we_write_is_intact(model_type: str, letters: str, tied: bool, tmp_path: Path) -> None:
    letters = fitted(letters, model_type) if letters else ""
    folder = save_tiny(tmp_path, model_type, letters, layers=5, tie_word_embeddings=tied)
    if letters:
        write_plan(folder / PLAN, plan_file(letters))
    check_checkpoint(folder)


SINKS, UP = "model.layers.2.self_attn.sinks", "model.layers.1.mlp.up_proj.weight"
Spoil = Callable[[Path], Any]


def config(**changes: Any) -> Spoil:
    return lambda folder: edit_config(folder, **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    return lambda folder: change_weights(folder, change)


SPOILED: dict[str, tuple[Spoil, str]] = {
    "shard missing": (lambda f: shard_of(f, UP).unlink(), r"lacks 1 of \d+ shards\nfound: no model-0000"),
    "shard truncated": (lambda f: truncate(shard_of(f, UP)), r"safetensors is damaged\nfound: .+\ndo: "),
    "shard empty": (lambda f: shard_of(f, UP).write_bytes(b""), "safetensors is damaged"),
    "index missing": (lambda f: (f / INDEX).unlink(), "has shards but no model.safetensors.index.json"),
    "index truncated": (lambda f: truncate(f / INDEX), "index.json cannot be read"),
    "index no mapping": (lambda f: (f / INDEX).write_text("[]"), "index.json cannot be read"),
    "index no metadata": (
        lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
        "cannot be read\\nfound: no 'metadata'",
    ),
    "tensor not where the index says": (
        lambda f: change_tensors(f, UP, lambda t: t.pop(UP)),
        f"lacks tensors that {INDEX} names\nfound: no {UP}",
    ),
    "another shape": (
        lambda f: change_tensors(f, UP, lambda t: t.update({UP: torch.zeros(90, 64)})),
        rf"disagree\nfound: {UP} is \[90, 64\], by the configuration \[96, 64\]",
    ),
    "sizes edited": (config(intermediate_size=128), r"disagree\nfound: .*up_proj.*\[128, 64\]"),
    "window edited": (
        config(sliding_window=8),
        r"disagree\nfound: layer 2: sliding 16 \+ sink in plan.yaml, sliding 8 \+ sink in config.json; layer 3",
    ),
    "sink edited": (
        config(attention_sink_layers=[2, 3]),
        r"layer 3: sliding 16 in plan.yaml, sliding 16 \+ sink in config.json",
    ),
    "none edited": (config(per_layer_config={}), "layer 0: none in plan.yaml, full in config.json"),
    "layer types edited": (
        config(layer_types=["full_attention"] * 4),
        r"layer 2: sliding 16 \+ sink in plan.yaml, full \+ sink in config.json",
    ),
    "layer types too short": (config(layer_types=["full_attention"]), "cannot read the config"),
    "per_layer_config of no layer": (
        config(per_layer_config={"7": {"skip": ["attention"]}}),
        "cannot read the configuration",
    ),
    "architectures edited": (
        config(architectures=["LlamaForCausalLM"]),
        r"no longer names LayerBoostForCausalLM\nfound: architectures \['LlamaForCausalLM'\]",
    ),
    "layer types removed": (config(layer_types=None), "cannot read the configuration"),
    "sinks that is invalid": (config(attention_sink_layers=2), "cannot read the configuration"),
    "base layer types too short": (config(base_layer_types=["full_attention"]), "cannot read the con"),
    "window that is invalid": (config(sliding_window="16"), "sliding_window '16', not 1 to 512 tokens"),
    "window of nothing": (config(sliding_window=0), "sliding_window 0, not 1 to 512 tokens"),
    "config that is invalid": (config(num_attention_heads="many"), "cannot read the configuration"),
    "plan edited": (
        lambda f: edit_text(f / PLAN, "attention: sliding, window: 16, sink: true", "attention: none"),
        r"disagree\nfound: layer 2: none in plan.yaml, sliding 16 \+ sink in config.json",
    ),
    "plan that is invalid": (
        lambda f: edit_text(f / PLAN, "attention: full", "attention: some"),
        "plan.yaml is not a valid",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_one_message_before_any_weight_is_loaded(case: str, folder: Path) -> None:
    spoil, message = SPOILED[case]
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        check_checkpoint(folder)
    assert not is_intact(folder)
    with pytest.raises(ConfigError, match=message):
        find_model(str(folder), RUNTIME).load()


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


def pickle(folder: Path, **changes: torch.Tensor) -> Path:
    """Put the weights into pytorch_model.bin too."""
    torch.save(load_file(folder / "model.safetensors") | changes, folder / "pytorch_model.bin")
    return folder


def test_a_stock_model_with_other_weights_than_safetensors(tmp_path: Path) -> None:
    folder = pickle(save_tiny(tmp_path))
    check_base(folder, torch.float32)  # both formats, the same weights
    (folder / "model.safetensors").unlink()
    assert check_checkpoint(folder)["model_type"] == "llama"
    check_base(folder, torch.float32)
    assert find_model(str(folder), RUNTIME).load()(torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model whose head is its embedding."""
    return save_tiny(tmp_path_factory.mktemp("stock"), layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model(layers=2, tie_word_embeddings=True).save_pretrained(folder, max_shard_size="100KB")
    return folder


EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2496\n"


def link_to_nothing(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/4d7a")


def in_place_of_safetensors(folder: Path) -> Path:
    """Take the safetensors file away; return the pickled one that is read then."""
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def pointer(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(LFS)


def number_at(value: float, name: str, row: int) -> Spoil:
    return weights(lambda t: t[name][row].fill_(value))


UNFIT: dict[str, tuple[Spoil, str]] = {
    "adapter left": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "holds an adapter[^$]+adapter_config.json",
    ),
    "adapter linked": (lambda f: link_to_nothing(f, "adapter_config.json"), "holds an adapter"),
    "pointer": (lambda f: pointer(f, "model.safetensors"), "model.safetensors is missing\nfound: a Git LFS pointer"),
    "pickled pointer": (lambda f: pointer(f, "pytorch_model.bin"), "pytorch_model.bin is missing\nfound: a Git LFS"),
    "pointer for a config": (lambda f: (f / "config.json").write_text(LFS), "config.json is missing"),
    "link to nothing": (
        lambda f: link_to_nothing(f, "model.safetensors"),
        "a link to ../../blobs/4d7a, which does not",
    ),
    "config linked": (lambda f: link_to_nothing(f, "config.json"), "a link to ../../blobs/4d7a, which does not"),
    "pickled nothing": (lambda f: in_place_of_safetensors(f).touch(), "pytorch_model.bin is damaged"),
    "pickled list": (
        lambda f: torch.save({"model": {"a": 1}}, in_place_of_safetensors(f)),
        "does not hold a model's weights",
    ),
    "an index too": (
        lambda f: (f / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}})
        ),
        "has weights twice: Transformers loads one, vLLM the other",
    ),
    "a shard of pickled weights left": (
        lambda f: shutil.copy(in_place_of_safetensors(pickle(f)), f / "pytorch_model-00002-of-00002.bin"),
        "has weights that Transformers ignores and vLLM loads\nfound: pytorch_model-00002-of-00002.bin",
    ),
    "a window that its class does not know": (
        config(sliding_window=8),
        "a sliding window that Transformers ignores and vLLM does not\nfound: sliding_window 8",
    ),
    "a number too large": (
        lambda f: edit_text(f / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'),
        "config.json: rms_norm_eps is inf",
    ),
    "tensor missing": (weights(lambda t: t.pop(OTHER)), f"disagree\nfound: no {OTHER}"),
    "tensor more": (weights(lambda t: t.update(more=torch.zeros(2))), "more is not in the configuration's model"),
    "layers fewer": (config(num_hidden_layers=1), r"layers\.1\.\S+ is not in the configuration's"),
    "another shape": (config(vocab_size=300), r"is \[200, 64\], by the configuration \[300, 64\]"),
    "untied without a head": (config(tie_word_embeddings=False), f"found: no {HEAD}"),
    "tied and another head": (weights(lambda t: t.update({HEAD: t[EMBEDDING] + 1})), f"{HEAD} and {EMBEDDING} differ"),
    "pickled weights of another": (
        lambda f: pickle(f, **{OTHER: torch.zeros(64, 96)}),
        f"weights twice, and they differ\nfound: {OTHER} in safetensors and",
    ),
    "fp8": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]}),
        "has quantization_config fp8, and no weight is of that type",
    ),
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        'is quantised, which MODEL cannot be\nfound: quantization_config {"quant_method": "gptq"',
    ),
    "compressed tensors": (config(compression_config={"format": "int-quantized"}), "is quantised"),
    "weights of another name": (config(transformers_weights="x.safetensors"), "transformers_weights x"),
    "quantised in no way": (config(quantization_config={}), "is quantised"),
    "another file": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model.fp16.safetensors"),
        "Transformers ignores and vLLM loads\nfound: model.fp16.safetensors",
    ),
    "fp8 unnamed": (
        weights(lambda t: t.update({OTHER: t[OTHER].to(torch.float8_e4m3fn)})),
        f"is quantised[^$]+{OTHER} of type torch.float8_e4m3fn",
    ),
    "int8 unnamed": (
        weights(lambda t: t.update({OTHER: t[OTHER].to(torch.int8)})),
        f"is quantised[^$]+{OTHER} of type torch.int8",
    ),
    "nan": (
        number_at(float("nan"), OTHER, 5),
        rf"not finite\nfound: {OTHER}: 96 of 6,144, the first is nan at \[5, 0\]",
    ),
    "infinite": (number_at(float("-inf"), EMBEDDING, 17), rf"{EMBEDDING}: 64 of 12,800.*-inf at \[17, 0\], token 17"),
    "nan in the config": (config(rms_norm_eps=float("nan")), "config.json: rms_norm_eps is nan"),
    "padding beyond": (config(pad_token_id=200), "no model can be built from"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_directory_that_cannot_be_the_base(case: str, stock: Path, tmp_path: Path) -> None:
    folder, (spoil, message) = Path(shutil.copytree(stock, tmp_path / "model")), UNFIT[case]
    check_base(folder, torch.float32)
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        check_base(folder, torch.float32)


def test_sliding_layers_without_a_window(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3", layers=2)
    edit_config(folder, layer_types=["full_attention", "sliding_attention"], use_sliding_window=False)
    with pytest.raises(ConfigError, match=r"has sliding layers without a window\nfound: [^$]+use_sliding_window False"):
        check_base(folder, torch.float32)


def test_tensors_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    check_base(folder, torch.float32)
    norm = load_file(shard_of(folder, "model.norm.weight"))["model.norm.weight"]
    change_tensors(folder, EMBEDDING, lambda t: t.update({"model.norm.weight": norm + 1}))
    with pytest.raises(ConfigError, match=r"holds tensors twice\nfound: model.norm.weight in model-0000"):
        check_base(folder, torch.float32)
    shard_of(folder, OTHER).write_text(LFS)
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        check_base(folder, torch.float32)


def test_weights_that_a_dtype_cannot_hold(stock: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "model"))
    number_at(1e6, OTHER, 3)(folder)
    check_base(folder, torch.float32)
    check_base(folder, torch.bfloat16)
    with pytest.raises(ConfigError, match=rf"not finite in float16\nfound: {OTHER}[^$]+dtype=float32"):
        check_base(folder, torch.float16)


def test_a_boosted_checkpoint_is_no_base(whole: Path) -> None:
    with pytest.raises(ConfigError, match="is a boosted checkpoint"):
        check_base(whole, torch.float32)


def test_what_transformers_knows_to_leave_out(stock: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stock, tmp_path / "model"))
    # As in old Llama checkpoints; and a head that is the embedding.
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    change_weights(folder, lambda t: t.update(old | {HEAD: t[EMBEDDING].clone()}))
    # A leftover that no library loads.
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        link_to_nothing(folder, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {EMBEDDING: "model.safetensors"}}))
    check_base(folder, torch.float32)
    assert find_model(str(folder), RUNTIME).fingerprint != find_model(str(stock), RUNTIME).fingerprint


@pytest.mark.parametrize(
    ("model_type", "changes", "found"),
    [
        (
            "qwen3_moe",
            {"num_local_experts": 6},
            r"experts.down_proj is \[8, 64, 32\], by the configuration \[6, 64, 32\]",
        ),
        (
            "mixtral",
            {"num_local_experts": 6},
            r"experts.down_proj is \[4, 64, 96\], by the configuration \[6, 64, 96\]",
        ),
        ("granitemoe", {"num_local_experts": 6}, r"experts.down_proj is \[8, 64, 32\]"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"more experts than there are.*\nfound: 9 of 8"),
        ("hunyuan_v1_moe", {"moe_topk": 0}, r"or through none\nfound: 0 of 8"),
        ("glm4_moe", {"n_shared_experts": 2}, r"shared_experts.*by the configuration"),
    ],
)
def test_experts_that_do_not_match_the_config(
    model_type: str, changes: dict[str, int], found: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, model_type, layers=2)
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=found):
        check_checkpoint(folder)


@pytest.mark.parametrize("spoil", ["one expert", "half an expert"])
def test_experts_that_are_missing(spoil: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3_moe", layers=2)
    expert = "model.layers.1.mlp.experts.5."
    names = [f"{expert}{part}_proj.weight" for part in ("up", "gate", "down")]
    change_weights(folder, lambda t: [t.pop(name) for name in (names if spoil == "one expert" else names[:1])])
    with pytest.raises(ConfigError, match=r"disagree|cannot load"):
        check_checkpoint(folder)


@pytest.mark.parametrize("model_type", families(experts=True))
def test_a_checkpoint_of_experts_is_read_back(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are compared in the form in which the files hold them."""
    letters = fitted(LETTERS, model_type)
    model, plan = boosted(letters, model_type), plan_file(letters)
    save_checkpoint(tmp_path / "out", model, plan)
    read = read_weights

    def other(folder: Path) -> dict[str, torch.Tensor]:
        return {
            name: value + 1 if "expert" in name or "linear" in name else value for name, value in read(folder).items()
        }

    monkeypatch.setattr(checkpoint, "read_weights", other)
    with pytest.raises(LayerboostError, match="what is read back is not the model"):
        save_checkpoint(tmp_path / "other", model, plan)
