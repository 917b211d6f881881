"""Reasons read from the source of the installed Transformers."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerboost.model.families import FAMILIES, WRAPPERS
from layerboost.model.unsupported import NO_ROW, unsupported_families, why_unsupported

REASONS = {
    "a wrapper of a language model": ["gemma3n", "gemma4"],
    "an encoder, or a decoder with cross-attention": ["bert", "bart", "gpt2", "gpt-sw3", "mllama"],
    "multi-head latent attention": ["deepseek_v3", "minicpm3", "longcat_flash"],
    "no attention": ["mamba", "mamba2", "falcon_mamba", "xlstm"],
    "sparse attention by an indexer": ["minimax_m3_vl_text", "deepseek_v4", "qwen4_exp_text"],
    "a mixture of attention heads": ["jetmoe"],
    "layers with different numbers of heads": ["laguna"],
    "chunked attention": ["llama4_text"],
    "convolutions in its attention": ["zaya", "inkling_text"],
    "attention with a mask that it computes": ["doge"],
    "layers that share keys and values": ["gemma3n_text"],
    "layers that share one attention": ["zamba", "zamba2"],
    "layers that run several times": ["hrm_text"],
    "sinks of its own": ["granite_swa", "gpt_oss"],
    "differential attention": ["diffllama"],
    "layers of attention alone, without an MLP": ["nemotron_h"],
    "layer types that its config computes, where a plan would be recorded": ["jamba", "bamba", "recurrent_gemma"],
    "a cache of its own": ["minimax"],
    "attention and the norm of its MLP in one module": ["dbrx"],
    "checkpoints that are all quantised": ["bitnet"],
    "projections in modules of their own": ["moshi"],
    "the language model of a wrapper without a row": ["aria_text", "cohere_compass_text"],
    "no num_key_value_heads in its config": ["gpt_neox", "opt", "persimmon"],
    "its attention does not go through Transformers' attention interface": ["bloom"],
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_are_read_from_the_source(reason: str) -> None:
    assert {name: why_unsupported(name) for name in REASONS[reason]} == dict.fromkeys(REASONS[reason], reason)


def test_every_causal_lm_is_supported_or_has_a_reason() -> None:
    found = unsupported_families()
    assert found.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - FAMILIES.keys() - WRAPPERS.keys()
    assert {*REASONS} <= {*found.values()} <= {*REASONS, NO_ROW}
    if Version(transformers.__version__) < Version("5.20"):  # later ones have families that are new to this table
        assert NO_ROW not in found.values()


def test_what_transformers_does_not_have_has_no_reason() -> None:
    assert why_unsupported("nobody") is None
    assert why_unsupported("llama") is None
