"""GGUF exports: what the file says, and the log-probabilities of llama.cpp itself."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_pipeline import layerboost
from tiny import WINDOW, boosted, byte_level_tokenizer, info, layer_plans, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from layerboost.errors import ConfigError
from layerboost.exporting.stage import run_export
from layerboost.exporting.targets import TARGETS
from layerboost.model.checkpoint import save_boosted
from layerboost.schemas.plan import PlanFile

IDS = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(1)).tolist()
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "nfSsn", {}),
    "tied": ("llama", "fSns", {"tie_word_embeddings": True}),
    "mistral": ("mistral", "sSnf", {}),
    "ministral": ("ministral", "Sfnf", {}),
    "granite": ("granite", "nSfs", {}),
}


def saved(folder: Path, family: str, letters: str, tokenizer: Any = None, **changes: Any) -> Path:
    """A boosted checkpoint with byte tokens."""
    model = boosted(letters, family, vocab_size=257, **changes)
    plan = PlanFile(model=info(len(letters)), method="by hand", layers=layer_plans(letters))
    save_boosted(model, tokenizer or byte_level_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    return folder


def test_cases_cover_every_family() -> None:
    assert {family for family, _, _ in CASES.values()} == set(TARGETS["gguf"].families)


def answered(file: Path, prompts: list[list[int]]) -> list[dict[int, float]]:
    """llama.cpp's log-probabilities of every next token."""
    llama = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_batch, params.n_ubatch, params.warmup = 256, 64, 64, False
    params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server, found = llama.Server(params), []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": 257, "temperature": 0, "post_sampling_probs": False}
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
        with urllib.request.urlopen(request) as answer:
            [first] = json.load(answer)["completion_probabilities"]
        found.append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
    return found


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llama_cpp_gives_the_same_log_probabilities(case: str, tmp_path: Path) -> None:
    family, letters, changes = CASES[case]
    folder = saved(tmp_path / "healed", family, letters, **changes)
    out = Path(run_export(folder, "gguf", kind="f32").folder)
    prompts = [IDS[:length] for length in (5, WINDOW, WINDOW + 1, 40, 60)]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for prompt, found in zip(prompts, answered(out, prompts), strict=True):
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert len(found) == 257
        assert max(abs(expected[token] - value) for token, value in found.items()) < 1e-3


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found, key
    return found.contents()


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
            {"rope_parameters": ROPE},
            "f16",
            "gguf cannot hold this plan\nfound: rotary embeddings of type linear",
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
