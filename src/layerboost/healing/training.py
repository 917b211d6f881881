"""One healing stage under `transformers.Trainer`: exact token counts, durable checkpoints, the best step kept."""

from __future__ import annotations

import importlib.util
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import ReduceOp
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from layerboost.artifacts import DISK_ERRORS, disk_error
from layerboost.errors import ConfigError, LayerboostError
from layerboost.healing.distillers import Distiller
from layerboost.healing.metrics import Metrics
from layerboost.healing.sharding import WholeAdamW, is_sharded
from layerboost.recipe import Heal
from layerboost.runtime import Progress, is_main_process, log, main_process_first, world_size

DONE = "complete"
STRETCH_TOKENS = 2048
KEPT_START = "no step of the %s stage is better on the validation slice than its start, which is kept; lower its rate"
Validate = Callable[[], dict[str, float]]


def train_stage(
    name: str,
    distiller: Distiller,
    ids: torch.Tensor,
    tokens: int,
    lr: float,
    settings: Heal,
    folder: Path,
    *,
    repeats: int = 1,
    ce_weight: float = 0.0,
    seed: int,
    validate: Validate,
) -> None:
    """Train one stage on the first `tokens` tokens of ids `[N, T]`, in order; leaves `distiller` at its best step.

    `repeats`: of each stretch of text, for a distiller that keeps the base's part of it (`repeated`).
    The best is the step with the lowest `validation_kl` of `validate()`, plus `ce_weight` times `validation_nll` where
    the stage's loss holds cross entropy, the start included; `folder/NAME.safetensors` keeps it. Resumes from the
    newest complete checkpoint in `folder/checkpoints/NAME`; a stage that ended is only loaded. Each logged step is a
    line of `folder/metrics.jsonl`. Raises LayerboostError when the loss is not finite, memory does not suffice or
    nothing can be written, KeyboardInterrupt after a SIGTERM.
    """
    if load_result(name, distiller, folder):
        return
    checkpoints = folder / "checkpoints" / name
    resume = newest_checkpoint(checkpoints)
    step = int(resume.name.split("-")[1]) if resume else 0
    metrics = Metrics(name, folder / "metrics.jsonl", after_step=step, writes=is_main_process())
    batch, accumulation = batch_of_process(settings)
    per_step = settings.batch_sequences * settings.gradient_accumulation
    rows = weighted_rows(ids, tokens, per_step, per_step // batch)
    if repeats > 1:
        rows = repeated(rows, repeats, per_step * stretch_steps(settings, ids.shape[1]))
    guard = _Guard(folder / f"{name}.best.safetensors", distiller, metrics, tokens, per_step * ids.shape[1] / repeats)
    guard.validate, guard.every, guard.fresh = validate, settings.validation_steps, resume is None
    guard.ce_weight = ce_weight
    trainer = _Trainer(
        model=distiller,
        args=_arguments(checkpoints, distiller, lr, settings, len(rows) // per_step, batch, accumulation, seed),
        train_dataset=rows,
        callbacks=[guard],
    )
    trainer.stage, trainer.sink_lr = name, settings.sink_lr
    printer = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback")
    trainer.remove_callback(printer)
    with clean_end(folder, settings), guard.until_sigterm():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if guard.stopping:
        raise KeyboardInterrupt
    guard.keep_best(_result(folder, name))


def load_result(name: str, distiller: Distiller, folder: Path) -> bool:
    """Load what a stage that ended left in `folder`; False if it has not ended."""
    ended = _result(folder, name).is_file()
    if ended:
        distiller.load_state_dict(load_file(_result(folder, name)))
    return ended


def _result(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def weighted_rows(ids: torch.Tensor, tokens: int, per_step: int, batches: int) -> list[dict[str, torch.Tensor]]:
    """The first `tokens` tokens of ids `[N, T]` as rows of full steps, each with the weights of its tokens, `[T]`.

    The weights of a step sum to `batches`, the number of batches its loss is the mean of: the loss is then the mean
    over the tokens that count, however the step is cut. Rows without a token that counts fill the last step.
    """
    length = ids.shape[1]
    ids = ids[: -(-tokens // length)]
    counted = torch.arange(len(ids) * length).view_as(ids) < tokens
    missing = -len(ids) % per_step
    ids = torch.cat([ids, ids[:1].expand(missing, -1)])
    counted = torch.cat([counted, counted.new_zeros(missing, length)]).float()
    steps = counted.view(-1, per_step, length)
    weights = (steps * (batches / steps.sum((1, 2), keepdim=True))).view_as(counted)
    return [{"input_ids": row, "weights": weight} for row, weight in zip(ids, weights, strict=True)]


def repeated(rows: list[dict[str, torch.Tensor]], repeats: int, stretch: int) -> list[dict[str, torch.Tensor]]:
    """The rows so many times over, `stretch` of them at a time, each with its `number` among them."""
    numbered = [{**row, "number": torch.tensor(number)} for number, row in enumerate(rows)]
    starts = range(0, len(rows), stretch)
    return [row for start in starts for _ in range(repeats) for row in numbered[start : start + stretch]]


def stretch_steps(settings: Heal, length: int) -> int:
    """Steps that stage 1 repeats at a time: STRETCH_TOKENS, whose activations are kept, or one if it is longer."""
    return max(1, STRETCH_TOKENS // (settings.batch_sequences * settings.gradient_accumulation * length))


def batches_kept(settings: Heal, length: int) -> int:
    """Batches of one process in a stretch that is repeated; none where nothing is."""
    return stretch_steps(settings, length) * batch_of_process(settings)[1] if settings.attention_repeats > 1 else 0


def batch_of_process(settings: Heal) -> tuple[int, int]:
    """Sequences a batch and batches a step of one process, so that a step is the same on any number of processes.

    Raises ConfigError when a step cannot be shared out evenly, or the model shall be shared out and there is one
    process.
    """
    batch, accumulation, processes = settings.batch_sequences, settings.gradient_accumulation, world_size()
    if settings.shard and processes == 1:
        raise ConfigError(
            "heal.shard shares the model out among the processes of torchrun",
            found="one process",
            do="start `layerboost heal` with torchrun (docs/guide/gpus.md has the commands), or --set heal.shard=false",
        )
    if accumulation % processes == 0:
        return batch, accumulation // processes
    if batch % processes == 0:
        return batch // processes, accumulation
    raise ConfigError(
        f"a step cannot be shared out among {processes} processes",
        found=f"heal.batch_sequences {batch}, heal.gradient_accumulation {accumulation}",
        do=f"make one of them a multiple of {processes}",
    )


def check_report_to(names: tuple[str, ...]) -> None:
    """Raise ConfigError for an experiment tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"heal.report_to names {name}, which is not installed", do=f"pip install {name}")


def save_state(distiller: Distiller, file: Path, facts: dict[str, str] | None = None) -> None:
    """Write the trainable parameters, atomically, with `facts` in the file's metadata; every process must take part."""
    state = {name: value.contiguous() for name, value in distiller.state_dict().items()}
    if is_main_process():
        temporary = file.with_suffix(".tmp")
        save_file(state, temporary, facts)
        temporary.replace(file)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that a kill cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if is_main_process():
        for path in [path for path in found if not (path / DONE).is_file()]:
            shutil.rmtree(path)
    complete = [path for path in found if (path / DONE).is_file()]
    return complete[-1] if complete else None


def _arguments(
    folder: Path, distiller: Distiller, lr: float, settings: Heal, steps: int, batch: int, accumulation: int, seed: int
) -> TrainingArguments:
    weight = next(distiller.student.parameters())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0,
        logging_steps=1,  # a loss that is not finite shows before the step is saved
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(settings.report_to),
        seed=seed,
        use_cpu=weight.device.type == "cpu",
        bf16=weight.device.type == "cuda" and weight.dtype == torch.bfloat16,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    # A process heals on one device; where it sees several GPUs, Trainer would wrap the distiller in DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextmanager
def clean_end(folder: Path, settings: Heal) -> Iterator[None]:
    """Say what to do when memory or the disk ends a run; its last complete checkpoint stays."""
    try:
        yield
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise disk_error(folder, OSError(str(error))) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:  # a tracker's network, say
            raise
        raise disk_error(folder, error) from error
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if "PytorchStreamWriter" in text:
            raise disk_error(folder, OSError(text.splitlines()[0])) from error
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in text:
            raise
        found = (text.splitlines() or [type(error).__name__])[0]
        raise LayerboostError("not enough memory to heal", found=found, do=less_memory(settings)) from error


def less_memory(settings: Heal) -> str:
    """What to change so that healing takes less memory."""
    lower = "text.sequence_tokens" if settings.batch_sequences == 1 else "heal.batch_sequences"
    full = settings.activation_checkpointing == "full"
    checkpointing = "" if full else ", or set heal.activation_checkpointing: full"
    return f"lower {lower} (raise heal.gradient_accumulation to keep the step){checkpointing}"


class _Trainer(Trainer):
    """A Trainer with a learning rate of the sinks' own, whose checkpoints say when they are complete."""

    stage, sink_lr = "", 0.0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            trained = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            adapters = [p for name, p in trained if not name.endswith(".sinks")]
            sinks = [p for name, p in trained if name.endswith(".sinks")]
            groups = [{"params": adapters, "lr": self.args.learning_rate}, {"params": sinks, "lr": self.sink_lr}]
            self.optimizer = WholeAdamW([g for g in groups if g["params"]], weight_decay=0.0)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        # Sharded layers run on all processes or on none: all look for the layer, and tell the lowest that one found.
        agreed = over_processes if is_sharded(self.model) else lambda value, *_: value
        if not math.isfinite(found := agreed(float(loss), loss.device)):
            layer = self.model.first_bad_layer(**self._prepare_inputs(inputs))
            layer = agreed(math.inf if layer is None else layer, loss.device, ReduceOp.MIN)
            where = "" if layer == math.inf else f", first in layer {layer:.0f}"
            base = ("", "") if is_sharded(self.model) else self.model.explain_teacher(inputs["input_ids"])
            raise not_finite(self.stage, f"loss is {found}", self.state.global_step + 1, where, base)
        return loss

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(model):
            # FSDP2 averages the gradients already: accelerate gives its autocast, and must not wrap the model in DDP.
            model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainable parameters, whole: every process takes part and the first one writes."""
        state = self.model.state_dict()
        if self.args.should_save:
            self._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / DONE).touch()


def not_finite(stage: str, what: str, step: int, where: str = "", base: tuple[str, str] = ("", "")) -> LayerboostError:
    """The error for a loss or gradient that is not finite; `base`: as from `explain_teacher`."""
    do = "lower its learning rate, in another --run folder or after deleting heal/; no checkpoint holds this step"
    if step <= 1:  # the rate has changed nothing yet
        do = "look for the cause in the converted model: `layerboost evaluate` names layer and token"
    found = f"the base is not finite on this text either: {base[0]}" if base[0] else ""
    return LayerboostError(f"the {what} at step {step} of the {stage} stage{where}", found=found, do=base[1] or do)


class _Guard(TrainerCallback):
    """Progress, metrics, validation and the best step, a stop before a bad step is saved, a checkpoint at SIGTERM."""

    validate: Validate
    every = 1
    fresh = True
    ce_weight = 0.0

    def __init__(self, file: Path, distiller: Distiller, metrics: Metrics, tokens: int, tokens_per_step: float) -> None:
        self.file, self.distiller, self.metrics = file, distiller, metrics
        self.tokens, self.tokens_per_step = tokens, tokens_per_step
        self.stopping, self.best = False, math.inf
        self.device = next(distiller.parameters()).device
        self.progress = Progress(f"healing, {metrics.stage} stage", tokens, "tokens")

    @contextmanager
    def until_sigterm(self) -> Iterator[None]:
        """Inside the block, SIGTERM ends training after the step at hand, with a checkpoint."""

        def stop(*_: Any) -> None:
            self.stopping = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self.progress.__exit__()

    def seen(self, step: int) -> int:
        """Tokens of text trained on after `step` steps."""
        return min(self.tokens, round(step * self.tokens_per_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.__enter__()
        self.progress.skip(self.seen(state.global_step))
        if self.fresh:
            self.judge(0)
        else:
            with safe_open(self.file, "pt") as kept:
                self.best = float(kept.metadata().get("score", math.inf))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.advance(self.seen(state.global_step) - self.seen(state.global_step - 1))
        if over_processes(float(self.stopping), self.device):
            self.stopping = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss, norm, step = float(logs["loss"]), float(logs["grad_norm"]), state.global_step
        if not math.isfinite(norm):
            raise not_finite(self.metrics.stage, f"norm of the gradient is {norm}", step)
        self.metrics.write(step, self.seen(step), {"loss": loss, "lr": float(logs["learning_rate"])})
        if step % self.every == 0 or step == state.max_steps:
            self.judge(step)

    def judge(self, step: int) -> None:
        """Validate, and keep the trained parameters if no earlier step was better."""
        # The mean, because processes must agree on which step is the best.
        values = {name: over_processes(value, self.device) for name, value in self.validate().items()}
        score = values["validation_kl"] + (self.ce_weight * values["validation_nll"] if self.ce_weight else 0.0)
        if step == 0 and not math.isfinite(score):
            raise not_finite(self.metrics.stage, f"validation loss is {score}", step)
        self.metrics.write(step, self.seen(step), values)
        if score < self.best:
            self.best = score
            save_state(self.distiller, self.file, {"step": str(step), "score": repr(score)})

    def keep_best(self, result: Path) -> None:
        """Load the best step and move it to `result`."""
        with safe_open(self.file, "pt") as kept:
            if kept.metadata()["step"] == "0":
                log.warning(KEPT_START, self.metrics.stage)
        self.distiller.load_state_dict(load_file(self.file))
        with main_process_first():  # nobody moves the file before all have read it
            pass
        if is_main_process():
            self.file.replace(result)


def over_processes(value: float, device: torch.device, operation: Any = ReduceOp.SUM) -> float:
    """The mean of a value over the processes, or what another reduction makes of it, the same on each of them."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(found, operation)
    return float(found) / (world_size() if operation == ReduceOp.SUM else 1)
