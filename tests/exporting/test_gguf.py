"""GGUF exports: what the file says, and how llama.cpp reads text; its log-probabilities: test_stock_runtimes.py."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from exported import BIASES, DYNAMIC, FACTOR, LINEAR, LLAMA3, TIED, YARN, check_cases, check_ends
from safetensors.torch import load_file, save_file
from stock_runtimes import serving
from test_pipeline import layerboost
from tiny import WINDOW, boosted, byte_level_tokenizer, info, layer_plans, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from layerboost.errors import ConfigError, LayerboostError
from layerboost.exporting.gguf_file import LAYOUTS
from layerboost.exporting.gguf_tokenizer import SPLITTERS
from layerboost.exporting.stage import gguf_file, run_export
from layerboost.exporting.targets import TARGETS, find_target
from layerboost.model.base import UNPACKED_FROM
from layerboost.model.card import Origin
from layerboost.model.checkpoint import save_boosted
from layerboost.model.surgery import boosted_config
from layerboost.model.tokenizer import SENTENCE
from layerboost.schemas.plan import PlanFile, read_plan, write_plan
from layerboost.tables import exported_rows

SAME = {"rope_type": "default", "rope_theta": 5e4}
BY_TYPE = {"full_attention": SAME, "sliding_attention": SAME}
SMALL = TIED | {"initializer_range": 0.1}
needs_llama = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp")
# By architecture: the family, layers and settings. Every family with what it can have.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("granite_swa", "llama", "nfSsn", {}),
    "unchanged": ("llama", "llama", "ffff", {"rope_parameters": LLAMA3}),
    "unchanged-biases": ("llama", "llama", "fff", BIASES),
    "unchanged-mistral": ("llama", "mistral", "fff", {"rope_parameters": LINEAR}),
    "unchanged-ministral": ("llama", "ministral", "fff", {"sliding_window": 4096, "rope_parameters": FACTOR}),
    "unchanged-qwen2": ("qwen2", "qwen2", "fff", {"head_dim": 16}),
    "unchanged-qwen2-yarn": ("granite_swa", "qwen2", "fff", {"head_dim": 16, "rope_parameters": YARN}),
    "unchanged-phi3": ("granite_swa", "phi3", "fff", {}),
    "unchanged-qwen3": ("qwen3", "qwen3", "fff", {}),
    "unchanged-qwen3-tied": ("qwen3", "qwen3", "fff", TIED),
    "unchanged-granite": ("granite", "granite", "fff", BIASES),
    "unchanged-granite-linear": ("granite", "granite", "fff", {"rope_parameters": LINEAR}),
    "unchanged-granite-llama3": ("granite", "granite", "fff", {"rope_parameters": LLAMA3}),
    "unchanged-granite-yarn": ("granite", "granite", "fff", {"rope_parameters": FACTOR}),
    "integer-theta": ("granite_swa", "llama", "fSns", {"rope_parameters": SAME | {"rope_theta": 100000}}),
    "tied": ("granite_swa", "llama", "fSns", TIED),
    "biases": ("granite_swa", "llama", "fSns", BIASES),
    "linear": ("granite_swa", "llama", "fSns", {"rope_parameters": LINEAR}),
    "llama3": ("granite_swa", "llama", "fSns", {"rope_parameters": LLAMA3}),
    "yarn": ("granite_swa", "llama", "fSns", {"rope_parameters": YARN}),
    "mistral": ("granite_swa", "mistral", "sSnf", {}),
    "ministral": ("granite_swa", "ministral", "Sfnf", {}),
    "granite": ("granite_swa", "granite", "nSfs", {}),
    "qwen2": ("granite_swa", "qwen2", "fSns", {"rope_parameters": FACTOR}),
    "smollm3": ("granite_swa", "smollm3", "SsfnS", {"no_rope_layer_interval": 2}),
    "phi3": ("granite_swa", "phi3", "fSns", {}),
    "absent": ("deci", "llama", "fnfn", {"rope_parameters": LLAMA3}),
    "thinned": ("deci", "llama", "ftno", TIED),
    "absent-first": ("granite_swa", "qwen2", "nffn", {}),
    "absent-biases": ("deci", "llama", "ftno", BIASES),
    "absent-qwen2": ("deci", "qwen2", "ftno", {"rope_parameters": LINEAR}),
    "absent-phi3": ("deci", "phi3", "fotn", TIED),
    "absent-mistral": ("deci", "mistral", "fotn", {"rope_parameters": FACTOR}),
    # Its other layers slide.
    "absent-ministral": ("deci", "ministral", "fnto", {"rope_parameters": YARN}),
    "qwen3": ("step35", "qwen3", "sfns", {}),
    "qwen3-tied": ("step35", "qwen3", "nfsn", TIED),
    "qwen3-moe": ("mellum", "qwen3_moe", "fsns", {}),
    "qwen3-moe-many": ("mellum", "qwen3_moe", "nfsn", {"num_experts": 12, "num_experts_per_tok": 3} | TIED),
    "unchanged-qwen3-moe": ("mellum", "qwen3_moe", "fff", {}),
    "mellum": ("mellum", "mellum", "sfnf", {"rope_parameters": BY_TYPE}),
    "olmo2": ("olmo2", "olmo2", "sfnf", {"head_dim": 16}),
    "olmo2-all": ("olmo2", "olmo2", "ssn", {"head_dim": 16} | TIED),
    "olmo2-none": ("olmo2", "olmo2", "fnf", {"head_dim": 16}),
    "olmo3": ("olmo2", "olmo3", "fffsnfff", {"head_dim": 16, "rope_parameters": BY_TYPE}),
    "olmo3-yarn": (
        "olmo2", "olmo3", "nffff",
        {"head_dim": 16, "rope_parameters": BY_TYPE | {"full_attention": YARN | {"rope_theta": 5e4}}},
    ),
    "olmo3-factor": (
        "olmo2", "olmo3", "nffff",
        {"head_dim": 16, "rope_parameters": BY_TYPE | {"full_attention": FACTOR | {"rope_theta": 5e4}}},
    ),
    "gemma2": ("gemma2", "gemma2", "ffnn", SMALL),
    "gemma2-all": ("gemma2", "gemma2", "fsfs", SMALL),
    "gemma3": ("gemma3", "gemma3_text", "ffnnff", SMALL),
    "gemma3-linear": (
        "gemma3", "gemma3_text", "fffnff",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": SAME}} | SMALL,
    ),
    "cohere2": ("cohere2", "cohere2", "fnfffn", {"head_dim": 16} | TIED),
}  # fmt: skip


def saved(folder: Path, family: str, letters: str, tokenizer: Any = None, **changes: Any) -> Path:
    """A boosted checkpoint with byte tokens."""
    model = boosted(letters, family, **({"vocab_size": 257} | changes))
    plan = PlanFile(
        model=info(len(letters)).model_copy(update={"model_type": family}),
        method="by hand",
        layers=layer_plans(letters),
    )
    save_boosted(model, tokenizer or byte_level_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    return folder


def test_cases_have_all_that_the_formats_claim() -> None:
    formats = {target.architecture: target for target in TARGETS.values() if target.architecture}
    assert formats.keys() == LAYOUTS.keys()
    for architecture, target in formats.items():
        cases = [case[1:] for case in CASES.values() if case[0] == architecture]
        check_cases(target, cases)
        check_ends(target, cases)


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found, key
    return found.contents()


def test_each_case_has_the_architecture_that_it_names() -> None:
    for name, (architecture, family, letters, changes) in CASES.items():
        layers = layer_plans(letters)
        config = boosted_config(tiny_config(family, len(letters), **changes), layers)
        assert find_target("gguf", config, layers).architecture == architecture, name


def test_the_file_says_the_same_plan(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "nfSs")
    reader = gguf.GGUFReader(run_export(folder, "gguf", kind="f32").folder)
    assert field(reader, "general.architecture") == "granite_swa"
    assert field(reader, "granite_swa.attention.sliding_window") == WINDOW
    assert field(reader, "granite_swa.attention.sliding_window_pattern") == [True, False, True, True]
    assert field(reader, "layerboost.plan") == (folder / "plan.yaml").read_text()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    sinks = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.layers.2.self_attn.sinks"]
    assert torch.equal(tensors["blk.2.attn_sinks.weight"], sinks)
    assert (tensors["blk.1.attn_sinks.weight"] == torch.tensor(-1e30)).all()
    assert not tensors["blk.0.attn_output.weight"].any()
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    tokens = byte_level_tokenizer().convert_ids_to_tokens(list(range(257)))
    assert field(reader, "tokenizer.ggml.tokens") == tokens


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("absent", "deci.attention.head_count_kv", [2, 0, 2, 0]),
        ("thinned", "deci.feed_forward_length", [96, 48, 96, 48]),
        ("qwen3", "step35.attention.sliding_window_pattern", [True, False, True, True]),
        ("olmo2", "olmo2.attention.sliding_window_pattern", 2),
        ("gemma2-all", "gemma2.attention.sliding_window_pattern", 0),
        # Its first full layer has no attention, so that every sixth is full.
        ("gemma3", "gemma3.attention.sliding_window_pattern", 6),
        ("smollm3", "granite_swa.attention.rope_pattern", [True, False, True, False, True]),
    ],
)
def test_each_architecture_says_the_same_plan(case: str, key: str, value: Any, tmp_path: Path) -> None:
    _, family, letters, changes = CASES[case]
    out = run_export(saved(tmp_path / "healed", family, letters, **changes), "gguf", kind="f32").folder
    assert field(gguf.GGUFReader(out), key) == value


def trained(splits: Any, **settings: Any) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of 380 tokens, its merges from a few words."""
    normalizer = settings.pop("normalizer", None)
    tokenizer = Tokenizer(models.BPE(**settings))
    if splits:
        tokenizer.pre_tokenizer = splits
    if normalizer:
        tokenizer.normalizer = normalizer
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if settings.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        initial_alphabet=[] if bytes_ else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Hello world it's 2023 2023 the thing that this caf\u00e9 costs in the x"] * 3, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    plain = json.loads(tokenizer.to_str())
    # Its bytes are no special tokens, and it needs to know that they stand for bytes.
    plain["added_tokens"] = plain["added_tokens"][:3]
    fast._tokenizer = Tokenizer.from_str(json.dumps(plain))
    return fast


def byte_level(*first: Any) -> Any:
    return pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not first)])


def split_by(pattern: str) -> Any:
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"))


REPLACE = normalizers.Replace(" ", "▁")
BYTES = {"byte_fallback": True, "unk_token": "<unk>"}
TOKENIZERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    name: ("gpt2", split_by(pattern), {"ignore_merges": whole}) for (pattern, whole), name in SPLITTERS.items()
} | {
    "gpt-2": ("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": ("gpt2", pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ]), {}),
    "mistral": ("llama", pre_tokenizers.Metaspace(prepend_scheme="always", split=False), BYTES),
    "never": ("llama", pre_tokenizers.Metaspace(prepend_scheme="never", split=False), BYTES),
    "llama-2": ("llama", None, BYTES | {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])}),
    "gemma": ("llama", pre_tokenizers.Split(" ", "merged_with_previous"), BYTES | {"normalizer": REPLACE}),
}  # fmt: skip


# Those that put <s> before a text.
OPENING = {"smollm", "tekken", "mistral"}


@needs_llama
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_text_the_same_way(name: str, tmp_path: Path) -> None:
    kind, splits, settings = TOKENIZERS[name]
    tokenizer = trained(splits, **settings)
    if name in OPENING:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = saved(tmp_path / "healed", "llama", "fS", tokenizer, vocab_size=380)
    out = Path(run_export(folder, "gguf", kind="f32").folder)
    reader = gguf.GGUFReader(out)
    assert field(reader, "tokenizer.ggml.model") == kind
    assert kind == "llama" or field(reader, "tokenizer.ggml.pre") == name
    ask = serving(out)
    for text in (SENTENCE, "that thing is the cafe", "2023 20231 x</s>the it's"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = ask("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        assert found == expected, text
    # llama.cpp's own defaults differ.
    assert ask("tokenize", {"content": "the x", "add_special": True})["tokens"] == tokenizer("the x")["input_ids"]


def test_tokens_are_the_same_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reads text as Latin-1 where LANG is en_US."""
    folder = saved(tmp_path / "healed", "llama", "fS", trained(byte_level()), vocab_size=380)
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "iso-8859-1")
    tokens = field(gguf.GGUFReader(run_export(folder, "gguf").folder), "tokenizer.ggml.tokens")
    assert {token: index for index, token in enumerate(tokens)}.items() >= trained(byte_level()).get_vocab().items()


@pytest.mark.parametrize(("kind", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2), ("q4_0", 0.3)])
def test_types_of_the_matrices(kind: str, most: float, tmp_path: Path) -> None:
    """Relative errors as large as the type, vectors in float32."""
    folder = saved(tmp_path / "healed", "llama", "fS")
    shown = json.loads(layerboost("export", folder, "--to", "gguf", "--type", kind, "--json").stdout)
    assert Path(shown["folder"]).name == f"healed-{kind}.gguf"
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    reader = gguf.GGUFReader(shown["folder"])
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert by_name["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert by_name["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert by_name["token_embd.weight"].tensor_type.name == ("Q8_0" if kind == "q4_0" else kind.upper())
    found = by_name["blk.0.ffn_up.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
    expected = state["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (values - expected).norm() / expected.norm() < most


@pytest.mark.parametrize(
    ("letters", "tokenizer", "changes", "kind", "message"),
    [
        ("fS", tiny_tokenizer(), {}, "f16", r"tokenizer of .* cannot be written to GGUF\nfound: WordLevel"),
        (
            "fS",
            byte_level_tokenizer(),
            {"rope_parameters": DYNAMIC},
            "f16",
            "gguf cannot hold this plan\nfound: .*rotary embeddings of type dynamic",
        ),
        (
            "fS",
            trained(pre_tokenizers.Metaspace(split=True), **BYTES),
            {"vocab_size": 380},
            "f16",
            "found: BPE, Metaspace, byte_fallback, unlike SentencePiece's; known",
        ),
        (
            "fS",
            trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
            {"vocab_size": 380},
            "f16",
            "found: BPE, ByteLevel, add_prefix_space; known",
        ),
        (
            "fS",
            trained(byte_level(), normalizer=normalizers.Lowercase()),
            {"vocab_size": 380},
            "f16",
            "found: BPE, ByteLevel, Lowercase; known",
        ),
        (
            "fS",
            trained(byte_level(pre_tokenizers.Split(Regex(next(iter(SPLITTERS))[0]), "removed")), ignore_merges=True),
            {"vocab_size": 380},
            "f16",
            "found: BPE, Split, ByteLevel, split Removed; known",
        ),
        ("fS", byte_level_tokenizer(), {}, "q3", "no GGUF type is called q3"),
        ("fh", byte_level_tokenizer(), {}, "f16", "layer 1 has full KV heads"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused(
    letters: str, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "healed", "llama", letters, tokenizer, **changes)
    with pytest.raises(ConfigError, match=message):
        run_export(folder, "gguf", kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "fS")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"blk.1.ffn_up.weight are too large for float16\ndo: .*bf16"):
        run_export(folder, "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]
    run_export(folder, "gguf", kind="bf16")


def llama_quantize(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a stand-in for llama.cpp's tool, which is no Python package, on the PATH, and nothing else."""
    tool = folder / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/bin:/usr/bin")


def test_k_quants_are_written_by_llama_cpps_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "healed", "llama", "fS")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no llama-quantize on the PATH\ndo: install llama.cpp"):
        run_export(folder, "gguf", kind="q4_k_m")
    llama_quantize(tmp_path, monkeypatch, f'cp "$1" "$2" && echo "$3" > {tmp_path}/asked')
    out = Path(run_export(folder, "gguf", kind="Q4_K_M").folder)
    assert out.name == "healed-q4_k_m.gguf"
    assert (tmp_path / "asked").read_text() == "Q4_K_M\n"
    # It is given the checkpoint's own values.
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "F32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked", "bin", "healed", out.name]


def test_a_tool_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "healed", "llama", "fS")
    llama_quantize(tmp_path, monkeypatch, 'echo half > "$2"; echo "unknown architecture" >&2; exit 3')
    with pytest.raises(LayerboostError, match="llama-quantize failed, with exit code 3\nfound: unknown architecture"):
        run_export(folder, "gguf", kind="q6_k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "healed"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), LayerboostError),
    ],
)
@pytest.mark.parametrize("to", ["gguf", "granite-swa", "decilm", "mlx"])
def test_an_export_that_ends_early_leaves_nothing(
    to: str, error: BaseException, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "healed", "llama", "fs")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if to == "gguf":
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    else:  # the last file
        monkeypatch.setattr("layerboost.exporting.stage.write_json", fail)
    with pytest.raises(raised):
        run_export(folder, to)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond a size: what is written fails as on a full one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("to", ["gguf", "granite-swa", "decilm", "mlx"])
def test_a_full_disk_is_one_message_and_leaves_nothing(to: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "fs")
    with files_of_at_most(100_000), pytest.raises(LayerboostError, match=r"cannot write .*\nfound: .*\ndo: .*folder"):
        run_export(folder, to)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_an_earlier_file_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    """One that cannot be made, or not to the end, leaves it as it is."""
    out = tmp_path / "model-f32.gguf"
    gguf_file(saved(tmp_path / "first", "llama", "fs"), out, "f32")
    earlier = out.read_bytes()
    second = saved(tmp_path / "second", "llama", "sf")
    with files_of_at_most(100_000), pytest.raises(LayerboostError, match="cannot write"):
        gguf_file(second, out, "f32")
    with pytest.raises(ConfigError, match="layer 1 has a sink"):
        gguf_file(saved(tmp_path / "third", "qwen3", "fS"), out, "f32")
    assert out.read_bytes() == earlier
    gguf_file(second, out, "f32")
    assert field(gguf.GGUFReader(out), "granite_swa.attention.sliding_window_pattern") == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", out.name, "second", "third"]


@needs_llama
@pytest.mark.parametrize("quoted", [str, lambda token: {"content": token, "__type": "AddedToken"}])
def test_a_text_opens_as_the_tokenizer_opens_it(quoted: Any, tmp_path: Path) -> None:
    """By the tokenizer itself: `bos_token` may be no string in its settings, and llama.cpp has its own defaults."""
    for kind, template in (("opens", "<s> $A"), ("bare", "$A")):
        for name in ("gpt-2", "mistral"):
            _, splits, settings = TOKENIZERS[name]
            tokenizer = trained(splits, **settings)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=template, special_tokens=[("<s>", 1)]
            )
            folder = saved(tmp_path / kind / name, "llama", "fS", tokenizer, vocab_size=380)
            said = json.loads((folder / "tokenizer_config.json").read_text())
            said["bos_token"] = quoted("<s>")
            (folder / "tokenizer_config.json").write_text(json.dumps(said))
            out = Path(run_export(folder, "gguf", kind="f32").folder)
            reader = gguf.GGUFReader(out)
            assert field(reader, "tokenizer.ggml.add_bos_token") == (kind == "opens")
            assert field(reader, "tokenizer.ggml.bos_token_id") == 1
            found = serving(out)("tokenize", {"content": "that thing", "add_special": True})["tokens"]
            assert found == tokenizer("that thing")["input_ids"]


def test_a_file_has_the_names_of_the_model_and_of_its_licence(tmp_path: Path) -> None:
    base, folder = "some/model", tmp_path / "healed"
    plan = PlanFile(model=info(2).model_copy(update={"name": base}), method="by hand", layers=layer_plans("fs"))
    link = "https://example.com/licence"
    licence = (("license", "other"), ("license_name", "mine"), ("license_link", link))
    for origin, name in ((Origin(base, licence), base), (Origin(None, licence[:1]), "model")):
        save_boosted(
            boosted("fs", vocab_size=257),
            byte_level_tokenizer(),
            plan,
            folder / name,
            recipe_yaml="schema_version: 1\n",
            origin=origin,
        )
        reader = gguf.GGUFReader(run_export(folder / name, "gguf").folder)
        assert field(reader, "general.name") == f"{name}, boosted"
        assert field(reader, "general.license") == "other"
    reader = gguf.GGUFReader(folder / "some" / "model-f16.gguf")
    assert field(reader, "general.license.name") == "mine"
    assert field(reader, "general.license.link") == link
    stock = tmp_path / "stock"
    tiny_model("llama", 2, vocab_size=257).save_pretrained(stock)
    byte_level_tokenizer().save_pretrained(stock)
    (stock / "README.md").write_text("---\nlicense: mit\n---\n")
    reader = gguf.GGUFReader(run_export(stock, "auto", kind="f16").folder)
    assert (field(reader, "general.name"), field(reader, "general.license")) == ("stock", "mit")


@needs_llama
@torch.no_grad()
def test_a_chat_is_answered_as_transformers_answers_it(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}a{% endfor %}"
    folder = saved(tmp_path / "healed", "llama", "fSns", tokenizer)
    ask = serving(Path(run_export(folder, "gguf", kind="f32").folder))
    chat = [{"role": "user", "content": "aab" * 10}]
    asked = {"messages": chat, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = ask("v1/chat/completions", asked)
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids) > WINDOW
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=-1)[0, len(ids) :]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected)


def test_what_precision_a_quantised_base_left_is_said(tmp_path: Path) -> None:
    base = run_export(saved(tmp_path / "base", "llama", "fs"), "gguf", kind="q8_0")
    assert base.base_type is None
    folder = tmp_path / "healed"
    plan = PlanFile(model=info(2).model_copy(update={"name": base.folder}), method="by hand", layers=layer_plans("fs"))
    save_boosted(boosted("fs", vocab_size=257), byte_level_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    found = run_export(folder, "gguf", kind="f32")
    assert found.base_type == "Q8_0"
    assert exported_rows(found)[1][-1] == "Q8_0"
    Path(base.folder).unlink()
    assert run_export(folder, "mlx").base_type == "unknown (the file is not there)"
    stock = saved(tmp_path / "stock", "llama", "ff")
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    plan.model = plan.model.model_copy(update={"name": str(stock)})
    write_plan(folder / "plan.yaml", plan)
    assert run_export(folder, "decilm").base_type == "fp8"


def test_the_type_of_a_base_from_the_hub_or_unpacked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run_export(saved(tmp_path / "base", "llama", "fs"), "gguf", kind="q4_0")
    unpacked = saved(tmp_path / "run" / "base", "llama", "ff")
    (unpacked / UNPACKED_FROM).write_text(f"{base.folder}\nabc\n")
    cached = tmp_path / "cache" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "healed", "llama", "fs")
    plan = read_plan(folder / "plan.yaml")
    for number, (name, expected) in enumerate(((str(unpacked), "Q4_0"), ("some/model", "fp8"), ("some/other", None))):
        plan.model = plan.model.model_copy(update={"name": name})
        write_plan(folder / "plan.yaml", plan)
        assert run_export(folder, "gguf", tmp_path / f"{number}.gguf").base_type == expected


def test_a_window_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "fs")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"max_position_embeddings": 8}))
    with pytest.raises(ConfigError, match="sliding_window 16, not 1 to 8 tokens"):
        run_export(folder, "gguf")


def test_a_boosted_checkpoint_without_its_plan_is_not_a_stock_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "healed", "llama", "fsns")
    (folder / "plan.yaml").unlink()
    with pytest.raises(ConfigError, match="is a boosted checkpoint without its plan"):
        run_export(folder, "gguf")
