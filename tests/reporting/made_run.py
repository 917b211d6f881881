"""A run folder with made-up values, for tests of the report only."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path

import yaml

from layerboost.files import file_hash
from layerboost.measuring.stability import compare_files, compare_metrics
from layerboost.planning.methods import frontier
from layerboost.recipe import Plan, Recipe
from layerboost.schemas.artifact import write_json
from layerboost.schemas.benchmark import Comparison, Measurement
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import Frontier, LayerPlan, PlanFile, Predicted, write_plan
from layerboost.schemas.run import RunFile, StageRecord
from layerboost.schemas.sensitivity import LayerSensitivity, Score, Sensitivity, Stability, Variant

FILES = {
    "run.json": "layerboost run",
    "recipe.yaml": "layerboost run",
    "sensitivity.json": "layerboost measure",
    "plan.yaml": "layerboost plan",
    "frontier.json": "layerboost plan --frontier",
    "stability.json": "layerboost measure --compare OTHER",
    "heal/metrics.jsonl": "layerboost heal",
    "eval/comparison.json": "layerboost evaluate",
    "bench/comparison.json": "layerboost bench",
    "bench/decode_sweep.json": "layerboost bench --decode-sweep",
}
LAYERS = 30


def model_info(name: str = "SmolLM2-135M-Instruct") -> ModelInfo:
    return ModelInfo(
        name=name,
        model_type="llama",
        layers=LAYERS,
        hidden_size=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        bytes_per_element=4,
        max_context_tokens=8192,
        vocabulary=49_152,
        tied_head=True,
        parameters=134_515_008,
        attention_parameters=885_312,
        fingerprint="5f0c1d2e3a4b5c6d",
    )


@cache
def search_files() -> tuple[Frontier, Stability]:
    """frontier.json and stability.json of the made sensitivities."""
    model, settings = model_info(), Plan(kv_padding=False)
    measured = sensitivity(model)
    points = frontier(measured, settings)
    comparisons = [compare_files(measured, measured, "other"), compare_metrics(measured)]
    return (
        Frontier(model=model, sensitivity="", settings=settings.model_dump(mode="json"), points=points),
        Stability(sensitivity="", comparisons=comparisons),
    )


def make_run(run: Path, name: str = "SmolLM2-135M-Instruct") -> Path:
    """Every file of a finished run; returns the folder."""
    run.mkdir(parents=True)
    model = model_info(name)
    write_json(run / "sensitivity.json", sensitivity(model))
    layers = [layer_plan(layer) for layer in range(LAYERS)]
    predicted = Predicted(
        quality_loss={"kl": 0.21, "nll": 0.19},
        kv_fraction=0.3,
        kv_bytes_per_request=14_155_776,
        parameter_fraction=0.95,
        context_tokens=1024,
    )
    plan = PlanFile(
        model=model,
        method="budget",
        sensitivity=file_hash(run / "sensitivity.json"),
        predicted=predicted,
        layers=layers,
    )
    write_plan(run / "plan.yaml", plan)
    searched, stability = search_files()
    made_from = file_hash(run / "sensitivity.json")
    write_json(run / "frontier.json", searched.model_copy(update={"sensitivity": made_from}))
    write_json(run / "stability.json", stability.model_copy(update={"sensitivity": made_from}))
    recipe = Recipe(model=name).model_dump(mode="json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write_json(run / "run.json", history())
    (run / "heal").mkdir()
    (run / "heal" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    write_json(run / "eval" / "comparison.json", quality())
    write_json(run / "bench" / "comparison.json", bench())
    write_json(run / "bench" / "decode_sweep.json", decode_sweep())
    return run


def layer_plan(layer: int) -> LayerPlan:
    if layer in {0, 2, 11, 12, 17, 23, 29, 8}:
        return LayerPlan(layer=layer, attention="full")
    if layer in {5, 14, 21, 26}:
        return LayerPlan(layer=layer, attention="none")
    return LayerPlan(layer=layer, attention="sliding", window=64, sink=layer % 3 == 0)


def sensitivity(model: ModelInfo) -> Sensitivity:
    chance = random.Random(1)
    layers = []
    for layer in range(LAYERS):
        removal = math.exp(chance.gauss(-3.2, 1.1)) + (1.5 if layer == 0 else 0)
        variants = [_variant(chance, removal, "none", None, False)]
        for window, share in ((64, 0.3), (128, 0.12), (256, 0.03)):
            for sink in (False, True):
                factor = chance.uniform(0.5, 1.2) if sink else 1.0
                variants.append(_variant(chance, removal * share * factor, "sliding", window, sink))
        layers.append(LayerSensitivity(layer=layer, variants=variants))
    return Sensitivity(
        model=model,
        text="0a1b2c3d4e5f6071",
        settings={"windows": [64, 128, 256]},
        sequences=32,
        tokens=16_384,
        base_nll=Score(mean=2.6712, standard_error=0.0391),
        layers=layers,
    )


def _variant(chance: random.Random, kl: float, attention: str, window: int | None, sink: bool) -> Variant:
    error = kl * chance.uniform(0.05, 0.4)
    nll = Score(mean=kl * chance.uniform(-0.2, 1.1), standard_error=1.2 * error)
    values = {"attention": attention, "window": window, "sink": sink}
    retrieval = Score(mean=40 * kl * chance.uniform(-0.1, 1.0), standard_error=20 * error)
    scores = {"kl": Score(mean=kl, standard_error=error), "nll": nll, "retrieval": retrieval}
    return Variant.model_validate({**values, "scores": scores})


def metrics() -> list[dict[str, object]]:
    chance = random.Random(2)
    checked = {"tokens": 16_384, "validation_kl": 0.6, "validation_nll": 3.1, "seconds": 40.0}
    lines: list[dict[str, object]] = [{"stage": "fit", "step": 1, **checked}]
    for step in range(1, 201):
        loss = (0.9 * math.exp(-step / 30) + 0.06) * math.exp(chance.gauss(0, 0.12))
        values = {"step": step, "tokens": step * 5000, "loss": loss, "lr": 1e-3, "seconds": step * 4.1}
        lines.append({"stage": "attention", **values})
    for step in range(1, 401):
        loss = (0.5 * math.exp(-step / 60) + 0.14) * math.exp(chance.gauss(0, 0.15))
        values = {"step": step, "tokens": step * 22_500, "loss": loss, "lr": 1e-3, "seconds": step * 21.0}
        lines.append({"stage": "lora", **values})
        if step % 50 == 0:
            checked = {"validation_kl": 0.45 * math.exp(-step / 60) + 0.15, "validation_nll": 2.7 + 20 / (step + 100)}
            lines.append({"stage": "lora", "step": step, "tokens": step * 22_500, **checked, "seconds": step * 21.0})
    return lines


def history() -> RunFile:
    stages = ("measure", "plan", "convert", "heal", "evaluate", "bench")
    seconds = (812.4, 1.3, 6.2, 9241.7, 3120.0, 1802.5)
    versions = {"python": "3.11.9", "layerboost": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"}
    records = [
        StageRecord(
            stage=stage,
            argv=["layerboost", stage, "--run", "runs/smollm2", "--set", "text.source=my notes.txt"],
            started=f"2026-11-2{index}T10:15:00+00:00",
            seconds=taken,
            status="done",
            seed=0,
            device="cpu",
            versions=versions,
            git_revision="c9c0528d1f0e4a5b6c7d8e9f0a1b2c3d4e5f6071",
        )
        for index, (stage, taken) in enumerate(zip(stages, seconds, strict=True))
    ]
    return RunFile(stages=records)


def _score(mean: float, standard_error: float) -> dict[str, float]:
    return {"mean": mean, "standard_error": standard_error}


def change(mean: float, error: float) -> dict[str, float]:
    bounds = {"low": mean - 1.96 * error, "high": mean + 1.96 * error, "lower_95": mean - 1.64 * error}
    return _score(mean, error) | bounds | {"minimum_detectable": 2.8 * error}


def quality() -> dict[str, object]:
    tasks = {
        "piqa": (1838, 0.674, 0.611, 0.668),
        "winogrande": (1267, 0.531, 0.509, 0.527),
        "arc_easy": (2376, 0.541, 0.428, 0.529),
        "arc_challenge": (1172, 0.282, 0.251, 0.279),
    }
    average = tuple(sum(values[model] for values in tasks.values()) / 4 for model in (1, 2, 3))
    return {
        "schema_version": 2,
        "settings": {"limit": None},
        "models": {"base": "5f0c1d2e3a4b5c6d", "converted": "77aa88bb99cc00dd", "healed": "12ab34cd56ef7890"},
        "selection": [],
        "text": {"source": "package:notes (held-out)", "tokens": 32_768, "fingerprint": "ffeeddccbbaa9988"},
        "perplexity": {
            "base": {"perplexity": 14.457, "nll": _score(2.6712, 0.0391), "kl": change(0.0, 0.0)},
            "converted": {
                "perplexity": 18.912,
                "nll": _score(2.9398, 0.0420),
                "nll_difference": change(0.2686, 0.0093),
                "kl": change(0.3012, 0.0081),
            },
            "healed": {
                "perplexity": 14.913,
                "nll": _score(2.7022, 0.0394),
                "nll_difference": change(0.0310, 0.0027),
                "kl": change(0.0641, 0.0019),
            },
        },
        "tasks": {name: _task(*values) for name, values in tasks.items()},
        "average": {**_task(6653, *average), "metric": "mean over tasks", "tasks": list(tasks), "margin": None},
        "positions": positions(),
        "retrieval": {"groups": [_retrieval("key_value", 256, 0.25), _retrieval("passkey", 2048, 1.0)], "able": None},
        "gate": {
            "model": "healed",
            "checks": [
                {"what": "KL to the base", "found": 0.0641, "low": 0.06, "high": 0.068, "at_most": 0.1, "passed": True}
            ],
        },
    }


def _task(items: int, base: float, converted: float, healed: float) -> dict[str, object]:
    values = {"base": base, "converted": converted, "healed": healed}
    changes = {name: value - base for name, value in values.items() if name != "base"}
    return {
        "metric": "acc_norm",
        "items": items,
        "selection": False,
        "models": {
            name: {"value": value, "standard_error": math.sqrt(value * (1 - value) / items)}
            for name, value in values.items()
        },
        "difference": {name: change(lost, 0.6 / math.sqrt(items)) for name, lost in changes.items()},
        "margin": {
            "unit": "nats per character",
            "models": {name: _score(value - 0.5, 0.01) for name, value in values.items()},
            "difference": {name: change(lost, 0.2 / math.sqrt(items)) for name, lost in changes.items()},
        },
    }


def positions() -> dict[str, object]:
    base = [3.4, 3.0, 2.8, 2.7]
    lost = {"converted": [0.01, 0.2, 0.35, 0.4], "healed": [0.01, 0.03, 0.05, 0.06]}
    models = {"base": base, **{name: [a + b for a, b in zip(base, more, strict=True)] for name, more in lost.items()}}
    return {
        "edges": [0, 128, 256, 512, 1024],
        "sequences": 16,
        "models": {name: [_score(value, 0.05) for value in values] for name, values in models.items()},
        "difference": {name: [change(value, 0.005) for value in values] for name, values in lost.items()},
    }


def _retrieval(kind: str, length: int, base: float) -> dict[str, object]:
    values = {"base": base, "converted": base / 4, "healed": base / 2}
    nats = {"base": -0.55, "converted": -7.6, "healed": -3.1}
    depths = [
        {"from": part / 4, "to": (part + 1) / 4, "prompts": 4, "exact": values, "log_probability": nats}
        for part in range(4)
    ]
    return {
        "kind": kind,
        "length_tokens": length,
        "prompts": 16,
        "able": base >= 0.5,
        "models": {name: {"value": value, "standard_error": 0.1} for name, value in values.items()},
        "difference": {name: change(value - base, 0.1) for name, value in values.items() if name != "base"},
        "log_probability": {name: _score(value, 0.6) for name, value in nats.items()},
        "log_probability_difference": {
            name: change(value + 0.55, 0.7) for name, value in nats.items() if name != "base"
        },
        "depths": depths,
    }


def bench() -> Comparison:
    chance = random.Random(3)
    speeds = {
        "base": {50: 181.0, 100: 203.0, 200: 209.0},
        "converted": {50: 198.0, 100: 261.0, 200: 296.0},
        "healed": {50: 197.0, 100: 258.0, 200: 297.0},
    }
    measurements = [
        _measurement(model, concurrency, repeat, speed * chance.uniform(0.97, 1.03))
        for repeat in range(3)
        for model, curve in speeds.items()
        for concurrency, speed in curve.items()
    ]
    return Comparison(
        settings={"requests_per_concurrency": 4, "input_tokens": 1024, "output_tokens": 128},
        environment={"vllm": "0.32.0", "device": "cpu", "cores": 2},
        models={"base": "1111222233334444", "converted": "5555666677778888", "healed": "5555666677778888"},
        reference="base",
        complete=True,
        measurements=measurements,
    )


def _measurement(model: str, concurrency: int, repeat: int, speed: float) -> Measurement:
    wait_ms = 1000 * concurrency / speed
    metrics = {
        "output_tokens_per_s": speed,
        "requests_per_s": speed / 128,
        "ttft_ms_median": 9 * wait_ms,
        "ttft_ms_p99": 31 * wait_ms,
        "tpot_ms_median": wait_ms,
        "tpot_ms_p99": 1.4 * wait_ms,
        "peak_rss_gib": 3.4,
        "kv_cache_tokens": 46_592.0 if model == "base" else 117_760.0,
    }
    return Measurement(
        model=model,
        concurrency=concurrency,
        repeat=repeat,
        file=f"{model}-c{concurrency}-r{repeat}.json",
        seed=concurrency,
        metrics=metrics,
    )


def decode_sweep() -> Comparison:
    chance = random.Random(4)
    measurements = [
        Measurement(
            model=model,
            concurrency=16,
            output_tokens=length,
            repeat=repeat,
            file=f"decode-{model}-{length}-r{repeat}.json",
            seed=length,
            metrics={
                "latency_ms_median": length * (40 + slope * length) * chance.uniform(0.98, 1.02),
                "tpot_ms_median": 40 + slope * length,
                "kv_used_gib": gib * length / 1024,
                "peak_rss_gib": 3.4,
            },
        )
        for repeat in range(2)
        for model, slope, gib in (("base", 0.03, 0.7), ("healed", 0.012, 0.25))
        for length in (256, 512, 1024, 2048)
    ]
    return Comparison(
        settings={"decode_batch": 16},
        environment={"vllm": "0.32.0", "device": "cpu", "cores": 2},
        models={"base": "1111222233334444", "healed": "5555666677778888"},
        reference="base",
        complete=True,
        measurements=measurements,
    )
