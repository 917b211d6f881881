from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import boosted, byte_tokenizer, tiny_model
from tiny_bench import tiny_model as bench_model

from layerboost.evaluating.held_out import (
    compare_positions,
    compare_retrieval,
    hidden_states,
    position_edges,
    position_losses,
    retrieval_answers,
    text_losses,
)
from layerboost.retrieval import FORMS, retrieval_prompts


def test_buckets_double_up_to_the_length() -> None:
    assert position_edges(1024) == [0, 128, 256, 512, 1024]
    assert position_edges(1500) == [0, 128, 256, 512, 1024, 1500]
    assert position_edges(100) == [0, 100]


@torch.no_grad()
def test_losses_by_position_are_those_of_whole_logits() -> None:
    model, ids = tiny_model(layers=2), torch.randint(3, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    done: list[float] = []
    found = position_losses(model, ids, done.append)
    assert sum(done) == ids.numel()
    nll = -model(ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for row, losses in zip(nll, found, strict=True):
        expected = [row[:127].mean(), row[127:255].mean(), row[255:].mean()]
        assert losses == pytest.approx([float(value) for value in expected], rel=1e-4)


@torch.no_grad()
def test_answers_are_scored_as_the_model_alone_scores_them() -> None:
    tokenizer, model = byte_tokenizer(), tiny_model(layers=2, vocab_size=256)
    filler = torch.randint(97, 120, (4000,), generator=torch.Generator().manual_seed(0))
    prompts = [retrieval_prompts(tokenizer, filler, kind, 450, 3, 0) for kind in FORMS]
    found = retrieval_answers(model, prompts, lambda tokens: None)
    assert [(answer["kind"], answer["length_tokens"]) for answer in found] == [
        (kind, 450) for kind in FORMS for _ in range(3)
    ]
    for answer, (part, row) in zip(found, [(part, row) for part in prompts for row in range(3)], strict=True):
        ids, count = part.ids[row], part.answers[row]
        logits = model(ids[None]).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, ids[-count:, None]).sum()
        assert answer["log_probability"] == pytest.approx(float(expected), rel=1e-4)
        assert answer["depth"] == part.depths[row]


@torch.no_grad()
def test_a_window_loses_nothing_within_itself_and_something_beyond() -> None:
    ids = torch.randint(3, 200, (4, 400), generator=torch.Generator().manual_seed(0))
    losses: dict[str, Any] = {
        name: {"edges": position_edges(400), "nll": position_losses(model, ids, lambda tokens: None)}
        for name, model in (("base", tiny_model(layers=3)), ("sliding", boosted("sss", window=128)))
    }
    compared = compare_positions(losses)
    assert compared.edges == [0, 128, 256, 400]
    first, *rest = compared.difference["sliding"]
    assert abs(first.mean) < 1e-5
    assert all(abs(bucket.mean) > 1e-4 for bucket in rest)
    assert [len(means) for means in compared.models.values()] == [3, 3]


def answers(exact: list[bool], kind: str = "passkey", length: int = 256) -> list[dict[str, Any]]:
    count = len(exact)
    return [
        {
            "kind": kind,
            "length_tokens": length,
            "depth": (index + 0.5) / count,
            "log_probability": -0.5 if hit else -9.0,
            "exact": hit,
        }
        for index, hit in enumerate(exact)
    ]


def test_only_what_the_base_is_able_to_do_is_judged() -> None:
    base = answers([True] * 8) + answers([False] * 7 + [True], "key_value")
    healed = answers([False] * 4 + [True] * 4) + answers([False] * 8, "key_value")
    found = compare_retrieval({"base": base, "healed": healed})
    by_kind = {group.kind: group for group in found.groups}
    assert by_kind["passkey"].able
    assert not by_kind["key_value"].able
    assert found.able
    assert found.able.prompts == 8
    assert found.able.difference["healed"].mean == -0.5
    assert by_kind["key_value"].log_probability["base"].mean == pytest.approx((-9 * 7 - 0.5) / 8)
    assert by_kind["key_value"].log_probability_difference["healed"].mean == pytest.approx(-8.5 / 8)
    quarters = by_kind["passkey"].depths
    assert [quarter.exact for quarter in quarters] == [{"base": 1.0, "healed": value} for value in (0, 0, 1, 1)]
    assert compare_retrieval({"base": base[8:], "healed": healed[8:]}).able is None


@pytest.fixture
def batches() -> list[torch.Tensor]:
    ids = torch.randint(0, 300, (3, 100), generator=torch.Generator().manual_seed(1))
    return list(torch.split(ids, 2))


@torch.no_grad()
def test_losses_are_those_of_whole_logits(batches: list[torch.Tensor]) -> None:
    base, changed = bench_model(0), bench_model(1)
    done: list[float] = []
    hidden = hidden_states(base, batches, done.append)
    found = text_losses(base, hidden, changed, batches, done.append)
    assert sum(done) == 2 * 300
    ids = torch.cat(batches)
    p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (base, changed))
    labels = ids[:, 1:, None]
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1).mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll.double(), -q.gather(-1, labels)[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    alone = text_losses(base, hidden, None, batches, done.append)
    torch.testing.assert_close(alone.nll.double(), -p.gather(-1, labels)[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    assert not alone.kl.any()
