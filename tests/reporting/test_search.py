"""The search panel: the frontier, and the run's plan on it."""

from __future__ import annotations

from pathlib import Path

from plotly import graph_objects

from layerboost.reporting.search import frontier_figure
from layerboost.reporting.sources import Sources
from layerboost.schemas.plan import read_plan, write_plan


def test_the_frontier_has_the_plan_on_it(run: Path) -> None:
    sources = Sources(run)
    assert sources.frontier
    assert sources.plan
    figure = frontier_figure(sources.frontier, sources.plan, "kl")
    graph_objects.Figure(figure)
    curve, plan = figure["data"]
    assert curve["y"] == sorted(curve["y"], reverse=True)
    assert (plan["x"], plan["y"]) == ([30.0], [0.21])
    # All layers full: the end of the curve, though such a plan has no metrics.
    nothing = sources.frontier.points[0].predicted.model_copy(update={"quality_loss": {}, "kv_fraction": 1.0})
    whole = sources.frontier.points[0].model_copy(update={"predicted": nothing})
    ended = sources.frontier.model_copy(update={"points": [*sources.frontier.points, whole]})
    curve = frontier_figure(ended, sources.plan, "kl")["data"][0]
    assert (curve["x"][-1], curve["y"][-1]) == (100.0, 0.0)


def test_a_plan_for_another_context_is_not_drawn_on_the_frontier(run: Path) -> None:
    found = read_plan(run / "plan.yaml")
    assert found.predicted
    longer = found.predicted.model_copy(update={"context_tokens": 8 * found.predicted.context_tokens})
    write_plan(run / "plan.yaml", found.model_copy(update={"predicted": longer}))
    sources = Sources(run)
    assert sources.frontier
    assert len(frontier_figure(sources.frontier, sources.plan, "kl")["data"]) == 1
