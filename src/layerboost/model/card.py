"""The model card of a boosted checkpoint."""

from __future__ import annotations

from layerboost.artifacts import PlanFile


def model_card(plan: PlanFile, healing: str = "") -> str:
    """`README.md` for the Hub: metadata, the plan as a table, how to load and serve, limits."""
    rows = [
        f"| {entry.layer} | {entry.attention} | {entry.window or ''} | {'yes' if entry.sink else ''} |"
        for entry in plan.layers
    ]
    counts = ", ".join(f"{plan.count(kind)} {kind}" for kind in ("full", "sliding", "none"))
    predicted = plan.foretold
    cache = (
        f"At {predicted.context_tokens} tokens of context its KV cache takes {predicted.kv_fraction:.0%} of the base's."
        if predicted
        else ""
    )
    flags = " ".join(plan.serving.flags) if plan.serving and predicted else ""
    return f"""---
base_model: {plan.model.name}
library_name: transformers
pipeline_tag: text-generation
tags: [layerboost, sliding-window-attention]
---

# {plan.model.name}, boosted

Made by layerboost after the method of LayerBoost (arXiv 2604.22050) from
`{plan.model.name}`; its licence applies. Of {plan.model.layers} layers: {counts}. {cache}

{healing or "Not healed: the weights that remain are the base's own."}

## Load

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)  # or: import layerboost
```

## Serve

```console
pip install "layerboost[serve]"
vllm serve PATH{" " * bool(flags)}{flags}
```
{_memory(plan) if flags else ""}
## The plan

`full`: softmax attention; `sliding`: softmax over the last `window` tokens; `none`: no attention, no KV cache.
`sink`: a learned logit per head in the softmax's denominator.

| layer | attention | window | sink |
|---|---|---|---|
{chr(10).join(rows)}

## Limits

A token can be looked up beyond the window only through the full layers: test retrieval at your context length before
serving. Generation needs Transformers' dynamic cache.
"""


def _memory(plan: PlanFile) -> str:
    """What the serving flags gain and cost."""
    found = plan.serving
    assert found
    return (
        f"\nvLLM reserves the tokens in flight for every sliding layer. With these flags and `--max-model-len "
        f"{found.context_tokens}` the same memory admits {found.requests_ratio:.2f} times the base's requests, with "
        f"vLLM's own settings {found.default_requests_ratio:.2f} times; a prompt of that length is then read in "
        f"{found.prefill_steps} steps, not {found.default_prefill_steps}.\n"
    )
