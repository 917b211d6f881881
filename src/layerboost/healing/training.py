"""One healing stage under `transformers.Trainer`: optimizer groups, durable checkpoints, metrics, progress."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from layerboost.artifacts import write_text
from layerboost.errors import LayerboostError
from layerboost.healing.distillers import Distiller
from layerboost.recipe import Heal
from layerboost.runtime import Progress

DONE = "complete"


def train_stage(
    name: str,
    distiller: Distiller,
    ids: torch.Tensor,
    lr: float,
    settings: Heal,
    folder: Path,
    *,
    seed: int,
    validate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train one stage on ids `[N, T]` in their order; its end state is kept in `folder/NAME.safetensors`.

    Resumes from the newest complete checkpoint in `folder/checkpoints/NAME`; a stage that ended is only loaded. Each
    logged step is a line of `folder/metrics.jsonl`. Raises LayerboostError when the loss is not finite.
    """
    result = folder / f"{name}.safetensors"
    if result.is_file():
        distiller.load_state_dict(load_file(result))
        return
    checkpoints = folder / "checkpoints" / name
    resume = newest_checkpoint(checkpoints)
    metrics = Metrics(name, folder / "metrics.jsonl", after_step=int(resume.name.split("-")[1]) if resume else 0)
    per_step = settings.batch_sequences * settings.gradient_accumulation
    steps = max(1, len(ids) // per_step)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_sequences,
        gradient_accumulation_steps=settings.gradient_accumulation,
        train_sampling_strategy="sequential",
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0,
        logging_steps=1,  # a loss that is not finite shows before the step is saved
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        use_cpu=next(distiller.parameters()).device.type == "cpu",
    )
    tokens_per_step = per_step * ids.shape[1]
    trainer = _Trainer(
        model=distiller,
        args=arguments,
        train_dataset=[{"input_ids": row} for row in ids],
        optimizers=(_optimizer(distiller, lr, settings.sink_lr), None),
        callbacks=[_Reporter(metrics, steps, tokens_per_step, resume is None, validate)],
    )
    trainer.remove_callback(
        next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    save_state(distiller, result)


def save_state(distiller: Distiller, file: Path) -> None:
    """Write the trainable parameters, atomically."""
    temporary = file.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in distiller.state_dict().items()}, temporary)
    temporary.replace(file)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that a kill cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in [path for path in found if not (path / DONE).is_file()]:
        shutil.rmtree(path)
    complete = [path for path in found if path.is_dir()]
    return complete[-1] if complete else None


class Metrics:
    """Appends to `metrics.jsonl`; what a killed run logged after its last checkpoint is cut off first."""

    def __init__(self, stage: str, file: Path, after_step: int) -> None:
        self.stage, self.file = stage, file
        rows = [row for row in read_metrics(file) if row["stage"] != stage or row["step"] <= after_step]
        own = [row["seconds"] for row in rows if row["stage"] == stage]
        self.started = time.monotonic() - (own[-1] if own else 0.0)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """One line: stage, step, tokens of this stage so far, the values, seconds of this stage so far."""
        seconds = round(time.monotonic() - self.started, 2)
        row = {"stage": self.stage, "step": step, "tokens": tokens, **values, "seconds": seconds}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _optimizer(distiller: Distiller, lr: float, sink_lr: float) -> torch.optim.AdamW:
    trained = [(name, p) for name, p in distiller.named_parameters() if p.requires_grad]
    adapters = [p for name, p in trained if not name.endswith(".sinks")]
    sinks = [p for name, p in trained if name.endswith(".sinks")]
    groups = [{"params": adapters, "lr": lr}, {"params": sinks, "lr": sink_lr}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


class _Trainer(Trainer):
    """A Trainer whose checkpoints say when they are complete."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / DONE).touch()


class _Reporter(TrainerCallback):
    """Progress on stderr, lines in metrics.jsonl, a stop at a loss that is not finite, validation at both ends."""

    def __init__(
        self,
        metrics: Metrics,
        steps: int,
        tokens_per_step: int,
        fresh: bool,
        validate: Callable[[], dict[str, float]] | None,
    ) -> None:
        self.metrics, self.tokens_per_step, self.fresh, self.validate = metrics, tokens_per_step, fresh, validate
        self.progress = Progress(f"healing, {metrics.stage} stage", steps * tokens_per_step, "tokens")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.__enter__()
        self.progress.skip(state.global_step * self.tokens_per_step)
        if self.validate and self.fresh:
            self.metrics.write(0, 0, self.validate())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.advance(self.tokens_per_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            self.progress.__exit__()
            raise LayerboostError(
                f"the loss of the {self.metrics.stage} stage is {loss} at step {state.global_step}",
                do="delete heal/ and lower the learning rate; no checkpoint holds this step",
            )
        values = {"loss": loss, "lr": float(logs["learning_rate"])}
        self.metrics.write(state.global_step, state.global_step * self.tokens_per_step, values)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.__exit__()
        if self.validate:
            self.metrics.write(state.global_step, state.global_step * self.tokens_per_step, self.validate())
