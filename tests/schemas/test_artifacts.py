from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import info, layer_plans

from layerboost.errors import ConfigError, LayerboostError
from layerboost.files import new_folder
from layerboost.schemas.artifact import finite, json_text, read_json, write_json
from layerboost.schemas.plan import PlanFile, read_plan, write_plan
from layerboost.schemas.sensitivity import Sensitivity


def plan(letters: str = "fsSn") -> PlanFile:
    return PlanFile(model=info(), method="budget", layers=layer_plans(letters))


def test_a_plan_round_trips_with_one_line_a_layer(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    write_plan(file, plan())
    assert read_plan(file) == plan()
    text = file.read_text()
    assert "  - {layer: 2, attention: sliding, window: 16, sink: true}\n" in text
    # A person can edit it.
    file.write_text(text.replace("{layer: 0, attention: full}", "{layer: 0, attention: none}"))
    assert [entry.attention for entry in read_plan(file).layers] == ["none", "sliding", "sliding", "none"]


def test_thinned_mlps_are_written_and_full_ones_are_not(tmp_path: Path) -> None:
    file, made = tmp_path / "plan.yaml", plan("ftmo")
    write_plan(file, made)
    assert read_plan(file) == made
    text = file.read_text()
    assert "  - {layer: 0, attention: full}\n" in text
    assert "  - {layer: 1, attention: full, mlp: thin, mlp_width: 48}\n" in text
    assert "  - {layer: 2, attention: full, mlp: none}\n" in text
    assert made.hash() not in (plan("ffmo").hash(), plan("ftmn").hash())


def test_hashes_of_plans_that_older_releases_wrote_stay() -> None:
    assert layer_plans("S")[0].key() == {"layer": 0, "attention": "sliding", "window": 16, "sink": True}


def test_the_hash_is_of_what_a_plan_does() -> None:
    assert plan().hash() == plan().model_copy(update={"method": "by hand"}).hash()
    assert plan().hash() != plan("fsSf").hash()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer: 3, attention: none", "layer: 4, attention: none", "layers 0 to 3"),
        ("attention: full", "attention: ring", "attention"),
        ("window: 16}", "window: 0}", "window"),
        ("window: 16}", "window: 8}", "one window"),
        ("attention: full", "attention: full, window: 8", "takes no window"),
        ("attention: full", "attention: full, attention: none", "attention is given twice, the second time in line"),
        ("attention: full", "attention: full, mlp: thin", "an MLP that is thin needs an mlp_width"),
        ("attention: full", "attention: full, mlp_width: 48", "an MLP that is full takes no mlp_width"),
        ("method: budget", "methods: budget", "methods"),
        ("schema_version: 2", "schema_version: 1", "schema_version"),
        ("layers:", "layers: [", "not a valid PlanFile"),
    ],
)
def test_a_mangled_plan_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    write_plan(file, plan())
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        read_plan(file)


def test_missing_truncated_and_foreign_files(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    with pytest.raises(ConfigError, match=r"does not exist\ndo: make it with `layerboost measure`"):
        read_json(file, Sensitivity, "layerboost measure")
    file.write_text('{"schema_version": 1, "mod')
    with pytest.raises(ConfigError, match="not a valid Sensitivity"):
        read_json(file, Sensitivity, "layerboost measure")
    write_json(file, plan())
    with pytest.raises(ConfigError, match="not a valid Sensitivity"):
        read_json(file, Sensitivity, "layerboost measure")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def fail() -> None:
        with new_folder(target) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
    assert [file.name for file in target.iterdir()] == ["whole"]


def test_a_folder_that_is_a_link_is_replaced_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "large" / "out")
    for content in ("first", "second"):
        with new_folder(link, "mark") as folder:
            (folder / "mark").write_text(content)
        assert link.is_symlink()
        assert [file.read_text() for file in (tmp_path / "large" / "out").iterdir()] == [content]


@pytest.mark.parametrize("kind", ["a directory", "a file"])
def test_what_is_not_ours_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """`healed.save("models")` deleted all other models there, and a GGUF file in RUN/base its own source."""
    target = tmp_path / "models"
    if kind == "a directory":
        target.mkdir()
        with new_folder(target, "mark"):  # empty
            pass
        (target / "other.gguf").write_text("x")
    else:
        target.write_text("x")
    with pytest.raises(ConfigError, match="models was not made by layerboost"), new_folder(target, "mark"):
        pass
    assert target.is_file() or [file.name for file in target.iterdir()] == ["other.gguf"]
    assert [file.name for file in tmp_path.iterdir()] == ["models"]


def test_a_full_disk_is_one_message_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LayerboostError, match=r"cannot write .*x.json\nfound: .*No space left[\s\S]*do: free space"):
        write_json(file, {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert "old" in file.read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_no_number_that_is_not_finite(value: float, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"good": 1.0})
    with pytest.raises(LayerboostError, match=rf"x.json cannot be written(.|\n)*layers.1.score is {value}"):
        write_json(file, {"layers": [{"score": 1.0}, {"score": value}]})
    assert "good" in file.read_text()
    assert finite({"a": [value, (1.5, value)], "b": "nan"}) == {"a": [None, [1.5, None]], "b": "nan"}
    with pytest.raises(LayerboostError, match=r"the result cannot be written"):
        json_text({"loss": np.float64(value)}, "the result")


def test_files_with_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.yaml", plan())
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("settings: {}", "settings: {kv_fraction: .nan}"))
    with pytest.raises(ConfigError, match=r"not a valid PlanFile(.|\n)*settings.kv_fraction is nan"):
        read_plan(tmp_path / "plan.yaml")
    score = {"mean": math.nan, "standard_error": 0.1}
    (tmp_path / "s.json").write_text(json.dumps({"schema_version": 2, "base_nll": score}))
    with pytest.raises(ConfigError, match=r"not a valid Sensitivity(.|\n)*base_nll.mean is nan"):
        read_json(tmp_path / "s.json", Sensitivity, "layerboost measure")


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path: Path) -> None:
    """As in a file name of other bytes than UTF-8."""
    write_json(tmp_path / "x.json", {"folder": "runs/caf\udce9", "unit": "KL(base ‖ changed)"})
    assert json.loads((tmp_path / "x.json").read_bytes().decode()) == {
        "folder": "runs/caf\udce9",
        "unit": "KL(base ‖ changed)",
    }
