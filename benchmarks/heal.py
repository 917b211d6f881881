"""Healing against the plain way: tokens/s, peak memory and losses, interleaved step by step.

    python benchmarks/heal.py --model DIR --text FILE

Plain: two whole models, logits of all tokens, LoRA on every linear layer, plain Trainer. Each arm is a process of its
own and they take turns at every step; both train on the same ids in the same order, with the same optimizer, rates and
sinks. The plan: 8 full layers spread evenly and the others sliding, with a window of 64 and sinks. The lowest layer
slides, so the two models share no layer and nothing is saved there: a plan whose first change is higher gains more.
Prints the ratios, then JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from layerboost.artifacts import CONVERTED, PLAN, LayerPlan, PlanFile, read_plan, write_plan
from layerboost.healing.distillers import LogitDistiller
from layerboost.healing.metrics import read_metrics
from layerboost.healing.student import adapted_layers, shared_student, train_only, with_adapters
from layerboost.healing.training import train_stage
from layerboost.model.checkpoint import (
    Source,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    model_info,
    open_base,
)
from layerboost.model.linear import linear
from layerboost.model.stream import head_logits
from layerboost.pipeline import run_stage
from layerboost.recipe import Heal, Recipe, load_recipe
from layerboost.runtime import peak_rss_bytes, start_runtime
from layerboost.text import load_tokens

WINDOW, FULL_LAYERS, STEP_TOKENS = 64, 8, 1024
ARMS = ("plain", "layerboost")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Prepare a run folder, run the arms in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, a GGUF file or package:NAME")
    parser.add_argument("--text", required=True, help="a text file, a folder or package:NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of {STEP_TOKENS} tokens; the first is not timed")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    recipe = load_recipe(
        [], {"model": given.model, "text.source": given.text, "text.sequence_tokens": given.lengths[0]}
    )
    if given.arm:
        print(json.dumps(run_arm(given.arm, recipe, given.run, given.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(recipe, Path(folder))
        limit = matmul_gflops()
        found = {length: take_turns(given, length, Path(folder)) for length in given.lengths}
    print_results(found, limit, count_flops(given.model, recipe))


def prepare(recipe: Recipe, run: Path) -> None:
    """Write the plan and the converted model."""
    runtime = start_runtime(recipe)
    source = open_base(recipe, run, runtime)
    config = load_config(source)
    count = config.num_hidden_layers
    full = {round((index + 1) * count / FULL_LAYERS) - 1 for index in range(FULL_LAYERS)}
    layers = [
        LayerPlan(layer=i, attention="full")
        if i in full
        else LayerPlan(layer=i, attention="sliding", window=WINDOW, sink=True)
        for i in range(count)
    ]
    plan = PlanFile(model=model_info(source, config, runtime.dtype), method="evenly spread", layers=layers)
    write_plan(run / PLAN, plan)
    run_stage("convert", recipe, run)


def take_turns(given: argparse.Namespace, length: int, run: Path) -> dict[str, dict[str, Any]]:
    """Both arms, each in a process of its own, one step of one after one step of the other."""
    command = [sys.executable, __file__, "--model", given.model, "--text", given.text, "--lengths", str(length)]
    command += ["--steps", str(given.steps), "--run", str(run), "--arm"]
    arms = {arm: Popen([*command, arm], stdin=PIPE, stdout=PIPE, text=True, bufsize=1) for arm in ARMS}
    for process in arms.values():
        line_of(process)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    results = {}
    for step in range(given.steps):
        for arm in ARMS if step % 2 == 0 else reversed(ARMS):
            start = time.perf_counter()
            print("go", file=arms[arm].stdin)
            results[arm] = line_of(arms[arm])
            seconds[arm].append(time.perf_counter() - start)
            print(f"T = {length}, step {step + 1}, {arm}: {seconds[arm][-1]:.2f} s", file=sys.stderr)
    return {arm: {**json.loads(results[arm]), "step_s": seconds[arm][1:]} for arm in ARMS}


def line_of(process: Popen[str]) -> str:
    """The next line an arm prints."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"an arm ended with exit code {process.wait()}")
    return line


def wait_for_turn(module: torch.nn.Module, *_: Any) -> None:
    """Before each step: tell the parent that the last one is done, and wait for its word."""
    if torch.is_grad_enabled():
        print("ready", flush=True)
        sys.stdin.readline()


def run_arm(arm: str, recipe: Recipe, run: Path, steps: int) -> dict[str, Any]:
    """Train for `steps` steps; peak resident memory and the loss of each step."""
    runtime = start_runtime(recipe)
    source = find_model(str(recipe.model), run)
    length = recipe.text.sequence_tokens
    settings = Heal(batch_sequences=STEP_TOKENS // length, save_steps=10**6, validation_steps=10**6)
    ids = load_tokens(recipe.text, load_tokenizer(source), "train", steps * STEP_TOKENS).ids
    train, load = (
        (train_plainly, load_plainly) if arm == "plain" else (train_cheaply, partial(load_model, runtime=runtime))
    )
    teacher = load(source)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        losses = train(teacher, run, ids, settings, Path(folder))
    return {"losses": losses, "peak_rss_mib": round(peak_rss_bytes() / 2**20)}


def train_cheaply(teacher: PreTrainedModel, run: Path, ids: torch.Tensor, settings: Heal, folder: Path) -> list[float]:
    """Stage 2 as `layerboost heal` runs it; the loss of each step."""
    plan = read_plan(run / CONVERTED / PLAN)
    names = adapted_layers(teacher, plan.layers, settings.lora_targets)["lora"]
    student = shared_student(teacher, run / CONVERTED, plan.layers)
    with_adapters(student, names, settings.lora_rank)
    train_only(student, names)
    distiller = LogitDistiller(student, teacher, plan.layers, checkpointing=settings.activation_checkpointing)
    distiller.register_forward_pre_hook(wait_for_turn)
    no_validation = {"validation_kl": 0.0}
    train_stage("lora", distiller, ids, ids.numel(), settings, folder, lambda: no_validation)
    return [line.loss for line in read_metrics(folder / "metrics.jsonl") if line.loss is not None]


def load_plainly(source: Source) -> PreTrainedModel:
    """As Transformers loads it, stock or boosted."""
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()


class PlainDistiller(torch.nn.Module):
    """Two whole models and all logits at once."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student, self._teacher = student, (teacher,)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        teacher = self._teacher[0]
        with torch.no_grad():
            target = teacher.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = self.student.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        student, base = (
            head_logits(model, rows).log_softmax(-1) for model, rows in ((self.student, hidden), (teacher, target))
        )
        return {"loss": kl_div(student, base, log_target=True, reduction="sum") / input_ids.numel()}


def train_plainly(teacher: PreTrainedModel, run: Path, ids: torch.Tensor, settings: Heal, folder: Path) -> list[float]:
    """The plain way; the loss of each step."""
    student = load_plainly(find_model(str(run / CONVERTED)))
    rank = settings.lora_rank
    get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ALL_LINEAR)))
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in student.named_parameters():
        is_sink = name.endswith(".sinks")
        parameter.requires_grad_("lora_" in name or is_sink)
        if parameter.requires_grad:
            groups[is_sink].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[False], "lr": settings.lr}, {"params": groups[True], "lr": settings.sink_lr}],
        weight_decay=0.0,
    )
    steps = len(ids) // settings.batch_sequences
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=settings.batch_sequences,
        train_sampling_strategy="sequential", lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20),
        learning_rate=settings.lr, logging_steps=1, save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True, report_to=[], use_cpu=True,
    )  # fmt: skip
    distiller = PlainDistiller(student, teacher)
    distiller.register_forward_pre_hook(wait_for_turn)
    data = [{"input_ids": row} for row in ids]
    trainer = Trainer(model=distiller, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def count_flops(model: str, recipe: Recipe) -> int:
    """Matrix products a token in both arms: forward of the teacher, forward and backward of the student's stream."""
    loaded = load_model(find_model(model), start_runtime(recipe))
    return 3 * 2 * sum(module.weight.numel() for module in loaded.modules() if isinstance(module, torch.nn.Linear))


def matmul_gflops() -> float:
    """The machine's matrix product on a large square float32 problem, best of ten, in GFLOP/s."""
    size = 2048
    left, right = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        linear(left, right)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def print_results(found: dict[int, dict[str, dict[str, Any]]], limit: float, flops: int) -> None:
    """The ratios, one line a length, then everything as one line of JSON."""
    summary: dict[str, Any] = {"matmul_gflop_per_s": round(limit, 1), "matmul_gflop_per_token": flops / 1e9}
    for length, arms in found.items():
        plain, ours = (arms[arm] for arm in ARMS)
        ratios = sorted(p / o for p, o in zip(plain["step_s"], ours["step_s"], strict=True))
        memory = ours["peak_rss_mib"] / plain["peak_rss_mib"]
        for arm in (plain, ours):
            arm["tokens_per_s"] = STEP_TOKENS / statistics.median(arm["step_s"])
            arm["share_of_matmul_limit"] = arm["tokens_per_s"] * flops / limit / 1e9
        print(
            f"T = {length}: {statistics.median(ratios):.2f} times the plain way's speed ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}), {memory:.0%} of its memory; {ours['tokens_per_s']:.0f} tokens/s, "
            f"{ours['share_of_matmul_limit']:.0%} of the matmul limit (plain: {plain['share_of_matmul_limit']:.0%})"
        )
        summary[f"T={length}"] = {"speed_ratio": ratios, "memory_ratio": memory, "arms": arms}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
