"""Real vLLM: boosted vision-language models, on text and on prompts with an image."""

from __future__ import annotations

import importlib.util
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from offline import Vllm, prompts
from pictures import IMAGE, PROCESSORS, picture_tokenizer, save_picture, save_with_processor
from PIL import Image
from tiny import IMAGE_TOKEN, RUNTIME, convert, layer_plans, sinks_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from layerboost.engines.vllm import runs_on_cpu
from layerboost.model.base import find_model
from layerboost.model.families import WRAPPERS
from layerboost.vllm_plugin.plugin import MODULES

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
IMAGES = 4
# Qwen3-VL's class in vLLM wants a video processor even for images: on text alone.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{wrapper: (wrapper, {}) for wrapper in PROCESSORS},
    "llava-heads": ("llava", {"inside": "qwen2"}),
    "llava-mistral": ("llava", {"inside": "mistral"}),
    "mistral3-ministral3": ("mistral3", {"inside": "ministral3"}),
    "internvl-qwen3": ("internvl", {"inside": "qwen3"}),
}
LETTERS = {"llava-heads": "nfHs", "gemma3": "fnSf"}


def save_boosted_wrapper(folder: Path, case: str) -> Path:
    """A boosted wrapper with its processor, sinks random."""
    wrapper, changes = CASES[case]
    letters = LETTERS.get(case, "nfSs")
    base = find_model(str(save_with_processor(folder / "base", wrapper, 4, **changes)), RUNTIME)
    convert(
        base,
        letters,
        folder / "boosted",
        {p.layer: torch.randn(sinks_of(p)) * 2 for p in layer_plans(letters) if p.sink},
    )
    return folder / "boosted"


@torch.no_grad()
def check_images(folder: Path, found: Any, images: list[str]) -> None:
    """Assert that vLLM's log-probabilities are those of Transformers, with the images of the first prompts."""
    assert isinstance(found, dict), found
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True) if images else None
    apart = []
    count = len(found["answers"]) // found["passes"]
    for number, answer in enumerate(found["answers"]):
        # Up to where the model happens to say the placeholder of images, which stands for none.
        said = list(takewhile(lambda token: token != IMAGE_TOKEN, answer["tokens"]))
        ids = torch.tensor([answer["prompt"] + said])
        given: dict[str, Any] = {}
        if number % count < len(images):
            picture = Image.open(images[number % count]).convert("RGB")
            assert processor
            given = dict(processor(text=["<image>"], images=[picture], return_tensors="pt"))
            assert (ids == IMAGE_TOKEN).sum() == (given.pop("input_ids") == IMAGE_TOKEN).sum() > 1
            del given["attention_mask"]
            for name in {"mm_token_type_ids", "token_type_ids"} & given.keys():
                given[name] = (ids == IMAGE_TOKEN).long()
        known = model(ids, **given).logits[0, :-1].log_softmax(-1)
        chosen = known.gather(1, ids[0, 1:, None])[:, 0]
        logprobs = torch.tensor(answer["logprobs"][: len(answer["logprobs"]) - len(answer["tokens"]) + len(said)])
        apart.append(float((chosen[-len(logprobs) :] - logprobs).abs().max()))
    assert max(apart) < 1e-3, apart


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=() if each == "llava" else pytest.mark.exhaustive) for each in CASES]
)
def test_log_probabilities_are_those_of_transformers(case: str, vllm: Vllm, tmp_path: Path) -> None:
    if case == "qwen3_vl":
        pytest.importorskip("torchvision", reason="vLLM's class for Qwen3-VL imports torchvision")
    wrapper = CASES[case][0]
    if WRAPPERS[wrapper].cpu_lacks and runs_on_cpu():
        pytest.skip(WRAPPERS[wrapper].cpu_lacks)
    folder = save_boosted_wrapper(tmp_path, case)
    text = [[token if token > 4 else 5 for token in prompt] for prompt in prompts()[::3]]
    pictured = case != "qwen3_vl"
    images = [str(save_picture(tmp_path / f"{number}.png", number)) for number in range(IMAGES * pictured)]
    place = picture_tokenizer(wrapper).convert_tokens_to_ids(IMAGE)
    asked = [[7, 8, place, *each] for each in text[-IMAGES:]] * pictured + text
    options: dict[str, Any] = {} if pictured else {"language_model_only": True}
    found = vllm.answers(folder, asked, images=images, trust_remote_code=True, **options)
    check_images(folder, found, images)


def test_cases_cover_every_wrapper_that_vllm_serves() -> None:
    """With every language model that it may hold."""
    cases = {(wrapper, changes.get("inside", WRAPPERS[wrapper].inside[0])) for wrapper, changes in CASES.values()}
    served = {name: row for name, row in WRAPPERS.items() if row.vllm}
    assert cases == {(name, inside) for name, row in served.items() for inside in row.inside}
    assert served.keys() == PROCESSORS.keys()
    assert {row.architecture for row in WRAPPERS.values()} < MODULES.keys()
