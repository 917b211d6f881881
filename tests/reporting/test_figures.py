"""Charts: what their axes and colours say."""

from __future__ import annotations

from pathlib import Path

from made_run import sensitivity
from tiny import info, layer_plans

from layerboost.reporting.figures import healing_figure, model_color, sensitivity_figure
from layerboost.reporting.search import frontier_figure, frontier_table
from layerboost.reporting.sources import Sources
from layerboost.schemas.plan import Frontier, FrontierPoint, PlanFile, Predicted
from layerboost.schemas.sensitivity import LayerSensitivity, Score, Variant
from layerboost.tables import measured_rows, planned_rows


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


def test_attention_and_mlps_are_in_one_figure_and_one_table() -> None:
    made = sensitivity(info(2))
    score = Score(mean=0.1, standard_error=0.01)
    mlps = [
        Variant(attention="full", mlp=kind, mlp_width=width, scores=dict.fromkeys(("kl", "retrieval"), score))
        for kind, width in (("thin", 48), ("thin", 24), ("none", None))
    ]
    layers = [
        LayerSensitivity(layer=layer, variants=[*entry.variants, *mlps]) for layer, entry in enumerate(made.layers[:2])
    ]
    measured = made.model_copy(update={"layers": layers})
    predicted = Predicted(
        quality_loss={"kl": 0.2}, kv_fraction=0.5, kv_bytes_per_request=1, parameter_fraction=0.8, context_tokens=64
    )
    plan = PlanFile(model=info(2), method="by hand", layers=layer_plans("uz", 64), predicted=predicted)
    figure = sensitivity_figure(measured, plan)
    marks = {trace["name"]: trace["marker"] for trace in figure["data"]}
    assert [(marks[name]["color"], marks[name]["symbol"]) for name in ("MLP thin 48", "MLP thin 24", "MLP none")] == [
        ("var(--thin)", "circle"),
        ("var(--thin)", "square"),
        ("var(--thin)", "x"),
    ]
    # Both of a layer's changes are ringed.
    assert len(figure["data"][-1]["x"]) == 4
    assert planned_rows(plan)[1:] == [
        ["0", "sliding", "64", "", "thin 48"],
        ["1", "none", "", "", "none"],
        ["all", "KV 50.0%", "kl 0.200", "predicted", "parameters 80.0%"],
    ]
    assert measured_rows(measured)[0][-3:] == ["MLP thin 48", "MLP thin 24", "MLP none"]
    point = FrontierPoint(predicted=predicted, layers=plan.layers)
    curve = Frontier(
        model=info(2), sensitivity="s", settings={"method": "budget"}, axis="parameter_fraction", points=[point]
    )
    drawn = frontier_figure(curve, plan, "kl")
    assert drawn["data"][0]["x"] == [80.0]
    assert drawn["layout"]["xaxis"]["title"]["text"] == "parameters, % of the base"
    table = frontier_table(curve)
    assert dict(zip(table.header, table.rows[0], strict=True))["changed MLPs"] == "2"
