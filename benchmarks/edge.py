"""Base against boosted in llama.cpp: KV memory, prompt and generation speed by type, context and slots.

    python benchmarks/edge.py BASE_DIR BOOSTED_DIR --run DIR [--types q8_0 f16 q4_0] [--contexts 1024 4096 8192]
        [--slots 1 8] [--repeats 3]

Each cell is `layerboost bench --engine llama.cpp` with prompts that fill the context but for 64 tokens, which are
generated; the models take turns in every repeat. With several slots the prompts are the same but for their last 64
tokens, and the clock starts when they are read up to there. An interrupted run continues. Prints a table of medians and
gains (base over boosted for bytes and times) with their range over the repeats, then JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timing

from layerboost.benching.stage import run_bench
from layerboost.recipe import Recipe
from layerboost.schemas.benchmark import Spread

OUTPUT_TOKENS = 64
OWN_TOKENS = 64
# Column -> the metric of a comparison, its factor, and whether less is better.
COLUMNS = {
    "KV, MiB": ("kv_used_gib", 1024.0, True),
    "ms per token": ("tpot_ms_median", 1.0, True),
    "prompt, s": ("ttft_ms_median", 1e-3, True),
    "output tokens/s": ("output_tokens_per_s", 1.0, False),
}


def cell(models: dict[str, Path], run: Path, kind: str, context: int, slots: int, repeats: int) -> dict[str, Any]:
    """One benchmark: medians by model, and base over boosted with its range."""
    prompt = context - OUTPUT_TOKENS
    shared = prompt - OWN_TOKENS if slots > 1 else 0
    bench = {
        **{"engine": "llama.cpp", "gguf_type": kind, "concurrency": [slots], "requests_per_concurrency": 1},
        **{"shared_prefix_tokens": shared, "input_tokens": prompt - shared, "output_tokens": OUTPUT_TOKENS},
        "repeats": repeats,
    }
    recipe = Recipe.model_validate({"bench": bench})
    [found] = run_bench(recipe, run / f"{kind}-{context}-{slots}", models).results
    row: dict[str, Any] = {"type": kind, "context_tokens": context, "slots": slots, "disturbed": found.disturbed}
    for column, (metric, factor, less) in COLUMNS.items():
        over = found.ratios["boosted"][metric]
        ratio = Spread(median=1 / over.median, min=1 / over.max, max=1 / over.min, repeats=over.repeats)
        medians = {name: round(found.models[name][metric].median * factor, 3) for name in models}
        row[column] = medians | (
            {"base over boosted": ratio.as_ratio} if less else {"boosted over base": over.as_ratio}
        )
    return row


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__, repeats=3)
    parser.add_argument("base", type=Path)
    parser.add_argument("boosted", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["q8_0", "f16", "q4_0"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--slots", nargs="+", type=int, default=[1, 8])
    asked = parser.parse_args()
    models = {"base": asked.base, "boosted": asked.boosted}
    rows = []
    head = ["type", "context", "slots", *(f"{column}: base, boosted, ratio" for column in COLUMNS)]
    print("| " + " | ".join(head) + " |", "|---" * len(head) + "|", sep="\n", flush=True)
    for slots in asked.slots:
        for kind in asked.types:
            for context in asked.contexts:
                row = cell(models, asked.run, kind, context, slots, asked.repeats)
                rows.append(row)
                values = [", ".join(str(value) for value in row[column].values()) for column in COLUMNS]
                mark = " (disturbed)" if row["disturbed"] else ""
                print("| " + " | ".join([kind, f"{context:,}", f"{slots}{mark}", *values]) + " |", flush=True)
    timing.show(rows, asked)


if __name__ == "__main__":
    main()
