from __future__ import annotations

import pytest
import torch

from layerboost.errors import ConfigError
from layerboost.healing.data import Data, batch_of_process, check_lengths, cut, grouped, lengths_of
from layerboost.recipe import Heal, parse_recipe

CPU = torch.device("cpu")
# The openings of 9 in rows of 16 tokens, cut in turn into sequences of 4 and of 16 tokens.
MIXED = cut(torch.arange(100, 180).view(5, 16), (4, 16), (9,))


def rows(data: Data, step: int) -> list[list[list[int]]]:
    """Return the ids of a step's batches."""
    return [batch["input_ids"].tolist() for batch in data.batches(step, CPU)]


def test_rows_are_cut_to_each_length_in_turn_and_keep_their_openings() -> None:
    assert [len(ids) for ids in MIXED] == [4, 4, 4, 4, 16, 4, 4, 4, 4, 16, 4, 4, 4, 4]
    assert MIXED[0].tolist() == [100, 101, 102, 103]
    assert MIXED[1].tolist() == [9, 105, 106, 107]
    assert MIXED[4].tolist() == list(range(116, 132))
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(torch.stack(cut(ids, (16,), (9,))), ids)
    assert torch.equal(torch.cat(cut(ids, (4,), ())), ids.flatten())
    # A length that is named twice has twice the text.
    assert [len(ids) for ids in cut(torch.zeros(3, 8), (8, 4, 8), ())] == [8, 4, 4, 8]


def test_lengths_default_to_those_of_the_text_and_must_divide_the_longest_and_fit_the_model() -> None:
    assert lengths_of(parse_recipe({"text": {"sequence_tokens": 64}}, "test")) == (64,)
    recipe = parse_recipe({"heal": {"sequence_tokens": [256, 2048]}}, "test")
    assert lengths_of(recipe) == (256, 2048)
    check_lengths(recipe, 2048)
    with pytest.raises(ConfigError, match=r"within the model's context\nfound: 2,048 tokens, a context of 1,024"):
        check_lengths(recipe, 1024)
    for wrong in ([300, 2048], [], [8]):
        with pytest.raises(ConfigError, match=r"heal\.sequence_tokens"):
            parse_recipe({"heal": {"sequence_tokens": wrong}}, "test")


def test_groups_hold_what_fits_and_at_least_one() -> None:
    assert grouped([3, 3, 9, 1, 3, 3], 6) == [[0, 1], [2], [3, 4], [5]]
    assert grouped([], 6) == []


def test_a_step_is_one_long_sequence_or_as_many_tokens_of_short_ones() -> None:
    data = Data(MIXED, 16 * 3 + 6, Heal(batch_sequences=2))
    shapes = [[tuple(batch["input_ids"].shape) for batch in data.batches(step, CPU)] for step in range(1, 7)]
    assert shapes == [[(2, 4)], [(2, 4)], [(1, 16)]] * 2
    assert [data.seen(step) for step in range(data.steps + 1)] == [0, 8, 16, 32, 40, 48, 54]


def test_a_step_that_holds_several_lengths_is_a_mean_over_their_tokens() -> None:
    data = Data(MIXED, 16 * 5, Heal(batch_sequences=4, gradient_accumulation=4))
    batches = data.batches(1, CPU)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 4), (1, 16), (4, 4), (1, 16)]
    assert torch.cat([batch["weights"].flatten() for batch in batches]).eq(4 / 64).all()
    assert data.steps == 2


def test_weights_are_those_of_a_mean() -> None:
    weights = [torch.arange(1.0, 1 + len(ids)) for ids in MIXED]
    [batch] = Data(MIXED, 6, Heal(batch_sequences=2), weights=weights).batches(1, CPU)
    torch.testing.assert_close(batch["weights"], torch.tensor([[1.0, 2, 3, 4], [1, 2, 0, 0]]) / 13)


def test_each_length_is_repeated_in_stretches_of_its_own() -> None:
    sequences = cut(torch.zeros(3, 2048, dtype=torch.long), (1024, 2048), ())
    data = Data(sequences, 3 * 2048, Heal(batch_sequences=1), repeats=2)
    places = [batch["place"] for step in range(1, data.steps + 1) for batch in data.batches(step, CPU)]
    assert places == [(0, 0, 0), (0, 1, 0)] * 2 + [(1, 2, 0)] * 2 + [(2, 3, 0), (2, 4, 0)] * 2
    assert [data.seen(step) for step in (4, 6, 10)] == [2048, 4096, 6144]
    assert [len(data.batches(step, CPU)[0]["input_ids"][0]) for step in (1, 5)] == [1024, 2048]


def test_repeats_come_a_stretch_at_a_time() -> None:
    settings, ids = Heal(batch_sequences=1), torch.arange(5 * 1024).view(5, 1024)
    data = Data(list(ids), ids.numel(), settings, repeats=2)
    order = [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    assert [rows(data, step) for step in range(1, 11)] == [[ids[row : row + 1].tolist()] for row in order]
    assert [data.seen(step) for step in (0, 4, 10)] == [0, 2048, 5 * 1024]


def test_the_exact_count_of_tokens_is_trained_on() -> None:
    ids = torch.arange(5 * 10).view(5, 10)
    data = Data(list(ids), 43, Heal(batch_sequences=2, gradient_accumulation=2))
    assert data.steps == 2
    steps = [data.batches(step, CPU) for step in (1, 2)]
    assert [len(batches) for batches in steps] == [2, 1]
    weights = torch.cat([batch["weights"] for batches in steps for batch in batches])
    assert torch.equal(weights[:4], torch.full((4, 10), 2 / 40))
    assert torch.equal(weights[4, :3], torch.full((3,), 1 / 3))
    assert weights[4, 3:].sum() == 0
    assert torch.equal(torch.cat([batch["input_ids"] for batches in steps for batch in batches]), ids)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (4, 1)])
def test_processes_share_a_step_out(monkeypatch: pytest.MonkeyPatch, batch: int, accumulation: int) -> None:
    """Each batch of a step goes to one of them, whichever of the two is cut."""
    ids, settings = torch.arange(16).view(16, 1), Heal(batch_sequences=batch, gradient_accumulation=accumulation)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        seen += rows(Data(list(ids), 16, settings), 2)
    assert seen == [[[4], [5]], [[6], [7]]]


def test_processes_have_as_many_batches_and_together_the_loss_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long sequence of two processes: the second has a copy that counts for nothing."""
    settings = Heal(batch_sequences=1, gradient_accumulation=2)
    alone = [Data(MIXED, 70, settings).batches(step, CPU) for step in range(1, 8)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step, batches in enumerate(alone, 1):
        expected, found = torch.zeros(200), torch.zeros(200)
        for batch in batches:
            expected.index_add_(0, batch["input_ids"].flatten(), batch["weights"].flatten() / len(batches))
        counts = []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            own = Data(MIXED, 70, settings).batches(step, CPU)
            counts.append(len(own))
            for batch in own:
                found.index_add_(0, batch["input_ids"].flatten(), batch["weights"].flatten() / len(own) / 2)
        assert counts[0] == counts[1]
        assert expected.sum() == pytest.approx(1)
        torch.testing.assert_close(found, expected)


def test_a_step_that_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert batch_of_process(Heal(batch_sequences=3, gradient_accumulation=4)) == (3, 2)
    assert batch_of_process(Heal(batch_sequences=4, gradient_accumulation=3)) == (2, 3)
    with pytest.raises(ConfigError, match="among 2 processes"):
        batch_of_process(Heal(batch_sequences=3, gradient_accumulation=1))
