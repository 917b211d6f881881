"""The files stages pass to each other: their schemas, and atomic reading and writing of each."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.strategies import FULL, STRATEGIES, WINDOW, Strategy, StrategyName

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_ERRORS = (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EIO)
# What lies in a run folder, in the order it is made.
BASE, SENSITIVITY, PLAN, CONVERTED = "base", "sensitivity.json", "plan.yaml", "converted"
HEAL, HEALED, COMPAT = "heal", "healed", "compat"

Record = TypeVar("Record", bound="Artifact")


class Artifact(BaseModel):
    """A file with a schema version; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    schema_version: int = 1

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != cls.model_fields["schema_version"].default:
            raise ValueError(f"version {value} of this file is not known here")
        return value


class ModelInfo(BaseModel):
    """Which model a file was made from. `fingerprint` covers its configuration and weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    name: str
    model_type: str
    layers: int
    hidden_size: int
    heads: int = Field(description="of queries")
    kv_heads: int
    head_dim: int
    bytes_per_element: int
    max_context_tokens: int
    vocabulary: int
    tied_head: bool = Field(description="whether the output head is the embedding")
    parameters: int
    attention_parameters: int = Field(description="of one layer: what a layer without attention does not have")
    fingerprint: str
    sliding_layers: list[int] = Field(default=[], description="layers that slide in the base already")
    sliding_window: int | None = Field(default=None, description="their window")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one full layer holds for one token."""
        return 2 * self.kv_heads * self.head_dim * self.bytes_per_element


class Score(BaseModel):
    """A mean over sequences or items with its standard error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float
    standard_error: float
    count: int | None = Field(None, description="tokens, answers or items behind it")

    @classmethod
    def of(cls, values: Sequence[float], count: int | None = None) -> Score:
        """Return the mean of values; its error is 0 of one value alone and NaN where one is not finite.

        `count`: what lies behind the values, if not one item each.
        """
        import numpy as np

        array = np.asarray(values, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else 0.0
        return cls(mean=float(array.mean()), standard_error=float(error), count=len(array) if count is None else count)


# What one replacement does, larger is worse.
METRICS = {
    "kl": "KL(base ‖ changed), nats per token",
    "nll": "NLL(changed) − NLL(base), nats per token",
    "top1": "share of tokens whose most likely next token changes",
    "retrieval": "log-probability lost on the answer in long prompts, nats per answer",
    "benchmark": "average accuracy lost over validation tasks (LayerBoost, Eq. 3)",
    "cosine": "1 − cosine of the stream before and after the attention (LLM-Drop); removal only",
    "mse": "squared error of the layer's output, relative to its square",
}


class Variant(BaseModel):
    """One layer under one replacement, in every metric measured (keys of METRICS)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    attention: StrategyName
    window: int | None = None
    sink: bool = False
    scores: dict[str, Score]

    @model_validator(mode="after")
    def _a_strategy_with_its_settings(self) -> Variant:
        self.plan(0)
        return self

    def plan(self, layer: int) -> LayerPlan:
        """The entry of a plan that has this replacement."""
        return LayerPlan(layer=layer, attention=self.attention, window=self.window, sink=self.sink)


class LayerSensitivity(BaseModel):
    """All variants of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int
    variants: list[Variant]


class Sensitivity(Artifact):
    """`sensitivity.json`: saved after each layer, complete once every layer is in it."""

    schema_version: int = 2
    model: ModelInfo
    text: str = Field(description="fingerprint of the calibration tokens")
    settings: dict[str, Any]
    sequences: int
    tokens: int
    base_nll: Score
    base_retrieval: dict[str, Score] | None = Field(
        None, description="the base's log_probability of an answer, in nats, and its share of exact answers"
    )
    base_tasks: dict[str, Score] | None = Field(None, description="the base's score on each task of `benchmark`")
    layers: list[LayerSensitivity] = []

    @property
    def complete(self) -> bool:
        return len(self.layers) == self.model.layers


class LayerPlan(BaseModel):
    """The strategy of one layer. `sink`: a learned logit per head in the softmax's denominator."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int = Field(ge=0)
    attention: StrategyName
    window: int | None = Field(default=None, ge=1)
    sink: bool = False

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> LayerPlan:
        takes = self.strategy.settings
        if WINDOW in takes and self.window is None:
            raise ValueError(f"a {self.attention} layer needs a window")
        if WINDOW not in takes and (self.window is not None or self.sink):
            raise ValueError(f"a {self.attention} layer takes neither window nor sink")
        return self

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.attention]

    @property
    def changed(self) -> bool:
        """Whether the layer is another than in the base."""
        return self.attention != FULL

    def kv_tokens(self, context_tokens: int) -> int:
        """Tokens whose keys and values the layer holds for one request of a context."""
        return self.strategy.kv_tokens(context_tokens, self.window)

    @property
    def label(self) -> str:
        """The strategy with its settings: full, sliding 64, sliding 64 + sink, none."""
        return self.attention + (f" {self.window}" if self.window else "") + (" + sink" if self.sink else "")


def all_full(model: ModelInfo) -> list[LayerPlan]:
    """The base as a plan."""
    return [LayerPlan(layer=layer, attention=FULL) for layer in range(model.layers)]


def window_of(layers: Iterable[LayerPlan]) -> int | None:
    """The one window of a plan's layers; None where none has one."""
    return next((entry.window for entry in layers if entry.window), None)


def counts(layers: Sequence[LayerPlan]) -> dict[StrategyName, int]:
    """How many layers have each strategy, in the table's order."""
    return {name: sum(entry.attention == name for entry in layers) for name in STRATEGIES}


def counted(layers: Sequence[LayerPlan]) -> str:
    """The counts as words: 8 full, 22 sliding, 0 none."""
    return ", ".join(f"{count} {name}" for name, count in counts(layers).items())


class Predicted(BaseModel):
    """What the files foretell of a plan: the sums of single-layer scores, and its costs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    damage: dict[str, float] = Field(description="sum over layers of each metric that all of its choices have")
    kv_fraction: float
    kv_bytes_per_request: int
    parameter_fraction: float
    context_tokens: int
    concurrency: int | None = Field(None, description="requests decoding at once in decode_ms")
    decode_ms: float | None = Field(None, description="of one step; known with plan.costs")
    decode_fraction: float | None = None
    plan: str = Field(default="", description="hash of the plan it foretells")


class PlanFile(Artifact):
    """`plan.yaml`: one line a layer; a person may edit it."""

    schema_version: int = 2
    model: ModelInfo
    method: str
    settings: dict[str, Any] = {}
    sensitivity: str | None = Field(default=None, description="hash of the sensitivity.json it was made from")
    predicted: Predicted | None = None
    layers: list[LayerPlan]

    @model_validator(mode="before")
    @classmethod
    def _without_flags(cls, values: Any) -> Any:
        """Older files hold serving flags, those of the machine that planned: they are left out."""
        return {key: value for key, value in values.items() if key != "serving"} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _layers_in_order(self) -> PlanFile:
        found = [entry.layer for entry in self.layers]
        if found != list(range(self.model.layers)):
            raise ValueError(f"the plan must name layers 0 to {self.model.layers - 1} once each, in order; got {found}")
        if len({entry.window for entry in self.layers if entry.window}) > 1:
            raise ValueError("a plan uses one window: vLLM and Transformers keep a single sliding_window")
        return self

    @property
    def window(self) -> int | None:
        return window_of(self.layers)

    @property
    def foretold(self) -> Predicted | None:
        """What was predicted of these layers; None once they have been edited."""
        return self.predicted if self.predicted and self.predicted.plan in ("", self.hash()) else None

    @property
    def sliding_as_base(self) -> list[int]:
        """The layers left full that slide in the base already."""
        return [e.layer for e in self.layers if not e.changed and e.layer in self.model.sliding_layers]

    def count(self, attention: StrategyName) -> int:
        return counts(self.layers)[attention]

    def hash(self) -> str:
        """Identity of what the plan does: the model and the layers, not how they were chosen."""
        return fingerprint(self.model.fingerprint, [entry.model_dump() for entry in self.layers])


class StageRecord(BaseModel):
    """One line of `run.json`."""

    model_config = ConfigDict(extra="forbid")
    stage: str
    argv: list[str]
    started: str
    seconds: float
    status: Literal["done", "failed", "interrupted"]
    error: str | None = None
    seed: int
    device: str
    versions: dict[str, str]
    git_revision: str | None = None
    model: str | None = None


class RunFile(Artifact):
    """`run.json`: what was run in this folder, in order."""

    stages: list[StageRecord] = []


def fingerprint(*parts: Any) -> str:
    """16 hex digits of the SHA-256 over the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def not_finite(value: Any, path: str = "") -> str:
    """The first number in plain values that is not finite, with the keys that lead to it; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{path.lstrip('.')} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (not_finite(item, f"{path}.{key}") for key, item in items)), "")


def finite(value: Any) -> Any:
    """The same plain values with None for numbers that are not finite: for what others computed, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, what: str, **options: Any) -> str:
    """The one way to JSON: raises LayerboostError, naming the number, where one is not finite, which JSON lacks."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        raise LayerboostError(
            f"{what} cannot be written: a number in it is not finite", found=not_finite(value)
        ) from None


def check_path(path: Path) -> None:
    """Raise ConfigError for a path that is not UTF-8: safetensors, tokenizers and vLLM cannot open it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        found = os.fsencode(path.absolute())
        raise ConfigError("a path is not UTF-8, which the libraries that read it want", found=repr(found)[1:],
                          do="rename it, or link to it by another name") from None  # fmt: skip


def file_hash(path: Path) -> str:
    """16 hex digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never half of it.

    Raises LayerboostError when the disk is full or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair (an odd file name, say) becomes an escape, which JSON and YAML read back.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well and vanishes when it does not.

    A symbolic link is followed: what it leads to, perhaps on a larger disk, is replaced.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # The old folder goes aside first: removing it takes time, in which a kill would leave neither.
        aside = path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            path.replace(aside)
        temporary.replace(path)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def disk_error(path: Path, error: OSError) -> LayerboostError:
    """The message for a write that failed; an error without a number is a library's word for a full disk."""
    full = error.errno is None or error.errno in DISK_FULL
    do = "free space" if full else "make it writable"
    return LayerboostError(f"cannot write {path}", found=str(error), do=f"{do}, or choose another --run folder")


def write_json(path: Path, value: Artifact | dict[str, Any]) -> None:
    """Write an artifact or a plain mapping as indented JSON, atomically."""
    plain = value.model_dump(mode="json") if isinstance(value, Artifact) else value
    write_text(path, json_text(plain, str(path), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type[Record], made_by: str) -> Record:
    """Read and validate an artifact; `made_by` is the command that writes it, named when the file is missing.

    Raises ConfigError for a missing, truncated or foreign file.
    """
    return _parse(path, kind, made_by, json.loads)


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write `plan.yaml` with one line a layer."""
    head = plan.model_dump(mode="json", exclude={"layers"})
    lines = [yaml.safe_dump(head, sort_keys=False, allow_unicode=True), "layers:\n"]
    for entry in plan.layers:
        values = entry.model_dump(mode="json", exclude_defaults=True)
        inner = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=200).strip()
        lines.append(f"  - {inner}\n")
    write_text(path, "".join(lines))


def read_plan(path: Path) -> PlanFile:
    """Read and validate `plan.yaml`; raises ConfigError."""
    return _parse(path, PlanFile, "layerboost plan", yaml.safe_load)


def _parse(path: Path, kind: type[Record], made_by: str, parser: Any) -> Record:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", do=f"make it with `{made_by}`")
    try:
        values = parser(path.read_text(encoding="utf-8"))
        if wrong := not_finite(values):
            raise ValueError(wrong)
        return kind.model_validate(values)
    except (ValueError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            found = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in error.errors()[:3]
            )
        else:
            found = first_line(error)
        raise ConfigError(
            f"{path} is not a valid {kind.__name__} (schema version {kind.model_fields['schema_version'].default})",
            found=found,
            do=f"mend it, or delete it and run `{made_by}` again",
        ) from None
