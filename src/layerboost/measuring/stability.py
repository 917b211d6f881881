"""Agreement of two measurements on the ranking of layers: Spearman's correlation per replacement, with intervals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ConstantInputWarning, bootstrap, pearsonr, rankdata

from layerboost.errors import ConfigError
from layerboost.files import file_hash
from layerboost.schemas.artifact import write_json
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.run import SENSITIVITY
from layerboost.schemas.sensitivity import (
    STABILITY,
    Agreement,
    Comparison,
    Sensitivity,
    Stability,
    Variant,
    read_sensitivity,
)
from layerboost.strategies import FULL_KV_HEADS, SINK

RESAMPLES = 2000
LEAST_LAYERS = 4

# A replacement (of layer 0), and whether its scores are of KV heads, each with the sink that its layer measured.
Kind = tuple[LayerPlan, bool]


def run_stability(run: Path, others: list[Path]) -> Stability:
    """Return the agreement of RUN/sensitivity.json with other files or run folders, and of its metrics; write it too.

    Raise ConfigError for a missing or incomplete file, and for one that shares no replacement with this run.
    """
    source = run / SENSITIVITY
    mine = read_sensitivity(source)
    comparisons = [compare_files(mine, read_sensitivity(other), str(other)) for other in others]
    found = Stability(sensitivity=file_hash(source), comparisons=[*comparisons, compare_metrics(mine)])
    write_json(run / STABILITY, found)
    return found


def compare_metrics(sensitivity: Sensitivity) -> Comparison:
    """Return the agreement of every two metrics of one file."""
    found = []
    for kind, scores in _scores(sensitivity).items():
        names = list(scores)
        for index, metric in enumerate(names):
            found += [_agreement(kind, metric, other, scores[metric], scores[other]) for other in names[index + 1 :]]
    return Comparison(other="", aligned_by="layer", agreements=[entry for entry in found if entry])


def compare_files(sensitivity: Sensitivity, other: Sensitivity, name: str) -> Comparison:
    """Return the agreement of two files on each metric of each replacement that both have, layer by layer.

    Models of different depth are compared by relative depth, the other's scores interpolated. Raise
    ConfigError if the files share no replacement, such as with windows of different lengths.
    """
    mine, theirs = _scores(sensitivity), _scores(other)
    same_depth = sensitivity.model.layers == other.model.layers
    same_sites = same_depth and sensitivity.model.kv_heads == other.model.kv_heads
    found = []
    for kind, scores in mine.items():
        if kind[1] and not same_sites:
            continue
        for metric in scores:
            if metric not in theirs.get(kind, {}):
                continue
            values = theirs[kind][metric]
            if not same_depth:
                values = _at_depths(values, sensitivity.model.layers)
            found.append(_agreement(kind, metric, metric, scores[metric], values))
    agreements = [entry for entry in found if entry]
    if not agreements:
        raise ConfigError(
            f"{name} shares no replacement and metric with this run, measured in {LEAST_LAYERS} layers or more",
            found=f"{_described(mine)} here, {_described(theirs)} there",
            do="measure both with the same measure.windows",
        )
    return Comparison(
        other=name,
        differs=_differences(sensitivity, other),
        aligned_by="layer" if same_depth else "relative depth",
        agreements=agreements,
    )


def _scores(sensitivity: Sensitivity) -> dict[Kind, dict[str, np.ndarray]]:
    """Return means `[layers]`, or `[layers · KV heads]`, by replacement and metric, NaN for a site without one."""
    layers, heads = sensitivity.model.layers, sensitivity.model.kv_heads
    table: dict[Kind, dict[str, np.ndarray]] = {}

    def put(kind: Kind, size: int, site: int, variant: Variant) -> None:
        for metric, score in variant.scores.items():
            table.setdefault(kind, {}).setdefault(metric, np.full(size, np.nan))[site] = score.mean

    for entry in sensitivity.layers:
        for variant in entry.variants:
            put((variant.plan(0), False), layers, entry.layer, variant)
        for variant in entry.heads:
            site = entry.layer * heads + min(set(range(heads)) - set(variant.full_kv_heads))
            whole = variant.plan(0).model_copy(update={FULL_KV_HEADS: (), SINK: False})
            put((whole, True), layers * heads, site, variant)
    return table


def _at_depths(values: np.ndarray, layers: int) -> np.ndarray:
    known = ~np.isnan(values)
    depths = (np.arange(len(values)) + 0.5) / len(values)
    return np.asarray(np.interp((np.arange(layers) + 0.5) / layers, depths[known], values[known]))


def _agreement(kind: Kind, metric: str, other: str, mine: np.ndarray, theirs: np.ndarray) -> Agreement | None:
    """Return the agreement; None if too few layers have both scores, or all have the same."""
    both = ~np.isnan(mine) & ~np.isnan(theirs)
    a, b = mine[both], theirs[both]
    if len(a) < LEAST_LAYERS or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    # Percentiles: BCa is undefined if leaving out any one layer gives the same correlation, as with equal ranks.
    options: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile", "rng": 0}
    low, high = bootstrap((a, b), _spearman, n_resamples=RESAMPLES, **options).confidence_interval
    return Agreement(
        **kind[0].model_dump(exclude={"layer"}),
        kv_heads=kind[1],
        metric=metric,
        other_metric=other,
        spearman=float(_spearman(a, b)),
        low=float(low),
        high=float(high),
        layers=len(a),
    )


def _spearman(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
    """Return Spearman's rank correlation along an axis; 0 if one side is constant, as a resample may be."""
    with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
        found = pearsonr(rankdata(a, axis=axis), rankdata(b, axis=axis), axis=axis).statistic
    return np.nan_to_num(found)


def _differences(sensitivity: Sensitivity, other: Sensitivity) -> list[str]:
    pairs = {
        "model": (sensitivity.model.name, other.model.name),
        "weights": (sensitivity.model.fingerprint, other.model.fingerprint),
        "text": (sensitivity.text, other.text),
        **{key: (value, other.settings.get(key)) for key, value in sensitivity.settings.items()},
    }
    return [f"{key}: {here} here, {there} there" for key, (here, there) in pairs.items() if here != there]


def _described(scores: dict[Kind, dict[str, np.ndarray]]) -> str:
    return ", ".join(plan.label for plan, of_heads in scores if not of_heads and not plan.sink)
