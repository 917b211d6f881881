"""Exports against the boosted checkpoint, by the stock classes of Transformers; under vLLM in tests/vllm_plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import BIASES, DYNAMIC, FACTOR, LINEAR, LLAMA3, TIED, YARN, check_cases, check_ends
from huggingface_hub import ModelCard
from test_pipeline import layerboost
from tiny import (
    RUNTIME,
    WINDOW,
    boosted,
    byte_level_tokenizer,
    byte_tokenizer,
    info,
    layer_plans,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from layerboost.errors import ConfigError, LayerboostError
from layerboost.exporting.stage import run_export
from layerboost.exporting.targets import BIASES as BIASES_IN_ATTENTION
from layerboost.exporting.targets import EXPERTS, HEADS, QK_NORMS, TARGETS, extra_kv_bytes, features
from layerboost.exporting.tensors import full_every
from layerboost.model.base import find_model
from layerboost.model.checkpoint import save_boosted
from layerboost.model.integrity import read_config
from layerboost.model.modeling import stock_class
from layerboost.model.tokenizer import SENTENCE
from layerboost.schemas.plan import PlanFile, read_plan

IDS = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(1))
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SAME = {"rope_type": "default", "rope_theta": 1e4}
BY_TYPE = {"full_attention": SAME, "sliding_attention": SAME}
# Families whose formats have no biases in attention.
WITHOUT_BIASES: dict[str, dict[str, Any]] = {
    "qwen3": {}, "qwen3_moe": {}, "mellum": {"rope_parameters": BY_TYPE}, "olmo2": {"head_dim": 16},
    "olmo3": {"head_dim": 16, "rope_parameters": BY_TYPE}, "gemma2": TIED, "gemma3_text": TIED,
    "cohere2": TIED | {"head_dim": 16},
}  # fmt: skip
SCALED_WINDOWS = {"rope_parameters": {"full_attention": SAME, "sliding_attention": LINEAR}}
# Every family with every kind of layer, settings that are not the defaults, and layers that slide in the base.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "nfSsn", TIED),
    "biases": ("llama", "fSns", BIASES | {"rope_parameters": LINEAR}),
    "mistral": ("mistral", "sSnf", {"rope_parameters": LLAMA3}),
    "ministral": ("ministral", "Sfnf", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", "fSns", {"rope_parameters": FACTOR}),
    "smollm3": ("smollm3", "SsfnS", {"no_rope_layer_interval": 2}),
    "phi3": ("phi3", "nfSs", {}),
    "granite": ("granite", "nSfs", {}),
    "no-window": ("llama", "fnfn", {"rope_parameters": DYNAMIC}),
}


def saved(folder: Path, family: str, letters: str, **changes: Any) -> Path:
    """A boosted checkpoint with its plan."""
    model = boosted(letters, family, **changes)
    model_info = info(len(letters)).model_copy(update={"model_type": family})
    plan = PlanFile(model=model_info, method="by hand", layers=layer_plans(letters))
    save_boosted(model, tiny_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    return folder


def test_cases_have_all_that_the_formats_claim() -> None:
    for name, cases in (("granite-swa", CASES), ("mlx", MLX_CASES)):
        check_cases(TARGETS[name], cases.values())
        check_ends(TARGETS[name], cases.values())


def test_what_a_model_needs_is_what_its_tensors_say() -> None:
    for family in {family for target in TARGETS.values() for family in target.families}:
        config = tiny_config(family, 3)
        with torch.device("meta"):
            names = " ".join(stock_class(config)(config).state_dict())
        found = features(config)
        assert ("q_norm" in names, "experts" in names) == (QK_NORMS in found, EXPERTS in found), family
        assert ("q_proj.bias" in names) == (BIASES_IN_ATTENTION in found), family


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_stock_class_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    family, letters, changes = CASES[case]
    folder = saved(tmp_path / "healed", family, letters, **changes)
    found = run_export(folder, "granite-swa")
    out = tmp_path / "healed-granite-swa"
    assert (found.target, found.folder) == ("granite-swa", str(out))
    ours = find_model(str(folder), RUNTIME).load().eval()
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(stock).__name__ == "GraniteSWAForCausalLM"
    assert stock.dtype == ours.dtype
    torch.testing.assert_close(stock(IDS).logits, ours(IDS).logits, atol=2e-4, rtol=1e-3)
    answers = [model.generate(IDS[:1], max_new_tokens=20, do_sample=False, eos_token_id=-1) for model in (ours, stock)]
    assert torch.equal(*answers)
    window = WINDOW if set(letters) & set("sS") else 16
    assert found.extra_kv_bytes == letters.count("n") * window * info().kv_bytes_per_token


def test_everything_but_the_weights_and_the_config_is_copied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "nfS")
    (folder / "LICENSE").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    more = Path("additional_chat_templates", "tools.jinja")
    (folder / more).parent.mkdir()
    (folder / more).write_text("{{ tools }}")
    run_export(folder, "granite-swa", tmp_path / "out")
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert (tmp_path / "out" / more).read_text() == "{{ tools }}"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    kept = {"tokenizer.json", "plan.yaml", "recipe.yaml", "LICENSE"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == {name: before[name] for name in kept}
    assert not (tmp_path / "out" / "modeling_layerboost.py").exists()
    plain = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "per_layer_config", "attention_sink_layers"} & plain.keys()
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == [
        "sliding_attention", "full_attention", "sliding_attention",
    ]  # fmt: skip
    assert read_plan(tmp_path / "out" / "plan.yaml").layers == layer_plans("nfS")
    text = ModelCard((tmp_path / "out" / "README.md").read_text()).text
    assert "GraniteSWAForCausalLM, so layerboost is not needed" in text
    assert "trust_remote_code" not in text
    assert "keeps a window of keys and values" in " ".join(text.split())


@pytest.mark.parametrize(("to", "family"), [("granite-swa", "granite"), ("mlx", "phi3"), ("decilm", "qwen2")])
def test_text_is_split_as_before(to: str, family: str, tmp_path: Path) -> None:
    """As of DeepSeek-R1-Distill-Qwen: Transformers overlooks the wrong class that it names by the type of the model,
    which an export no longer has."""
    folder = saved(tmp_path / "healed", family, "fsf", vocab_size=300)
    byte_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    wanted = byte_tokenizer()(SENTENCE)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(SENTENCE)["input_ids"] == wanted
    out = run_export(folder, to).folder
    found = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert found(SENTENCE)["input_ids"] == wanted


@pytest.mark.parametrize(
    ("letters", "target", "why"),
    [
        ("fnfn", "decilm", ""),
        ("nfff", "granite-swa", "(decilm: layer 0 has no attention; gguf llama: layer 0 has no attention;"),
        ("fsfn", "decilm", "(gguf llama: layer 1 has a sliding window; gguf deci: layer 1 has a sliding window)"),
        ("ffff", "granite-swa", ""),
        ("fSfn", "granite-swa", "(decilm: layer 1 has a sink; mlx: layer 1 has a sink;"),
    ],
)
def test_auto_takes_what_costs_nothing_and_says_why(letters: str, target: str, why: str, tmp_path: Path) -> None:
    shown = layerboost("export", saved(tmp_path / "healed", "llama", letters), "--to", "auto", "--json")
    assert json.loads(shown.stdout)["target"] == target
    assert f"{target} holds this plan at the least KV cache {why}" in shown.stderr.replace("\n", " ")
    config = json.loads((tmp_path / f"healed-{target}" / "config.json").read_text())
    assert config["architectures"] == [{"decilm": "DeciLMForCausalLM"}.get(target, "GraniteSWAForCausalLM")]


@pytest.mark.parametrize(
    ("family", "letters", "to", "message"),
    [
        ("llama", "fSfn", "decilm", "layer 1 has a sink\ndo: export to granite-swa"),
        (
            "llama",
            "fSfn",
            "mlx",
            r"layer 1 has a sink\ndo: export to granite-swa, or plan without .*plan.sinks=false\): mlx holds that",
        ),
        ("llama", "nssn", "mlx", "no full layer\ndo: export to granite-swa"),
        ("llama", "nfff", "decilm", "layer 0 has no attention\ndo: export to granite-swa"),
        ("llama", "fHff", "granite-swa", "layer 1 has full KV heads"),
        ("llama", "fhff", "auto", "nearest plan of whole layers: layers 1 full"),
        ("qwen3", "fSff", "auto", "gguf step35: layer 1 has a sink"),
        (
            "qwen3",
            "fSff",
            "gguf",
            "gguf cannot hold this plan\nfound: gguf qwen3: layer 1 .*; gguf step35: layer 1 has a sink",
        ),
        ("qwen3", "fsff", "granite-swa", "family qwen3; it holds .*\ndo: export to gguf"),
        ("olmo2", "fsff", "gguf", "heads not as wide as the model together"),
        ("olmo3", "fffs", "gguf", "rotary embeddings of two bases in full and sliding layers"),
        ("gemma2", "ffff", "gguf", "an untied output head"),
        ("gemma3_text", "ffsf", "gguf", "an untied output head"),
        ("llama", "fHff", "gguf", "granite_swa: layer 1 has full KV heads in a sliding layer; gguf deci: layer 1 has"),
        ("llama", "ftfn", "granite-swa", "layer 1 has a thinned MLP\ndo: export to decilm"),
        ("llama", "ffmf", "auto", "decilm: layer 2 has no MLP"),
        ("llama", "fSft", "auto", "granite-swa: layer 3 has a thinned MLP; decilm: layer 1 has a sink"),
        ("llama", "flff", "auto", "a stock format has no linear attention\nfound: layers 1 of the plan"),
        ("llama", "fLff", "gguf", "gguf has no linear attention"),
        ("llama", "ffff", "gguff", "no format is called gguff"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(family: str, letters: str, to: str, message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", family, letters)
    with pytest.raises(ConfigError, match=message):
        run_export(folder, to)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


MLX_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "nfssn", TIED),
    "linear": ("llama", "fsns", BIASES | {"rope_parameters": LINEAR}),
    "llama3": ("llama", "fsns", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", "fsns", {"rope_parameters": YARN}),
    "mistral": ("mistral", "ssnf", {}),
    "ministral": ("ministral", "ffnf", {}),
    "qwen2": ("qwen2", "fsns", {}),
    "phi3": ("phi3", "nfss", {}),
    "full": ("llama", "fnf", {}),
}


@pytest.mark.parametrize("case", MLX_CASES)
@torch.no_grad()
def test_mlx_lm_gives_the_same_log_probabilities(case: str, tmp_path: Path) -> None:
    """All at once, and token by token past the window."""
    mlx = pytest.importorskip("mlx_lm", reason="pip install mlx-lm 'mlx[cpu]'")
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    family, letters, changes = MLX_CASES[case]
    folder, ids = saved(tmp_path / "healed", family, letters, **changes), IDS[:1]
    out = Path(run_export(folder, "mlx").folder)
    expected = find_model(str(folder), RUNTIME).load()(ids).logits[0].log_softmax(-1)
    model, _ = mlx.utils.load_model(out)
    tokens = mx.array(ids.tolist())
    cache, past = make_prompt_cache(model), ids.shape[1] - 20
    steps = [model(tokens[:, :past], cache=cache)]
    steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(past, ids.shape[1])]
    for logits in (model(tokens), mx.concatenate(steps, axis=1)):
        found = torch.tensor(logits.astype(mx.float32).tolist())[0].log_softmax(-1)
        assert (found - expected).abs().max() < 1e-3


def test_what_an_mlx_directory_says(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "qwen2", "nfs", rope_parameters=LLAMA3)
    out = Path(run_export(folder, "mlx").folder)
    plain = json.loads((out / "config.json").read_text())
    assert (plain["model_type"], plain["sliding_window"], plain["attention_bias"]) == ("llama", WINDOW, True)
    assert plain["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (plain["rope_theta"], plain["rope_scaling"]["rope_type"]) == (1e4, "llama3")
    text = " ".join(ModelCard((out / "README.md").read_text()).text.split())
    assert "Transformers and vLLM would load it as a Llama without windows" in text
    assert "keeps a window of keys and values" in text


@pytest.mark.parametrize(
    ("family", "letters", "changes", "message"),
    [
        ("olmo2", "sfff", {"head_dim": 16}, "windows in all layers but 1, 2, 3; it has them in all but every n-th"),
        ("gemma3_text", "ffsfff", TIED, "layer 2 slides, but has a full layer's rotary embedding"),
        ("cohere2", "fffsff", TIED | {"head_dim": 16}, "layer 3 slides, but has a full layer's rotary embedding"),
        ("gemma2", "ffff", TIED | {"query_pre_attn_scalar": 8}, "scores scaled by another number than the head's size"),
        ("gemma2", "ffff", TIED | {"final_logit_softcapping": None}, "one soft cap of two"),
        ("gemma2", "ffff", TIED | {"hidden_activation": "gelu"}, "activation gelu; it has gelu_pytorch_tanh"),
        ("gemma3_text", "ffff", TIED | {"final_logit_softcapping": 5.0}, "one soft cap of two"),
        ("gemma3_text", "ffff", TIED | SCALED_WINDOWS, "rotary embeddings of type linear"),
        ("olmo2", "ffff", {"head_dim": 16, "rope_parameters": YARN}, "rotary embeddings of type yarn"),
        ("phi3", "fsff", {"rope_parameters": PARTIAL}, "a part of each head"),
        ("llama", "fsff", {"rope_parameters": DYNAMIC}, "embeddings of type dynamic"),
        ("llama", "fsff", {"rope_parameters": FACTOR}, "mlx: a rotary attention_factor"),
        *(
            (family, "ffff", changes | {"attention_bias": True}, "biases in attention")
            for family, changes in WITHOUT_BIASES.items()
        ),
        *(
            ("llama", "fsff", {"hidden_act": "gelu"}, f"{to}: activation gelu; it has silu")
            for to in ("granite-swa", "decilm", "mlx", "gguf")
        ),
    ],
)  # fmt: skip
def test_what_an_engine_computes_otherwise_is_refused_before_a_weight_is_read(
    family: str, letters: str, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "healed", family, letters, **changes)
    monkeypatch.setattr("layerboost.exporting.stage.read_weights", lambda _: pytest.fail("it read the weights"))
    to, _, found = message.rpartition(": ")
    with pytest.raises(ConfigError, match=found):
        run_export(folder, to or "gguf")


def test_directories_that_cannot_be_exported_or_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is not a boosted checkpoint"):
        run_export(tmp_path / "empty", "auto")
    folder = saved(tmp_path / "healed", "llama", "fn")
    with pytest.raises(ConfigError, match="exists already"):
        run_export(folder, "auto", tmp_path / "empty")
    byte_level_tokenizer().save_pretrained(folder)
    for to in ("gguf", "granite-swa"):
        with pytest.raises(LayerboostError, match=r"cannot write .*out\nfound: \[Errno"):
            run_export(folder, to, folder / "config.json" / "out")
    refused = layerboost("export", tmp_path / "nowhere", "--to", "auto", check=False)
    assert (refused.returncode, "is not a boosted checkpoint" in refused.stderr) == (2, True)


def test_a_type_is_for_gguf_alone_and_a_removed_layer_costs_what_the_engine_holds(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "nfSf")
    with pytest.raises(ConfigError, match="granite-swa keeps the checkpoint's type\nfound: --type q8_0"):
        run_export(folder, "granite-swa", kind="q8_0")
    # 2 KV heads of 32 numbers: a window of float32 in vLLM; in llama.cpp a window and a batch of 512 of float16.
    one, config = info(), read_config(folder, "healed")
    assert extra_kv_bytes(TARGETS["granite-swa"], config, one) == WINDOW * one.kv_bytes_per_token
    assert extra_kv_bytes(TARGETS["gguf granite_swa"], config, one) == 768 * one.kv_bytes_per_token // 2
    assert extra_kv_bytes(TARGETS["decilm"], config, one) == extra_kv_bytes(TARGETS["gguf deci"], config, one) == 0
    # Where every third layer is full and lost its attention, its cells are full ones.
    config = boosted("snnsnn", "olmo2").config
    assert full_every(config) == 0
    assert extra_kv_bytes(TARGETS["gguf olmo2"], config, one) == 4 * 768 * one.kv_bytes_per_token // 2
    config = boosted("sfnsfn", "olmo2").config
    assert full_every(config) is None
    config = boosted("sfsnsf", "olmo2").config
    assert full_every(config) == 2
    assert extra_kv_bytes(TARGETS["gguf olmo2"], config, one) == 512 * one.kv_bytes_per_token // 2


def test_targets_are_listed() -> None:
    """What a removed layer holds, and what a model may have, are data."""
    listed = json.loads(layerboost("ls", "targets", "--json").stdout)
    assert list(listed) == list(TARGETS)
    assert listed["gguf step35"]["families"] == "qwen3"
    assert "sink" in listed["granite-swa"]["holds, besides full layers"]
    assert "layer 0 must have attention" in listed["decilm"]["holds, besides full layers"]
    assert "a layer must be full" in listed["mlx"]["holds, besides full layers"]
    held = {name: cells["a layer without attention holds"] for name, cells in listed.items()}
    assert (held["decilm"], held["gguf deci"], held["gguf llama"]) == ("nothing", "nothing", "not held")
    assert held["granite-swa"] == "64 tokens at a window of 64"
    assert held["gguf step35"] == "768 tokens at a window of 64"
    assert held["gguf gemma2"] == "768 tokens at a window of 64; at the place of a full layer, the context"
    assert listed["gguf mellum"]["models may have"] == "q/k norms, experts, an untied output head, " + HEADS
    assert (listed["gguf gemma3"]["activation"], listed["mlx"]["activation"]) == ("gelu_pytorch_tanh", "silu")
    assert listed["gguf gemma3"]["rotary embeddings"] == "default; of full layers linear"
    assert "granite-swa" in layerboost("ls", "targets").stdout
