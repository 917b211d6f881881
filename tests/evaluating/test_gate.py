from __future__ import annotations

import math
from typing import Any

import pytest

from layerboost.errors import ConfigError, GateMissed
from layerboost.evaluating.gate import check_gate, gate_checks, validate_gate
from layerboost.recipe import Evaluate
from layerboost.schemas.evaluation import Change, EvalComparison, Perplexity, Retrieval, RetrievalScores, Task
from layerboost.schemas.sensitivity import Score


def change(mean: float) -> Change:
    return Change(
        mean=mean, standard_error=0.01, low=mean - 0.01, high=mean + 0.02, lower_95=mean - 0.01, minimum_detectable=0.03
    )


def task(mean: float, selection: bool = False) -> Task:
    difference = {"healed": change(mean), "other": change(-0.5)}
    return Task(metric="acc", items=20, selection=selection, models={}, difference=difference)


def text(kl: float) -> Perplexity:
    return Perplexity(perplexity=9.0, nll=Score(mean=2.2, standard_error=0.1), kl=change(kl))


def retrieval(mean: float | None) -> Retrieval:
    if mean is None:
        return Retrieval(groups=[])
    found = {"difference": {"healed": change(mean)}, "log_probability": {}, "log_probability_difference": {}}
    return Retrieval(groups=[], able=RetrievalScores(prompts=8, able=True, models={}, **found))


def comparison(**changes: Any) -> EvalComparison:
    values: dict[str, Any] = {
        "models": {"base": "a", "healed": "b", "other": "c"},
        "perplexity": {"healed": text(0.08), "other": text(3.0)},
        "tasks": {"piqa": task(-0.01), "arc_easy": task(-0.2, selection=True), "winogrande": task(0.03)},
        "average": task(0.01),
        "retrieval": retrieval(-0.25),
    }
    return EvalComparison(**values | changes)


def verdicts(settings: Evaluate, **changes: Any) -> dict[str, Any]:
    found = gate_checks(comparison(**changes), settings)
    assert found is not None
    assert found.model == "healed"
    return {check.what: check.passed for check in found.checks}


def test_no_threshold_is_no_gate() -> None:
    assert gate_checks(comparison(), Evaluate()) is None
    check_gate(None)


def test_every_threshold_is_checked_and_selection_tasks_are_left_out() -> None:
    loose = Evaluate(max_kl=0.1, max_average_drop=0.0, max_task_drop=0.01, max_retrieval_drop=0.3)
    assert verdicts(loose) == {
        "KL to the base": True,
        "average accuracy, drop": True,
        "piqa, drop": True,
        "winogrande, drop": True,
        "retrieval, drop of exact match": True,
    }
    strict = Evaluate(max_kl=0.01, max_average_drop=0.0, max_task_drop=0.005, max_retrieval_drop=0.2)
    assert verdicts(strict) == {
        "KL to the base": False,
        "average accuracy, drop": True,
        "piqa, drop": False,
        "winogrande, drop": True,
        "retrieval, drop of exact match": False,
    }


def test_a_missed_gate_says_everything_in_a_table() -> None:
    with pytest.raises(GateMissed) as missed:
        check_gate(gate_checks(comparison(), Evaluate(max_kl=0.01, max_task_drop=0.05)))
    assert missed.value.exit_code == 4
    lines = [line.split("  ") for line in str(missed.value).splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["KL to the base", "0.0800", "0.0700 to 0.1000", "0.01", "MISSED"] in table
    assert ["piqa, drop", "0.0100", "-0.0100 to 0.0200", "0.05", "passed"] in table


def test_what_cannot_be_judged_is_said_and_does_not_fail() -> None:
    settings = Evaluate(max_average_drop=0.0, max_retrieval_drop=0.0)
    gate = gate_checks(comparison(average=None, retrieval=retrieval(None)), settings)
    assert gate is not None
    assert [check.passed for check in gate.checks] == [None, None]
    check_gate(gate)


def test_a_threshold_on_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_retrieval_drop is set(.|\n)*evaluate\.retrieval_tokens"):
        validate_gate(Evaluate(max_retrieval_drop=0.1))
    with pytest.raises(ConfigError, match="max_kl"):
        validate_gate(Evaluate(max_kl=0.1, perplexity_tokens=0))
    validate_gate(Evaluate(max_kl=0.1, max_retrieval_drop=0.1, retrieval_tokens=(256,)))


def test_no_gate_passes_on_what_is_not_a_number() -> None:
    settings = Evaluate(max_kl=9, max_average_drop=1, max_task_drop=1, max_retrieval_drop=1)
    nothing = task(math.nan)
    found = verdicts(
        settings,
        perplexity={"healed": text(math.nan)},
        average=nothing,
        tasks={"piqa": nothing},
        retrieval=retrieval(math.nan),
    )
    assert set(found.values()) == {False}
