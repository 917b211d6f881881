"""The costs of strategies: bytes of KV cache, parameters, and the time of decoding and prefill by a linear model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from layerboost.costs.memory import as_served, cached, module_heads, padded_full
from layerboost.errors import ConfigError
from layerboost.recipe import Plan
from layerboost.runtime import machine, warn_once
from layerboost.schemas.artifact import Artifact, read_json
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, all_full, unchanged_layer, window_of
from layerboost.schemas.sensitivity import Sensitivity
from layerboost.strategies import FEATURE_MAPS, SLIDING

# The costs that a budget can limit: the keys of every mapping of costs here.
KV_BYTES, PARAMETERS, DECODE_MS = "kv_bytes", "parameters", "decode_ms"
# Of a number in the state of linear attention, which is float32 in every model.
STATE_BYTES = 4


def plan_kv_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int) -> int:
    """Return the KV bytes of a plan for one request of `context_tokens`, states of linear attention included.

    The states of a hybrid's layers of another kind are not: they are constant, and the same in every plan.
    """
    held = sum(entry.kv_tokens(context_tokens, model.kv_heads) for entry in as_served(model, layers))
    shape = model.heads, model.kv_heads, model.head_dim
    states = sum(FEATURE_MAPS[entry.feature_map].state(*shape) for entry in layers if entry.feature_map)
    return held * model.kv_bytes_per_token // model.kv_heads + states * STATE_BYTES


def base_kv_bytes(model: ModelInfo, context_tokens: int) -> int:
    """Return the KV bytes of the base for one request of `context_tokens`."""
    return plan_kv_bytes(model, all_full(model), context_tokens)


class Rates(BaseModel):
    """The speed of a machine. The time of a step is the sum of its parts; a rate of None means no time.

    A sum and not the maximum of a roofline, so that each layer has a time of its own; the two differ by at most the
    number of parts as a factor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    step_ms: float = Field(0.0, ge=0, description="of every forward pass: scheduler, sampler, launches")
    layer_ms: float = Field(0.0, ge=0, description="of every layer with attention in a pass")
    call_ms: float = Field(0.0, ge=0, description="of every further attention call in a layer, if KV heads differ")
    weight_bytes_per_s: float | None = Field(None, gt=0, description="reading of weights, once per pass")
    flops_per_s: float | None = Field(None, gt=0, description="matrix products with weights")
    kv_bytes_per_s: float | None = Field(None, gt=0, description="reading of the KV cache while decoding")
    attention_flops_per_s: float | None = Field(None, gt=0, description="attention during prefill")
    removed_saves: bool = Field(True, description="attention that is removed takes no time; in llama.cpp it slides")

    def milliseconds(self, work: np.ndarray) -> float:
        """Return the milliseconds that `work` `[7]` takes, as from `decode_work` or `prefill_work`."""
        rates = (self.weight_bytes_per_s, self.flops_per_s, self.kv_bytes_per_s, self.attention_flops_per_s)
        prices = [self.step_ms, self.layer_ms, *(1e3 / rate if rate else 0.0 for rate in rates), self.call_ms]
        return float(work @ np.array(prices))


class Costs(Artifact):
    """`costs.json`: rates measured on one machine with one model, or written by hand from a data sheet.

    `machine` and `model` are None in a file written by hand, which is valid anywhere.
    """

    machine: str | None = None
    model: str | None = Field(None, description="fingerprint of the model it was measured with")
    disturbed: str | None = Field(None, description="why the rates may be too low: other load of the machine")
    rates: Rates


def read_costs(file: Path, model: ModelInfo) -> Rates:
    """Return the rates in `costs.json`; raise ConfigError if they are of another machine or model."""
    costs = read_json(file, Costs, "layerboost costs")
    for what, there, here in (("machine", costs.machine, machine()), ("model", costs.model, model.fingerprint)):
        if there is not None and there != here:
            raise ConfigError(
                f"{file} was measured on another {what}",
                found=f"{there} there, {here} here",
                do="measure here (`layerboost costs`), or write the rates down yourself: docs/reference/plan.md",
            )
    if costs.disturbed:
        warn_once(f"{file} was measured on a disturbed machine ({costs.disturbed}): plan.decode_fraction may be off")
    return costs.rates


def decode_work(
    model: ModelInfo, layers: Sequence[LayerPlan], requests: int, context_tokens: int, module: int | None = None
) -> np.ndarray:
    """Return the work `[7]` of one step of `requests` sequences of `context_tokens`.

    Columns: passes, layers with attention, weight bytes, FLOPs of weights, KV bytes, FLOPs of prefill attention,
    attention calls besides one per layer. `module`: KV heads per call, by default as many as the layers allow.
    """
    attention = sum(entry.has_attention for entry in layers)
    weights = _body_parameters(model, layers) + model.hidden_size * model.vocabulary
    held = requests * plan_kv_bytes(model, layers, context_tokens)
    read = (weights - model.idle_parameters(requests)) * model.bytes_per_element
    flops = 2 * (weights - model.idle_parameters(1)) * requests
    return np.array([1, attention, read, flops, held, 0, _further_calls(model, layers, module)], dtype=float)


def prefill_work(
    model: ModelInfo, layers: Sequence[LayerPlan], prompt_tokens: int, max_batched_tokens: int
) -> np.ndarray:
    """Return the work `[7]` of a prompt read in steps of `max_batched_tokens`. The head runs on the last token only."""
    attention = sum(entry.has_attention for entry in layers)
    weights, head = _body_parameters(model, layers), model.hidden_size * model.vocabulary
    passes = math.ceil(prompt_tokens / max_batched_tokens)
    pairs = sum(_pairs(entry, prompt_tokens, model.kv_heads) for entry in as_served(model, layers)) / model.kv_heads
    flops = 2 * ((weights - model.idle_parameters(1)) * prompt_tokens + head * passes)
    idle = model.idle_parameters(min(prompt_tokens, max_batched_tokens))
    read = passes * (weights - idle + head) * model.bytes_per_element
    calls, scores = passes * _further_calls(model, layers, None), 4 * model.heads * model.head_dim * pairs
    return np.array([passes, passes * attention, read, flops, 0, scores, calls], dtype=float)


@dataclass(frozen=True)
class Budget:
    """Limits on costs, and the costs compared with them; all depend on the strategies' counts alone.

    Costs are sums over layers, except for the padding (vLLM keeps modules of a kind in groups of one size) and the KV
    heads per attention call, `module`: those that a plan's layers allow, unless given. `window`: of removed layers if
    the engine computes them and no layer slides.
    """

    model: ModelInfo
    context_tokens: int
    concurrency: int
    fractions: dict[str, float]
    rates: Rates | None
    padding: bool = True
    module: int | None = None
    window: int = 1

    @classmethod
    def of(cls, sensitivity: Sensitivity, settings: Plan) -> Budget:
        """Return the budget of the settings; raise ConfigError for a limit on time without rates."""
        rates = read_costs(Path(settings.costs), sensitivity.model) if settings.costs else None
        if settings.decode_fraction is not None and rates is None:
            raise ConfigError(
                "plan.decode_fraction needs to know how fast this machine is",
                do="measure it with `layerboost costs`, or write a file of rates, and name it in plan.costs",
            )
        given = {
            KV_BYTES: settings.kv_fraction,
            PARAMETERS: settings.parameter_fraction,
            DECODE_MS: settings.decode_fraction,
        }
        fractions = {name: fraction for name, fraction in given.items() if fraction is not None}
        model, context = sensitivity.model, settings.context_tokens
        # If layers slide in the base, or have a state, vLLM's groups have other counts than the plan.
        padding = settings.kv_padding and not model.sliding_layers and not model.other_layers
        limits = cls(model, context, settings.concurrency, fractions, rates, padding)
        if rates is not None and not limits.base()[DECODE_MS]:
            raise ConfigError(
                f"by the rates in {settings.costs} decoding takes no time",
                do="write down at least one of step_ms, layer_ms, weight_bytes_per_s, flops_per_s and kv_bytes_per_s",
            )
        return limits

    def plan(self, layers: Sequence[LayerPlan]) -> dict[str, float]:
        """Return every cost of a plan, for one request of the budget's context."""
        costs = {
            KV_BYTES: float(plan_kv_bytes(self.model, layers, self.context_tokens)),
            PARAMETERS: float(plan_parameters(self.model, layers)),
        }
        if self.rates is not None:
            window = window_of(layers) or self.window
            timed = layers if self.rates.removed_saves else [_kept(entry, window) for entry in layers]
            work = decode_work(self.model, timed, self.concurrency, self.context_tokens, self.module)
            costs[DECODE_MS] = self.rates.milliseconds(work)
        return costs

    def added(self, entry: LayerPlan) -> dict[str, float]:
        """Return the costs that a layer adds to a plan in which it was unchanged: negative, what it saves."""
        full = self.plan([unchanged_layer(self.model, entry.layer)])
        return {name: cost - full[name] for name, cost in self.plan([entry]).items()}

    def base(self) -> dict[str, float]:
        """Return the costs of the base."""
        return replace(self, module=None).plan(all_full(self.model))

    def relative(self, layers: Sequence[LayerPlan]) -> dict[str, float]:
        """Return the costs of a plan as fractions of the base's."""
        base = self.base()
        return {name: cost / base[name] for name, cost in self.plan(layers).items()}

    def limited(self, layers: Sequence[LayerPlan]) -> dict[str, float]:
        """Return the costs to compare with the limits: `relative`, with the padding in the KV bytes."""
        costs = self.relative(layers)
        # Modules of one KV head: larger ones pad as many heads.
        padding = self.padding_fraction(*cached(layers, self.model.kv_heads, 1), 1)
        return costs | {KV_BYTES: costs[KV_BYTES] + padding}

    def padding_fraction(self, full: int, sliding: int, module: int) -> float:
        """Return vLLM's padding with full modules of `module` KV heads as a fraction of the base's KV bytes; 0 if it is
        not counted."""
        padded = (padded_full(full, sliding) - full) * module
        return padded / (len(self.model.attention_layers) * self.model.kv_heads) if self.padding else 0.0

    def met(self, layers: Sequence[LayerPlan]) -> bool:
        """Return whether a plan is within every limit."""
        costs = self.limited(layers)
        return all(costs[name] <= fraction + 1e-9 for name, fraction in self.fractions.items())


def _kept(entry: LayerPlan, window: int) -> LayerPlan:
    """Return the entry for an engine that computes a layer without attention as one that slides like the others."""
    return entry if entry.strategy.keeps_weights else entry.model_copy(update={"attention": SLIDING, "window": window})


def _pairs(entry: LayerPlan, tokens: int, kv_heads: int) -> int:
    """Return the query-key pairs of a prompt, summed over KV heads: a query attends to the last tokens that its head
    holds, and itself."""
    seen = entry.strategy.kv_tokens(tokens, entry.window)
    full, others = len(entry.full_kv_heads), kv_heads - len(entry.full_kv_heads)
    return full * (tokens * (tokens + 1) // 2) + others * (seen * (seen + 1) // 2 + (tokens - seen) * seen)


def plan_parameters(model: ModelInfo, layers: Sequence[LayerPlan]) -> int:
    """Return the parameters of a plan, in which a layer that `layers` leave out has its MLP alone."""
    attention = sum(entry.strategy.keeps_weights for entry in layers) - model.layers
    removed = sum(model.removed_from_mlp(entry.mlp_width) for entry in layers if entry.mlp_changed)
    return model.parameters + attention * model.attention_parameters - removed


def _further_calls(model: ModelInfo, layers: Sequence[LayerPlan], module: int | None) -> int:
    """Return the attention calls of a pass besides one per layer with attention."""
    calls = model.kv_heads // (module or module_heads(model.kv_heads, layers))
    return (calls - 1) * sum(entry.has_attention for entry in layers)


def _body_parameters(model: ModelInfo, layers: Sequence[LayerPlan]) -> int:
    """Return the parameters of a plan that every token is multiplied with, without the head."""
    embeddings = (1 if model.tied_head else 2) * model.hidden_size * model.vocabulary
    return plan_parameters(model, layers) - embeddings
