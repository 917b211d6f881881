"""What the verdict claims of a difference, and of which model."""

from __future__ import annotations

from made_run import change

from layerboost.reporting.verdict import certainty
from layerboost.schemas.evaluation import Change


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
