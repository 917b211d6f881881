from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import layer_plans, plan_file, save_tiny

from layerboost.engines.server import check_port
from layerboost.engines.vllm import (
    NO_INTERVAL,
    NUMBERS,
    OTHERS,
    RESERVED,
    bench_command,
    check,
    check_vllm,
    flags_given,
    serve_command,
    unless_given,
    vllm_environment,
)
from layerboost.errors import ConfigError
from layerboost.exporting.stage import run_export
from layerboost.model.card import CARD
from layerboost.model.retention import prefix_flag
from layerboost.recipe import Bench
from layerboost.runtime import cores
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN


def test_missing_vllm_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python itself writes down for a module that is not there
    with pytest.raises(ConfigError, match=r"\.\[serve-cpu\]"):
        check_vllm()


@pytest.mark.parametrize(
    ("module", "found"),
    [(None, "imported, not installed"), ("layerboost.serving.plugin", "another version of layerboost is installed")],
)
def test_a_plugin_that_vllm_cannot_load_is_named(
    module: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = "vllm.general_plugins"
    points = [importlib.metadata.EntryPoint("layerboost", f"{module}:register", group)] if module else []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: points)
    monkeypatch.setattr("layerboost.engines.vllm.vllm_version", lambda: "0.32.0")
    with pytest.raises(ConfigError, match="cannot see layerboost's plugin") as raised:
        check_vllm()
    assert found in raised.value.found


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_command_that_serves(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    folder = save_tiny(tmp_path / "model", "llama", "nf")
    argv, environment = serve_command(folder, free_port, ("--dtype", "bfloat16"))
    assert Path(argv[0]).parent == Path(sys.executable).parent
    assert argv[1:5] == ["serve", str(folder), "--port", str(free_port)]
    assert argv.count("--dtype") == 1
    assert environment["HF_HUB_OFFLINE"] == "1"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # The port that vLLM will take is looked at, and no other.
        with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
            serve_command(folder, free_port, ("--port", str(port)))
        argv, _ = serve_command(folder, port, (f"--port={free_port}",))
        assert [part for part in argv if part.startswith("--port")] == [f"--port={free_port}"]
        assert str(port) not in argv
    if hasattr(os, "sched_getaffinity") and "VLLM_CPU_OMP_THREADS_BIND" in environment:
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))


def test_linear_attention_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.check_vllm", lambda: "0.32.0")
    folder = save_tiny(tmp_path / "model", "llama", "fl")
    write_plan(folder / PLAN, plan_file("fl"))
    for refused in (lambda: serve_command(folder, 1, ()), lambda: check(Bench(), [folder])):
        with pytest.raises(ConfigError, match="vLLM has no linear attention") as raised:
            refused()
        assert raised.value.found == "layers 1 of the plan"


def test_a_stock_base_that_vllm_lacks_a_router_for_on_cpus_is_refused(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.check_vllm", lambda: "0.32.0")
    stock, boosted = save_tiny(tmp_path / "stock", "minimax_m2"), save_tiny(tmp_path / "boosted", "minimax_m2", "ffnf")
    for on_cpu in (True, False):
        monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda on_cpu=on_cpu: on_cpu)
        check(Bench(), [boosted])
        for serve in (lambda: check(Bench(), [stock]), lambda: serve_command(stock, free_port, ())):
            if on_cpu:
                with pytest.raises(ConfigError, match=r"on a CPU, only boosted\nfound: family minimax_m2: .*sigmoid"):
                    serve()
            else:
                serve()


def test_vllm_environment_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda: True)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    added = vllm_environment()
    assert added["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cores()))
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in added, "what the user sets stays"
    assert "VLLM_PLUGINS" not in added
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    assert vllm_environment()["VLLM_PLUGINS"] == "mine,layerboost", "vLLM loads no others"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert int(vllm_environment()["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ((), 1),
        (("--tensor-parallel-size", "2"), 2),
        (("--tensor_parallel_size=2",), 2),
        (("-tp", "2"), 2),
        (("-pp=2", "-dp", "1"), 2),
        (("--data-parallel-size", "1", "--data-parallel-size", "2"), 2),
        (("-tp", "4", "-dp", "4", "--data-parallel-size-local", "1"), 4),
        (("-tp", "2", "-pp", "4", "--nnodes", "4", "--node-rank", "3"), 2),
    ],
)
def test_each_process_has_cores_of_its_own(
    flags: tuple[str, ...], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda: True)
    monkeypatch.setattr("layerboost.engines.vllm.cores", lambda: [2, 3, 4, 5, 6, 7, 8, 9])
    # As Intel numbers threads: the second ones of all cores after the first.
    monkeypatch.setattr("layerboost.engines.vllm._place", lambda core: (0, core % 4))
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    bound = [part.split(",") for part in vllm_environment(flags)["VLLM_CPU_OMP_THREADS_BIND"].split("|")]
    assert len(bound) == processes
    assert sorted(int(core) for part in bound for core in part) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [sorted({int(core) % 4 for core in part}) for part in bound] == {
        1: [[0, 1, 2, 3]],
        2: [[0, 1], [2, 3]],
        4: [[0], [1], [2], [3]],
    }[processes]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("flags", "eager"),
    [((), True), (("-pp", "2"), False), (("-O2",), False), (("--no_enforce_eager",), False), (("-cc.mode=3",), False)],
)
def test_models_run_uncompiled_on_a_cpu_unless_asked(
    flags: tuple[str, ...], eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda: True)
    monkeypatch.setattr("layerboost.engines.vllm.cores", lambda: [0, 1])
    argv, _ = bench_command(tmp_path, Bench(server_args=list(flags), concurrency=[2]))
    assert ("--enforce-eager" in argv) == eager


def test_more_processes_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda: True)
    monkeypatch.setattr("layerboost.engines.vllm.cores", lambda: [0, 1])
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    flags = ("-tp", "2", "-pp", "2")
    with pytest.raises(ConfigError, match="4 processes of vLLM need a core each") as raised:
        vllm_environment(flags)
    assert raised.value.found == "2 cores"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment(flags), "what the user sets stays"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_as_many_requests_decode_as_are_concurrent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def flags(**changes: Any) -> dict[str, str]:
        argv = bench_command(tmp_path, Bench(**{"kv_cache_gib": 0.5, **changes}))[0]
        return dict(pairwise(argv))

    assert flags()["--max-num-seqs"] == "200"
    assert "--max-num-seqs" not in flags(concurrency=[64])
    assert "--no-enable-prefix-caching" in flags()
    assert "--no-enable-prefix-caching" not in flags(shared_prefix_tokens=64)
    few = flags(server_args=["--max-num-batched-tokens", "160"])
    assert few["--max-num-seqs"] == "160"
    assert "at most 160 of 200 requests decode at once" in caplog.text
    assert flags(server_args=["--max_num_batched_tokens=160"])["--max-num-seqs"] == "160"
    assert flags(concurrency=[4096])["--max-num-seqs"] == "2048"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("letters", "interval"), [("fsf", "1024"), ("Sss", "None"), ("fnf", "1024"), ("fff", None)])
def test_a_stock_export_keeps_windows_in_the_prefix_cache(
    letters: str, interval: str | None, tmp_path: Path, free_port: int
) -> None:
    """As the plugin does for a boosted checkpoint: a layer without attention slides in this form."""
    save_tiny(tmp_path / "boosted", "llama", letters)
    write_plan(tmp_path / "boosted" / PLAN, plan_file(letters))
    run_export(tmp_path / "boosted", "granite-swa", tmp_path / "stock")
    flag = "--prefix-cache-retention-interval"

    def given(folder: str, *flags: str) -> dict[str, str]:
        return dict(pairwise(serve_command(tmp_path / folder, free_port, flags)[0]))

    assert given("stock").get(flag) == interval
    assert (f"{flag} {interval}" in (tmp_path / "stock" / CARD).read_text()) == (interval is not None)
    assert flag not in given("boosted") | given("stock", "--disable-sliding-window") | given(
        "stock", "--block-size", "48"
    )
    assert given("stock", flag, "2048")[flag] == "2048"
    for shared, expected in ((0, None), (64, interval)):
        argv = bench_command(tmp_path / "stock", Bench(shared_prefix_tokens=shared, kv_cache_gib=0.5))[0]
        assert dict(pairwise(argv)).get(flag) == expected


def test_given_flags_override_advised_ones() -> None:
    advised = {"--max-num-batched-tokens": "256", "--block-size": "32"}
    assert unless_given((), advised) == ("--max-num-batched-tokens", "256", "--block-size", "32")
    assert unless_given(("--block_size=16", "-O0"), advised) == ("--max-num-batched-tokens", "256")
    assert unless_given(("--block=16", "--max-num-b", "8k"), advised) == ()  # vLLM takes abbreviations


def test_numbers_are_read_as_vllm_reads_them() -> None:
    given = ("--max-num-batched-tokens", "8k", "--max_num_seqs=2K", "--kv-cache-memory-bytes", "0.5g", "--seed", "1")
    assert flags_given(given) == {
        "max_num_batched_tokens": 8000,
        "max_num_seqs": 2048,
        "kv_cache_memory_bytes": 5 * 10**8,
    }
    with pytest.raises(ConfigError, match="vLLM would refuse its arguments") as raised:
        flags_given(("--port", "http"))
    assert "--port" in raised.value.found


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--served-model-name", "tiny"),
        ("--served_model_name=tiny",),
        ("--served-model", "tiny"),  # vLLM takes abbreviations
        ("--enforce-eager", "--port", "8739"),
        ("--host=0.0.0.0",),
        ("--uds", "/tmp/socket"),
        ("--api-key", "secret"),
        ("--ssl-keyfile", "key.pem"),
        ("--config", "vllm.yaml"),
        ("--disable-log-stats",),
        ("--enable-prefix-caching",),
    ],
)
def test_arguments_that_hide_the_server_from_its_benchmark_are_refused(
    arguments: tuple[str, ...], free_port: int
) -> None:
    with pytest.raises(ConfigError, match=r"bench\.server_args may not have --"):
        check(Bench(server_args=arguments, port=free_port), [])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_similar_arguments_are_accepted(free_port: int) -> None:
    given = "--api-server-count 1 --config-format hf --model-impl auto --tokenizer-mode auto -O0"
    check(Bench(server_args=given.split(), port=free_port), [Path("a {b} %s é\n")])


@pytest.mark.parametrize("port", [70_000, -1])
def test_an_invalid_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
        check_port(port)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", ["run[1]", "what?", "a*b"])
def test_a_path_that_vllm_takes_for_a_pattern_is_refused(name: str, tmp_path: Path, free_port: int) -> None:
    folder = save_tiny(tmp_path / name)
    with pytest.raises(ConfigError, match="vLLM cannot read a model from"):
        serve_command(folder, free_port, ())
    with pytest.raises(ConfigError, match="vLLM cannot read a model from"):
        check(Bench(port=free_port), [tmp_path, folder])
    (tmp_path / "plain").symlink_to(folder)
    assert serve_command(tmp_path / "plain", free_port, ())[0][2] == str(tmp_path / "plain")


def test_gpus_that_are_hidden_from_a_build_for_them_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.engines.vllm.vllm_version", lambda: "0.32.0")
    monkeypatch.setattr("layerboost.engines.vllm._is_cpu_build", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no GPU is visible"):
        check_vllm()
    monkeypatch.setattr("layerboost.engines.vllm._is_cpu_build", lambda: True)
    check_vllm()


OPTIONS = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
print("options", *make_arg_parser(FlexibleArgumentParser())._option_string_actions)
"""


@pytest.mark.server
@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_flag_that_we_read_is_one_of_vllms() -> None:
    ended = subprocess.run([sys.executable, "-c", OPTIONS], check=True, capture_output=True, text=True)
    line = next(line for line in ended.stdout.splitlines() if line.startswith("options "))
    ours = {
        name
        for names in (*NUMBERS, *OTHERS, *RESERVED, *NO_INTERVAL, "--prefix-cache-retention-interval")
        for name in names.split()
    } - {"-O"}
    assert ours | {"--enforce-eager", "--no-enforce-eager", "--no-enable-prefix-caching"} <= {*line.split()}


def test_the_prefix_flag_of_an_export_whose_base_slides() -> None:
    """All its layers slide, those that the plan leaves as they are, too: then vLLM keeps everything."""
    layers = layer_plans("fsf")
    for kinds, interval in (
        (["sliding_attention"] * 3, "None"),
        (["full_attention", "sliding_attention"] * 2, "16384"),
    ):
        config = {"layer_types": kinds[:3], "sliding_window": 4096}
        assert prefix_flag(config, layers) == {"--prefix-cache-retention-interval": interval}
