"""Charts: what their axes and colours say."""

from __future__ import annotations

from pathlib import Path

from layerboost.reporting.figures import healing_figure, model_color
from layerboost.reporting.sources import Sources


def test_extra_models_have_colours_of_their_own() -> None:
    names = ["base", "healed", "bold", "mild"]
    assert len({model_color(name, names) for name in names}) == 4


def test_losses_of_stage_1_are_not_called_nats(run: Path) -> None:
    lines = Sources(run).metrics
    assert lines
    local = [line.model_copy(update={"validation_kl": 0.1}) for line in lines if line.stage == "attention"]
    assert healing_figure(local)["layout"]["yaxis"]["title"]["text"].startswith("normalised MSE")
    whole = [line for line in lines if line.stage == "lora"]
    assert healing_figure(whole)["layout"]["yaxis"]["title"]["text"] == "nats per token"
