"""export: a boosted checkpoint → a directory in a stock format."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from layerboost.errors import ConfigError, LayerboostError
from layerboost.exporting.llama_shaped import (
    CONFIGURATION,
    decilm_config,
    granite_config,
    granite_tensors,
    llama_tensors,
    mlx_config,
)
from layerboost.exporting.targets import Target, extra_kv_bytes, find_target
from layerboost.files import disk_error, file_hash, new_folder
from layerboost.model.base import UNPACKED_FROM, find_model
from layerboost.model.card import CARD, vllm_commands
from layerboost.model.checkpoint import MAX_SHARD_SIZE, plan_in
from layerboost.model.families import WRAPPERS
from layerboost.model.files import Tensors, read_weights, weight_files
from layerboost.model.integrity import check_checkpoint, read_config
from layerboost.model.modeling import base_layer_types, is_boosted
from layerboost.model.retention import prefix_flag
from layerboost.model.surgery import boosted_config, unchanged
from layerboost.model.tokenizer import copied_files, name_class, read_tokenizer
from layerboost.runtime import Runtime, log
from layerboost.schemas.artifact import fingerprint, write_json
from layerboost.schemas.plan import LayerPlan, PlanFile
from layerboost.schemas.run import PLAN
from layerboost.text import opening_ids

# Types of GGUF files that llama.cpp's own tool writes, from one of the checkpoint's type.
QUANTISED_BY_TOOL = ("q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs")
EXACT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# What is not copied as it is.
NOT_COPIED = {CARD, "config.json", "heal.json", "modeling_layerboost.py", "model.safetensors.index.json"}


@dataclass(frozen=True)
class Directory:
    """How a format is written as a Hugging Face directory.

    `serving`: of its card, with SERVE for vLLM's commands; `flags`: of these; `file`: one that it has besides.
    """

    config: Callable[[PreTrainedConfig], dict[str, Any]]
    tensors: Callable[[PreTrainedConfig, Tensors], Tensors]
    serving: str
    flags: tuple[str, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Exported:
    """What was written. `extra_kv_bytes`: of one request, by layers without attention that keep a window.

    `base_type`: of the weights of a base that came quantised, such as Q4_K.
    """

    target: str
    folder: str
    extra_kv_bytes: int
    base_type: str | None


def run_export(
    folder: Path, to: str, out: Path | None = None, kind: str | None = None, *, replace: bool = False
) -> Exported:
    """Write a boosted checkpoint in the format `to`, or in the one that holds it at least cost (`auto`); as GGUF also a
    stock model.

    `out`: a new directory, or file for GGUF, by default next to the checkpoint; complete or not there at all. `kind`:
    the type of a GGUF file's matrices, float16 by default. `replace`: a GGUF file that is there, once the new one is
    complete. Raise ConfigError, before any weight is read, if the directory is not a model or no format holds its plan.
    """
    plan = plan_in(folder)
    to = "gguf" if to == "auto" and kind else to
    if plan is None and to != "gguf":
        raise _not_boosted(folder, "no plan.yaml")
    config, target = _target(folder, to, plan)
    if kind and target.name != "gguf":
        raise ConfigError(f"{target.name} keeps the checkpoint's type", found=f"--type {kind}", do="leave it out")
    kind = (kind or "f16").lower()
    ending = f"-{kind}.gguf" if target.name == "gguf" else f"-{target.name}"
    out = out or folder.resolve().with_name(folder.resolve().name + ending)
    if out.exists() and not replace:
        raise ConfigError(f"{out} exists already", do="name another directory with --out, or delete it")
    if target.architecture:
        _write_gguf(folder, out, config, target.architecture, kind)
    else:
        assert plan is not None
        _write(folder, out, config, target, plan)
    if plan is None:
        return Exported(target.name, str(out), 0, None)
    if base_type := _base_type(plan.model.name):
        log.warning("the base came with weights of type %s: no export is more precise", base_type)
    return Exported(target.name, str(out), extra_kv_bytes(target, config, plan.model), base_type)


def check_gguf(folder: Path, kind: str) -> None:
    """Raise ConfigError if a model directory, stock or boosted, cannot be written as GGUF with this type."""
    _target(folder, "gguf", plan_in(folder))
    check_type(folder, kind)


def check_plan(config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> None:
    """Raise ConfigError if no GGUF file holds a plan of a base with this config."""
    find_target("gguf", boosted_config(config, layers), layers)


def gguf_file(folder: Path, out: Path, kind: str) -> None:
    """Write a GGUF file of a model directory, stock or boosted, unless `out` is of the same files already.

    One of other files is replaced once the new one is complete. Raise as `run_export` does, also for a file that was
    not made so.
    """
    from layerboost.exporting.gguf_file import source_of

    earlier = source_of(out) if out.is_file() else None
    if earlier is None or earlier != _source(folder):
        run_export(folder, "gguf", out, kind, replace=earlier is not None)


def _source(folder: Path) -> str:
    """Return a hash of the files that an export is made from; of weights, of their sizes and times. Another release may
    write another file of them."""
    code = [file_hash(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    weights = weight_files(folder)
    names = ("config.json", PLAN, CARD, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    others = [folder / name for name in names]
    told = [file_hash(file) for file in others if file.is_file()]
    return fingerprint(code, told, [(file.stat().st_size, file.stat().st_mtime_ns) for file in weights])


def _target(folder: Path, to: str, plan: PlanFile | None) -> tuple[PreTrainedConfig, Target]:
    """Return a model's config and the format for it; without a plan all layers are the base's own."""
    boosted = is_boosted(check_checkpoint(folder).get("architectures"))
    if boosted and plan is None:
        raise ConfigError(
            f"{folder} is a boosted checkpoint without its plan", found="no plan.yaml", do="copy it again"
        )
    if plan is not None and not boosted:
        raise _not_boosted(folder, "another architecture")
    config = read_config(folder, str(folder))
    if config.model_type in WRAPPERS:
        raise ConfigError(
            "exports hold language models alone",
            found=f"{folder} is a wrapper, {config.model_type}",
            do="load the checkpoint itself in Transformers, with layerboost installed or its remote code",
        )
    config.layer_types = base_layer_types(config) if plan is None else config.layer_types
    return config, find_target(to, config, plan.layers if plan else unchanged(config))


def _not_boosted(folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"{folder} is not a boosted checkpoint",
        found=found,
        do="give RUN/healed or RUN/converted; a stock model can only be exported to gguf",
    )


def _write(folder: Path, out: Path, config: PreTrainedConfig, target: Target, plan: PlanFile) -> None:
    form = DIRECTORIES[target.name]
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    tensors = form.tensors(config, read_weights(folder))
    with new_folder(out) as new:
        save_torch_state_dict(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            new,
            max_shard_size=MAX_SHARD_SIZE,
            metadata={"format": "pt"},
        )
        weights = {file.name for file in weight_files(folder)}
        for file in {*folder.iterdir(), *copied_files(folder)}:
            if file.is_file() and file.name not in NOT_COPIED | weights:
                place = new / file.relative_to(folder)
                place.parent.mkdir(exist_ok=True)
                shutil.copy(file, place)
        if form.file:
            shutil.copy(form.file, new)
        plain = form.config(config)
        write_json(new / "config.json", plain)
        name_class(new, lambda: opening_ids(read_tokenizer(folder, str(folder))))
        prefix = tuple(part for pair in prefix_flag(plain, plan.layers).items() for part in pair)
        serving = form.serving.replace("SERVE", vllm_commands(plan, (*form.flags, *prefix)))
        (new / CARD).write_text(_card(card, target, serving, plan), encoding="utf-8")


def _write_gguf(folder: Path, out: Path, config: PreTrainedConfig, architecture: str, kind: str) -> None:
    from layerboost.exporting.gguf_file import write_gguf

    tool = check_type(folder, kind)
    tensors, source = read_weights(folder), _source(folder)
    temporary, exact = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.exact.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if tool:
            own = EXACT[next(iter(tensors.values())).dtype]
            write_gguf(exact, folder, architecture, config, tensors, own, source)
            _quantise(tool, exact, temporary, kind)
        else:
            write_gguf(temporary, folder, architecture, config, tensors, kind, source)
        temporary.replace(out)
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        for file in (temporary, exact):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def check_type(folder: Path, kind: str) -> str | None:
    """Return the path of the tool that a type of GGUF file needs, if any; raise ConfigError without it, for an unknown
    type, and for a tokenizer that llama.cpp lacks."""
    from layerboost.exporting.gguf_file import TYPES
    from layerboost.exporting.gguf_tokenizer import splitter

    known = (*TYPES, *QUANTISED_BY_TOOL)
    if kind not in known:
        raise ConfigError(f"no GGUF type is called {kind}", do=f"choose one of {', '.join(known)}")
    splitter(folder)
    return None if kind in TYPES else _quantise_tool(kind)


def _quantise_tool(kind: str) -> str:
    """Return the path of llama.cpp's own tool; raise ConfigError if it is not there."""
    if tool := shutil.which("llama-quantize"):
        return tool
    raise ConfigError(
        f"{kind} is a type that llama.cpp's own tool writes",
        found="no llama-quantize on the PATH",
        do="install llama.cpp, or take --type q8_0 or q4_0, which need no tool",
    )


def _quantise(tool: str, file: Path, out: Path, kind: str) -> None:
    ended = subprocess.run([tool, str(file), str(out), kind.upper()], capture_output=True, text=True, check=False)
    if ended.returncode or not out.is_file():
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        raise LayerboostError(
            f"llama-quantize failed, with exit code {ended.returncode}",
            found=lines[-1] if lines else "no message",
            do="free space if the disk is full, or take --type q8_0",
        )


def _base_type(name: str) -> str | None:
    """Return the type of most weights of a base that came quantised, a GGUF file or a directory; None for others."""
    from gguf import GGUFReader

    in_file = name.startswith("package:") or name.lower().endswith(".gguf")
    folder = Path(name).expanduser()
    if not in_file and not folder.is_dir():
        return _cached_type(name)
    if (folder / UNPACKED_FROM).is_file():
        return _base_type((folder / UNPACKED_FROM).read_text(encoding="utf-8").splitlines()[0])
    try:
        base = find_model(name, Runtime(torch.device("cpu"), torch.float32))
        if base.gguf is None:
            return (base.dequantised or {}).get("quant_method")
        sizes = Counter[str]()
        for tensor in GGUFReader(base.folder / base.gguf).tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    except (ConfigError, OSError, ValueError):
        return "unknown (the file is not there)" if in_file else None
    [(most, _)] = sizes.most_common(1)
    return None if most in ("F32", "F16", "BF16") else most


def _cached_type(name: str) -> str | None:
    """Return how the weights of a Hub id are quantised by its config in the cache; None if they are not, or it is not
    there."""
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    settings = (
        json.loads(Path(config).read_text(encoding="utf-8")).get("quantization_config")
        if isinstance(config, str)
        else None
    )
    return settings.get("quant_method") if settings else None


def _card(boosted: str, target: Target, serving: str, plan: PlanFile) -> str:
    """Return the boosted checkpoint's card with another way to load and serve it."""
    head, _, rest = boosted.partition("## Load")
    _, table, tail = rest.partition("## The plan")
    removed = target.removed_tokens and any(not entry.strategy.keeps_weights for entry in plan.layers)
    heading = f"## Load and serve\n\nIn the form of {target.title.partition(',')[0]}, so layerboost is not needed: "
    return f"{head}{heading}{target.runs}.\n{_REMOVED * bool(removed)}\n{serving}\n{table}{tail}"


_REMOVED = """
A layer without attention is a sliding layer here whose output projection is zero: exact, but it keeps a window of keys
and values.
"""
_GRANITE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

```console
SERVE
```
"""
_DECILM = """Transformers has no such class; it loads the checkpoint from which this one was exported. The remote code
is the configuration class next to this card.

```console
SERVE
```
"""
_MLX = """Transformers and vLLM would load it as a Llama without windows: give them the checkpoint from which this one
was exported.

```console
mlx_lm.generate --model PATH --prompt "Hello"
```
"""
DIRECTORIES = {
    "granite-swa": Directory(granite_config, granite_tensors, _GRANITE),
    "decilm": Directory(decilm_config, lambda _, tensors: tensors, _DECILM, ("--trust-remote-code",), CONFIGURATION),
    "mlx": Directory(mlx_config, llama_tensors, _MLX),
}
