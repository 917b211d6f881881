from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from test_selection import sensitivity

from layerboost.errors import ConfigError
from layerboost.measuring.stability import compare_files, compare_metrics
from layerboost.schemas.sensitivity import LayerSensitivity, Score, Sensitivity, Variant


def removal(values: list[float]) -> Sensitivity:
    scores = [{"kl": Score(mean=value, standard_error=0.1)} for value in values]
    layers = [
        LayerSensitivity(layer=layer, variants=[Variant(attention="none", scores=score)])
        for layer, score in enumerate(scores)
    ]
    return sensitivity(len(values)).model_copy(update={"layers": layers})


def test_correlations_are_scipys_and_lie_in_their_interval() -> None:
    found = sensitivity(12)
    rows = compare_metrics(found).agreements
    assert {(row.metric, row.other_metric) for row in rows if row.attention == "none"} == {
        ("kl", "nll"), ("kl", "retrieval"), ("kl", "cosine"), ("nll", "retrieval"), ("nll", "cosine"),
        ("retrieval", "cosine"),
    }  # fmt: skip
    for row in rows:
        pairs = [
            (variant.scores[row.metric].mean, variant.scores[row.other_metric].mean)
            for entry in found.layers
            for variant in entry.variants
            if (variant.attention, variant.window, variant.sink) == (row.attention, row.window, row.sink)
        ]
        assert row.spearman == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)
        assert -1 <= row.low <= row.spearman <= row.high <= 1


def test_the_same_ranks_agree_wholly_and_reversed_ones_not() -> None:
    values = [0.1, 0.5, 0.3, 0.9, 0.7, 0.2]
    (same,) = compare_files(removal(values), removal([value**2 for value in values]), "b").agreements
    assert (same.spearman, same.low, same.high) == pytest.approx((1, 1, 1))
    (reverse,) = compare_files(removal(values), removal([-value for value in values]), "b").agreements
    assert reverse.spearman == pytest.approx(-1)


def test_models_of_different_depth_are_compared_by_relative_depth() -> None:
    deep = removal([float(depth) ** 2 for depth in np.linspace(0, 1, 24)])
    shallow = removal([float(depth) for depth in np.linspace(0, 1, 8)])
    found = compare_files(deep, shallow, "shallow")
    assert found.aligned_by == "relative depth"
    assert found.agreements[0].layers == 24
    assert found.agreements[0].spearman > 0.99


def test_files_without_a_common_replacement_are_refused() -> None:
    with pytest.raises(ConfigError, match="shares no replacement"):
        compare_files(sensitivity(6, (16,), none=False), sensitivity(6, (32,), none=False), "b")
