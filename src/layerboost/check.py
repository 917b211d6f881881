"""check: find what would fail in a run, before hours of compute, and estimate healing's time and memory."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig

from layerboost import converting as convert
from layerboost.benching import stage as bench
from layerboost.engines import open_engine
from layerboost.errors import LayerboostError
from layerboost.evaluating import stage as evaluate
from layerboost.files import check_path
from layerboost.healing import stage as heal
from layerboost.healing.data import STRETCH_TOKENS, lengths_of
from layerboost.healing.least_squares import MOST_BYTES, sums_bytes
from layerboost.healing.losses import CHUNK_ELEMENTS
from layerboost.healing.student import adapted_layers
from layerboost.healing.training import less_memory
from layerboost.measuring import stage as measure
from layerboost.model.base import find_base
from layerboost.model.linear import linear
from layerboost.model.modeling import auto_class
from layerboost.model.surgery import packed_parameters
from layerboost.planning import stage as plan
from layerboost.recipe import Recipe, model_of
from layerboost.run_folder import no_run_folder
from layerboost.runtime import GIB, Runtime, start_runtime, world_size
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, read_plan
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


# Fraction of the matrix product's speed; softmax, norms and LoRA's thin products take the rest.
EFFICIENCY = 0.7
LOGIT_COPIES = 6


@dataclass(frozen=True)
class HealingEstimate:
    """The estimate for all stages together; memory is that of one process on its device."""

    tokens_per_s: float
    hours: float
    memory_gib: float


def estimate_healing(
    recipe: Recipe, config: PreTrainedConfig, info: ModelInfo, runtime: Runtime, plan: list[LayerPlan] | None
) -> HealingEstimate:
    """Return an estimate from the model's sizes and the measured speed of this machine's matrix product.

    `config`: of the whole model, of a wrapper too. `plan`: base and student share the layers below its first changed
    one; without a plan, none, and no layer is taken to be without attention.
    """
    whole_config, config = config, config.get_text_config()
    layers = info.layers
    first = next((entry.layer for entry in plan or [] if entry.changed), 0)
    changed = layers - first
    head = info.hidden_size * config.vocab_size
    embeddings = head * (1 if info.tied_head else 2)
    whole, body = info.parameters - embeddings, info.active_parameters - embeddings
    passes = {"none": 2, "selective": 2, "full": 3}[recipe.heal.activation_checkpointing]
    lora_flops = 2 * (body * (1 + passes * changed / layers) + 3 * head)
    attention_flops = 2 * body * (1 + recipe.heal.attention_repeats * changed / layers)
    rate = matmul_flops_per_s(runtime, info.hidden_size) * EFFICIENCY * world_size()
    flops = recipe.heal.tokens * lora_flops + recipe.heal.attention_tokens * attention_flops
    seconds = (flops + recipe.heal.fit_tokens * 2 * body) / rate  # the fit costs about one pass of the base
    lengths, processes = lengths_of(recipe), world_size()
    batch_tokens = max((1 if recipe.heal.traffic else recipe.heal.batch_sequences) * lengths[0], *lengths)
    held = changed * activation_elements(config, info, body, recipe) * batch_tokens * info.bytes_per_element
    logits = LOGIT_COPIES * min(CHUNK_ELEMENTS, batch_tokens * config.vocab_size) * 4
    step_tokens = recipe.heal.batch_sequences * recipe.heal.gradient_accumulation * lengths[0]
    stretch_tokens = max(max(STRETCH_TOKENS, step_tokens) / processes, *lengths)
    cached_tokens = stretch_tokens if recipe.heal.attention_repeats > 1 else 0
    cached = 2 * changed * cached_tokens * info.hidden_size * info.bytes_per_element
    sums = changed * sums_bytes(info.hidden_size, info.heads * info.head_dim) if recipe.heal.fit_tokens else 0
    held += copied_experts(whole_config, recipe, plan or []) * info.bytes_per_element if info.expert_parameters else 0
    most = max(held + logits, cached, min(sums, MOST_BYTES))
    weights = float(info.parameters)
    if recipe.heal.shard and runtime.device.type == "cuda":
        # Without torchrun, as in `check`, assume that a sharded run uses every GPU of the machine. Embeddings, head
        # and three layers are not sharded (docs/guide/gpus.md).
        weights /= world_size() if world_size() > 1 else torch.cuda.device_count()
        weights += embeddings + 3 * whole / layers
    weights *= info.bytes_per_element
    return HealingEstimate(
        tokens_per_s=round(rate / lora_flops, 1),
        hours=round(seconds / 3600, 2),
        memory_gib=round((weights + most) / GIB, 2),
    )


def activation_elements(config: PreTrainedConfig, info: ModelInfo, body: int, recipe: Recipe) -> int:
    """Return the number of elements that a layer saves per token for the backward pass.

    `body`: the parameters of all layers that a token uses.
    """
    hidden = config.hidden_size
    if info.expert_parameters:  # three matrices for each of a token's experts
        inner = (body / info.layers - info.attention_parameters) / (3 * hidden)
    else:
        inner = config.intermediate_size
    query, keys = info.heads * info.head_dim, 2 * info.kv_heads * info.head_dim
    products = 2 * hidden + query + keys + 2 * inner
    # Norms, rotary embeddings, the activation and its product, adapters, and the windows' scores.
    others = 8 * hidden + 2 * inner + 6 * max(recipe.measure.windows) * config.num_attention_heads
    saved = {"full": hidden, "selective": hidden + products, "none": hidden + products + others}
    return int(saved[recipe.heal.activation_checkpointing])


def copied_experts(config: PreTrainedConfig, recipe: Recipe, plan: list[LayerPlan]) -> int:
    """Return the number of elements in the copies of experts' weights that exist at once: peft adds the adapters of a
    layer's experts to a copy of their weights, and the backward pass makes a gradient of it.

    All layers have a copy at once, but only one in stage 2 with checkpointing. In stage 1 the experts' input has no
    gradient, so of their three matrices only the last one's copy stays.
    """
    heal = recipe.heal
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    tokens, most = {"attention": heal.attention_tokens, "lora": heal.tokens}, 0
    for stage, names in adapted_layers(model, plan, heal.lora_targets).items():
        adapted = [model.get_submodule(name) for name in names]
        sizes = [sum(each.get_parameter(name).numel() for name in packed_parameters(each)) for each in adapted]
        if tokens[stage] and sizes:
            kept = sum(sizes) if heal.activation_checkpointing == "none" else max(sizes)
            most = max(most, max(sizes) + (kept if stage == "lora" else sum(sizes) // 3))
    return most


def matmul_flops_per_s(runtime: Runtime, size: int) -> float:
    """Return the floating-point operations per second of a matrix product of width `size`, best of five."""
    left = torch.ones(1024, size, device=runtime.device, dtype=runtime.dtype)
    right = torch.ones(1024, size, device=runtime.device, dtype=runtime.dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        linear(left, right)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * left.numel() * 1024 / best
