"""What the tests with vLLM share: prompts, a process in which vLLM answers them, and Transformers' opinion of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY, WINDOW
from transformers import AutoModelForCausalLM

from layerboost.serving.server import cores

PROMPT_LENGTHS = (3, WINDOW - 1, WINDOW, WINDOW + 1, 40, 150)
OUTPUT_TOKENS = 24


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def vllm_answers(
    folders: list[str], scratch: Path, *, trust_remote_code: bool = False, **environment: str
) -> dict[str, Any]:
    """Per folder what vLLM makes of it, or its error. One process for all, importing vLLM being slow."""
    job = {
        "folders": folders,
        "prompts": prompts(),
        "output_tokens": OUTPUT_TOKENS,
        "trust_remote_code": trust_remote_code,
    }
    environment |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores())),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_offline.py")), str(scratch / "answers.json")],
        input=json.dumps(job),
        text=True,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    answers: dict[str, Any] = json.loads((scratch / "answers.json").read_text())
    return answers


def differences(folder: str, found: dict[str, Any]) -> tuple[float, float]:
    """Of vLLM's answers, by the log-probabilities of Transformers' model in `folder`: the most that one differs, and
    the most by which a chosen token falls short of the best."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    apart, short = [], []
    for prompt, answer in zip(prompts(), found["answers"], strict=True):
        tokens = prompt + answer["tokens"]
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        chosen = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        apart.append((chosen - torch.tensor(answer["logprobs"])).abs().max())
        best = expected[len(prompt) - 1 : -1].max(-1).values
        short.append((best - chosen[len(prompt) - 1 :]).max())
    return float(max(apart)), float(max(short))
