from __future__ import annotations

from tiny import info, layer_plans

from layerboost.artifacts import PlanFile, Predicted
from layerboost.model.card import model_card
from layerboost.search.memory import CPU_ENGINE, serving


def test_the_card_names_the_flags_that_make_the_memory_real_unless_the_layers_were_edited() -> None:
    model, layers = info(8), layer_plans("ffssssss", 64)
    plan = PlanFile(model=model, method="budget", layers=layers)
    plan.serving = serving(model, layers, 2048, 100, CPU_ENGINE)
    plan.predicted = Predicted(
        damage={}, kv_fraction=0.3, kv_bytes_per_request=1, parameter_fraction=1, context_tokens=2048, plan=plan.hash()
    )
    card = model_card(plan)
    assert "vllm serve PATH --max-num-batched-tokens 128 --block-size 32\n" in card
    assert "`--max-model-len 2048` the same memory admits 3.01 times the base's requests" in card
    edited = plan.model_copy(update={"layers": layer_plans("fsssssss", 64)})
    assert "vllm serve PATH\n```\n\n## The plan" in model_card(edited)
