from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from layerboost.healing.sharding import WholeAdamW, is_sharded, like, whole

TESTS = Path(__file__).parents[1]


def test_two_processes_have_the_gradients_of_one_with_half_the_weights_each(tmp_path: Path) -> None:
    """Both stages of four families, in float32 and bfloat16, tied heads and all kinds of checkpointing."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*torchrun, str(TESTS / "healing" / "sharded.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_is_not_sharded_stays_as_it_is() -> None:
    layer = nn.Linear(3, 2)
    assert not is_sharded(layer)
    assert whole(layer.weight) is layer.weight
    assert like(layer.bias, layer.weight) is layer.bias
    layer(torch.ones(1, 3)).sum().backward()
    optimizer, plain = (kind(layer.parameters(), lr=0.1) for kind in (WholeAdamW, torch.optim.AdamW))
    plain.step()
    optimizer.load_state_dict(plain.state_dict())
    ours, theirs = (made.state_dict()["state"][0] for made in (optimizer, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
