"""export: a boosted checkpoint → a directory in a stock format."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedConfig

from layerboost.errors import ConfigError
from layerboost.exporting.granite_swa import granite_config, granite_tensors
from layerboost.exporting.targets import Target, extra_kv_bytes, find_target
from layerboost.files import disk_error, new_folder
from layerboost.model.card import CARD
from layerboost.model.checkpoint import MAX_SHARD_SIZE, plan_in
from layerboost.model.compat import export_compat
from layerboost.model.files import read_weights, weight_files
from layerboost.model.integrity import ARCHITECTURE, check_checkpoint, read_config
from layerboost.schemas.artifact import write_json
from layerboost.schemas.plan import PlanFile

NOT_COPIED = {CARD, "config.json", "heal.json", "modeling_layerboost.py", "model.safetensors.index.json"}


@dataclass(frozen=True)
class Exported:
    """What was written. `extra_kv_bytes`: of one request, by layers without attention that keep a window."""

    target: str
    folder: str
    extra_kv_bytes: int


def run_export(folder: Path, to: str, out: Path | None = None, kind: str | None = None) -> Exported:
    """Write a boosted checkpoint in the format `to`, or in the one that holds it at least cost (`auto`).

    `out`: a new directory, or file for GGUF, by default next to the checkpoint; complete or not there at all. `kind`:
    the type of a GGUF file's matrices, float16 by default. Raise ConfigError, before any weight is read, if the
    directory is not a boosted checkpoint or no format holds its plan.
    """
    plan = plan_in(folder)
    if plan is None or ARCHITECTURE not in (check_checkpoint(folder).get("architectures") or []):
        raise ConfigError(
            f"{folder} is not a boosted checkpoint",
            found="no plan.yaml" if plan is None else "another architecture",
            do="give RUN/healed or RUN/converted",
        )
    config = read_config(folder, str(folder))
    target = find_target(to, config, plan.layers)
    if kind and target.name != "gguf":
        raise ConfigError(f"{target.name} keeps the checkpoint's type", found=f"--type {kind}", do="leave it out")
    kind = kind or "f16"
    ending = f"-{kind}.gguf" if target.name == "gguf" else f"-{target.name}"
    out = out or folder.resolve().with_name(folder.resolve().name + ending)
    if out.exists():
        raise ConfigError(f"{out} exists already", do="name another directory with --out, or delete it")
    if target.name == "decilm":
        export_compat(folder, out)
    elif target.name == "gguf":
        _write_gguf(folder, out, config, target.architecture, kind)
    else:
        _write(folder, out, config, target, plan)
    return Exported(target.name, str(out), extra_kv_bytes(target, config, plan.model))


def _write(folder: Path, out: Path, config: PreTrainedConfig, target: Target, plan: PlanFile) -> None:
    with new_folder(out) as new:
        tensors = granite_tensors(config, read_weights(folder))
        save_torch_state_dict(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            new,
            max_shard_size=MAX_SHARD_SIZE,
            metadata={"format": "pt"},
        )
        weights = {file.name for file in weight_files(folder)}
        for file in folder.iterdir():
            if file.is_file() and file.name not in NOT_COPIED | weights:
                shutil.copy(file, new)
        write_json(new / "config.json", granite_config(config))
        (new / CARD).write_text(_card((folder / CARD).read_text(), target, plan))


def _write_gguf(folder: Path, out: Path, config: PreTrainedConfig, architecture: str, kind: str) -> None:
    from layerboost.exporting.gguf_file import TYPES, write_gguf
    from layerboost.exporting.gguf_tokenizer import splitter

    if kind not in TYPES:
        raise ConfigError(f"no GGUF type is called {kind}", do=f"choose one of {', '.join(TYPES)}")
    splitter(folder)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(temporary, folder, architecture, config, read_weights(folder), kind)
        temporary.replace(out)
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _card(boosted: str, target: Target, plan: PlanFile) -> str:
    """Return the boosted checkpoint's card with another way to load and serve it."""
    head, _, rest = boosted.partition("## Load")
    _, table, tail = rest.partition("## The plan")
    note = (
        "\nA layer without attention is a sliding layer here whose output projection is zero: exact, but it keeps a "
        "window of keys and values.\n"
        if any(not entry.strategy.keeps_weights for entry in plan.layers)
        else ""
    )
    return head + _SERVE.format(title=target.title.partition(",")[0], runs=target.runs, note=note) + table + tail


_SERVE = """## Load and serve

In the form of {title}, so layerboost is not needed: {runs}.
{note}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

```console
vllm serve PATH
```

"""
