"""Checkpoints under vLLM in this process: speed of reading and decoding, where a step's time goes, and quality.

    python benchmarks/engines.py base=MODEL mild=runs/a/healed --requests 100 --prefix-tokens 2048 --profile
    python benchmarks/engines.py boosted=runs/a/healed int8=runs/a/int8 fp8=runs/a/healed --fp8-kv fp8 --text FILE
    python benchmarks/engines.py --random llama

The models take turns, and ratios are to the first one's speed; one named `backend` is served by vLLM's Transformers
backend. `--random`: a checkpoint of SmolLM2-135M's shape with random weights and all three kinds of layers, by that
backend and by vLLM's own class. `--profile`: milliseconds per decoding step by kind of operation, of PyTorch's
profiler; what is in no operation is Python. `--text`: perplexity as vLLM serves it, and KL(first ‖ model) in
Transformers, which has no fp8 KV cache. Then JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import layerboost  # noqa: F401  (teaches Transformers boosted checkpoints)
from layerboost.model.surgery import apply_plan
from layerboost.schemas.plan import LayerPlan

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "sliding", "window": 64, "sink": True},
    {"attention": "none"},
]
# By the first kind with a part of the operation's name in it.
OPERATIONS = {
    "attention": ("attention", "reshape_and_cache"),
    "products with weights": ("mm", "linear", "matmul", "onednn"),
    "norms, rotary, activations": ("norm", "rotary", "silu", "gelu"),
}
PROFILED, TEXT_TOKENS = 5, 512


def random_model(family: str, folder: Path) -> None:
    """Save a model with a third of its layers full, a third sliding with sinks, a third without attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE)).eval()
    apply_plan(model, [LayerPlan(layer=layer, **KINDS[layer % 3]) for layer in range(SHAPE["num_hidden_layers"])])
    model.save_pretrained(folder)


class Engine:
    """One model's engine, and the requests it is given: the same for every model."""

    def __init__(self, name: str, folder: Path, asked: argparse.Namespace) -> None:
        from layerboost.vllm_plugin import model as vllm_model

        self.asked, self.draw, self.count, own = asked, np.random.default_rng(0), 0, dict(vllm_model.NATIVE)
        if name == "backend":
            vllm_model.NATIVE.clear()
        try:
            self.llm = timing.engine(
                folder,
                kv_cache_dtype="fp8" if name in asked.fp8_kv else "auto",
                skip_tokenizer_init=True,
                max_model_len=max(asked.prefix_tokens + asked.prompt_tokens + self.answer, TEXT_TOKENS + 1),
                max_num_batched_tokens=asked.batched_tokens,
                max_num_seqs=asked.requests,
                block_size=asked.block_size,
                kv_cache_memory_bytes=int(asked.cache_gib * (1 << 30)),
                enable_prefix_caching=asked.prefix_tokens > 0,
                gpu_memory_utilization=0.4,  # engines share a GPU
            )
        finally:
            vllm_model.NATIVE.update(own)
        self.engine = self.llm.llm_engine
        self.vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        self.prefix = self.tokens(asked.prefix_tokens)

    @property
    def answer(self) -> int:
        """Tokens of an answer, which does not end while steps are timed: some requests decode while others are read."""
        prompts = self.asked.requests * (self.asked.prefix_tokens + self.asked.prompt_tokens)
        return int(2 * prompts // self.asked.batched_tokens + self.asked.steps + PROFILED + 64)

    def tokens(self, count: int) -> list[int]:
        """Random ids."""
        return [int(token) for token in self.draw.integers(100, self.vocabulary, count)]

    def run(self) -> dict[str, Any]:
        """Read all prompts, decode: seconds of reading and of a step, and shares of a step where they are asked for."""
        from vllm import SamplingParams

        names = [str(self.count + index) for index in range(self.asked.requests)]
        self.count += len(names)
        sampling = SamplingParams(max_tokens=self.answer, ignore_eos=True, temperature=0, detokenize=False)
        for name in names:
            prompt = self.prefix + self.tokens(self.asked.prompt_tokens)
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        answered: set[str] = set()

        def read() -> None:
            while len(answered) < len(names):
                answered.update(output.request_id for output in self.engine.step())

        reading = timing.seconds(read)
        found: dict[str, Any] = {"reading": reading, "step": statistics.median(self.steps(self.asked.steps))}
        if self.asked.profile:
            found["shares_ms"] = self.shares()
        assert self.engine.get_num_unfinished_requests() == len(names), "a request ended while it was timed"
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return found

    def steps(self, count: int) -> list[float]:
        """Seconds of each of some steps."""
        return [timing.seconds(self.engine.step) for _ in range(count)]

    def shares(self) -> dict[str, float]:
        """Milliseconds per step by kind of operation, and of what is in none."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            spent = sum(self.steps(PROFILED))
        kinds = dict.fromkeys([*OPERATIONS, "others"], 0.0)
        for event in found.key_averages():
            of = (kind for kind, parts in OPERATIONS.items() if any(part in event.key for part in parts))
            kinds[next(of, "others")] += event.self_cpu_time_total / 1e3 / PROFILED
        return kinds | {"Python": 1e3 * spent / PROFILED - sum(kinds.values())}

    def perplexity(self, text: torch.Tensor) -> float:
        """Of sequences of ids `[N, T]`, by vLLM's own log-probabilities."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in text.tolist()]
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        losses = [
            -entry[token].logprob
            for output in self.llm.generate(prompts, sampling, use_tqdm=False)
            for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        ]
        return math.exp(statistics.fmean(losses))


@torch.no_grad()
def divergences(folders: dict[str, Path], text: torch.Tensor) -> dict[str, float]:
    """KL(first ‖ model) per token, mean over text `[N, T]`; int8 activations are rounded as in a kernel."""
    models = {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for n, f in folders.items()}
    totals = dict.fromkeys(models, 0.0)
    for row in text.split(1):
        logs = {name: model(row).logits.log_softmax(-1) for name, model in models.items()}
        first = next(iter(logs.values()))
        for name, own in logs.items():
            totals[name] += float((first.exp() * (first - own)).sum())
    return {name: total / text.numel() for name, total in totals.items()}


def compare(folders: dict[str, Path], asked: argparse.Namespace) -> dict[str, Any]:
    """Quality, then speed with the models in turn; a line for each model."""
    text, kl = None, {}
    if asked.text:
        tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
        ids = tokenizer(asked.text.read_text(), return_tensors="pt").input_ids[0]
        text = ids[: asked.sequences * TEXT_TOKENS].view(-1, TEXT_TOKENS)
        kl = divergences({name: folder for name, folder in folders.items() if name not in asked.fp8_kv}, text)
    engines = {name: Engine(name, folder, asked) for name, folder in folders.items()}
    quality = {} if text is None else {name: each.perplexity(text) for name, each in engines.items()}
    # Plans of full and sliding layers keep the blocks that a hit needs from the second time on.
    warm_up = 2 if asked.prefix_tokens else 1
    runs = timing.in_turn({name: each.run for name, each in engines.items()}, asked.repeats, warm_up)
    results: dict[str, Any] = {}
    for name, folder in folders.items():
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
        found: dict[str, Any] = {
            "weights_mib": weights,
            "perplexity": quality.get(name),
            "kl": kl.get(name),
            "runs": runs[name],
        }
        print(f"{name}: weights {weights:.0f} MiB", end="")
        for what in ("reading", "step"):
            own, theirs = ([run[what] for run in runs[model]] for model in (name, next(iter(folders))))
            found[f"{what}_ratio"] = timing.ratio(theirs, own)
            print(f"; {what} {1e3 * statistics.median(own):.1f} ms, {timing.times(found[f'{what}_ratio'])}", end="")
        print("".join(f"; {key} {found[key]:.4g}" for key in ("perplexity", "kl") if found[key] is not None))
        for kind, ms in runs[name][-1].get("shares_ms", {}).items():
            print(f"  {kind:28} {ms:8.1f} ms")
        results[name] = found
    return results


def main() -> None:
    """Measure, print."""
    parser = timing.parser(__doc__, repeats=3)
    parser.add_argument("models", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--random", choices=["llama", "qwen3"], help="in place of models")
    parser.add_argument("--fp8-kv", nargs="+", default=[], metavar="NAME", help="models whose KV cache is fp8")
    parser.add_argument("--text", type=Path, help="a plain text file, for quality")
    parser.add_argument("--sequences", type=int, default=8, help=f"of {TEXT_TOKENS} tokens of the text")
    parser.add_argument("--profile", action="store_true", help="where a decoding step's time goes")
    parser.add_argument("--requests", type=int, default=8, help="that are read and decode at once")
    parser.add_argument("--prefix-tokens", type=int, default=0, help="what all prompts begin with, in the prefix cache")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=15, help="decoding steps, of which the median counts")
    parser.add_argument("--batched-tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--cache-gib", type=float, default=1.0, help="KV cache of each model")
    asked = parser.parse_args()
    folders = timing.folders(asked.models)
    if bool(folders) == bool(asked.random):
        parser.error("give models, or --random")
    if unknown := {*asked.fp8_kv} - {*folders}:
        parser.error(f"--fp8-kv {' '.join(sorted(unknown))}: the models are {', '.join(folders)}")
    with tempfile.TemporaryDirectory() as root:
        if asked.random:
            random_model(asked.random, Path(root))
            folders = dict.fromkeys(("backend", "own"), Path(root))
        timing.show(compare(folders, asked), asked)


if __name__ == "__main__":
    main()
