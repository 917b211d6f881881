"""Properties that hold for every input: packing, plans in configs, serving flags, KV groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WINDOW, info, layer_plans, plan_file, tiny_model
from transformers import AutoConfig

from layerboost.costs.memory import CacheSettings, admission_bytes, cached, groups, module_heads, resident_bytes
from layerboost.engines.vllm import unless_given
from layerboost.model.surgery import boosted_config, recorded_plan
from layerboost.schemas.plan import LayerPlan, read_plan, write_plan
from layerboost.text import _pack

OPENING = st.sampled_from([[], [0]])


@given(
    documents=st.lists(st.lists(st.integers(3, 199), max_size=40), max_size=12),
    opening=OPENING,
    length=st.integers(2, 16),
)
def test_packing_loses_no_token_and_opens_every_row_and_document(
    documents: list[list[int]], opening: list[int], length: int
) -> None:
    rows: list[list[int]] = [[]]
    for document in documents:
        _pack(rows, [*document, 1], opening, length)
    assert all(len(row) == length for row in rows[:-1])
    assert len(rows[-1]) < length
    assert all(row[: len(opening)] == opening for row in rows if row)
    packed = [token for row in rows for token in row if token != 0]
    assert packed == [token for document in documents for token in [*document, 1]]
    if opening:
        # A document opens with the token unless its row begins with it.
        tokens = [token for row in rows for token in row]
        assert all(after == 0 for token, after in itertools.pairwise(tokens) if token == 1)


LETTERS = st.text("fsSnhH", min_size=2, max_size=5).filter(lambda letters: set(letters) != {"n"})


@settings(deadline=None, max_examples=20)
@given(letters=LETTERS, window=st.integers(1, 64))
def test_a_plan_survives_its_file_and_a_checkpoints_config(
    letters: str, window: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    plan = plan_file(letters, window)
    write_plan(folder / "plan.yaml", plan)
    assert read_plan(folder / "plan.yaml") == plan
    boosted_config(tiny_model(layers=len(letters)).config, plan.layers).save_pretrained(folder)
    assert recorded_plan(AutoConfig.from_pretrained(folder)) == plan.layers


FLAGS = ("--max-num-batched-tokens", "--block-size", "--max-num-seqs", "--port", "--seed", "--no-such-flag")
NUMBER = st.integers(1, 9999).map(str)


@given(
    given_flags=st.dictionaries(st.sampled_from(FLAGS), NUMBER),
    advised=st.dictionaries(st.sampled_from(FLAGS[:4]), NUMBER),
    joined=st.booleans(),
    spell=st.sampled_from([str, lambda flag: "--" + flag[2:].replace("-", "_")]),
)
def test_flags_that_are_given_win_over_advised_ones_and_the_others_stay(
    given_flags: dict[str, str], advised: dict[str, str], joined: bool, spell: Callable[[str], str]
) -> None:
    pairs = [(spell(flag), number) for flag, number in given_flags.items()]
    words = [f"{flag}={number}" for flag, number in pairs] if joined else [word for pair in pairs for word in pair]
    missing = [(flag, number) for flag, number in advised.items() if flag not in given_flags]
    assert unless_given(words, advised) == tuple(word for pair in missing for word in pair)


@given(full=st.integers(0, 128), sliding=st.integers(0, 128))
def test_kv_groups_hold_every_layer_and_pad_less_than_a_group_of_each_kind(full: int, sliding: int) -> None:
    found = groups(full, sliding)
    assert found.full * found.size >= full
    assert found.sliding * found.size >= sliding
    if found.size:
        assert found.full * found.size - full < found.size
        assert found.sliding * found.size - sliding < found.size
    assert (found.full == 0) == (full == 0)


@given(
    letters=st.text("fsnh", min_size=1, max_size=12),
    context=st.integers(WINDOW, 4096),
    batched=st.sampled_from([128, 512, 2048]),
)
def test_a_longer_context_never_needs_less_kv_memory(letters: str, context: int, batched: int) -> None:
    model, layers, engine = info(len(letters)), layer_plans(letters), CacheSettings(batched, 32, 1)
    for count in (admission_bytes, resident_bytes):
        assert count(model, layers, context, engine) <= count(model, layers, 2 * context, engine)
    assert resident_bytes(model, layers, context, engine) <= admission_bytes(model, layers, context, engine)


@given(counts=st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_attention_modules_hold_every_kv_head_once_and_are_as_large_as_they_can_be(counts: list[int]) -> None:
    """`counts`: how many of its 8 KV heads each layer keeps full, the first ones."""
    layers = [
        LayerPlan(layer=layer, attention="sliding", window=16, full_kv_heads=tuple(range(full))).normalized(8)
        for layer, full in enumerate(counts)
    ]
    size = module_heads(8, layers)
    full, windowed = cached(layers, 8, size)
    assert (full * size, windowed * size) == (sum(counts), 8 * len(counts) - sum(counts))
    assert any(count % (2 * size) or (8 - count) % (2 * size) for count in counts) or size == 8
