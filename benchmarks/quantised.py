"""What the types of a GGUF export cost in quality, by llama.cpp itself: KL to the base in f32, and NLL.

    python benchmarks/quantised.py BASE_DIR BOOSTED_DIR TEXT [--types f16 q8_0 q4_0] [--sequences 24] [--places 8]

Each model is exported and served by llama.cpp, which answers the log-probabilities of all next tokens at random places
of sequences of 512 tokens. f32 is with a KV cache in f32 and without flash attention, the types are with llama.cpp's
defaults. TEXT is a file that nothing was chosen or healed on. Intervals: bootstrap over sequences. Prints JSON.
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
from layerboost.model.integrity import read_config
from layerboost.recipe import Bench, Text
from layerboost.runtime import Progress
from layerboost.text import load_tokens

SEQUENCE_TOKENS = 512
EXACT = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32")


def log_probabilities(url: str, prompt: list[int], vocabulary: int) -> np.ndarray[Any, Any]:
    """llama.cpp's log-probabilities `[V]` of the token after a prompt."""
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0, "cache_prompt": True}
    body = json.dumps(asked | {"post_sampling_probs": False}).encode()
    with DIRECT.open(urllib.request.Request(f"{url}/completion", body)) as answer:
        [first] = json.load(answer)["completion_probabilities"]
    found = np.full(vocabulary, -np.inf, np.float32)
    for entry in first["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def answers(folder: Path, kind: str, prompts: list[list[int]], scratch: Path) -> np.ndarray[Any, Any]:
    """The log-probabilities `[prompts, V]` of a model in a type."""
    name, bench = f"{folder.name}-{kind}", Bench()
    file, vocabulary = scratch / f"{name}.gguf", int(read_config(folder, name).vocab_size)
    gguf_file(folder, file, kind)
    given = ("--host", HOST, "--parallel", "1", "--ctx-size", "1024", *(EXACT if kind == "f32" else ()))
    command = serve_command(file, bench.port, given)
    found = []
    with (
        running_server("llama.cpp", name, folder, command, bench, scratch / f"{name}.log") as server,
        Progress(name, len(prompts), "tokens") as progress,
    ):
        for prompt in prompts:
            found.append(log_probabilities(server.url, prompt, vocabulary))
            progress.advance(1)
    return np.stack(found)


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__)
    for name in ("base", "boosted"):
        parser.add_argument(name, type=Path)
    parser.add_argument("text")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--places", type=int, default=8)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    text = Text(source=asked.text, sequence_tokens=SEQUENCE_TOKENS)
    tokens = load_tokens(text, tokenizer, "held_out", asked.sequences * SEQUENCE_TOKENS)
    rows = [row.tolist() for batch in tokens.batches(1) for row in batch]
    draw = random.Random(0)
    # In order of the place, so that the server reads what it does not hold yet.
    places = [(row, end) for row in rows for end in sorted(draw.sample(range(1, len(row)), asked.places))]
    prompts, targets = [row[:end] for row, end in places], [row[end] for row, end in places]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = answers(asked.base, "f32", prompts, Path(scratch))
        for kind in ("f32", *asked.types):
            for folder in (asked.base, asked.boosted):
                exact = kind == "f32" and folder == asked.base
                other = base if exact else answers(folder, kind, prompts, Path(scratch))
                index = np.arange(len(targets)), targets
                by_sequence = {
                    "kl": (np.exp(base) * (base - other)).sum(-1),
                    "nll_gap": (base - other)[index],
                }
                name = f"{'base' if folder == asked.base else 'boosted'} {kind}"
                results[name] = {
                    key: difference(values.reshape(len(rows), -1).mean(1).tolist()).model_dump(
                        include={"mean", "low", "high"}
                    )
                    for key, values in by_sequence.items()
                }
                print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    timing.show(results, asked)


if __name__ == "__main__":
    main()
