"""What the tests with vLLM share: prompts, a process in which vLLM answers them, and Transformers' opinion of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny import VOCABULARY, WINDOW
from transformers import AutoModelForCausalLM

from layerboost.runtime import cores

# From within the window to many times its length, around the borders of windows (16) and blocks (32).
PROMPT_LENGTHS = (3, 7, WINDOW - 1, WINDOW, WINDOW + 1, 24, 31, 32, 33, 40, 47, 48, 50, 63, 64, 65, 80, 97, 129, 150)
# More prompts begin alike, so that with prefix caching their sequences share blocks.
SHARED_TOKENS = 100
TAILS = (1, 2, 5, 13, 16, 17, 28, 29, 40, 60, 61, 75)
OUTPUT_TOKENS = 24


def prompts() -> list[list[int]]:
    """32 prompts of random tokens."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    alone = [tokens(length) for length in PROMPT_LENGTHS]
    shared = tokens(SHARED_TOKENS)
    return alone + [shared + tokens(length) for length in TAILS]


class Vllm:
    """A process in which one vLLM engine after another answers, importing vLLM being slow."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        settings = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores())),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Dynamo traces what is to be compiled and Inductor compiles nothing; no warm-up.
            "VLLM_CPU_CI_ENV": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("vllm_offline.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | settings | environment,
            )

    def ask(self, job: dict[str, Any]) -> Any:
        """Return the answer to one job."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def answers(self, model: Path | str, asked: list[list[int]] | None = None, /, **options: Any) -> Any:
        """Return what an engine with these options makes of the prompts, or the text of its error."""
        engine = {"model": str(model), **options}
        return self.ask({"engine": engine, "prompts": asked or prompts(), "output_tokens": OUTPUT_TOKENS})

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def check_same_model(
    folder: Path | str,
    found: Any,
    asked: list[list[int]] | None = None,
    *,
    most: float = 1e-3,
    adapter: Path | None = None,
) -> None:
    """Assert that no log-probability in vLLM's answers is further than `most` from that of Transformers' model in
    `folder`, and that no chosen token is worse by more than the best one."""
    assert isinstance(found, dict), found
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    asked = asked or prompts()
    cached = [answer["cached_tokens"] for answer in found["answers"][len(asked) :]]
    assert not cached or sum(cached) > len(cached), "nothing came from the prefix cache"
    known: dict[tuple[int, ...], torch.Tensor] = {}
    apart, short = [], []
    for prompt, answer in zip(asked * found["passes"], found["answers"], strict=True):
        tokens = prompt + answer["tokens"]
        if (key := tuple(tokens)) not in known:
            with torch.no_grad():
                known[key] = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        chosen = known[key].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        given = torch.tensor(answer["logprobs"])
        apart.append(float((chosen[-len(given) :] - given).abs().max()))
        # Greedy: what vLLM chose is the best token, or a tie with it.
        answered = slice(len(prompt) - 1, None)
        short.append(float((known[key][answered].max(-1).values - chosen[answered]).max()))
    assert max(apart) < most, apart
    assert max(short) < most, short
