"""What a report says of a run that is unfinished, disturbed or edited: every sentence, in one golden file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made_run import make_run, model_info, sensitivity

from layerboost.files import file_hash
from layerboost.reporting.page import markdown_page
from layerboost.reporting.sources import Sources
from layerboost.reporting.stage import report_page
from layerboost.schemas.artifact import write_json
from layerboost.schemas.plan import read_plan, write_plan

QUALITY, BENCH, SWEEP = "eval/comparison.json", "bench/comparison.json", "bench/decode_sweep.json"
Edit = Callable[[Path], None]


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    """An edit of one JSON file of a run."""

    def edited(run: Path) -> None:
        values = json.loads((run / name).read_text())
        change(values)
        (run / name).write_text(json.dumps(values))

    return edited


def missed_gate(values: dict[str, Any]) -> None:
    checks = values["gate"]["checks"]
    checks.append(checks[0] | {"what": "piqa, drop", "passed": False})
    values["tasks"]["arc_easy"]["selection"] = True


def extra_model(values: dict[str, Any]) -> None:
    values["perplexity"]["longer"] = values["perplexity"]["healed"]
    values["average"]["models"]["longer"] = values["average"]["models"]["base"]


def one_repeat(values: dict[str, Any]) -> None:
    values["measurements"] = [entry for entry in values["measurements"] if entry["repeat"] == 0]


def disturbed(values: dict[str, Any]) -> None:
    for entry in values["measurements"]:
        taken = 0.9 if (entry["model"], entry["concurrency"], entry["repeat"]) == ("base", 200, 0) else 0.02
        entry["metrics"] |= {"own_cores": 1.0, "other_cores": taken}


def all_full(run: Path) -> None:
    plan = read_plan(run / "plan.yaml")
    full = [entry.model_copy(update={"attention": "full", "window": None, "sink": False}) for entry in plan.layers]
    write_plan(run / "plan.yaml", plan.model_copy(update={"layers": full}))


def another_context(run: Path) -> None:
    plan = read_plan(run / "plan.yaml")
    assert plan.predicted
    longer = plan.predicted.model_copy(update={"context_tokens": 8 * plan.predicted.context_tokens})
    write_plan(run / "plan.yaml", plan.model_copy(update={"predicted": longer}))


def measured_again(run: Path) -> None:
    cut = sensitivity(model_info())
    write_json(run / "sensitivity.json", cut.model_copy(update={"layers": cut.layers[:12]}))


def healed_again(run: Path) -> None:
    (run / "healed").mkdir()
    (run / "healed" / "config.json").write_text("{}")


EDITS: dict[str, Edit] = {
    "a gate is missed, and layers were chosen on a task": edit(QUALITY, missed_gate),
    "an extra checkpoint is evaluated": edit(QUALITY, extra_model),
    "another base was evaluated": edit(QUALITY, lambda values: values["models"].update(base="0" * 16)),
    "no task outside the selection": edit(QUALITY, lambda values: values.update(average=None)),
    "no long contexts": edit(QUALITY, lambda values: values.update(positions=None, retrieval=None)),
    "one repeat": edit(BENCH, one_repeat),
    "another process took a core": edit(BENCH, disturbed),
    "a shared prefix": edit(BENCH, lambda values: values["settings"].update(shared_prefix_tokens=512)),
    "an unfinished decode sweep": edit(SWEEP, lambda values: values.update(complete=False)),
    "a model healed after its benchmark": healed_again,
    "all layers made full by hand": all_full,
    "a plan for another context": another_context,
    "sensitivities measured again, not all yet": measured_again,
}


def test_what_a_report_points_out(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    def lines(name: str, change: Edit) -> list[str]:
        run = make_run(tmp_path / name / "run")
        change(run)
        return markdown_page(report_page(Sources(run))).splitlines()

    plain = set(lines("plain", lambda run: None))
    parts = []
    for name, change in EDITS.items():
        # Rows of tables are in report.md's own golden file.
        said = [line for line in lines(name, change) if line not in plain and not line.startswith("|")]
        assert said, name
        parts.append(f"## {name}\n\n" + "\n".join(said) + "\n")
    golden("remarks.md", "\n".join(parts))


def test_a_model_that_is_the_one_benchmarked_is_not_pointed_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    healed_again(run)
    edit(BENCH, lambda values: values["models"].update(healed=file_hash(run / "healed" / "config.json")))(run)
    assert "changed after the benchmark" not in markdown_page(report_page(Sources(run)))
