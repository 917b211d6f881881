"""The sensitivity sweep against the plain way: a full forward pass of Transformers' own code for every variant.

    python benchmarks/sweep.py MODEL_DIR TEXT [--layers 10] [--sequences 4]

Both measure KL, NLL and top-1 agreement of the same variants (none; windows 64, 128, 256, each with and without a sink)
of the same layers on the same text, layer by layer in turn. The plain way holds the base's log-probabilities of all
batches, so it does not pay for the base again. Then each runs alone in a process for its peak memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from layerboost.artifacts import LayerPlan
from layerboost.model.linear import use_onednn
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import attention_of
from layerboost.recipe import Measure, Text
from layerboost.runtime import peak_rss_bytes
from layerboost.sensitivity.metrics import BaseText
from layerboost.sensitivity.probe import TextProbe
from layerboost.sensitivity.sinks import Sinks, calibrate_sinks
from layerboost.sensitivity.sweep import candidates
from layerboost.text import load_tokens

WINDOWS = (64, 128, 256)
TOKENS = 512
METRICS = ("kl", "nll", "top1")
ALL_ATTENTION_FUNCTIONS.register("gpt_oss_eager", eager_attention_forward)


class Plain:
    """Every variant by a full forward pass; windows by masks, sinks by gpt-oss's eager attention."""

    def __init__(self, model: Any, batches: list[torch.Tensor], sinks: Sinks) -> None:
        self.model, self.batches, self.sinks = model, batches, sinks

    def base(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The base's log-probabilities `[B, T, V]` and best tokens `[B, T]` of each batch."""
        found = [self.model(batch, use_cache=False).logits.log_softmax(-1) for batch in self.batches]
        return [(every, every.argmax(-1)) for every in found]

    def measure(self, plans: list[LayerPlan], base: list[tuple[torch.Tensor, torch.Tensor]]) -> list[dict[str, float]]:
        """What each plan's one changed layer loses, by metric."""
        found = []
        for plan in plans:
            parts: dict[str, list[torch.Tensor]] = {metric: [] for metric in METRICS}
            for batch, (every, top) in zip(self.batches, base, strict=True):
                with self.changed(plan, batch):
                    changed = self.model(batch, use_cache=False).logits.log_softmax(-1)[:, :-1]
                expected, labels = every[:, :-1], batch[:, 1:, None]
                parts["kl"].append(F.kl_div(changed, expected, log_target=True, reduction="none").sum(-1))
                parts["nll"].append((expected.gather(-1, labels) - changed.gather(-1, labels))[..., 0])
                parts["top1"].append((top[:, :-1] != changed.argmax(-1)).float())
            found.append({metric: float(torch.cat(values).mean()) for metric, values in parts.items()})
        return found

    @contextmanager
    def changed(self, plan: LayerPlan, batch: torch.Tensor) -> Iterator[None]:
        """One layer under another strategy."""
        layer = self.model.model.layers[plan.layer]
        attention: Any = attention_of(self.model, plan.layer)
        config = attention.config
        if plan.attention == "none":
            layer.self_attn = Nothing()
            yield
            layer.self_attn = attention
            return
        assert plan.window
        position = torch.arange(batch.shape[1])
        seen = (position <= position[:, None]) & (position > position[:, None] - plan.window)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        hook = attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        if plan.sink:
            attention.config = copy.copy(config)
            attention.config._attn_implementation = "gpt_oss_eager"
            attention.sinks = self.sinks[plan.layer, plan.window]
        yield
        hook.remove()
        attention.config = config
        if plan.sink:
            del attention.sinks


class Nothing(nn.Module):
    """No attention."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Nothing is added to the stream."""
        return torch.zeros_like(hidden_states), None


class Timed:
    """Seconds spent inside methods, summed."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(owner, name, self.timed(getattr(owner, name)))

    def timed(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """The method, with its seconds added."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = stock(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return found

        return timed


class Ours:
    """The sweep's own probe, one layer at a time, on a model with the same weights."""

    def __init__(self, model: Any, batches: list[torch.Tensor], sinks: Sinks) -> None:
        model = copy.deepcopy(model, {id(weights): weights for weights in model.parameters()})
        use_onednn(model)
        self.stream = LayerStream(model, sinks)
        self.probe = TextProbe(self.stream, batches, windows=WINDOWS)
        self.in_layers, self.in_head = Timed(self.stream, "finish", "finish_after"), Timed(BaseText, "damages")

    def go_to(self, layer: int) -> None:
        """What the sweep does between layers, for the sample's gaps."""
        inputs = self.probe.streams.inputs
        while max(inputs) <= layer:
            self.probe.streams.advance(max(inputs))
        for done in [index for index in inputs if index < layer]:
            del inputs[done]

    def measure(self, plans: list[LayerPlan]) -> list[dict[str, float]]:
        """What each plan's one changed layer loses, by metric."""
        full, layer = self.probe.streams.kept, plans[0].layer
        whole = [[*full[:layer], plan, *full[layer + 1 :]] for plan in plans]
        return [{m: float(damages[m].mean()) for m in METRICS} for damages in self.probe.damages(whole)]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gives."""
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found


@torch.no_grad()
def compare(model: Any, batches: list[torch.Tensor], layers: list[int]) -> dict[str, Any]:
    """Both ways over the layers in turn."""
    sinks = calibrate_sinks(model, batches, layers, WINDOWS)
    plain = Plain(model, batches, sinks)
    expected = plain.base()
    seconds = {"plain": 0.0}
    # The base's part is done once for all layers of a sweep.
    start, ours = timed(lambda: Ours(model, batches, sinks))
    seconds["ours"] = start * len(layers) / model.config.num_hidden_layers
    largest = dict.fromkeys(METRICS, 0.0)
    for layer in layers:
        plans = candidates(model, layer, WINDOWS)
        # A sweep of all layers goes from each to the next; a sample's way is longer by the layers it leaves out.
        spent, _ = timed(lambda layer=layer: ours.go_to(layer))
        seconds["ours"] += spent * len(layers) / model.config.num_hidden_layers
        spent, found = timed(lambda plans=plans: ours.measure(plans))
        seconds["ours"] += spent
        spent, theirs = timed(lambda plans=plans: plain.measure(plans, expected))
        seconds["plain"] += spent
        for metric, before in largest.items():
            off = [abs(a[metric] - b[metric]) for a, b in zip(found, theirs, strict=True)]
            largest[metric] = max(before, *off)
        print(f"layer {layer}: ours {seconds['ours']:.1f} s, plain {seconds['plain']:.1f} s", file=sys.stderr)
    tokens = len(layers) * len(plans) * sum(batch.numel() for batch in batches)
    above, head = ours.in_layers.seconds / seconds["ours"], ours.in_head.seconds / seconds["ours"]
    return {
        "layers": layers,
        "variants": len(plans),
        "seconds": seconds,
        "ratio": seconds["plain"] / seconds["ours"],
        "tokens_per_s": {arm: tokens / spent for arm, spent in seconds.items()},
        "largest_difference": largest,
        "share_of_time": {"layers above": above, "head and losses": head, "layer and base": 1 - above - head},
    }


@torch.no_grad()
def alone(arm: str, model: Any, batches: list[torch.Tensor], layer: int) -> None:
    """One way on one layer, and its peak memory as JSON; sinks of any value, as fitting them would be the peak."""
    sinks = {(layer, window): torch.zeros(model.config.num_attention_heads) for window in WINDOWS}
    plans = candidates(model, layer, WINDOWS)
    if arm == "ours":
        ours = Ours(model, batches, sinks)
        ours.go_to(layer)
        ours.measure(plans)
    else:
        plain = Plain(model, batches[:1], sinks)
        plain.measure(plans, plain.base())
    print(json.dumps(peak_rss_bytes() / 2**20))


def main() -> None:
    """Compare, print, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layers", type=int, default=10, help="evenly spread layers to do")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--batch", type=int, default=Measure().batch_sequences)
    parser.add_argument("--arm", choices=["ours", "plain"], help="one alone, for its peak memory")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = Text(source=args.text, sequence_tokens=TOKENS)
    tokens = load_tokens(text, AutoTokenizer.from_pretrained(args.model), "calibration", args.sequences * TOKENS)
    batches, count = tokens.batches(args.batch), model.config.num_hidden_layers
    layers = [int((index + 0.5) * count / args.layers) for index in range(args.layers)]
    if args.arm:
        alone(args.arm, model, batches, layers[0])
        return
    result = compare(model, batches, layers)
    argv = [sys.executable, __file__, *sys.argv[1:]]
    result["peak_mib"] = peaks = {
        arm: json.loads(subprocess.run([*argv, "--arm", arm], capture_output=True, text=True, check=True).stdout)
        for arm in ("ours", "plain")
    }
    print(f"{result['ratio']:.2f} times as fast as full forward passes at equal numbers", end="; ")
    print(", ".join(f"{metric} differs by at most {most:.1e}" for metric, most in result["largest_difference"].items()))
    print(f"peak memory {peaks['ours']:,.0f} MiB against {peaks['plain']:,.0f} MiB")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
