"""What the tests of exports share: rotary embeddings, and whether their cases have all that a format claims."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tiny import layer_plans, tiny_config

from layerboost.exporting.targets import NONE, SINK, SLIDING, Target, features, needs, rope_types
from layerboost.model.modeling import base_layer_types

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
FACTOR = YARN | {"attention_factor": 1.2}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
# Family, letters of the plan and settings.
Case = tuple[str, str, dict[str, Any]]


def check_cases(target: Target, cases: Iterable[Case]) -> None:
    """Assert that cases have every family, kind of layer, feature and rotary embedding of a format, and no other."""
    families, layers, taken, full, sliding = (set[str]() for _ in range(5))
    for family, letters, changes in cases:
        config = tiny_config(family, len(letters), **changes)
        families.add(family)
        for entry, kind in zip(layer_plans(letters), base_layer_types(config), strict=True):
            layers.update(needs(entry, kind == "sliding_attention"))
        taken |= features(config)
        of_full, of_sliding = rope_types(config)
        full.add(of_full)
        sliding.add(of_sliding)
    claimed = (set(target.families), target.holds, target.takes, target.rope | target.scales_full, target.rope)
    for found, all_of in zip((families, layers, taken, full, sliding), claimed, strict=True):
        assert found == all_of, f"{target.label}: {found ^ all_of}"


def check_ends(target: Target, cases: Iterable[Case]) -> None:
    """Assert that the first and the last layer have what a layer of a format may have, each in one case at least; not
    where windows come in a period."""
    plans = [layer_plans(letters) for _, letters, _ in cases]
    for place in (0, -1):
        found = {need for plan in plans for need in needs(plan[place], slides=False)}
        wanted = {SLIDING, SINK, NONE} & target.holds
        wanted -= {NONE} if target.keeps_first and place == 0 else set()
        assert target.every_nth or wanted <= found, f"{target.label}, layer {place}: {wanted - found}"
