from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import boosted, layer_plans, tiny_model

from layerboost.errors import LayerboostError
from layerboost.healing.distillers import AttentionDistiller, LogitDistiller
from layerboost.healing.training import newest_checkpoint, read_metrics, train_stage
from layerboost.recipe import Heal

IDS = torch.randint(3, 200, (8, 24), generator=torch.Generator().manual_seed(1)).repeat(8, 1)
SETTINGS = Heal(batch_sequences=4, save_steps=3, sink_lr=0.05)


def distiller() -> LogitDistiller:
    student = boosted("fSns", window=8)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("mlp" in name or name.endswith("sinks"))
    return LogitDistiller(student, tiny_model(layers=4))


def test_distillation_lowers_its_loss_and_only_trains_what_it_should(tmp_path: Path) -> None:
    made = distiller()
    before = copy.deepcopy(made.student.state_dict())
    train_stage("lora", made, IDS, 3e-3, SETTINGS, tmp_path, seed=0, validate=lambda: {"validation_kl": 1.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert [row["step"] for row in rows if "validation_kl" in row] == [0, 16]
    assert rows[-1]["tokens"] == 16 * 4 * 24
    changed = [name for name, value in made.student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all("mlp" in name or name.endswith("sinks") for name in changed)
    assert load_file(tmp_path / "lora.safetensors").keys() == made.state_dict().keys()


def test_attention_distillation_learns_each_layer_apart(tmp_path: Path) -> None:
    student, teacher = boosted("fSns", window=8), tiny_model(layers=4)
    for name, parameter in student.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        parameter.requires_grad_((layer in (1, 3) and "self_attn" in name) or (layer == 2 and "mlp" in name))
    made = AttentionDistiller(student, teacher, layer_plans("fSns", 8))
    start = made(IDS[:8])["loss"].item()
    train_stage("attention", made, IDS, 3e-3, SETTINGS, tmp_path, seed=0)
    assert made(IDS[:8])["loss"].item() < 0.8 * start


RUN = """
import sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
import test_training as t
torch.set_num_threads(1)
t.train_stage("lora", t.distiller(), t.IDS, 1e-2, t.SETTINGS, Path(sys.argv[1]), seed=0)
"""


def test_killed_runs_end_as_the_unkilled_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    train_stage("lora", distiller(), IDS, 1e-2, SETTINGS, whole, seed=0)
    script = RUN.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    metrics = killed / "metrics.jsonl"
    for step in (5, 10):
        process = subprocess.Popen([sys.executable, "-c", script, str(killed)], stderr=(tmp_path / "log").open("a"))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(row["step"] >= step for row in read_metrics(metrics)):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    train_stage("lora", distiller(), IDS, 1e-2, SETTINGS, killed, seed=0)
    expected, found = load_file(whole / "lora.safetensors"), load_file(killed / "lora.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    losses = [[row["loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, killed)]
    assert losses[0] == losses[1]


def test_half_written_checkpoints_are_dropped(tmp_path: Path) -> None:
    for step, complete in ((3, True), (6, True), (9, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-6"
    assert not (tmp_path / "checkpoint-9").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    made = distiller()
    with torch.no_grad():
        made.student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LayerboostError, match="nan at step 1"):
        train_stage("lora", made, IDS, 1e-2, SETTINGS, tmp_path, seed=0)


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1}) + '\n{"step": ')
    assert read_metrics(file) == [{"step": 1}]
