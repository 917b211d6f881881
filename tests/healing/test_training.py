from __future__ import annotations

import copy
import errno
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forked
from safetensors.torch import load_file
from tiny import boosted, layer_plans, tiny_model

from layerboost.errors import ConfigError, LayerboostError
from layerboost.healing.data import Data, cut
from layerboost.healing.distillers import AttentionDistiller, Distiller, LogitDistiller
from layerboost.healing.training import Validate, check_report_to, checkpoints_in, less_memory, train_stage
from layerboost.recipe import Heal
from layerboost.schemas.healing import MetricLine, read_metrics

IDS = torch.randint(3, 200, (8, 24), generator=torch.Generator().manual_seed(1)).repeat(8, 1)
SETTINGS = Heal(lr=1e-2, attention_lr=1e-2, batch_sequences=4, save_steps=3, validation_steps=4, sink_lr=0.05)
SEQUENCES, TOKENS = list(IDS), IDS.numel()
KINDS: dict[str, type[Distiller]] = {"attention": AttentionDistiller, "lora": LogitDistiller}
stages = pytest.mark.parametrize("stage", KINDS)


def distiller(kind: type[Distiller] = LogitDistiller) -> Any:
    student = boosted("fSns", window=8)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("mlp" in name or name.endswith("sinks"))
    return kind(student, tiny_model(layers=4).requires_grad_(False), layer_plans("fSns", 8))


def validation(made: Distiller) -> Validate:
    """A validation on other ids than those of training."""
    held = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(2))

    def validate() -> dict[str, float]:
        with torch.no_grad():
            return {"validation_kl": made(held).item()}

    return validate


def train(
    folder: Path,
    made: Distiller,
    stage: str = "lora",
    ids: Sequence[torch.Tensor] = SEQUENCES,
    tokens: int = TOKENS,
    validate: Validate | None = None,
    **changes: Any,
) -> list[MetricLine]:
    """Train a stage with these changes to the settings; return its metrics."""
    settings = SETTINGS.model_copy(update=changes)
    folder.mkdir(exist_ok=True)
    data = Data(ids, tokens, settings, settings.attention_repeats if stage == "attention" else 1)
    train_stage(stage, made, data, settings, folder, validate or validation(made))
    return read_metrics(folder / "metrics.jsonl")


def told(kls: Sequence[float], nlls: Sequence[float] = ()) -> Validate:
    """A validation that gives these values one after another."""
    rows = [{"validation_kl": kl} for kl in kls]
    for row, nll in zip(rows, nlls, strict=False):
        row["validation_nll"] = nll
    left = iter(rows)
    return lambda: next(left)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def losses_in(lines: list[MetricLine]) -> list[float]:
    return [line.loss for line in lines if line.loss is not None]


def test_distillation_lowers_its_loss_and_only_trains_what_it_should(tmp_path: Path) -> None:
    made = distiller()
    before = copy.deepcopy(made.student.state_dict())
    rows = train(tmp_path, made, lr=3e-3)
    losses = losses_in(rows)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert [line.step for line in rows if line.validation_kl is not None] == [0, 4, 8, 12, 16]
    assert rows[-1].tokens == 16 * 4 * 24
    changed = [name for name, value in made.student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all("mlp" in name or name.endswith("sinks") for name in changed)
    assert load_file(tmp_path / "lora.safetensors").keys() == made.trained_state().keys()
    files = tmp_path / "lora.safetensors", tmp_path / "metrics.jsonl"
    assert len({file.stat().st_mode for file in files}) == 1


def test_attention_distillation_learns_each_layer_apart(tmp_path: Path) -> None:
    made = distiller(AttentionDistiller)
    for name, parameter in made.student.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        parameter.requires_grad_((layer in (1, 3) and "self_attn" in name) or (layer == 2 and "mlp" in name))
    start = made.layer_losses(IDS[:8])
    train(tmp_path, made, "attention", attention_lr=3e-3)
    end = made.layer_losses(IDS[:8])
    assert start.keys() == {1, 2, 3}
    assert all(end[layer] < start[layer] for layer in start), (start, end)
    assert sum(end.values()) < 0.8 * sum(start.values())


class Uncached(AttentionDistiller):
    def forward(
        self, input_ids: torch.Tensor, weights: torch.Tensor | None = None, place: object = None, given: object = None
    ) -> torch.Tensor:
        return super().forward(input_ids, weights)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_the_base_runs_once_over_text_that_is_repeated(tmp_path: Path, batch: int, accumulation: int) -> None:
    changes: dict[str, Any] = {"batch_sequences": batch, "gradient_accumulation": accumulation}
    tokens, ends, runs = 10 * 4 * 24 - 30, [], []
    for kind in (AttentionDistiller, Uncached):
        made = distiller(kind)
        for name, parameter in made.student.named_parameters():
            parameter.requires_grad_("layers.1.self_attn" in name or "layers.2.mlp" in name)
        made.teacher.model.register_forward_hook(lambda *_: runs.append(1))
        rows = train(
            tmp_path / kind.__name__, made, "attention", tokens=tokens, validate=lambda: {"validation_kl": 0.0},
            attention_repeats=3, attention_lr=1e-3, **changes,
        )  # fmt: skip
        assert rows[-1].tokens == tokens
        assert max(line.step for line in rows) == 30
        ends.append(losses_in(rows))
    assert ends[0] == ends[1]
    assert len(runs) == (3 + 1) * 10 * accumulation


def test_tokens_beyond_the_count_teach_nothing(tmp_path: Path) -> None:
    ends = []
    for name, tail in (("one", 5), ("other", 7)):
        ids = IDS[:6].clone()
        ids[5, 3:] = tail
        made = distiller()
        assert train(tmp_path / name, made, ids=list(ids), tokens=5 * 24 + 3)[-1].tokens == 123
        ends.append(made.trained_state())
    assert same(*ends)


def test_a_step_cut_into_batches_is_the_same_step(tmp_path: Path) -> None:
    ends = []
    for batch, accumulation in ((4, 1), (1, 4)):
        made = distiller()
        changes: dict[str, Any] = {"batch_sequences": batch, "gradient_accumulation": accumulation, "lr": 1e-3}
        rows = train(tmp_path / str(batch), made, ids=list(IDS[:10]), tokens=230, **changes)
        ends.append((losses_in(rows), made.trained_state()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-3, atol=1e-5)


# KL and NLL of validations at the start and after every fourth step, the settings, and which of them is the best.
BEST: dict[str, tuple[list[float], list[float], dict[str, Any], int]] = {
    "the lowest KL": ([5.0, 3.0, 4.0, math.nan, 3.5], [], {}, 1),
    "KL and cross entropy if the loss has both": (
        [5.0, 3.0, 3.1, 3.1, 3.3],
        [9.0, 9.0, 7.0, 8.0, 6.0],
        {"ce_weight": 0.1},
        2,
    ),
    "the start": ([3.0, 3.5, 4.0, 5.0, 4.5], [], {}, 0),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_step_is_kept(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kls, nlls, changes, best = BEST[case]
    made, seen, values = distiller(), [], told(kls, nlls)

    def validate() -> dict[str, float]:
        seen.append({name: value.clone() for name, value in made.trained_state().items()})
        return values()

    train(tmp_path, made, validate=validate, **changes)
    assert len(seen) == 5
    assert same(made.trained_state(), seen[best])
    assert same(load_file(tmp_path / "lora.safetensors"), seen[best])
    kept = "no step of the lora stage is better on the validation text than its start" in caplog.text
    assert kept == (best == 0)


def test_answers_that_weigh_more_count_as_much_for_the_best_step(tmp_path: Path) -> None:
    made, seen = distiller(), []
    data = Data(SEQUENCES, TOKENS, SETTINGS, weights=[torch.tensor([1.0, 9.0]).repeat(12)] * len(SEQUENCES))
    values = zip([1.0, 1.1, 1.2, 1.2, 1.2], [5.0, 3.0, 1.0, 2.0, 3.0], strict=True)
    rows = iter([{"validation_kl": kl, "validation_answer_kl": answers} for kl, answers in values])

    def validate() -> dict[str, float]:
        seen.append({name: value.clone() for name, value in made.trained_state().items()})
        return next(rows)

    train_stage("lora", made, data, SETTINGS, tmp_path, validate)
    assert data.answer_fraction == pytest.approx(0.9)
    assert same(made.trained_state(), seen[2])
    written = [line.validation_answer_kl for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert [value for value in written if value] == [5, 3, 1, 2, 3]


def heal_in(folder: Path) -> None:
    train(folder, distiller())


def reached(folder: Path, step: int) -> Callable[[], bool]:
    """Whether the run in a folder has noted a step."""
    return lambda: any(line.step >= step for line in read_metrics(folder / "metrics.jsonl"))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "kills", [(5, 10), pytest.param((2, 4, 7, 11, 14), marks=pytest.mark.exhaustive)], ids=["twice", "five times"]
)
def test_killed_runs_end_as_the_unkilled_one(tmp_path: Path, kills: tuple[int, ...]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = [train(whole, distiller())]
    for step in kills:
        Forked(heal_in, killed, folder=tmp_path).kill_when(reached(killed, step))
    rows.append(train(killed, distiller()))
    assert same(*(load_file(folder / "lora.safetensors") for folder in (whole, killed)))
    timeless = [[line.model_dump(exclude={"seconds"}) for line in run] for run in rows]
    assert timeless[0] == timeless[1]


@stages
def test_a_mixture_of_lengths_goes_on_where_it_was(tmp_path: Path, stage: str) -> None:
    changes: dict[str, Any] = {"batch_sequences": 1, "attention_repeats": 2, "attention_lr": 1e-3}
    sequences, result = cut(IDS[:4].view(2, 48), (16, 48), ()), tmp_path / f"{stage}.safetensors"

    def run() -> list[MetricLine]:
        return train(tmp_path, distiller(KINDS[stage]), stage, sequences, 90, **changes)

    lines = run()
    whole = load_file(result)
    ends = [line.tokens for line in lines if line.loss is not None]
    assert ends == ([16, 32, 48, 90] if stage == "lora" else [8, 16, 24, 45, 53, 61, 69, 90])
    result.unlink()
    checkpoints_in(tmp_path / "checkpoints" / stage)[-1].unlink()
    again = run()
    assert same(load_file(result), whole)
    assert [line.loss for line in again] == [line.loss for line in lines]


@pytest.mark.multiprocess
def test_sigterm_leaves_a_checkpoint(tmp_path: Path) -> None:
    process = Forked(heal_in, tmp_path, folder=tmp_path)
    process.wait_until(reached(tmp_path, 1))
    process.send(signal.SIGTERM)
    assert process.wait() != 0
    assert "KeyboardInterrupt" in process.errors.read_text()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1].step
    assert checkpoints_in(tmp_path / "checkpoints" / "lora")[-1].name == f"step-{last:08}.pt"
    assert last < 16


def test_two_checkpoints_are_kept_and_half_written_ones_are_not_read(tmp_path: Path) -> None:
    folder, result = tmp_path / "checkpoints" / "lora", tmp_path / "lora.safetensors"
    train(tmp_path, distiller())
    assert [file.name for file in checkpoints_in(folder)] == ["step-00000015.pt", "step-00000016.pt"]
    expected = load_file(result)
    result.unlink()
    (folder / "step-00000016.pt").unlink()
    killed = folder / ".step-00000016.pt.123.tmp"
    killed.write_bytes(b"PK")
    train(tmp_path, distiller())
    assert not killed.exists()
    assert same(load_file(result), expected)


@stages
def test_a_loss_that_is_not_finite_stops_the_run_before_its_step_is_saved(tmp_path: Path, stage: str) -> None:
    made = distiller(KINDS[stage])
    broken = made.student.model.layers[2].mlp.down_proj
    steps = 0

    def break_it(*_: object) -> None:
        nonlocal steps
        if steps == 4:
            with torch.no_grad():
                broken.weight.fill_(float("nan"))
        steps += 1

    made.register_forward_pre_hook(lambda *_: break_it() if torch.is_grad_enabled() else None)
    with pytest.raises(LayerboostError, match=f"loss is nan at step 5 of the {stage} stage, first in layer 2"):
        train(tmp_path, made, stage)
    (found,) = checkpoints_in(tmp_path / "checkpoints" / stage)
    assert found.name == "step-00000003.pt"
    assert all(value.isfinite().all() for value in torch.load(found)["trained"].values())


def test_a_validation_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    train(tmp_path, distiller(), validate=told([5.0, math.inf, 4.0, math.nan, 3.5]))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["validation_kl"] for row in rows if "validation_kl" in row] == [5.0, None, 4.0, None, 3.5]


def test_no_rate_is_blamed_for_a_start_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(LayerboostError, match="validation loss is nan at step 0 of the lora stage") as caught:
        train(tmp_path, distiller(), validate=told([math.nan]))
    assert "rate" not in str(caught.value)
    assert not (tmp_path / "lora.safetensors").exists()


@stages
def test_a_base_that_is_not_finite_on_a_text_is_named(tmp_path: Path, stage: str) -> None:
    """One row of the embedding is damaged, and a token far into the text asks for it."""
    made, ids = distiller(KINDS[stage]), IDS.clone()
    ids[ids == 199] = 198
    ids[22, 5] = 199
    with torch.no_grad():
        made.teacher.get_input_embeddings().weight[199] = math.nan
    with pytest.raises(LayerboostError, match=rf"loss is nan at step 6 of the {stage} stage") as caught:
        train(tmp_path, made, stage, list(ids), validate=told([1.0] * 9))
    assert "the base is not finite on this text either: first in the embedding (token 6, id 199)" in str(caught.value)
    assert "rate" not in str(caught.value)


def test_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    made = distiller()
    made.register_forward_pre_hook(lambda *_: torch.empty(1 << 60) if torch.is_grad_enabled() else None)
    with pytest.raises(LayerboostError, match="not enough memory to heal") as caught:
        train(tmp_path, made)
    assert "lower heal.batch_sequences" in str(caught.value)
    assert "activation_checkpointing" in str(caught.value)
    assert less_memory(Heal(sequence_tokens=(256, 2048))).startswith("lower heal.sequence_tokens")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LayerboostError, match="cannot write") as caught:
        train(tmp_path, distiller())
    assert "No space left" in str(caught.value)
    assert checkpoints_in(tmp_path / "checkpoints" / "lora") == []


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_report_to(("wandb",))


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = {"stage": "lora", "step": 1, "tokens": 96, "loss": 0.5, "lr": 0.0, "seconds": 1.5}
    file.write_text(json.dumps(line) + '\n{"step": ')
    assert read_metrics(file) == [MetricLine.model_validate(line)]
