from __future__ import annotations

import re

import pytest
import torch
from tiny import opening_tokenizer, tiny_tokenizer

from layerboost import retrieval
from layerboost.healing.recall import CUE, INTRODUCTIONS, LONGEST, NAMES, SHORTEST, TOPICS, with_recall


class Words:
    """One token per word, digit or other character; `words` are those seen, by id."""

    eos_token_id, bos_token_id = 0, None

    def __init__(self) -> None:
        self.words = ["<end>"]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        found = re.findall(r" ?[A-Za-z']+| ?\d|\W", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in found]}

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(self.words[index] for index in ids.tolist())


LENGTH = 1200


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


@pytest.fixture(scope="module")
def rows(words: Words) -> list[torch.Tensor]:
    # Made-up words of one to five letters, none twice in a row, so that a passage is in one place.
    names = [" " + "".join(chr(97 + (index * step) % 26) for step in (1, 3, 7, 11, 17)) + "q" for index in range(26)]
    draw = torch.Generator().manual_seed(0)
    made = [words("".join(names[int(n)] for n in torch.randint(26, (LENGTH,), generator=draw))) for _ in range(20)]
    ids = [torch.tensor(each["input_ids"]) for each in made]
    for row in ids:
        row[500] = 0
    return ids


def spans(answers: torch.Tensor) -> list[range]:
    """Return the tokens of each answer: those that follow a run of marked positions."""
    at = [index for index, marked in enumerate(answers.tolist()) if marked]
    starts = [index for index in at if index - 1 not in at]
    return [range(start + 1, next(end for end in range(start, LENGTH) if end not in at) + 1) for start in starts]


def test_a_fraction_asks_for_what_was_read_before(words: Words, rows: list[torch.Tensor]) -> None:
    found, answers = with_recall(rows, words, 0.25, seed=3)
    changed = [row for row in range(20) if not torch.equal(found[row], rows[row])]
    assert changed == [3, 7, 11, 15, 19]
    assert [len(row) for row in found] == [len(each) for each in answers] == [LENGTH] * 20
    assert [row for row in range(20) if answers[row].any()] == changed
    again, other = (with_recall(rows, words, 0.25, seed=seed)[0] for seed in (3, 4))
    assert torch.equal(torch.stack(found), torch.stack(again))
    assert not torch.equal(torch.stack(found), torch.stack(other))


def test_every_answer_was_read_before_at_distances_up_to_the_length(words: Words, rows: list[torch.Tensor]) -> None:
    found, marks = with_recall(rows, words, 1, seed=0)
    facts, passages, distances = 0, 0, []
    for ids, answers in zip(found, marks, strict=True):
        assert ids.ne(0).all()
        for span in spans(answers):
            answer, before = words.decode(ids[span.start : span.stop]), words.decode(ids[: span.start])
            if len(span) > 7:
                assert SHORTEST - CUE <= len(span) <= LONGEST - CUE
                passage = words.decode(ids[span.start - CUE : span.stop])
                place = before.find(passage)
                assert any(
                    before[: -len(words.decode(ids[span.start - CUE : span.start]))].endswith(words_before)
                    for words_before in INTRODUCTIONS
                )
                passages += 1
            else:
                # The question names the person, and so does the statement; a town or an animal may have others.
                [name] = {each for each in NAMES if each in words.decode(ids[span.start - 12 : span.start])}
                stated = [match.start() for match in re.finditer(re.escape(answer.strip()), before)]
                place = next((at for at in stated if name in before[max(0, at - 60) : at + 60]), -1)
                facts += 1
            assert place >= 0
            distances.append((len(before) - place) / len(words.decode(ids)))
    assert facts > 2 * passages > 50
    assert max(distances) > 0.9
    assert sum(distance > 0.5 for distance in distances) > len(distances) / 5


def test_each_length_has_its_fraction(words: Words, rows: list[torch.Tensor]) -> None:
    mixed = [part for row in rows[:4] for part in (row[:400], row[400:800], row)]
    _, answers = with_recall(mixed, words, 0.5, seed=0)
    assert [bool(each.any()) for each in answers] == [False, True, False, False, True, True] * 2


def test_a_sequence_keeps_its_opening_and_has_no_other() -> None:
    ids = torch.full((1000,), 5)
    ids[[0, 300, 301]] = torch.tensor([0, 1, 0])
    [row], [answers] = with_recall([ids], opening_tokenizer(), 1, seed=0)
    assert row[0] == 0
    assert row[1:].ne(0).all()
    assert answers.any()
    assert not torch.equal(row, ids)


def test_no_share_and_short_sequences_change_nothing(words: Words, rows: list[torch.Tensor]) -> None:
    for given, share in ((rows, 0), ([row[:30] for row in rows], 1)):
        found, answers = with_recall(given, words, share, seed=0)
        assert torch.equal(torch.stack(found), torch.stack(given))
        assert not torch.stack(answers).any()
    assert torch.stack(with_recall(rows, tiny_tokenizer(), 1, seed=0)[0]).shape == (20, LENGTH)


def test_the_wording_is_not_that_of_the_retrieval_tests() -> None:
    tested = " ".join((*(form.fact + form.question for form in retrieval.FORMS.values()), *retrieval.KEYS)).lower()
    wordings = [*INTRODUCTIONS, *(each for topic in TOPICS for each in (*topic.statements, *topic.questions))]
    values = [value for topic in TOPICS for value in topic.values]
    for words in (*wordings, *values, *NAMES):
        plain = words.replace("{name}", "").replace("{value}", "").lower()
        assert not [word for word in re.findall(r"[a-z]{5,}", plain) if word in tested]
        assert not re.search(r"[{}=#]", plain)
    # A passage to copy follows empty lines there.
    assert not [words for words in wordings if "\n\n" in words]
