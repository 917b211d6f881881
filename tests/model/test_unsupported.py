"""Reasons read from the source of the installed Transformers."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerboost.model.families import FAMILIES, WRAPPERS
from layerboost.model.unsupported import unsupported_families, why_unsupported

REASONS = {
    "a wrapper of a language model": ["gemma3n", "gemma4"],
    "an encoder, or a decoder with cross-attention": ["bert", "bart", "gpt2", "mllama"],
    "multi-head latent attention": ["deepseek_v3", "minicpm3"],
    "a hybrid with layers of another kind": ["jamba", "falcon_h1", "bamba", "mamba", "recurrent_gemma"],
    "sparse attention by an indexer": ["minimax_m3_vl_text", "deepseek_v4"],
    "a mixture of attention heads": ["jetmoe"],
    "layers with different numbers of heads": ["laguna"],
    "chunked attention": ["llama4_text"],
    "convolutions in its attention": ["zaya"],
    "attention with a mask that it computes": ["doge"],
    "layers that share keys and values": ["gemma3n_text"],
    "layers that run several times": ["hrm_text"],
    "sinks of its own": ["granite_swa", "gpt_oss"],
    "differential attention": ["diffllama"],
    "not tested yet": ["gpt_neox", "opt", "dbrx"],
    "its attention does not go through Transformers' attention interface": ["bloom", "gptj"],
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_are_read_from_the_source(reason: str) -> None:
    assert {name: why_unsupported(name) for name in REASONS[reason]} == dict.fromkeys(REASONS[reason], reason)


def test_every_causal_lm_is_supported_or_has_a_reason() -> None:
    found = unsupported_families()
    assert found.keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - FAMILIES.keys() - WRAPPERS.keys()
    assert set(found.values()) == set(REASONS)


def test_what_transformers_does_not_have_has_no_reason() -> None:
    assert why_unsupported("nobody") is None
    assert why_unsupported("llama") is None
