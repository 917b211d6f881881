from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, boosted, save_tiny

from layerboost.engines.protocol import Load
from layerboost.engines.transformers import generate, launch, measure
from layerboost.errors import LayerboostError
from layerboost.recipe import parse_recipe
from layerboost.schemas.benchmark import FROM_VLLM, metrics_of


def load(**changes: int) -> Load:
    settings = {"concurrency": 2, "requests": 5, "shared_prefix_tokens": 0, "input_tokens": 20, "output_tokens": 6}
    return Load(**{**settings, "seed": 3, **changes})


@pytest.mark.parametrize("letters", ["ffff", "nSsf", "nSnS"])
def test_a_prefix_in_the_cache_changes_no_answer(letters: str) -> None:
    model = boosted(letters)
    asked = load(shared_prefix_tokens=24)
    batch = asked.prompts(VOCABULARY)[:2]
    plain, times = generate(model, batch, 0, 6)
    cached, _ = generate(model, batch, 24, 6)
    assert torch.equal(plain, cached)
    assert plain.shape == (2, 6)
    assert len(times) == 6
    assert times == sorted(times)


def test_prompts_share_the_prefix_and_nothing_else() -> None:
    drawn = load(shared_prefix_tokens=8).prompts(VOCABULARY)
    assert drawn.shape == (5, 28)
    assert (drawn[:, :8] == drawn[0, :8]).all()
    assert len({tuple(row) for row in drawn[:, 8:].tolist()}) == 5
    assert torch.equal(drawn, load(shared_prefix_tokens=8).prompts(VOCABULARY))
    assert not torch.equal(drawn, load(shared_prefix_tokens=8, seed=4).prompts(VOCABULARY))


def test_throughput_is_tokens_over_time() -> None:
    found = measure(boosted("nSsf"), load())
    assert found["completed"] == 5
    assert found["output_throughput"] * found["duration"] == pytest.approx(30)
    assert found["request_throughput"] * found["duration"] == pytest.approx(5)
    latency = found["median_ttft_ms"] + 5 * found["median_tpot_ms"]
    assert latency == pytest.approx(found["median_e2el_ms"], rel=0.5)
    assert set(metrics_of(found)) == set(FROM_VLLM)


@pytest.mark.multiprocess
@pytest.mark.exhaustive
def test_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file of the current folder that is called as a library is.
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "torch.py").write_text("raise SystemExit('the wrong torch')")
    monkeypatch.chdir(tmp_path / "here")
    folder = save_tiny(tmp_path / "model", "llama", "nSsf")
    recipe = parse_recipe({"device": "cpu"}, "test")
    counted: list[float] = []
    with launch("it", folder, recipe, tmp_path / "run.log") as running:
        found = running.answer(load(), counted.append)
        assert found.raw["completed"] == 5
        assert sum(counted) == 30
        assert found.metrics["peak_rss_gib"] > 0.1
        (folder / "config.json").unlink()
        with pytest.raises(
            LayerboostError, match=r"Transformers failed at concurrency 2 on it\n.*is not a model directory"
        ):
            running.answer(load(), counted.append)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".log" and file.name != "here"] == ["model"]
