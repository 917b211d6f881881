"""Prompts with images: the processor travels, a boosted model answers as the base, and layers are measured on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pictures import IMAGE, save_bases, save_picture, save_requests, save_with_processor, wrappers
from PIL import Image
from tiny import IMAGE_TOKEN, convert, fitted, layer_plans, save_tiny
from transformers import AutoModelForImageTextToText, AutoProcessor

import layerboost as lb
from layerboost.errors import ConfigError
from layerboost.model.base import Base
from layerboost.model.modeling import decoder_layers, final_norm
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import apply_plan
from layerboost.model.thinning import thin_mlps
from layerboost.probes.probe import TextProbe
from layerboost.traffic import Traffic, load_traffic

PROMPT = f"w9 w8 {IMAGE} w7 w6 w5 w6 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return save_bases(tmp_path_factory.mktemp("bases"))


def requests(base: Base, file: Path) -> Traffic:
    return load_traffic(file, base.tokenizer, 96, 10_000, trust_remote_code=True)


@wrappers
@pytest.mark.parametrize("letters", ["fff", "nfS"])
@torch.no_grad()
def test_a_boosted_checkpoint_answers_a_prompt_with_an_image(
    wrapper: str, letters: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    """With the processor in its own directory; all full, as the base does."""
    base, folder = bases[wrapper], tmp_path / "boosted"
    convert(base, letters, folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = Image.open(save_picture(tmp_path / "it.png"))
    prompt = processor(text=[PROMPT], images=[picture], return_tensors="pt")
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded).__name__.startswith("LayerBoost")
    settings: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    settings["suppress_tokens"] = [IMAGE_TOKEN]  # without a cache it would ask for another image
    answer = loaded.generate(**prompt, **settings)
    assert torch.equal(answer, loaded.generate(**prompt, **settings, use_cache=False))
    assert torch.equal(answer, base.load().generate(**prompt, **settings)) == (letters == "fff")
    prompt["pixel_values"] = -prompt["pixel_values"]
    assert not torch.equal(answer, loaded.generate(**prompt, **settings))


@wrappers
@torch.no_grad()
def test_layers_run_alone_on_images_as_in_the_model(wrapper: str, bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases[wrapper]
    model, traffic = base.load(), requests(base, save_requests(tmp_path, 2))
    for batch in traffic.batches(4):
        stream = LayerStream(model)
        hidden, output = stream.forward(batch.ids, given=batch.given)
        torch.testing.assert_close(stream.finish(0, hidden), output)
        expected = model(input_ids=batch.ids, **batch.given).logits
        torch.testing.assert_close(model.get_output_embeddings()(output), expected)
        if wrapper == "qwen3_vl" and batch.given:  # deepstack reaches into the stream
            for layer in range(len(decoder_layers(model))):
                hidden = stream._run(layer, hidden, stream._arguments[batch.ids.shape][layer])
            assert not torch.allclose(final_norm(model)(hidden), output, atol=1e-2)


@wrappers
@torch.no_grad()
def test_what_a_plan_loses_on_images_is_the_boosted_models(
    wrapper: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    base = bases[wrapper]
    model, traffic = base.load(), requests(base, save_requests(tmp_path, 3))
    assert len(traffic.images) == 4
    batches, plan = traffic.batches(4), layer_plans(fitted("nuS", wrapper))
    assert [len(batch.ids) for batch in batches] == [1] * 4
    sinks = calibrate_sinks(model, batches, [2], [16])
    thinned = thin_mlps(model, batches, [(1, 48)])
    [found] = TextProbe(LayerStream(model, sinks, thinned), batches).losses([plan])
    boosted = apply_plan(base.load(), plan, {2: sinks(plan[2])}, {1: thinned[1, 48]})
    for batch, kl in zip(batches, found["kl"], strict=True):
        ours, theirs = (each(input_ids=batch.ids, **batch.given).logits.log_softmax(-1) for each in (model, boosted))
        by_token = F.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1)
        expected = by_token[:, :-1][batch.scored[:, 1:]].mean()
        assert expected > 0.005
        torch.testing.assert_close(kl, expected, atol=1e-4, rtol=1e-3)


def test_rows_with_images(bases: dict[str, Base], tmp_path: Path) -> None:
    base, file = bases["llava"], tmp_path / "rows.jsonl"
    for name in ("a.png", "b.png"):
        save_picture(tmp_path / name)
    parts = [{"type": "image"}, {"type": "text", "text": "w7 w8"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "w9 w10 w11"}]},
    ]
    rows: list[dict[str, Any]] = [
        {"prompt": f"{IMAGE} w7 {IMAGE} w8 ", "answer": "w9 w10", "messages": None, "images": ["a.png", "b.png"]},
        {"messages": turns, "images": ["a.png"]},
        {"prompt": "w7 w8 ", "answer": "w9", "images": []},
        {"prompt": "w7 w8 ", "answer": "w9", "images": ["a.png"]},  # no place for it
        {"prompt": f"{IMAGE} w8 ", "answer": "w9", "images": ["none.png"]},
        {"prompt": f"{IMAGE} {'w8 ' * 95}", "answer": "w9", "images": ["a.png"]},
        {"text": "w8 w9", "images": ["a.png"]},
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = requests(base, file)
    image = [2] * 4
    whole = [[*image, 7, *image, 8, 9, 10], [5, *image, 7, 8, 6, 9, 10, 11], [7, 8, 9]]
    assert [row[:n].tolist() for row, n in zip(found.ids, found.lengths, strict=True)] == whole
    assert found.scored.sum(1).tolist() == [2, 3, 1]
    assert [given["pixel_values"].shape[0] if given else 0 for given in found.images] == [2, 1, 0]
    again = requests(base, file)
    assert again.fingerprint == found.fingerprint
    save_picture(tmp_path / "a.png", seed=1)
    assert requests(base, file).fingerprint != found.fingerprint


def test_a_missing_processor_is_named(tmp_path: Path) -> None:
    folder = save_with_processor(tmp_path / "model", "llava")
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    base = lb.open_base(folder, dtype="float32")
    with pytest.raises(ConfigError, match=r"has images, and the processor of the model cannot be loaded\nfound: "):
        load_traffic(save_requests(tmp_path), base.tokenizer, 96, 1000)


def test_a_language_model_alone_takes_no_images(tmp_path: Path) -> None:
    base = lb.open_base(save_tiny(tmp_path / "model"), dtype="float32")
    with pytest.raises(ConfigError, match=r"images, which this model cannot read\nfound: a language model without"):
        load_traffic(save_requests(tmp_path), base.tokenizer, 96, 1000)


def test_images_are_a_list(bases: dict[str, Base], tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    file, row = tmp_path / "rows.jsonl", {"prompt": f"{IMAGE} w7 ", "answer": "w9", "images": "a.png"}
    file.write_text(f"{json.dumps(row)}\n" * 2)
    with pytest.raises(
        ConfigError, match=r"two rows to score[^$]+line 1 of \S+: its images are not a list of files \(str\)"
    ):
        requests(bases["llava"], file)
