"""What the types of a GGUF export cost in quality, by llama.cpp itself: KL to the base in f32 on held-out text.

    python benchmarks/quantised.py BASE_DIR BOOSTED_DIR TEXT [--types f16 q8_0 q4_0] [--sequences 24] [--places 16]

Each model is exported and served by llama.cpp, which answers the 4,096 most probable next tokens at random places of
sequences of 512 tokens. Tokens that one of two models does not answer count as one, so the KL is a lower bound. f32 has
a KV cache in f32 and no flash attention, the types have llama.cpp's defaults. TEXT is a file that nothing was chosen or
healed on. Intervals: bootstrap over sequences. Prints JSON.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import timing
from transformers import AutoTokenizer

from layerboost.engines.llama_cpp import serve_command
from layerboost.engines.server import DIRECT, HOST, running_server
from layerboost.evaluating.statistics import difference
from layerboost.exporting.stage import gguf_file
from layerboost.recipe import Bench, Text
from layerboost.runtime import Progress
from layerboost.text import load_tokens

SEQUENCE_TOKENS = 512
TOP = 4096  # answering all 49,152 tokens takes a second
EXACT = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32")


def log_probabilities(url: str, prompt: list[int]) -> dict[int, float]:
    """llama.cpp's log-probabilities of the most probable tokens after a prompt."""
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": TOP, "temperature": 0, "cache_prompt": True}
    body = json.dumps(asked | {"post_sampling_probs": False}).encode()
    with DIRECT.open(urllib.request.Request(f"{url}/completion", body)) as answer:
        [first] = json.load(answer)["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def kl(base: dict[int, float], other: dict[int, float]) -> float:
    """KL(base ‖ other) with the tokens that one of them lacks as one."""
    both = base.keys() & other.keys()
    mine, theirs = (np.array([found[token] for token in both]) for found in (base, other))
    rest, other_rest = (max(1 - np.exp(found).sum(), 1e-9) for found in (mine, theirs))
    return float((np.exp(mine) * (mine - theirs)).sum() + rest * np.log(rest / other_rest))


def answers(folder: Path, kind: str, prompts: list[list[int]], scratch: Path) -> list[dict[int, float]]:
    """The log-probabilities after each prompt of a model in a type."""
    name, bench = f"{folder.name}-{kind}", Bench()
    file = scratch / f"{name}.gguf"
    gguf_file(folder, file, kind)
    given = ("--host", HOST, "--parallel", "1", "--ctx-size", "1024", *(EXACT if kind == "f32" else ()))
    command = serve_command(file, bench.port, given)
    found = []
    with (
        running_server("llama.cpp", name, folder, command, bench, scratch / f"{name}.log") as server,
        Progress(name, len(prompts), "tokens") as progress,
    ):
        for prompt in prompts:
            found.append(log_probabilities(server.url, prompt))
            progress.advance(1)
    return found


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__)
    for name in ("base", "boosted"):
        parser.add_argument(name, type=Path)
    parser.add_argument("text")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--places", type=int, default=16)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    text = Text(source=asked.text, sequence_tokens=SEQUENCE_TOKENS)
    tokens = load_tokens(text, tokenizer, "held_out", asked.sequences * SEQUENCE_TOKENS)
    rows = [row.tolist() for batch in tokens.batches(1) for row in batch]
    draw = random.Random(0)
    # In order of the place, so that the server reads what it does not hold yet.
    prompts = [row[:end] for row in rows for end in sorted(draw.sample(range(1, len(row)), asked.places))]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = answers(asked.base, "f32", prompts, Path(scratch))
        for kind in ("f32", *asked.types):
            for folder in (asked.base, asked.boosted):
                exact = kind == "f32" and folder == asked.base
                other = base if exact else answers(folder, kind, prompts, Path(scratch))
                each = np.array([kl(*pair) for pair in zip(base, other, strict=True)]).reshape(len(rows), -1).mean(1)
                name = f"{'base' if folder == asked.base else 'boosted'} {kind}"
                results[name] = difference(each.tolist()).model_dump(include={"mean", "low", "high"})
                print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    timing.show(results, asked)


if __name__ == "__main__":
    main()
