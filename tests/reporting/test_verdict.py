"""What the verdict claims of a difference, and of which model."""

from __future__ import annotations

from pathlib import Path

from made_run import change
from tiny import plan_file

from layerboost.reporting.sources import Sources
from layerboost.reporting.verdict import certainty, findings
from layerboost.schemas.evaluation import Change
from layerboost.schemas.plan import write_plan


def test_no_worse_is_claimed_of_the_interval_and_never_of_its_width() -> None:
    def said(mean: float, error: float) -> str:
        return certainty(Change.model_validate(change(mean, error)))

    assert said(-0.002, 0.003).endswith("no worse than 1 point: yes")
    # A wide interval around zero shows no difference, and no equivalence either.
    assert said(0.0, 0.02) == (
        "no difference shown; these items show 5.6 points or more; no worse than 1 point: not shown"
    )
    assert said(-0.005, 0.001) == "a loss beyond the 95 % interval; no worse than 1 point: yes"
    assert said(-0.05, 0.01) == "a loss beyond the 95 % interval; no worse than 1 point: no"


def test_mlps_that_a_person_thinned_are_counted(tmp_path: Path) -> None:
    """The plan has no valid prediction: its layers are counted."""
    write_plan(tmp_path / "plan.yaml", plan_file("ftm"))
    kept = 1 - (48 * 192 + 18_432) / (25_600 + 3 * 50_000)
    [cache, *_] = findings(Sources(tmp_path))
    assert f"The plan has {kept:.1%}".replace("%", " %") in cache.sentence
