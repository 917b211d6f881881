"""check: find what would fail in a run, before hours of compute."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from layerboost import converting as convert
from layerboost.benching import stage as bench
from layerboost.engines import open_engine
from layerboost.errors import LayerboostError
from layerboost.evaluating import stage as evaluate
from layerboost.files import check_path
from layerboost.healing import stage as heal
from layerboost.healing.estimate import estimate_healing
from layerboost.healing.training import less_memory
from layerboost.measuring import stage as measure
from layerboost.model.base import find_base
from layerboost.planning import stage as plan
from layerboost.recipe import Recipe, model_of
from layerboost.run_folder import no_run_folder
from layerboost.runtime import GIB, start_runtime
from layerboost.schemas.plan import read_plan
from layerboost.schemas.run import CONVERTED, HEALED, PLAN

# The stages with a `check(recipe, run, base)`, which raises ConfigError.
STAGES = (measure, plan, convert, heal, evaluate, bench)


@dataclass(frozen=True)
class Estimate:
    """The model, and the needs of the run against what is available."""

    model: str
    family: str
    layers: int
    parameters: int
    active_parameters: int
    device: str
    memory_needed_gib: float
    memory_free_gib: float
    disk_needed_gib: float
    disk_free_gib: float
    calibration_tokens: int
    healing_tokens_per_s: float
    healing_hours: float
    engine: str


def check(recipe: Recipe, run: Path) -> Estimate:
    """Check the model, then each stage's needs (recipe, model, text, tasks, engine), then memory and disk.

    Memory is that of healing, the largest, on its device, without the adapters and their optimizer. With a GPU, the
    host must hold the model once, to merge it. Speed is estimated from a matrix product on this machine.
    Raise ConfigError for what cannot work and LayerboostError if memory or disk do not suffice.
    """
    model_of(recipe)
    check_path(run)
    free_bytes = shutil.disk_usage(_place_of(run)).free
    runtime = start_runtime(recipe)
    base = find_base(recipe, run, runtime)
    for stage in STAGES:
        stage.check(recipe, run, base)
    info = base.info
    weights_gib = info.parameters * info.bytes_per_element / GIB
    copies = 2 + base.packed - sum((run / folder).is_dir() for folder in (CONVERTED, HEALED))
    layers = read_plan(run / PLAN).layers if (run / PLAN).is_file() else None
    healing = estimate_healing(recipe, base.model_config, info, runtime, layers)
    engine = open_engine(recipe.bench.engine)
    estimate = Estimate(
        model=base.name,
        family=info.model_type,
        layers=info.layers,
        parameters=info.parameters,
        active_parameters=info.active_parameters,
        device=str(runtime.device),
        memory_needed_gib=healing.memory_gib,
        memory_free_gib=free_memory_gib(runtime.device),
        disk_needed_gib=round(copies * weights_gib, 2),
        disk_free_gib=round(free_bytes / GIB, 2),
        calibration_tokens=recipe.measure.tokens,
        healing_tokens_per_s=healing.tokens_per_s,
        healing_hours=healing.hours,
        engine=f"{engine.NAME}, {engine.check(recipe.bench, ())}",
    )
    check_room(estimate, weights_gib, runtime.device, less_memory(recipe.heal))
    return estimate


def check_room(estimate: Estimate, weights_gib: float, device: torch.device, advice: str) -> None:
    """Raise LayerboostError if memory or disk do not suffice; `advice`: how healing takes less memory."""
    needs = [
        (f"memory on {device}", estimate.memory_needed_gib, estimate.memory_free_gib, f"free some, or {advice}"),
        ("disk", estimate.disk_needed_gib, estimate.disk_free_gib, "free some, or use a smaller model"),
    ]
    if device.type != "cpu":
        needs.append(("host memory", round(weights_gib, 2), free_memory_gib("cpu"), "free some: merging needs it once"))
    for kind, needed, free, do in needs:
        if needed > free:
            raise LayerboostError(f"not enough {kind}: {needed} GiB needed", found=f"{free} GiB free", do=do)


def free_memory_gib(device: torch.device | str) -> float:
    """Return the free memory of a device, in GiB."""
    cpu = torch.device(device).type == "cpu"
    free: int = psutil.virtual_memory().available if cpu else torch.cuda.mem_get_info(device)[0]
    return round(free / GIB, 2)


def _place_of(run: Path) -> Path:
    """Return the run folder, or its nearest parent that exists; raise ConfigError if it cannot be made."""
    place = run.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise no_run_folder(run, f"{place} is not a directory that can be written")
    return place
