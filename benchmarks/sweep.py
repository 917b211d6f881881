"""The sensitivity sweep against the plain way: a full forward pass of Transformers' own code for every variant.

    python benchmarks/sweep.py MODEL_DIR TEXT [--layers 10] [--sequences 4]

Both measure KL, NLL and top-1 agreement of the same variants (none; windows 64, 128, 256, each with and without a sink)
of the same layers on the same text; they take turns layer by layer. The plain way holds the base's log-probabilities of
all batches, so it does not pay for the base again. Then each runs alone in a process for its peak memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timing
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from layerboost.measuring.sweep import candidates
from layerboost.model.linear import use_onednn
from layerboost.model.sinks import Sinks, calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import attention_of
from layerboost.probes.probe import TextProbe
from layerboost.recipe import Measure, Text
from layerboost.runtime import peak_rss_bytes
from layerboost.schemas.plan import LayerPlan
from layerboost.text import load_tokens

WINDOWS, TOKENS, METRICS = (64, 128, 256), 512, ("kl", "nll", "top1")
ALL_ATTENTION_FUNCTIONS.register("gpt_oss_eager", eager_attention_forward)


class Plain:
    """Every variant by a full forward pass; windows by masks, sinks by gpt-oss's eager attention."""

    def __init__(self, model: Any, batches: list[torch.Tensor], sinks: Sinks) -> None:
        self.model, self.batches, self.sinks = model, batches, sinks
        self.base = [model(batch, use_cache=False).logits.log_softmax(-1) for batch in batches]

    def measure(self, plans: list[LayerPlan]) -> list[dict[str, float]]:
        """What each plan's one changed layer loses, by metric."""
        found = []
        for plan in plans:
            parts: dict[str, list[torch.Tensor]] = {metric: [] for metric in METRICS}
            for batch, base in zip(self.batches, self.base, strict=True):
                with self.changed(plan, batch):
                    changed = self.model(batch, use_cache=False).logits.log_softmax(-1)[:, :-1]
                expected, labels = base[:, :-1], batch[:, 1:, None]
                parts["kl"].append(F.kl_div(changed, expected, log_target=True, reduction="none").sum(-1))
                parts["nll"].append((expected.gather(-1, labels) - changed.gather(-1, labels))[..., 0])
                parts["top1"].append((expected.argmax(-1) != changed.argmax(-1)).float())
            found.append({metric: float(torch.cat(values).mean()) for metric, values in parts.items()})
        return found

    @contextmanager
    def changed(self, plan: LayerPlan, batch: torch.Tensor) -> Iterator[None]:
        """One layer under another strategy."""
        attention: Any = attention_of(self.model, plan.layer)
        if plan.attention == "none":
            attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
            yield
            del attention.forward
            return
        assert plan.window
        config, position = attention.config, torch.arange(batch.shape[1])
        seen = (position <= position[:, None]) & (position > position[:, None] - plan.window)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        hook = attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        if plan.sink:
            attention.config = copy.copy(config)
            attention.config._attn_implementation = "gpt_oss_eager"
            attention.sinks = self.sinks(plan)
        yield
        hook.remove()
        attention.config = config
        if plan.sink:
            del attention.sinks


class ZeroSinks(Sinks):
    """Sinks of zero, which are not fitted."""

    def __init__(self, heads: int) -> None:
        super().__init__({}, heads, torch.device("cpu"))
        self.heads = heads

    def __call__(self, plan: LayerPlan) -> torch.Tensor:
        """Return the sink logits of a layer whose heads all have a window."""
        return torch.zeros(self.heads)


class Ours:
    """The sweep's own probe, one layer at a time, on a model with the same weights."""

    def __init__(self, model: Any, batches: list[torch.Tensor], sinks: Sinks) -> None:
        model = copy.deepcopy(model, {id(weights): weights for weights in model.parameters()})
        use_onednn(model)
        self.probe = TextProbe(LayerStream(model, sinks), batches, windows=WINDOWS)

    def go_to(self, layer: int) -> None:
        """What the sweep does between layers, for the sample's gaps."""
        inputs = self.probe.streams.inputs
        while max(inputs) <= layer:
            self.probe.streams.advance(max(inputs))
        for done in [index for index in inputs if index < layer]:
            del inputs[done]

    def measure(self, plans: list[LayerPlan]) -> list[dict[str, float]]:
        """What each plan's one changed layer loses, by metric."""
        full, layer = self.probe.streams.plan, plans[0].layer
        whole = [[*full[:layer], plan, *full[layer + 1 :]] for plan in plans]
        return [{m: float(losses[m].mean()) for m in METRICS} for losses in self.probe.losses(whole)]


@torch.no_grad()
def compare(model: Any, batches: list[torch.Tensor], layers: list[int]) -> dict[str, Any]:
    """Both ways over the layers in turn."""
    sinks = calibrate_sinks(model, batches, layers, WINDOWS)
    plain, made, found = Plain(model, batches, sinks), [], {}
    # What all layers of a sweep share: the base's part, and going from each layer to the next.
    shared = timing.seconds(lambda: made.append(Ours(model, batches, sinks)))
    [ours], seconds, largest = made, {"ours": 0.0, "plain": 0.0}, dict.fromkeys(METRICS, 0.0)

    def measure(name: str, way: Plain | Ours, plans: list[LayerPlan]) -> None:
        found[name] = way.measure(plans)

    for layer in layers:
        plans = candidates(model.config, WINDOWS)[layer]
        shared += timing.seconds(partial(ours.go_to, layer))
        for name, way in (("ours", ours), ("plain", plain)):
            seconds[name] += timing.seconds(partial(measure, name, way, plans))
        for metric, before in largest.items():
            off = [abs(a[metric] - b[metric]) for a, b in zip(found["ours"], found["plain"], strict=True)]
            largest[metric] = max(before, *off)
    seconds["ours"] += shared * len(layers) / model.config.num_hidden_layers
    tokens = len(layers) * len(plans) * sum(batch.numel() for batch in batches)
    return {
        "layers": layers,
        "variants": len(plans),
        "seconds": seconds,
        "ratio": seconds["plain"] / seconds["ours"],
        "tokens_per_s": {way: tokens / spent for way, spent in seconds.items()},
        "largest_difference": largest,
    }


@torch.no_grad()
def peak_mib(way: str, model: Any, batches: list[torch.Tensor], layer: int) -> float:
    """Peak memory of one way on one layer; sinks of any value, as fitting them would be the peak."""
    sinks = ZeroSinks(model.config.num_attention_heads)
    plans = candidates(model.config, WINDOWS)[layer]
    if way == "ours":
        ours = Ours(model, batches, sinks)
        ours.go_to(layer)
        ours.measure(plans)
    else:
        Plain(model, batches[:1], sinks).measure(plans)
    return peak_rss_bytes() / 2**20


def main() -> None:
    """Compare, print, then JSON."""
    parser = timing.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layers", type=int, default=10, help="evenly spread layers to do")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--batch", type=int, default=Measure().batch_sequences)
    parser.add_argument("--way", choices=["ours", "plain"], help="one alone, for its peak memory")
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    text = Text(source=asked.text, sequence_tokens=TOKENS)
    tokens = load_tokens(text, AutoTokenizer.from_pretrained(asked.model), "calibration", asked.sequences * TOKENS)
    batches, count = tokens.batches(asked.batch), model.config.num_hidden_layers
    layers = [int((index + 0.5) * count / asked.layers) for index in range(asked.layers)]
    if asked.way:
        print(json.dumps({"peak_mib": peak_mib(asked.way, model, batches, layers[0])}))
        return
    result = compare(model, batches, layers)
    words = [asked.model, asked.text, "--layers", asked.layers, "--sequences", asked.sequences, "--batch", asked.batch]
    peaks = {way: timing.alone(__file__, *words, "--way", way)["peak_mib"] for way in ("ours", "plain")}
    print(f"{result['ratio']:.2f} times as fast as full forward passes at equal numbers", end="; ")
    print(", ".join(f"{metric} differs by at most {most:.1e}" for metric, most in result["largest_difference"].items()))
    print(f"peak memory {peaks['ours']:,.0f} MiB against {peaks['plain']:,.0f} MiB")
    timing.show(result | {"peak_mib": peaks}, asked)


if __name__ == "__main__":
    main()
