"""Healing against the plain way: tokens/s, peak memory and losses, from one interleaved run.

    python benchmarks/heal.py --model DIR --text FILE

Plain: two whole models, logits of all tokens, LoRA on every linear layer, plain Trainer. Each arm is a process
of its own; both train on the same ids in the same order, with the same optimizer, rates and sinks. The plan: 8 full
layers spread evenly and 22 of 30 sliding with a window of 64 and sinks. The lowest layer slides, so the two models share
no layer and nothing is saved there: a plan whose first change is higher gains more. Prints the ratios, then JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from layerboost.artifacts import CONVERTED, PLAN, LayerPlan, PlanFile, read_plan, write_plan
from layerboost.healing.distillers import LogitDistiller
from layerboost.healing.losses import distillation_loss_reference
from layerboost.healing.metrics import read_metrics
from layerboost.healing.student import adapted_layers, shared_student, train_only, with_adapters
from layerboost.healing.training import train_stage
from layerboost.model.checkpoint import find_model, load_config, load_model, load_tokenizer, model_info
from layerboost.model.stream import head_logits
from layerboost.pipeline import run_stage
from layerboost.recipe import Heal, Recipe, load_recipe
from layerboost.runtime import start_runtime
from layerboost.text import load_tokens

WINDOW, FULL_LAYERS, STEP_TOKENS = 64, 8, 1024
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Prepare a run folder, run the arms in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, a GGUF file or package:NAME")
    parser.add_argument("--text", required=True, help="a text file, a folder or package:NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="tokens in a sequence")
    parser.add_argument(
        "--steps", type=int, default=5, help=f"steps of {STEP_TOKENS} tokens an arm; the first is not timed"
    )
    parser.add_argument("--rounds", type=int, default=2, help="times each arm is run")
    parser.add_argument("--arm", choices=["plain", "layerboost"], help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    recipe = load_recipe(
        [], {"model": given.model, "text.source": given.text, "text.sequence_tokens": given.lengths[0]}
    )
    if given.arm:
        print(json.dumps(run_arm(given.arm, recipe, given.run, given.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        prepare(recipe, run)
        found: dict[str, list[dict[str, Any]]] = {}
        for turn in range(given.rounds):
            for length in given.lengths:
                for arm in ("plain", "layerboost") if turn % 2 == 0 else ("layerboost", "plain"):
                    result = in_process(given, arm, length, run)
                    print(f"{arm}, T = {length}: {result['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
                    found.setdefault(f"{arm} {length}", []).append(result)
        limit = matmul_gflops()
        flops = 3 * 2 * matmul_parameters(load_model(find_model(given.model, run), start_runtime(recipe)))
    print_results(found, given.lengths, limit, flops)


def prepare(recipe: Recipe, run: Path) -> None:
    """Write the plan and the converted model."""
    runtime = start_runtime(recipe)
    source = find_model(str(recipe.model))
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


def in_process(given: argparse.Namespace, arm: str, length: int, run: Path) -> dict[str, Any]:
    """One arm in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--model", given.model, "--text", given.text, "--lengths", str(length)]
    command += ["--steps", str(given.steps), "--arm", arm, "--run", str(run)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_arm(arm: str, recipe: Recipe, run: Path, steps: int) -> dict[str, Any]:
    """Train for `steps` steps; tokens/s after the first step, peak resident memory, the loss of each step."""
    runtime = start_runtime(recipe)
    source = find_model(str(recipe.model), run)
    length = recipe.text.sequence_tokens
    settings = Heal(batch_sequences=STEP_TOKENS // length, save_steps=10**6, validation_steps=10**6)
    tokenizer = load_tokenizer(source)
    ids = load_tokens(recipe.text, tokenizer, "train", steps * STEP_TOKENS).ids
    teacher = load_model(source, runtime)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        train = train_plainly if arm == "plain" else train_cheaply
        seconds, losses = train(teacher, run, ids, settings, Path(folder))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    timed = [later - sooner for sooner, later in itertools.pairwise(seconds)]
    return {
        "tokens_per_s": STEP_TOKENS / statistics.median(timed),
        "step_s": timed,
        "peak_rss_mib": round(peak_mib),
        "losses": losses,
    }


def train_cheaply(
    teacher: PreTrainedModel, run: Path, ids: torch.Tensor, settings: Heal, folder: Path
) -> tuple[list[float], list[float]]:
    """Stage 2 as `layerboost heal` runs it: when each step ended, and its loss."""
    plan = read_plan(run / CONVERTED / PLAN)
    names = adapted_layers(teacher, plan.layers, settings.lora_targets)["lora"]
    student = shared_student(teacher, run / CONVERTED, plan.layers)
    with_adapters(student, names, settings.lora_rank)
    train_only(student, names)
    distiller = LogitDistiller(student, teacher, plan.layers)
    no_validation = {"validation_kl": 0.0}
    train_stage(
        "lora", distiller, ids, ids.numel(), settings.lr, settings, folder, seed=0, validate=lambda: no_validation
    )
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return [row["seconds"] for row in rows], [row["loss"] for row in rows]


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
        weights = torch.full(input_ids.shape, 1 / input_ids.numel())
        heads = [lambda rows: head_logits(self.student, rows), lambda rows: head_logits(teacher, rows)]
        return {"loss": distillation_loss_reference(hidden, target, *heads, weights)}


class Clock(TrainerCallback):
    """When each step ended, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.seconds.append(time.monotonic())
            self.losses.append(float(logs["loss"]))


def train_plainly(
    teacher: PreTrainedModel, run: Path, ids: torch.Tensor, settings: Heal, folder: Path
) -> tuple[list[float], list[float]]:
    """The plain way: when each step ended, and its loss."""
    student = load_model(find_model(str(run / CONVERTED)), start_runtime(Recipe()))
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
    clock = Clock()
    trainer = Trainer(
        model=PlainDistiller(student, teacher),
        args=arguments,
        train_dataset=[{"input_ids": row} for row in ids],
        optimizers=(optimizer, None),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds, clock.losses


def matmul_parameters(model: PreTrainedModel) -> int:
    """Weights that every token is multiplied with: all linear layers, the head included."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def matmul_gflops() -> float:
    """The machine's matrix product on a large square float32 problem, best of ten, in GFLOP/s."""
    size = 2048
    left, right, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def print_results(found: dict[str, list[dict[str, Any]]], lengths: list[int], limit: float, flops: int) -> None:
    """The ratios, one line a length, then everything as one line of JSON."""
    summary: dict[str, Any] = {"matmul_gflop_per_s": round(limit, 1), "matmul_gflop_per_token": flops / 1e9}
    for length in lengths:
        plain, ours = found[f"plain {length}"], found[f"layerboost {length}"]
        speeds = [o["tokens_per_s"] / p["tokens_per_s"] for o, p in zip(ours, plain, strict=True)]
        memory = max(o["peak_rss_mib"] for o in ours) / max(p["peak_rss_mib"] for p in plain)
        shares = [statistics.mean(r["tokens_per_s"] for r in arm) * flops / limit / 1e9 for arm in (plain, ours)]
        print(
            f"T = {length}: {statistics.mean(speeds):.2f} times the plain way's speed ({min(speeds):.2f} to "
            f"{max(speeds):.2f}), {memory:.0%} of its memory; {shares[1]:.0%} of the matmul limit, not {shares[0]:.0%}"
        )
        summary[f"speed_ratio_{length}"], summary[f"memory_ratio_{length}"] = speeds, memory
        summary[f"matmul_share_{length}"] = {"plain": shares[0], "layerboost": shares[1]}
    print(json.dumps(summary | {"arms": found}))


if __name__ == "__main__":
    main()
