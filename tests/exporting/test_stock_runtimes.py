"""Every case of every format where layerboost is not installed; in vLLM: tests/vllm_plugin/test_exports_served.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_export
import test_gguf
import torch
from processes import without_layerboost
from smollm2 import CAPITALS, boosted_default
from tiny import RUNTIME, WINDOW
from transformers import AutoModelForCausalLM

from layerboost.exporting.stage import run_export
from layerboost.model.base import find_model

IDS = torch.randint(3, 200, (60,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPTS = [IDS[:length] for length in (5, WINDOW, WINDOW + 1, 40, 60)]
# By format: the runtime, how a boosted checkpoint for it is saved, and its cases.
FORMATS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "granite-swa": ("transformers", test_export.saved, test_export.CASES),
    "mlx": ("mlx_lm", test_export.saved, test_export.MLX_CASES),
    "gguf": ("xllamacpp", test_gguf.saved, {name: case[1:] for name, case in test_gguf.CASES.items()}),
}


class HalfGelu(torch.nn.Module):
    """GELU as llama.cpp computes it on a CPU: by a table in float16."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(hidden.half().float(), approximate="tanh").half().float()


class Stock:
    """A process without layerboost in which one runtime after another answers."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stock_runtimes.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=os.environ | without_layerboost(folder) | {"LLAMA_TRACE": "1"},  # llama.cpp names the tensors
        )

    def answers(self, to: str, out: str, prompts: list[list[int]], vocabulary: int) -> torch.Tensor:
        """Log-probabilities of the token after each prompt."""
        runtime, _, _ = FORMATS[to]
        if importlib.util.find_spec(runtime) is None:
            pytest.skip(f"{runtime} is not installed")
        job = {"to": to, "prompts": prompts, "vocabulary": vocabulary}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job | {"path": out}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return torch.tensor(json.loads(line))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    found = Stock(tmp_path_factory.mktemp("stock"))
    with found.process:
        yield found
        found.process.kill()


def of_ours(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])


@pytest.mark.parametrize(
    ("to", "case"),
    [
        # Only llama.cpp's process does not import PyTorch.
        pytest.param(to, name, marks=() if to == "gguf" else pytest.mark.multiprocess)
        for to, (_, _, cases) in FORMATS.items()
        for name in cases
    ],
)
@torch.no_grad()
def test_log_probabilities_are_those_of_the_boosted_checkpoint(
    stock: Stock, to: str, case: str, tmp_path: Path
) -> None:
    _, save, cases = FORMATS[to]
    family, letters, changes = cases[case]
    folder = save(tmp_path / "healed", family, letters, **changes)
    out = run_export(folder, to, kind="f32" if to == "gguf" else None).folder
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = stock.answers(to, out, PROMPTS, model.config.vocab_size)
    if to == "gguf" and "gemma" in family:
        assert (found - of_ours(model, PROMPTS)).abs().max() < 3e-3
        for layer in model.model.layers:
            layer.mlp.act_fn = HalfGelu()
    assert (found - of_ours(model, PROMPTS)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "case", ["llama", "smollm3", "unchanged", "absent", "thinned", "qwen3", "qwen3-moe-many", "olmo2", "olmo2-all"]
)
def test_what_llama_cpp_logs_as_it_loads_a_file_is_the_plan(stock: Stock, case: str, tmp_path: Path) -> None:
    """Window, layers that slide, sinks, layers without attention, and the cells of the KV cache."""
    architecture, family, letters, changes = test_gguf.CASES[case]
    folder = test_gguf.saved(tmp_path / "healed", family, letters, **changes)
    before = len(stock.log.read_text())
    stock.answers("gguf", run_export(folder, "gguf", kind="f32").folder, PROMPTS[:1], 257)
    log = stock.log.read_text()[before:]
    # A removed layer slides where an architecture has no absent ones.
    absent = {layer for layer, letter in enumerate(letters) if letter in "no" and architecture == "deci"}
    slides = [letter in "sSn" and layer not in absent for layer, letter in enumerate(letters)]
    assert re.findall(r"n_swa += (\d+)", log) == [str(WINDOW * any(slides))]
    assert re.findall(r"layer +\d+ assigned .* is_swa = (\d)", log) == [str(int(each)) for each in (*slides, False)]
    tensors = set(re.findall(r" - tensor .* blk\.(\d+)\.(\w+)\.weight", log))
    with_attention, with_sinks = (
        {int(layer) for layer, name in tensors if name == wanted} for wanted in ("attn_q", "attn_sinks")
    )
    layers = set(range(len(letters)))
    assert with_attention == layers - absent
    assert with_sinks == (layers if architecture == "granite_swa" else set())
    caches = re.findall(r"llama_kv_cache: size = .*\( *\d+ cells, +(\d+) layers", log)
    assert caches == [str(slides.count(False)), str(slides.count(True))][: 1 + any(slides)]


@pytest.mark.real
@pytest.mark.multiprocess
@pytest.mark.exhaustive
@pytest.mark.parametrize("to", FORMATS)
@torch.no_grad()
def test_log_probabilities_are_those_of_the_real_model(stock: Stock, to: str, tmp_path: Path) -> None:
    """30 layers of SmolLM2-135M, and prompts up to three times the window."""
    folder = boosted_default(tmp_path, sinks=to != "mlx", heads=False)
    base = find_model(str(folder), RUNTIME)
    ids = base.tokenizer(CAPITALS * 20)["input_ids"]
    prompts = [ids[:length] for length in (5, 60, 65, 200)]
    out = run_export(folder, to, kind="f32" if to == "gguf" else None).folder
    found = stock.answers(to, out, prompts, base.config.vocab_size)
    assert (found - of_ours(base.load().eval(), prompts)).abs().max() < 1e-3
