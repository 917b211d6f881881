"""Stage 2 of healing against the plain way: seconds per step, peak memory and losses.

    python benchmarks/heal.py --model DIR --text FILE

Plain: two whole models, logits of all tokens, LoRA on every linear layer, a bare training loop. The plan: 8 full layers
spread evenly and the others sliding, with a window of 64 and sinks. The lowest layer slides, so the two models share no
layer and nothing is saved there: a plan whose first change is higher gains more. Each run is a process of its own, the
two take turns, and the first step of a run is not timed. Prints the ratios, then JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from layerboost.model.base import open_base
from layerboost.pipeline import run_stage
from layerboost.recipe import Recipe, load_recipe
from layerboost.runtime import peak_rss_bytes, start_runtime
from layerboost.schemas.plan import PlanFile, write_plan
from layerboost.schemas.run import CONVERTED, HEAL, PLAN
from layerboost.text import load_tokens

WINDOW, FULL_LAYERS, STEP_TOKENS = 64, 8, 1024
WAYS = ("plain", "layerboost")


def settings(model: str, text: str, length: int, steps: int) -> Recipe:
    """The recipe of both ways: stage 2 alone, for so many steps."""
    return load_recipe(
        [],
        {
            "model": model,
            "text.source": text,
            "text.sequence_tokens": length,
            "measure.tokens": 4096,
            "heal.fit_tokens": 0,
            "heal.attention_tokens": 0,
            "heal.tokens": steps * STEP_TOKENS,
            "heal.batch_sequences": STEP_TOKENS // length,
            "heal.validation_steps": 10**6,
            "heal.save_steps": 10**6,
        },
    )


def prepare(recipe: Recipe, run: Path) -> None:
    """Write the plan and the converted model."""
    base = open_base(recipe, run, start_runtime(recipe))
    layers = timing.evenly(base.info.layers, FULL_LAYERS, WINDOW)
    write_plan(run / PLAN, PlanFile(model=base.info, method="evenly spread", layers=layers))
    run_stage("convert", recipe, run)


def ours(recipe: Recipe, run: Path) -> dict[str, list[float]]:
    """`layerboost heal`; the loss and the seconds of each step."""
    run_stage("heal", recipe, run)
    lines = [json.loads(line) for line in (run / HEAL / "metrics.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    ends = [line["seconds"] for line in steps]
    return {"losses": [line["loss"] for line in steps], "step_s": [b - a for a, b in itertools.pairwise(ends)]}


def plain(recipe: Recipe, run: Path) -> dict[str, list[float]]:
    """The plain way; the loss and the seconds of each step."""
    base = open_base(recipe, run, start_runtime(recipe))
    ids = load_tokens(recipe.text, base.tokenizer, "train", recipe.heal.tokens, seed=recipe.seed + 1).ids
    teacher = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(run / CONVERTED, dtype=torch.float32)
    rank = recipe.heal.lora_rank
    student = get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    groups = []
    for part, rate in (("lora_", recipe.heal.lr), (".sinks", recipe.heal.sink_lr)):
        parameters = [value.requires_grad_() for name, value in student.named_parameters() if part in name]
        groups.append({"params": parameters, "lr": rate})
    optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.0), []

    def step(batch: torch.Tensor) -> None:
        with torch.no_grad():
            expected = teacher(batch, use_cache=False).logits.log_softmax(-1)
        changed = student(batch, use_cache=False).logits.log_softmax(-1)
        loss = F.kl_div(changed, expected, log_target=True, reduction="sum") / batch.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    spent = [timing.seconds(partial(step, batch)) for batch in ids.split(recipe.heal.batch_sequences)]
    return {"losses": losses, "step_s": spent[1:]}


def main() -> None:
    """Prepare a run folder, run the two ways in turn, print."""
    parser = timing.parser(__doc__, repeats=3)
    parser.add_argument("--model", required=True, help="a model directory, a GGUF file or package:NAME")
    parser.add_argument("--text", required=True, help="a text file, a folder or package:NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of {STEP_TOKENS} tokens in one run")
    parser.add_argument("--way", choices=WAYS, help="one way alone, in the folder --run")
    parser.add_argument("--run", type=Path)
    asked = parser.parse_args()
    if asked.way:
        recipe = settings(asked.model, asked.text, asked.lengths[0], asked.steps)
        found = {"plain": plain, "layerboost": ours}[asked.way](recipe, asked.run)
        print(json.dumps(found | {"peak_rss_mib": peak_rss_bytes() / 2**20}))
        return
    results: dict[str, Any] = {}
    for length in asked.lengths:
        with tempfile.TemporaryDirectory() as root:
            prepared = Path(root) / "prepared"
            prepare(settings(asked.model, asked.text, length, asked.steps), prepared)
            words = ["--model", asked.model, "--text", asked.text, "--lengths", length, "--steps", asked.steps]

            def one(way: str, words: list[Any] = words, prepared: Path = prepared) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder)
                    for made in prepared.iterdir():
                        (run / made.name).symlink_to(made)
                    return timing.alone(__file__, *words, "--way", way, "--run", run)

            ways: dict[str, Callable[[], dict[str, Any]]] = {way: partial(one, way) for way in WAYS}
            runs = timing.in_turn(ways, asked.repeats, warm_up=0)
        results[f"T={length}"] = summary(length, runs)
    timing.show(results, asked)


def summary(length: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The ratios at one length, printed and returned with the runs."""
    steps = {way: [statistics.median(run["step_s"]) for run in runs] for way, runs in found.items()}
    peaks = {way: max(run["peak_rss_mib"] for run in runs) for way, runs in found.items()}
    rates = {way: STEP_TOKENS / statistics.median(taken) for way, taken in steps.items()}
    speed, memory = timing.ratio(steps["plain"], steps["layerboost"]), peaks["layerboost"] / peaks["plain"]
    print(
        f"T = {length}: {timing.times(speed)} times the plain way's speed ({rates['layerboost']:.0f} against "
        f"{rates['plain']:.0f} tokens/s), {memory:.0%} of its memory"
    )
    return {"speed_ratio": speed, "memory_ratio": memory, "tokens_per_s": rates, "runs": found}


if __name__ == "__main__":
    main()
