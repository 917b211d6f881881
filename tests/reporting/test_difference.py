from __future__ import annotations

from pathlib import Path

import pytest
from tiny import info, layer_plans

from layerboost.errors import ConfigError
from layerboost.reporting.difference import difference_table, plan_difference
from layerboost.schemas.plan import PlanFile, write_plan


def test_two_plans_side_by_side(tmp_path: Path) -> None:
    for name, letters in (("a", "fsSn"), ("b", "fSSf")):
        write_plan(tmp_path / name / "plan.yaml", PlanFile(model=info(), method=name, layers=layer_plans(letters)))
    found = plan_difference(tmp_path / "a", tmp_path / "b" / "plan.yaml")
    assert [row["layer"] for row in found["layers"] if row["differs"]] == [1, 3]
    table = difference_table(found)
    assert table[2] == ["1", "sliding 16", "sliding 16 + sink", "≠"]
    assert ["none", "1", "0", ""] in table
    # At the model's 512 tokens: a full layer holds a quarter, a window of 16 a 128th.
    assert ["KV of base", "0.266", "0.516", ""] in table
    assert ["parameters of base", "0.891", "1.00", ""] in table
    write_plan(tmp_path / "c.yaml", PlanFile(model=info(5), method="c", layers=layer_plans("fffff")))
    with pytest.raises(ConfigError, match="different depth"):
        plan_difference(tmp_path / "a", tmp_path / "c.yaml")
