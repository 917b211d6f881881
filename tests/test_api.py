"""The Python API on a tiny model: the example as it is, the notebook's cells, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import python_api
import torch
from tiny import layer_plans, plan_file, save_text, save_tiny

import layerboost as lb
from layerboost.errors import ConfigError, InfeasibleBudget

IDS = torch.arange(3, 43)[None]
EXAMPLES = Path(python_api.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    save_tiny(folder / "model", max_position_embeddings=2048)
    save_text(folder / "text.jsonl", words=400_000)
    return folder


@pytest.mark.pipeline
def test_the_example_runs_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    python_api.main(str(folder / "model"), str(folder / "text.jsonl"), "out")
    printed = capsys.readouterr().out
    assert "layer 3: sliding 64: " in printed
    assert "healed: perplexity " in printed
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "nothing else is left"
    model = lb.AutoModelForCausalLM.from_pretrained("out")
    assert model(IDS).logits.isfinite().all()


@pytest.mark.pipeline
def test_the_notebook_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    first, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert {"MODEL", "TEXT"} <= {line.split(" = ")[0] for line in first.splitlines()}
    known: dict[str, Any] = {"MODEL": str(folder / "model"), "TEXT": str(folder / "text.jsonl")}
    for source in code:
        exec(source, known)
    assert known["found"].perplexity["healed"].kl.mean > 0


@pytest.mark.pipeline
def test_the_readmes_lines_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(
        r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(snippet.splitlines()) <= 12
    snippet = snippet.replace("Qwen/Qwen3-0.6B", str(folder / "model")).replace(
        "books.jsonl", str(folder / "text.jsonl")
    )
    exec(re.sub(r"\d+(_000)+", "2048", snippet), {})
    assert (tmp_path / "qwen3-boosted" / "plan.yaml").is_file()


def test_stages_on_objects(folder: Path, tmp_path: Path) -> None:
    base, text = lb.open_base(folder / "model"), lb.Text(source=str(folder / "text.jsonl"), sequence_tokens=48)
    settings = lb.Measure(windows=(8,), tokens=192, retrieval_prompts=0)
    sensitivity = lb.measure(base, text, settings)
    assert sensitivity.complete
    plan = lb.plan(sensitivity, lb.Plan(kv_fraction=0.6, context_tokens=64))
    assert plan.valid_prediction
    assert plan.valid_prediction.kv_fraction <= 0.6
    only_windows = [
        layer.model_copy(update={"variants": [variant for variant in layer.variants if variant.window]})
        for layer in sensitivity.layers
    ]
    with pytest.raises(InfeasibleBudget):
        lb.plan(sensitivity.model_copy(update={"layers": only_windows}), lb.Plan(kv_fraction=0.01, context_tokens=64))
    with pytest.raises(ConfigError, match="measures whole plans"):
        lb.plan(sensitivity, lb.Plan(method="greedy"))
    sinks = plan.model_copy(update={"layers": layer_plans("fsfS", 8)})
    with pytest.raises(ConfigError, match="the plan has sinks"):
        lb.convert(base, sinks)
    converted = lb.convert(base, sinks, text, settings)
    assert converted.model.model.layers[3].self_attn.sinks.shape == (4,)
    assert not torch.equal(converted.model(IDS).logits, base.load()(IDS).logits)
    stock = lb.AutoModelForCausalLM.from_pretrained(lb.export(converted, tmp_path / "stock"))
    torch.testing.assert_close(stock(IDS).logits, converted.model(IDS).logits, atol=2e-4, rtol=1e-3)
    with pytest.raises(ConfigError, match=r"models\['base'\] must be a base"):
        lb.evaluate({"healed": converted}, text)


def test_linear_attention_that_a_family_cannot_have_is_not_measured(folder: Path, tmp_path: Path) -> None:
    base = lb.open_base(save_tiny(tmp_path / "olmo2", "olmo2"))
    text = lb.Text(source=str(folder / "text.jsonl"), sequence_tokens=48)
    with pytest.raises(ConfigError, match="cannot have linear attention"):
        lb.measure(base, text, lb.Measure(windows=(8,), strategies=("sliding", "linear"), tokens=192))


def test_a_healed_model_says_so_and_replaces_nothing_of_others(folder: Path, tmp_path: Path) -> None:
    base, text = lb.open_base(folder / "model"), lb.Text(source=str(folder / "text.jsonl"), sequence_tokens=48)
    plan = plan_file("fssn", 8, base.info)
    settings = lb.Heal(fit_tokens=96, attention_tokens=96, tokens=96)
    healed = lb.heal(lb.convert(base, plan), text, settings, folder=tmp_path / "run")
    (tmp_path / "models" / "other").mkdir(parents=True)
    with pytest.raises(ConfigError, match="models was not made by layerboost"):
        healed.save(tmp_path / "models")
    for _ in range(2):  # its own place is replaced
        card = (healed.save(tmp_path / "models" / "healed") / "README.md").read_text(encoding="utf-8")
        assert "Healed by 96 tokens of attention distillation and 96 tokens of LoRA distillation" in card
    assert (tmp_path / "models" / "other").is_dir()


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "error:flex_attention called without"
)  # not compiled, as once under selective checkpointing
def test_stages_on_a_gpu(folder: Path) -> None:
    base = lb.open_base(folder / "model", device="cuda")
    text = lb.Text(source=str(folder / "text.jsonl"), sequence_tokens=48)
    settings = lb.Measure(windows=(8,), tokens=192, retrieval_prompts=0, unit="kv_head")
    plan = lb.plan(lb.measure(base, text, settings), lb.Plan(kv_fraction=0.6, context_tokens=64))
    plan = plan.model_copy(update={"layers": layer_plans("fSnH", 8)})
    converted = lb.convert(base, plan, text, settings)
    healed = lb.heal(converted, text, lb.Heal(fit_tokens=96, attention_tokens=384, tokens=384))
    assert (healed.model.device.type, healed.model.dtype) == ("cuda", torch.bfloat16)
    assert healed.model(IDS.cuda()).logits.isfinite().all()
