"""The model's own samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import RUNTIME, save_tiny

from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.probes.samples import write_samples
from layerboost.recipe import Recipe, load_recipe
from layerboost.text import SAMPLES, load_tokens, read_documents


def test_the_models_own_samples_resume_after_a_kill(tmp_path: Path) -> None:
    def recipe(folder: Path) -> Recipe:
        own = {"text.source": "self", "text.sequence_tokens": 16, "text.self_samples": 80}
        return load_recipe([], {"model": str(folder)} | own)

    folder, other = (save_tiny(tmp_path / name, layers=layers) for name, layers in (("model", 2), ("other", 1)))
    base, file = find_model(str(folder), RUNTIME), tmp_path / SAMPLES
    write_samples(recipe(folder), tmp_path, base)
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 80
    assert len(set(lines)) > 70
    file.write_text("".join(lines[:64]))
    write_samples(recipe(folder), tmp_path, base)
    assert file.read_text() == whole
    assert load_tokens(recipe(folder).text, base.tokenizer, "train", 64, run=tmp_path).ids.shape == (4, 16)
    with pytest.raises(ConfigError, match="sampled from another model"):
        write_samples(recipe(other), tmp_path, find_model(str(other), RUNTIME))


def test_samples_may_hold_any_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "w3 \u2028 w4 \u2029 w5 \x85 w6"
    monkeypatch.setattr("layerboost.probes.samples.sampled", lambda *given: [f"{odd} {n}" for n in range(given[2])])
    base = find_model(str(save_tiny(tmp_path / "model", layers=1)), RUNTIME)
    recipe = load_recipe([], {"model": str(base.folder), "text.source": "self", "text.self_samples": 70})
    for _ in range(2):
        write_samples(recipe, tmp_path, base)
    assert "".join(read_documents("self", "text", tmp_path)).count("w5") == 64  # each text is taken once
