"""What a probe says of whole plans, batches and prompts, against full forward passes and definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import IDS, PROMPTS, naive
from tiny import byte_tokenizer, layer_plans, save_text, save_tiny, sinks_of, tiny_model

from layerboost.errors import LayerboostError
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import apply_plan
from layerboost.probes.calibration import filler_tokens, load_prompts
from layerboost.probes.metrics import answer_scores, check_finite, head_statistics
from layerboost.probes.probe import TextProbe, first_difference
from layerboost.recipe import parse_recipe
from layerboost.schemas.plan import LayerPlan

WINDOW = 8


def sinks(plan: LayerPlan) -> torch.Tensor:
    return torch.linspace(-2, 2, sinks_of(plan)) + plan.layer


@settings(deadline=None, max_examples=10)
@given(letters=st.lists(st.text("fsSnhH", min_size=4, max_size=4), min_size=1, max_size=3), batch=st.integers(1, 5))
def test_any_plans_lose_what_full_forward_passes_say_in_batches_of_any_size(letters: list[str], batch: int) -> None:
    base = tiny_model(layers=4)
    probe = TextProbe(LayerStream(base, sinks), list(IDS.split(batch)), PROMPTS.batches(batch), (WINDOW,))
    for plan, losses in zip(letters, probe.losses([layer_plans(each, WINDOW) for each in letters]), strict=True):
        layers = layer_plans(plan, WINDOW)
        changed = apply_plan(
            tiny_model(layers=4), layers, {entry.layer: sinks(entry) for entry in layers if entry.sink}
        )
        expected = naive(base, changed)
        for metric in ("kl", "nll", "retrieval"):
            torch.testing.assert_close(losses[metric], expected[metric], atol=1e-4, rtol=1e-3)
        assert losses["kl"].min() > -1e-5


@given(one=st.text("fsn", min_size=3, max_size=3), other=st.text("fsn", min_size=3, max_size=3))
def test_first_difference(one: str, other: str) -> None:
    differs = [a != b for a, b in zip(one, other, strict=True)]
    found = first_difference(layer_plans(one), layer_plans(other))
    assert found == (differs.index(True) if any(differs) else 2)


@torch.no_grad()
def test_answers_are_scored_where_they_are() -> None:
    base = tiny_model(layers=2)
    hidden = base.model(PROMPTS.ids).last_hidden_state
    logs = base(PROMPTS.ids).logits.log_softmax(-1)
    found, exact = answer_scores(base, PROMPTS, hidden)
    for row, tokens in enumerate(PROMPTS.answers):
        answer = PROMPTS.ids[row, -tokens:]
        predicted = logs[row, -tokens - 1 : -1]
        torch.testing.assert_close(found[row], predicted.gather(-1, answer[:, None]).sum())
        assert bool(exact[row]) == torch.equal(predicted.argmax(-1), answer)
    # A model that answers rightly: its own greedy continuation as the answer.
    greedy = PROMPTS.ids.clone()
    for place in (2, 1):
        greedy[:, -place] = base(greedy).logits[:, -place - 1].argmax(-1)
    right = type(PROMPTS)("passkey", greedy, (2,) * 4, PROMPTS.depths)
    assert answer_scores(base, right, base.model(greedy).last_hidden_state)[1].all()


@given(rows=st.integers(1, 5), vocabulary=st.integers(2, 70), block=st.integers(1, 80))
@settings(deadline=None)
def test_statistics_of_logits_do_not_depend_on_the_block_of_the_vocabulary(
    rows: int, vocabulary: int, block: int
) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    hidden, weight = torch.randn(rows, 6, generator=draw), torch.randn(vocabulary, 6, generator=draw)
    tokens = torch.randint(vocabulary, (rows,), generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerboost.probes.metrics.VOCABULARY", block)
        lse, most, picked = head_statistics(hidden, weight, (tokens,))
    logits = hidden @ weight.T
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(most, logits.amax(-1))
    torch.testing.assert_close(picked, logits.gather(-1, tokens[:, None])[:, 0])


def test_prompts_come_half_of_each_kind_after_the_text_that_is_skipped(tmp_path: Path) -> None:
    values = {
        "model": str(save_tiny(tmp_path / "model")),
        "text": {"source": str(save_text(tmp_path / "text.jsonl", words=60_000)), "sequence_tokens": 64},
        "measure": {"retrieval_prompts": 6, "retrieval_tokens": 512, "tokens": 64, "batch_sequences": 16},
    }
    recipe = parse_recipe(values, "the test")
    assert filler_tokens(recipe) == 6 * 512
    batches = load_prompts(recipe, byte_tokenizer_with_end(), tmp_path)
    assert [batch.kind for batch in batches] == ["passkey", "passkey", "key_value", "key_value"]
    assert [batch.ids.shape for batch in batches] == [(2, 512), (1, 512), (2, 512), (1, 512)]
    assert all(0 < depth < 1 for batch in batches for depth in batch.depths)
    none = recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"retrieval_prompts": 0})})
    assert load_prompts(none, byte_tokenizer_with_end(), tmp_path) == []


def byte_tokenizer_with_end() -> object:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused_by_name(value: float) -> None:
    with pytest.raises(LayerboostError, match="kl of layer 3"):
        check_finite("layer 3", {"nll": 0.1, "kl": value}, torch.float32)
