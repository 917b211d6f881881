"""A continued stream against a whole one."""

from __future__ import annotations

import pytest
import torch
from tiny import SLIDING_BASES, layer_plans, tiny_model

from layerboost.model.families import FAMILIES
from layerboost.model.stream import LayerStream

IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SLIDING_BASES])
@torch.no_grad()
def test_the_positions_after_a_window_alone_are_those_of_the_whole(family: str) -> None:
    stream = LayerStream(tiny_model(family, layers=4))
    assert stream.can_continue
    first, output, beginning = stream.forward_with_beginning(IDS, 12)
    plan = layer_plans("fsff", 8)
    state = stream.layer(1, stream.layer(0, first), plan[1])
    whole = stream.finish(2, state, plan)
    assert torch.allclose(whole[:, :8], output[:, :8], atol=1e-5)
    assert not torch.allclose(whole[:, 8:], output[:, 8:], atol=1e-3)
    assert torch.allclose(stream.finish_after(beginning.first(8), 2, state[:, 8:]), whole[:, 8:], atol=1e-5)
    # The recorded arguments hold no cache: a whole stream after it is as before.
    assert torch.equal(stream.finish(2, state, plan), whole)


@pytest.mark.parametrize("family", SLIDING_BASES)
def test_bases_that_slide_do_not_continue(family: str) -> None:
    assert not LayerStream(tiny_model(family, layers=4)).can_continue
