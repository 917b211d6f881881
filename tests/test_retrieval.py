"""Retrieval prompts: exact length, the fact at its depth, the answer at the end."""

from __future__ import annotations

import pytest
import torch
from tiny import byte_tokenizer, opening_tokenizer
from transformers import PreTrainedTokenizerFast

from layerboost.errors import ConfigError
from layerboost.recipe import RetrievalForm
from layerboost.retrieval import COPIED, FORMS, KEYS, KINDS, REPEATED, retrieval_prompts

FILLER = torch.full((4096,), byte_tokenizer()("x")["input_ids"][0])


def text_of(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids.tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_holds_its_fact_and_ends_with_its_answer(kind: RetrievalForm) -> None:
    tokenizer = byte_tokenizer()
    prompts = retrieval_prompts(tokenizer, FILLER, kind, 600, 4, seed=1)
    assert prompts.ids.shape == (4, 600)
    assert sorted(prompts.depths) == [0.125, 0.375, 0.625, 0.875]
    for row, count, depth in zip(prompts.ids, prompts.answers, prompts.depths, strict=True):
        answer = text_of(tokenizer, row[-count:]).strip()
        assert len(answer) == 5
        asked, body = text_of(tokenizer, row[:-count]).split("\n\n")[-1], text_of(tokenizer, row[:-count])
        fact = body.index(f"{asked.strip()} {answer}.")
        before = body[:fact]
        assert before.count("x") == pytest.approx(depth * body.count("x"), abs=2)


@pytest.mark.parametrize("kind", [kind for kind, form in FORMS.items() if form.facts > 1])
def test_every_form_states_its_facts_in_its_own_words(kind: RetrievalForm) -> None:
    """The answer is the value that was stated for the key asked for, and no other form has the wording."""
    tokenizer, form = byte_tokenizer(), FORMS[kind]
    prompts = retrieval_prompts(tokenizer, FILLER, kind, 700, 3, seed=1)
    for row, count in zip(prompts.ids, prompts.answers, strict=True):
        body, answer = text_of(tokenizer, row[:-count]), text_of(tokenizer, row[-count:]).strip()
        [key] = [key for key in KEYS if body.endswith(form.question.format(key=key))]
        assert form.fact.format(key=key, value=answer) in body
        assert sum(form.fact.format(key=other, value="|").partition("|")[0] in body for other in KEYS) == form.facts
    wordings = [other.fact.partition("{value}")[0] for other in FORMS.values() if other.facts]
    assert len(set(wordings)) == len(wordings)


def test_copying_repeats_a_passage_at_its_depth() -> None:
    filler = torch.randint(97, 123, (4096,), generator=torch.Generator().manual_seed(0))
    prompts = retrieval_prompts(byte_tokenizer(), filler, "copy", 600, 4, seed=1)
    for row, count, depth in zip(prompts.ids.tolist(), prompts.answers, prompts.depths, strict=True):
        assert (len(row), count) == (600, COPIED)
        passage = row[-(REPEATED + COPIED) :]
        [start] = [index for index in range(500) if row[index : index + len(passage)] == passage]
        assert start == pytest.approx(depth * 530, abs=5)
    with pytest.raises(ConfigError, match="too short to hold"):
        retrieval_prompts(byte_tokenizer(), filler, "copy", 70, 1, seed=0)


def test_prompts_repeat_from_their_seed_and_differ_in_everything_else() -> None:
    tokenizer = byte_tokenizer()
    same = [retrieval_prompts(tokenizer, FILLER, "passkey", 300, 3, seed=seed).ids for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    assert len({tuple(row.tolist()) for row in same[0]}) == 3


def test_batches_keep_every_row_with_its_answer() -> None:
    prompts = retrieval_prompts(byte_tokenizer(), FILLER, "passkey", 300, 5, seed=0)
    parts = prompts.batches(2)
    assert [len(part.ids) for part in parts] == [2, 2, 1]
    assert sum((part.answers for part in parts), ()) == prompts.answers
    assert torch.equal(torch.cat([part.ids for part in parts]), prompts.ids)


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="too short to hold"):
        retrieval_prompts(byte_tokenizer(), FILLER, "key_value", 100, 1, seed=0)


def test_prompts_open_as_the_tokenizer_opens_a_text() -> None:
    filler = torch.full((1000,), 5)
    prompts = retrieval_prompts(opening_tokenizer(), filler, "passkey", 250, 4, seed=0)
    assert prompts.ids.shape == (4, 250)
    assert prompts.ids[:, 0].eq(0).all()
    assert prompts.ids[:, 1:].ne(0).all()
