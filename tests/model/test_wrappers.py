"""Vision-language models through the stages that touch files: opened, converted, loaded as anyone would, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hybrids import check_stages
from tiny import (
    HEADS,
    KV_HEADS,
    RUNTIME,
    boosted,
    change_weights,
    convert,
    image_prompt,
    layer_plans,
    plan_file,
    tiny_model,
    tiny_tokenizer,
    tower_parameters,
)

import layerboost as lb
from layerboost.costs.budget import decode_work
from layerboost.engines import vllm
from layerboost.errors import ConfigError
from layerboost.exporting.stage import run_export
from layerboost.model.base import find_model
from layerboost.model.families import WRAPPERS
from layerboost.model.integrity import check_base, check_checkpoint
from layerboost.model.surgery import family_of
from layerboost.model.unsupported import why_unsupported
from layerboost.pipeline import run_stage
from layerboost.recipe import Bench, parse_recipe
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN

IDS = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(1))
PROCESSOR = {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 8}}


def save_wrapper(folder: Path, wrapper: str = "llava", layers: int = 3, **changes: Any) -> Path:
    """A stock wrapper with the names of tensors that its real checkpoints have, a tokenizer and a processor's file."""
    tiny_model(wrapper, layers, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change a config; `text_config` and `vision_config` in part."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapper(tmp_path_factory.mktemp("stock") / "model")


@pytest.fixture(scope="module")
def converted(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A boosted checkpoint of the stock model, and what it gives for an image prompt in logits.pt."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    model = convert(find_model(str(stock), RUNTIME), "fSn", folder)
    prompt = image_prompt("llava", IDS)
    torch.save((prompt, model(**prompt).logits), folder.parent / "logits.pt")
    return folder


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_facts_are_those_of_the_language_model(wrapper: str, tmp_path: Path) -> None:
    base = find_model(str(save_wrapper(tmp_path, wrapper)), RUNTIME)
    base.check()
    text, info = base.config, base.info
    assert (base.model_config.model_type, text.model_type) == (wrapper, WRAPPERS[wrapper].inside[0])
    assert (info.model_type, info.layers, info.heads, info.kv_heads) == (wrapper, 3, HEADS, KV_HEADS)
    model = base.load()
    inside = sum(each.numel() for each in model.get_decoder().parameters()) + model.lm_head.weight.numel()
    assert info.parameters == inside < sum(each.numel() for each in model.parameters())
    assert decode_work(info, layer_plans("fff"), 1, 64)[2] < 4 * inside  # bytes of weights: no embedding, no tower


def test_a_checkpoint_has_the_tower_and_the_processor(stock: Path, converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LayerBoostForConditionalGeneration"]
    assert config["auto_map"].keys() == {"AutoModelForImageTextToText"}
    assert config["text_config"]["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert config["text_config"]["attention_sink_layers"] == [1]
    assert json.loads((converted / "preprocessor_config.json").read_text()) == PROCESSOR
    before, after = (load_file(folder / "model.safetensors") for folder in (stock, converted))
    tower = {name.removeprefix("model."): value for name, value in after.items() if "language" not in name}
    assert len(tower) > 20
    other = {name: value for name, value in before.items() if not name.startswith("language_model")}
    assert tower.keys() - {"lm_head.weight"} == {name.removeprefix("model.") for name in other}
    check_checkpoint(converted)
    card = (converted / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "vllm serve PATH" in card
    assert "A window counts the tokens of images too." in card


def test_a_loaded_model_is_saved_as_it_was(converted: Path, tmp_path: Path) -> None:
    """Under the names that vLLM's class of boosted wrappers knows."""
    lb.AutoModelForImageTextToText.from_pretrained(converted).save_pretrained(tmp_path)
    names, again = (load_file(folder / "model.safetensors").keys() for folder in (converted, tmp_path))
    assert names == again
    assert (tmp_path / "modeling_layerboost.py").read_text() == (converted / "modeling_layerboost.py").read_text()


@pytest.mark.multiprocess
@pytest.mark.parametrize("remote_code", [True, False])
def test_anyone_can_load_it(converted: Path, tmp_path: Path, remote_code: bool) -> None:
    """By its remote code, where layerboost is not installed, or after importing layerboost."""
    module = "transformers" if remote_code else "layerboost"
    hidden = "sys.modules['layerboost'] = None; " if remote_code else ""
    script = (
        f"import sys, torch; {hidden}from {module} import AutoModelForImageTextToText as Auto\n"
        f"prompt, expected = torch.load({str(converted.parent / 'logits.pt')!r})\n"
        f"model = Auto.from_pretrained({str(converted)!r}, trust_remote_code={remote_code})\n"
        "assert type(model).__name__ == 'LayerBoostForConditionalGeneration'\n"
        "torch.testing.assert_close(model(**prompt).logits, expected, atol=1e-4, rtol=1e-4)\n"
        "assert model.generate(**prompt, max_new_tokens=5, min_new_tokens=5).shape[1] == 65\n"
    )
    environment = {"HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param(name, marks=pytest.mark.pipeline if name == "qwen3_vl" else pytest.mark.exhaustive)
        for name in WRAPPERS
    ],
)
def test_the_stages(wrapper: str, tmp_path: Path) -> None:
    """On text; what is saved answers prompts with images."""
    model = save_wrapper(tmp_path / "model", wrapper)
    _, plan, loaded = check_stages(tmp_path, model, image_prompt(wrapper, IDS))
    assert any(entry.changed for entry in plan.layers)
    stock = find_model(str(model), RUNTIME).load()
    tower = tower_parameters(loaded)
    assert tower
    assert all(torch.equal(loaded.get_parameter(name), stock.get_parameter(name)) for name in tower)


def without_tower(folder: Path) -> None:
    change_weights(folder, lambda t: [t.pop(name) for name in [*t] if "vision_tower" in name])


def without_text_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    # Qwen2.5-VL's configs, and no others, have the language model's settings here.
    config |= {"hidden_size": config.pop("text_config")["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(config))


WHICH = "does not say which language model the wrapper llava holds\nfound: "
UNFIT: dict[str, tuple[Any, str]] = {
    "no model_type": (lambda folder: edit(folder, text_config={"model_type": None}), f"{WHICH}no model_type in its"),
    "no text_config": (without_text_config, f"{WHICH}no text_config"),
    "text_config null": (lambda folder: edit(folder, text_config=None), f"{WHICH}text_config is null"),
    "text_config a list": (lambda folder: edit(folder, text_config=["llama"]), f"{WHICH}text_config is a list"),
    "an unknown model_type": (
        lambda folder: edit(folder, text_config={"model_type": "llama9"}),
        r"llava is not supported with this language model\nfound: llama9 \(not in Transformers",
    ),
    "a tower without weights": (without_tower, r"weights and configuration[^$]+found: no model.vision_tower\."),
    "another tower": (
        lambda folder: edit(folder, vision_config={"intermediate_size": 64}),
        r"model.vision_tower\.\S+ is \[48, 32\], by the configuration \[64, 32\]",
    ),
    "tied and another head": (
        lambda folder: edit(folder, tie_word_embeddings=True),
        "lm_head.weight and model.language_model.embed_tokens.weight differ",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_wrapper_that_cannot_be_the_base(case: str, stock: Path, tmp_path: Path) -> None:
    folder, (spoil, message) = Path(shutil.copytree(stock, tmp_path / "model")), UNFIT[case]
    check_base(folder, torch.float32)
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        check_base(folder, torch.float32)


def test_a_flat_config_has_the_settings_of_the_language_model(tmp_path: Path) -> None:
    """As Qwen2.5-VL's checkpoints are published (tests/published)."""
    folder = save_wrapper(tmp_path, "qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config") | {"model_type": "qwen2_5_vl"}
    (folder / "config.json").write_text(json.dumps(text | config))
    check_base(folder, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="which language model the wrapper qwen2_5_vl holds\nfound: no text_config"):
        check_base(folder, torch.float32)


def test_another_language_model_inside(tmp_path: Path) -> None:
    config = tiny_model("llava", 1, inside="granite").config
    with pytest.raises(ConfigError, match=r"llava with granite\ndo: use one with llama, mistral, qwen2"):
        family_of(config)
    assert why_unsupported("gemma3") is None


def test_what_cannot_serve_or_hold_it(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "check_vllm", lambda: "0.32.0")
    boosted("xsxf", "qwen3_5").save_pretrained(tmp_path)
    refused = r"vLLM cannot serve [^$]+ boosted\nfound: a wrapper, qwen3_5: vLLM's Transformers backend keeps no state"
    for serve in (lambda: vllm.check(Bench(), [tmp_path]), lambda: vllm.serve_command(tmp_path, 8000, ())):
        with pytest.raises(ConfigError, match=refused):
            serve()
    with pytest.raises(ConfigError, match=r"exports hold language models alone\nfound: [^$]+ is a wrapper, llava"):
        run_export(converted, "auto")


def test_vllm_needs_the_processor(
    stock: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`convert` warns of one that is missing; what starts vLLM refuses before it starts."""
    monkeypatch.setattr(vllm, "check_vllm", lambda: "0.32.0")
    monkeypatch.setattr(vllm, "check_port", lambda *_, **__: None)
    base, boosted = (Path(shutil.copytree(each, tmp_path / each.parent.name)) for each in (stock, converted))
    vllm.check(Bench(), [base, boosted])
    vllm.serve_command(boosted, 8000, ())
    for folder in (base, boosted):
        (folder / "preprocessor_config.json").unlink()
        with pytest.raises(
            ConfigError, match=r"without the processor of its images\nfound: none of preprocessor_config"
        ):
            vllm.check(Bench(), [folder])
    with pytest.raises(ConfigError, match=r"without the processor of its images"):
        vllm.serve_command(boosted, 8000, ())
    vllm.serve_command(boosted, 8000, ("--language-model-only",))
    recipe, run = parse_recipe({"model": str(base), "dtype": "float32"}, "the test"), tmp_path / "run"
    run.mkdir()
    write_plan(run / PLAN, plan_file("fsn", model=find_model(str(base), RUNTIME).info))
    with caplog.at_level("WARNING"):
        run_stage("convert", recipe, run)
    assert f"{base} has no processor (none of preprocessor_config.json, processor_config.json)" in caplog.text


@torch.no_grad()
def test_a_head_of_its_own_that_no_setting_names(tmp_path: Path) -> None:
    """Mistral Small's config has no tie_word_embeddings, a wrapper's default is True, and its head is its own."""
    folder = save_wrapper(tmp_path / "stock", "mistral3", tie_word_embeddings=False)
    expected = find_model(str(folder), RUNTIME).load()(IDS).logits
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    base = find_model(str(folder), RUNTIME)
    base.check()
    assert not base.info.tied_head
    assert torch.equal(base.load()(IDS).logits, expected)
    changed = convert(base, "fSn", tmp_path / "boosted")
    again = find_model(str(tmp_path / "boosted"), RUNTIME).load()
    assert torch.equal(again(IDS).logits, changed(IDS).logits)
