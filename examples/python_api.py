"""The whole method on objects, without a run folder: `python examples/python_api.py MODEL TEXT OUT`."""

from __future__ import annotations

import sys

import layerboost as lb


def main(model: str, source: str, out: str) -> None:
    """Measure, plan, convert, heal and evaluate MODEL on TEXT; write the healed checkpoint to OUT."""
    base = lb.open_base(model)
    text = lb.Text(source=source, sequence_tokens=256)

    # How much worse the model gets with each layer's attention replaced: nats per token, with a standard error.
    sensitivity = lb.measure(base, text, lb.Measure(windows=(64,), tokens=4096, retrieval_prompts=0))
    for layer in sensitivity.layers:
        costs = [f"{v.attention} {v.window or ''}: {v.scores['kl'].mean:.4f}" for v in layer.variants]
        print(f"layer {layer.layer}: {', '.join(costs)}")

    # The best strategy for each layer with at most 60 % of the base's KV cache.
    plan = lb.plan(sensitivity, lb.Plan(kv_fraction=0.6, context_tokens=1024))
    print([entry.attention for entry in plan.layers])

    converted = lb.convert(base, plan, text)
    healed = lb.heal(converted, text, lb.Heal(fit_tokens=2048, attention_tokens=2048, tokens=4096))
    found = lb.evaluate(
        {"base": base, "converted": converted, "healed": healed}, text, lb.Evaluate(tasks=(), perplexity_tokens=2048)
    )
    for name, quality in found.perplexity.items():
        print(f"{name}: perplexity {quality.perplexity:.2f}, KL to the base {quality.kl.mean:.4f}")
    print(f"saved {healed.save(out)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
