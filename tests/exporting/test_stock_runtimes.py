"""Exports where layerboost is not installed; under vLLM in tests/vllm_plugin/test_exports_served.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import without_layerboost
from test_export import IDS, saved
from tiny import RUNTIME

from layerboost.exporting.stage import run_export
from layerboost.model.base import find_model

LETTERS = {"granite-swa": "nfSs", "mlx": "nfsn"}


@pytest.mark.multiprocess
@torch.no_grad()
def test_stock_runtimes_run_exports_without_layerboost(tmp_path: Path) -> None:
    prompts = [IDS[0, :length].tolist() for length in (5, 17, 60)]
    folders, expected = {}, {}
    for to, letters in LETTERS.items():
        if to == "mlx" and importlib.util.find_spec("mlx_lm") is None:
            continue
        folder = saved(tmp_path / to, "llama", letters)
        folders[to] = run_export(folder, to).folder
        model = find_model(str(folder), RUNTIME).load()
        expected[to] = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
    script = Path(__file__).with_name("stock_runtimes.py")
    told = subprocess.run(
        [sys.executable, str(script), json.dumps({"folders": folders, "prompts": prompts})],
        env=os.environ | without_layerboost(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    found = json.loads(told.stdout.splitlines()[-1])
    assert found.keys() == expected.keys()
    for to, logs in expected.items():
        assert (torch.tensor(found[to]) - torch.stack(logs)).abs().max() < 1e-3, to
