"""Plans measured one after another, and kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import layer_plans, tiny_model

from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.stream import LayerStream
from layerboost.probes.calibration import MeasuredPlans
from layerboost.probes.probe import TextProbe

IDS = torch.randint(3, 200, (4, 40), generator=torch.Generator().manual_seed(1))
# As a search asks: one layer of the base, then of plans that it has taken, then something else altogether.
ASKED = ("fffs", "sfff", "fsff", "fsfn", "fssn", "nssn", "nsfn", "nffn", "ffff", "ssss")


def probe() -> TextProbe:
    return TextProbe(LayerStream(tiny_model(layers=4)), list(IDS.split(2)))


def test_what_was_measured_before_makes_no_difference(tmp_path: Path) -> None:
    measured = MeasuredPlans(probe(), tmp_path / "kept.jsonl", "here")
    for letters in ASKED:
        plan = layer_plans(letters, 8)
        [fresh] = probe().losses([plan])
        found = measured(plan)
        assert found == pytest.approx({m: float(fresh[m].mean()) for m in ("kl", "nll", "top1")}, abs=1e-6), letters


def test_layers_up_to_the_change_are_kept(tmp_path: Path) -> None:
    measured = MeasuredPlans(probe(), tmp_path / "kept.jsonl", "here")
    measured(layer_plans("fffs", 8))
    assert set(measured.probe.streams.inputs) == {0, 1, 2, 3}


def test_a_plan_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plan = tmp_path / "kept.jsonl", layer_plans("fsff", 8)
    found = MeasuredPlans(probe(), file, "here")(plan)
    again = MeasuredPlans(probe(), file, "here")
    monkeypatch.setattr(again, "_measure", lambda _: pytest.fail("measured again"))
    assert again(plan) == found
    other = MeasuredPlans(probe(), file, "another text")
    monkeypatch.setattr(other, "_measure", lambda _: {"kl": 1.0})
    assert other(plan) == {"kl": 1.0}
    assert len(file.read_text().splitlines()) == 2
    for made_from, results in (("here", [found]), ("another text", [{"kl": 1.0}])):
        assert list(MeasuredPlans(probe(), file, made_from).results.values()) == results
    file.write_text("half a li")
    with pytest.raises(ConfigError, match="cannot be read"):
        MeasuredPlans(probe(), file, "here")


def test_what_is_not_finite_is_neither_kept_nor_read(tmp_path: Path) -> None:
    file, plan = tmp_path / "kept.jsonl", layer_plans("fsff", 8)
    broken = probe()
    with torch.no_grad():
        broken.streams.stream.model.model.layers[3].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(LayerboostError, match=r"kl of a plan that was tried is nan"):
        MeasuredPlans(broken, file, "here")(plan)
    assert not file.exists()
    file.write_text('{"made_from": "here", "plan": "a", "found": {"kl": NaN}}\n')
    with pytest.raises(ConfigError, match="cannot be read"):
        MeasuredPlans(probe(), file, "here")
