from __future__ import annotations

import re

import torch
from tiny import opening_tokenizer, tiny_tokenizer

from layerboost import retrieval
from layerboost.healing.recall import NAMES, TEMPLATES, with_recall


class Letters:
    """One token a letter."""

    eos_token_id, bos_token_id = 0, None

    def __call__(self, words: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in words]}


IDS = torch.full((20, 3000), ord("x"))
IDS[:, 500] = 0


def test_facts_are_stated_before_they_are_asked_for() -> None:
    found = with_recall(list(IDS), Letters(), 0.25, seed=3)
    changed = [row for row in range(20) if not torch.equal(found[row], IDS[row])]
    assert changed == [3, 7, 11, 15, 19]
    assert [len(row) for row in found] == [3000] * 20
    for row in changed:
        text = "".join(map(chr, found[row].tolist()))
        values = re.findall(r"\d+", text)
        assert len(values) >= 4
        assert all(values.count(value) == 2 for value in values)
        for value in set(values):
            first, second = (match.start() for match in re.finditer(value, text))
            before, after = text[max(0, first - 60) : first + 60], text[second - 60 : second + 60]
            assert any(name in before and name in after for name in NAMES)
    again, other = (with_recall(list(IDS), Letters(), 0.25, seed=seed) for seed in (3, 4))
    assert torch.equal(torch.stack(found), torch.stack(again))
    assert not torch.equal(torch.stack(found), torch.stack(other))


def test_a_sequence_keeps_its_opening_and_has_no_other() -> None:
    ids = torch.full((1, 1000), 5)
    ids[0, [0, 300, 301]] = torch.tensor([0, 1, 0])
    [row] = with_recall(list(ids), opening_tokenizer(), 1, seed=0)
    assert row[0] == 0
    assert row[1:].ne(0).all()
    assert not torch.equal(row, ids[0])


def test_no_share_and_short_sequences_change_nothing() -> None:
    assert torch.equal(torch.stack(with_recall(list(IDS), Letters(), 0, seed=0)), IDS)
    assert torch.equal(torch.stack(with_recall(list(IDS[:, :60]), Letters(), 1, seed=0)), IDS[:, :60])
    assert torch.stack(with_recall(list(IDS), tiny_tokenizer(), 1, seed=0)).shape == IDS.shape


def test_the_wording_is_not_that_of_the_retrieval_tests() -> None:
    tested = " ".join((*(form.fact + form.question for form in retrieval.FORMS.values()), *retrieval.KEYS)).lower()
    for statement, question in TEMPLATES:
        for words in (statement, question):
            kept = [
                word for word in re.findall(r"[a-z]{5,}", words.format(name="", value="").lower()) if word in tested
            ]
            assert not kept
