"""One healing stage: a loop with exact token counts, durable checkpoints and metrics; the best step is its result."""

from __future__ import annotations

import importlib.util
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.files import replacing, write_text
from layerboost.healing.data import Batch, Data
from layerboost.healing.distillers import Distiller
from layerboost.healing.sharding import FullStateAdamW, is_sharded, to_full_tensor
from layerboost.recipe import Heal
from layerboost.runtime import Progress, is_main_process, log
from layerboost.schemas.artifact import finite, json_text
from layerboost.schemas.healing import METRICS, MetricLine, read_metrics

MAX_GRADIENT_NORM = 1.0
KEPT_CHECKPOINTS = 2
KEPT_START = "no step of the %s stage is better on the validation text than its start, which is kept; lower its rate"
Validate = Callable[[], dict[str, float]]


def train_stage(
    name: str,
    distiller: Distiller,
    data: Data,
    settings: Heal,
    folder: Path,
    validate: Validate,
) -> None:
    """Train a stage, `attention` or `lora`, on `data`.

    Leave `distiller` at the best step, the start included: that with the lowest `validation_kl` of `validate()`, plus
    `heal.ce_weight` times `validation_nll` if the stage's loss has cross entropy; answers that weigh more count as much
    as in the loss, by `validation_answer_kl`. `folder/NAME.safetensors` stores it;
    a stage that ended is only loaded. Resume from the newest checkpoint in `folder/checkpoints/NAME`. Each step and
    each validation is a line of `folder/metrics.jsonl`.

    Raise LayerboostError if the loss is not finite, memory does not suffice or nothing can be written, and
    KeyboardInterrupt after a SIGTERM.
    """
    if load_result(name, distiller, folder):
        return
    with enough_memory(settings), until_sigterm() as sigterm:
        training = _Training(name, distiller, data, settings, folder, validate)
        training.run(sigterm)
        training.keep_best()


class _Training:
    """The training loop of a stage, and its state."""

    def __init__(
        self,
        name: str,
        distiller: Distiller,
        data: Data,
        settings: Heal,
        folder: Path,
        validate: Validate,
    ) -> None:
        self.name, self.distiller, self.data, self.settings, self.folder = name, distiller, data, settings, folder
        self.validate = validate
        lr, self.ce_weight = (settings.attention_lr, 0.0) if name == "attention" else (settings.lr, settings.ce_weight)
        self.checkpoints = folder / "checkpoints" / name
        weight = next(distiller.student.parameters())
        self.device = weight.device
        self.mixed = weight.device.type == "cuda" and weight.dtype == torch.bfloat16
        self.sharded = is_sharded(distiller)
        self.accelerator = Accelerator(
            log_with=list(settings.report_to) or None,
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.model = distiller.eval()  # without dropout a step is deterministic
        if not self.sharded:  # FSDP2 averages the gradients itself; elsewhere DDP does
            self.model = self.accelerator.prepare_model(distiller, device_placement=False)
        self.optimizer = FullStateAdamW(_parameter_groups(distiller, lr, settings.sink_lr), weight_decay=0.0)
        self.schedule = get_scheduler(settings.scheduler, self.optimizer, max(1, data.steps // 20), data.steps)
        self.best: dict[str, Any] = {"score": math.inf}
        self.done = self.load_checkpoint()
        if settings.report_to:  # one run per tracker and stage
            run = {"name": f"{folder.parent.name}-{name}"}
            self.accelerator.init_trackers("layerboost", init_kwargs={"wandb": run, "trackio": run})
        after_step = self.done if self.done else -1
        self.metrics = Metrics(name, folder / METRICS, after_step, self.accelerator.trackers)

    def run(self, sigterm: threading.Event) -> None:
        """Train from the newest checkpoint to the last step.

        After a SIGTERM, end the step, write a checkpoint and raise KeyboardInterrupt.
        """
        data, settings = self.data, self.settings
        with Progress(f"healing, {self.name} stage", data.tokens, "tokens") as progress:
            progress.skip(data.seen(self.done))
            if not self.done:
                self.judge(0)
            for step in range(self.done + 1, data.steps + 1):
                batches = data.batches(step, self.device)
                loss, stop = self.mean(self.forward_backward(batches), sigterm.is_set())
                if not math.isfinite(loss):
                    raise self.bad_loss(loss, step, batches)
                norm = float(to_full_tensor(clip_grad_norm_(self.distiller.trained.values(), MAX_GRADIENT_NORM)))
                if not math.isfinite(norm):
                    raise not_finite(self.name, f"norm of the gradient is {norm}", step)
                lr = self.schedule.get_last_lr()[0]
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

                progress.advance(data.seen(step) - data.seen(step - 1))
                self.metrics.write(step, data.seen(step), {"loss": loss, "lr": lr})
                last = step == data.steps
                if last or step % settings.validation_steps == 0:
                    self.judge(step)
                if last or step % settings.save_steps == 0 or stop:
                    self.save_checkpoint(step)
                if stop or (last and sigterm.is_set()):
                    raise KeyboardInterrupt
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def forward_backward(self, batches: list[Batch]) -> float:
        """Add up the gradients of a step; return the mean loss of this process's batches."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            # Processes exchange gradients once per step.
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                    loss = self.model(**batch) / len(batches)
                loss.backward()
            total += loss.detach()
        return float(total)

    def judge(self, step: int) -> None:
        """Validate, and keep the trained parameters if no earlier step was better."""
        found = self.validate()
        # The mean, because processes must agree on the best step.
        values = dict(zip(found, self.mean(*found.values()), strict=True))
        self.metrics.write(step, self.data.seen(step), values)
        score = values["validation_kl"] + (self.ce_weight * values["validation_nll"] if self.ce_weight else 0.0)
        if "validation_answer_kl" in values:
            score += self.data.answer_fraction * (values["validation_answer_kl"] - values["validation_kl"])
        if step == 0 and not math.isfinite(score):
            raise not_finite(self.name, f"validation loss is {score}", step)
        if score < self.best["score"]:
            self.best = {"score": score, "step": step, "trained": self.distiller.trained_state()}

    def save_checkpoint(self, step: int) -> None:
        """Write all that later steps depend on, as full tensors: every process takes part, the first one writes."""
        parts = {"trained": self.distiller.trained_state(), "optimizer": self.optimizer.state_dict()}
        if is_main_process():
            with replacing(self.checkpoints / f"step-{step:08}.pt") as file:
                torch.save({"step": step, "best": self.best, "schedule": self.schedule.state_dict(), **parts}, file)
            for old in checkpoints_in(self.checkpoints)[:-KEPT_CHECKPOINTS]:
                old.unlink()

    def load_checkpoint(self) -> int:
        """Load the newest checkpoint; return its step, 0 without a checkpoint."""
        if is_main_process():
            for stale in self.checkpoints.glob(".step-*.tmp"):  # of a process that was killed as it wrote
                stale.unlink()
        if not (found := checkpoints_in(self.checkpoints)):
            return 0
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
        self.distiller.load_trained(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = state["best"]
        return int(state["step"])

    def keep_best(self) -> None:
        """Load the best step and write it as the stage's result."""
        if self.best["step"] == 0:
            log.warning(KEPT_START, self.name)
        self.distiller.load_trained(self.best["trained"])
        if is_main_process():
            with replacing(self.folder / f"{self.name}.safetensors") as file:
                save_file(self.best["trained"], file)

    def mean(self, *values: float) -> list[float]:
        """Return the mean of each value over the processes."""
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        return list(self.accelerator.reduce(found, "mean").tolist())

    def bad_loss(self, loss: float, step: int, batches: list[Batch]) -> LayerboostError:
        """Return the error for a loss that is not finite, with the place in the model unless that is sharded."""
        rows = [(row, batch.get("given")) for batch in batches for row in batch["input_ids"]]
        places = ("", ("", "")) if self.sharded else self.distiller.explain_not_finite(rows)
        return not_finite(self.name, f"loss is {loss}", step, *places)


def load_result(name: str, distiller: Distiller, folder: Path) -> bool:
    """Load the result of a stage from `folder`; return False if it has not ended."""
    file = folder / f"{name}.safetensors"
    if file.is_file():
        distiller.load_trained(load_file(file))
    return file.is_file()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a stage, the newest last."""
    return sorted(folder.glob("step-*.pt"))


def check_report_to(names: tuple[str, ...]) -> None:
    """Raise ConfigError for an experiment tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"heal.report_to names {name}, which is not installed", do=f"pip install {name}")


@contextmanager
def until_sigterm() -> Iterator[threading.Event]:
    """Yield an event; in the block, a SIGTERM only sets it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def enough_memory(settings: Heal) -> Iterator[None]:
    """Raise an error with advice if memory ends a run; its last complete checkpoint stays."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise LayerboostError("not enough memory to heal", found=first_line(error), do=less_memory(settings)) from error


def less_memory(settings: Heal) -> str:
    """Return advice on settings with which healing takes less memory."""
    one = settings.batch_sequences == 1 or settings.traffic  # a request is a batch of its own
    lower = "text.sequence_tokens" if one else "heal.batch_sequences"
    lower = "heal.sequence_tokens" if settings.sequence_tokens else lower
    full = settings.activation_checkpointing == "full"
    checkpointing = "" if full else ", or set heal.activation_checkpointing: full"
    return f"lower {lower} (raise heal.gradient_accumulation to keep the step){checkpointing}"


def not_finite(stage: str, what: str, step: int, where: str = "", base: tuple[str, str] = ("", "")) -> LayerboostError:
    """Return the error for a loss or gradient that is not finite; `where` and `base` as from `explain_not_finite`."""
    do = "lower its learning rate, in another --run folder or after deleting heal/; no checkpoint holds this step"
    if step <= 1:  # the rate has no effect yet
        do = "look for the cause in the converted model: `layerboost evaluate` names layer and token"
    found = f"the base is not finite on this text either: {base[0]}" if base[0] else ""
    wrong = ", ".join(filter(None, (f"the {what} at step {step} of the {stage} stage", where)))
    return LayerboostError(wrong, found=found, do=base[1] or do)


def _parameter_groups(distiller: Distiller, lr: float, sink_lr: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: adapters, and sinks with their own learning rate."""
    trained = distiller.trained
    sinks = [parameter for name, parameter in trained.items() if name.endswith(".sinks")]
    adapters = [parameter for name, parameter in trained.items() if not name.endswith(".sinks")]
    groups = [{"params": adapters, "lr": lr}, {"params": sinks, "lr": sink_lr}]
    return [group for group in groups if group["params"]]


class Metrics:
    """Appends one stage's lines, after removing what a killed run wrote after its last checkpoint."""

    def __init__(self, stage: Any, file: Path, after_step: int, trackers: Sequence[Any] = ()) -> None:
        """Keep the lines of the other stages, and of this one those up to `after_step`.

        accelerate's `trackers` get every later line too.
        """
        self.stage, self.file, self.trackers = stage, file, trackers
        lines = [line for line in read_metrics(file) if line.stage != stage or line.step <= after_step]
        self.started = time.monotonic() - max((line.seconds for line in lines if line.stage == stage), default=0.0)
        if is_main_process():
            write_text(file, "".join(self._text(line) for line in lines))

    def write(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Append one line; a value that is not finite becomes null."""
        seconds = round(time.monotonic() - self.started, 2)
        line = MetricLine(stage=self.stage, step=step, tokens=tokens, seconds=seconds, **values)
        if is_main_process():
            with self.file.open("a", encoding="utf-8") as file:
                file.write(self._text(line))
        for tracker in self.trackers:
            tracker.log({f"{self.stage}/{name}": value for name, value in values.items()}, step=step)

    def _text(self, line: MetricLine) -> str:
        return json_text(finite(line.model_dump(exclude_unset=True)), str(self.file)) + "\n"
