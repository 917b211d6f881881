from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import finish, ranks, run_script
from torch import nn

from layerboost.healing.sharding import FullStateAdamW, distribute_like, is_sharded, to_full_tensor


@pytest.mark.multiprocess
def test_two_processes_have_the_gradients_of_one_with_half_the_weights_each(tmp_path: Path) -> None:
    """Both stages of five families, in float32 and bfloat16, tied heads and all kinds of checkpointing."""
    finish(ranks(run_script, Path(__file__).with_name("sharded.py"), str(tmp_path), folder=tmp_path))


def test_what_is_not_sharded_stays_as_it_is() -> None:
    layer = nn.Linear(3, 2)
    assert not is_sharded(layer)
    assert to_full_tensor(layer.weight) is layer.weight
    assert distribute_like(layer.bias, layer.weight) is layer.bias
    layer(torch.ones(1, 3)).sum().backward()
    optimizer, plain = (kind(layer.parameters(), lr=0.1) for kind in (FullStateAdamW, torch.optim.AdamW))
    plain.step()
    optimizer.load_state_dict(plain.state_dict())
    ours, theirs = (made.state_dict()["state"][0] for made in (optimizer, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
