from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import info, layer_plans, plan_file

from layerboost.costs.memory import CPU_DEFAULTS, GPU_DEFAULTS, plan_serving
from layerboost.model.card import UNKNOWN, model_card, origin_of
from layerboost.recipe import Card
from layerboost.schemas.plan import PlanFile

PLAN = plan_file("nfSs")
LLAMA = "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\ntags: [a]\n---\n# A model\n"


def test_a_card_is_ready_for_the_hub() -> None:
    card = ModelCard(model_card(PLAN, UNKNOWN))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layerboost", "sliding-window-attention"],
    }
    for text in (
        "| 0 | none |  |  |",
        "| 2 | sliding | 16 | yes |",
        "Of 4 layers: 1 full, 2 sliding, 1 none",
        "trust_remote_code=True",
        "Without either, Transformers loads a stock model",
        "vllm serve PATH",
        "name no licence",
        "## Limits",
        "Not healed",
    ):
        assert text in card.text
    without = ModelCard(model_card(plan_file("nfff"), UNKNOWN))
    assert without.data.to_dict()["tags"] == ["layerboost"]


def test_full_layers_that_slide_in_the_base_are_told_apart() -> None:
    model = info().model_copy(update={"sliding_layers": [1, 2], "sliding_window": 8})
    text = model_card(plan_file("nfff", model=model), UNKNOWN)
    assert "`full`: softmax attention (layers 1, 2: the last 8 tokens, as in the base);" in text
    assert "only through the full layers that do not slide:" in text
    assert "only through the full layers: test" in model_card(PLAN, UNKNOWN)


def test_the_licence_is_the_bases_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(LLAMA)
    (tmp_path / "LICENSE.txt").touch()
    (tmp_path / "Notice").touch()
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "config.json").touch()
    origin = origin_of(tmp_path, "meta-llama/Llama-3.2-1B", Card(license="mit", base_model="some/other"))
    card = ModelCard(model_card(PLAN, origin))
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.2-1B"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama3.2", "LICENSE")
    assert "licence applies: llama3.2" in card.text
    assert {file.name for file in origin.files} == {"LICENSE.txt", "Notice"}


@pytest.mark.parametrize("text", [None, "no front matter", "---\nlanguage: en\n---\n", "---\n: [\n---\n"])
def test_a_base_that_names_no_licence(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert origin_of(tmp_path, "package:some", Card()) == UNKNOWN
    given = origin_of(tmp_path, str(tmp_path), Card(license="mit", base_model="some/model"))
    assert (given.base_model, given.licence) == ("some/model", (("license", "mit"),))


def test_the_card_names_the_flags_that_make_the_memory_real_on_each_kind_of_engine() -> None:
    settings = {"context_tokens": 2048, "concurrency": 100}
    plan = PlanFile(model=info(8), method="budget", settings=settings, layers=layer_plans("ffssssss", 64))
    card = model_card(plan, UNKNOWN)
    for engine, where in ((CPU_DEFAULTS, "On a CPU"), (GPU_DEFAULTS, "On a GPU")):
        found = plan_serving(plan, engine)
        assert found
        assert f"vllm serve PATH {' '.join(found.flags)}    # {where}\n" in card
    assert "`--max-model-len 2048`: On a GPU vLLM admits" in card
    assert "On a CPU vLLM admits 3.01 times the base's requests of 2048 tokens" in card
    others: list[dict[str, Any]] = [{"layers": layer_plans("ffffffff")}, {"settings": {}}]
    for other in others:
        assert "vllm serve PATH\n```\n\n## The plan" in model_card(plan.model_copy(update=other), UNKNOWN)
