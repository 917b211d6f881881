"""llama.cpp as an engine: the package xllamacpp serves tiny models, stock and boosted."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from processes import free_port
from tiny import (
    WINDOW,
    boosted,
    byte_level_tokenizer,
    edit_json,
    layer_plans,
    plan_file,
    save_checkpoint,
    save_tiny,
    tiny_model,
)

from layerboost.engines import open_engine
from layerboost.engines.llama_cpp import (
    CELLS,
    WHOLE_CONTEXT,
    RunningLlama,
    check,
    environment,
    kv_bytes,
    launch,
    serve_command,
    serving_flags,
)
from layerboost.engines.protocol import Load
from layerboost.engines.server import Server
from layerboost.engines.xllamacpp_server import parameters
from layerboost.errors import ConfigError, LayerboostError
from layerboost.exporting.gguf_file import source_of
from layerboost.exporting.stage import _source, gguf_file
from layerboost.recipe import Bench, Recipe
from layerboost.runtime import GIB
from layerboost.schemas.benchmark import FROM_VLLM, metrics_of

LETTERS = "fSsf"
PLAN = plan_file(LETTERS)
LOAD = Load(concurrency=2, requests=3, shared_prefix_tokens=0, input_tokens=300, output_tokens=6, seed=1)

pytest.importorskip("xllamacpp", reason="pip install xllamacpp")


def recipe(**bench: Any) -> Recipe:
    settings = {"engine": "llama.cpp", "port": free_port(), "concurrency": [2], "input_tokens": 300, "output_tokens": 6}
    return Recipe.model_validate({"bench": settings | bench})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("models"), byte_level_tokenizer()
    base = root / "base"
    tiny_model("llama", len(LETTERS), vocab_size=257).save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_checkpoint(root / "healed", boosted(LETTERS, vocab_size=257), PLAN, tokenizer)
    return {"base": base, "healed": root / "healed"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["base", "healed"])
def test_a_load_is_answered_and_the_cache_is_as_computed(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(server_args=serving_flags(PLAN, ()), gguf_type="f32")
    done: list[float] = []
    file = tmp_path / "bench" / "logs" / f"{name}.log"
    with launch(name, models[name], asked, file) as running:
        answer = running.answer(LOAD, done.append)
    assert answer.raw["completed"] == 3
    assert answer.raw["total_output_tokens"] == sum(done) == 18
    assert set(metrics_of(answer.raw)) == set(FROM_VLLM)
    assert answer.metrics["peak_rss_gib"] > 0
    plan = PLAN if name == "healed" else PLAN.model_copy(update={"layers": layer_plans("ffff")})
    expected = kv_bytes(plan, context_tokens=2 * CELLS, slots=2, ubatch_tokens=CELLS - WINDOW)
    assert answer.metrics["kv_used_gib"] * GIB == pytest.approx(expected, rel=0.02)
    caches = re.findall(r"llama_kv_cache: size = .*\( *(\d+) cells, +(\d+) layers", file.read_text())
    sliding = sum(entry.window is not None for entry in plan.layers)
    assert caches == [(str(2 * CELLS), str(len(LETTERS) - sliding))] + [(str(CELLS), str(sliding))] * bool(sliding)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["base", "healed"])
def test_slots_share_a_prefix_that_is_read_once(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(shared_prefix_tokens=200, input_tokens=20, server_args=serving_flags(PLAN, ()))
    load = replace(LOAD, requests=2, shared_prefix_tokens=200, input_tokens=20)
    with launch(name, models[name], asked, tmp_path / "bench" / "logs" / f"{name}.log") as running:
        answer = running.answer(load, lambda _: None)
    assert answer.raw["total_output_tokens"] == 12
    # A sliding layer's last tokens before the end of what was saved are read again.
    assert 0.85 < answer.metrics["prefix_hit_share"] <= 200 / 220
    assert environment(asked)["slot_tokens"] == CELLS


@pytest.mark.multiprocess
def test_tokens_within_a_character_are_counted(tmp_path: Path) -> None:
    model, token = tiny_model("llama", 1, vocab_size=257), 256
    with torch.no_grad():  # the model always says this token
        for name, weights in model.named_parameters():
            weights.fill_(float("norm" in name))
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.get_output_embeddings().weight[token, 0] = 1.0
    model.save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace('"t256"', '"â"'))  # the first byte of three
    with launch(
        "base", tmp_path / "base", recipe(gguf_type="f32"), tmp_path / "bench" / "logs" / "base.log"
    ) as running:
        answer = running.answer(LOAD, lambda _: None)
    assert answer.raw["total_output_tokens"] == 18


@pytest.mark.multiprocess
def test_a_server_that_dies_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(server_args=("--cache-type-k", "q4_0", "--ctx-size", "-7"))
    with (
        pytest.raises(LayerboostError, match=r"llama\.cpp died while serving base|request to llama\.cpp failed"),
        launch("base", models["base"], asked, tmp_path / "bench" / "logs" / "base.log"),
    ):
        pass


class CutOff(BaseHTTPRequestHandler):
    """Begins answers and does not end them."""

    def do_POST(self) -> None:
        self.wfile.write(b"HT\r\n")

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"llamacpp:")

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_dies_in_the_middle_of_an_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("Segmentation fault")
    with HTTPServer(("127.0.0.1", 0), CutOff) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        dead = subprocess.Popen(["true"])
        url = f"http://127.0.0.1:{listening.server_port}"
        server = Server("llama.cpp", "it", tmp_path, url, tmp_path / "server.log", dead)
        dead.wait()
        for ask in (lambda: RunningLlama(server, 257).answer(LOAD, lambda _: None), server.metrics):
            with pytest.raises(LayerboostError, match=r"llama.cpp died while serving it\nfound: Segmentation fault"):
                ask()
        listening.shutdown()


def test_the_batch_fills_the_cells_of_the_window() -> None:
    window = PLAN.window
    assert window == WINDOW
    assert serving_flags(PLAN, ()) == ("--ubatch-size", str(CELLS - WINDOW))
    assert serving_flags(PLAN, ("-ub", "64")) == ()
    long = PLAN.model_copy(update={"layers": layer_plans("fSsf", window=250)})
    assert serving_flags(long, ()) == ("--ubatch-size", str(2 * CELLS - 250)), "not a batch of 6 tokens"
    all_full = PLAN.model_copy(update={"layers": layer_plans("ffff")})
    assert serving_flags(all_full, ()) == ()


def test_a_directory_is_exported_and_served(models: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    argv, _ = serve_command(models["healed"], port, ("--ctx-size", "512"))
    file = models["healed"].with_name("healed-f16.gguf")
    assert file.is_file()
    made = file.stat().st_mtime_ns
    assert argv[-10:] == [
        *("--model", str(file), "--ubatch-size", str(CELLS - WINDOW), "--parallel", "1"),
        *("--port", str(port), "--ctx-size", "512"),
    ]
    assert "--parallel" not in serve_command(file, port, ("-np", "4"))[0]
    assert serve_command(file, port, ("--ctx-size", "512"))[0] == argv
    assert file.stat().st_mtime_ns == made
    assert not caplog.records
    serve_command(file, port, ("--swa-full",))
    assert [record.message for record in caplog.records] == [f"--swa-full: {WHOLE_CONTEXT}"]


def test_a_window_that_drops_nothing_needs_no_flags(tmp_path: Path) -> None:
    """llama.cpp's `granite_swa` wants a layer that slides, also in an unchanged SmolLM3."""
    tiny_model("smollm3", 2, vocab_size=257).save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    argv, _ = serve_command(tmp_path / "base", free_port(), ("--swa-full",))
    assert not {"--ubatch-size", "--parallel"} & set(argv)


def test_a_stock_base_has_llamas_own_architecture(models: dict[str, Path]) -> None:
    argv, _ = serve_command(models["base"], free_port(), ())
    assert "--ubatch-size" not in argv
    assert b"general.architecture" in (content := models["base"].with_name("base-f16.gguf").read_bytes())[:200]
    assert b"granite_swa" not in content[:400]


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        ({"server_args": ["-np", "4"]}, "bench.server_args may not have -np"),
        ({"server_args": ["--port=9"]}, "bench.server_args may not have --port"),
        ({"server_args": ["--swa-full"]}, "may not have --swa-full\nfound: llama.cpp then holds the whole context"),
        ({"server_args": ["--max-num-batched-tokens", "256"]}, "xllamacpp's server would refuse its arguments"),
    ],
)
def test_what_a_benchmark_cannot_use_is_refused(bench: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(recipe(**bench).bench, ())


def test_the_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)

    monkeypatch.setattr("layerboost.engines.llama_cpp.shutil.which", lambda _: None)
    monkeypatch.setattr("layerboost.engines.llama_cpp.importlib.metadata.version", missing)
    with pytest.raises(ConfigError, match=r"llama\.cpp is not installed"):
        check(Bench(), ())


@pytest.mark.parametrize("kept", [0, 3, 40, 200])
def test_a_file_that_is_no_model_is_refused(kept: int, models: dict[str, Path], tmp_path: Path) -> None:
    gguf_file(models["base"], tmp_path / "whole.gguf", "f16")
    (tmp_path / "x.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:kept])
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        serve_command(tmp_path / "x.gguf", free_port(), ())


def test_another_model_of_a_name_is_exported_again(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older files, too; a file of the name that export did not write is left alone."""
    out = tmp_path / "model-f16.gguf"
    gguf_file(models["base"], out, "f16")
    first = out.read_bytes()
    gguf_file(models["base"], out, "f16")
    assert out.read_bytes() == first
    gguf_file(models["healed"], out, "f16")
    assert out.read_bytes() != first
    copy = shutil.copytree(models["healed"], tmp_path / "copy")
    gguf_file(copy, out, "f16")
    edit_json(copy / "tokenizer_config.json", chat_template="{{ messages }}")
    gguf_file(copy, out, "f16")
    assert b"{{ messages }}" in out.read_bytes()
    with monkeypatch.context() as release:
        release.setattr("layerboost.exporting.stage.__file__", __file__)
        gguf_file(copy, out, "f16")
    assert source_of(out) != (written := _source(copy))
    gguf_file(copy, out, "f16")
    assert source_of(out) == written
    foreign = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.close()
    with pytest.raises(ConfigError, match="exists already"):
        gguf_file(models["base"], tmp_path / "other.gguf", "f16")


def test_what_cannot_be_exported_is_refused_before_a_server_starts(models: dict[str, Path], tmp_path: Path) -> None:
    phi = save_tiny(tmp_path / "phi", "phi")
    with pytest.raises(
        ConfigError, match=r"gguf cannot hold this plan\nfound: .*family phi[\s\S]*bench.engine=transformers"
    ):
        check(recipe().bench, [phi])
    with pytest.raises(ConfigError, match="no GGUF type is called q9"):
        check(recipe(gguf_type="q9").bench, [models["base"]])
    assert "xllamacpp" in check(recipe().bench, models.values())


def test_slots_are_part_of_what_results_depend_on() -> None:
    one, eight = (environment(recipe(concurrency=[count])) for count in (1, 8))
    assert (one["slots"], eight["slots"]) == (1, 8)
    assert one["slot_tokens"] == 2 * CELLS


def test_flags_become_parameters() -> None:
    found = parameters(["-m", "x.gguf", "-c", "1024", "-np", "2", "-ub", "64", "-t", "1", "-ctk", "f32", "-fa", "off"])
    assert (found.model.path, found.n_ctx, found.n_parallel, found.n_ubatch) == ("x.gguf", 1024, 2, 64)
    assert (found.cpuparams.n_threads, found.port, found.hostnames) == (1, 8080, ["127.0.0.1"])


@pytest.mark.parametrize(
    ("there", "expected"), [({"vllm", "xllamacpp"}, "vllm"), ({"xllamacpp"}, "llama.cpp"), (set(), "transformers")]
)
def test_auto_is_the_first_that_is_installed(there: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.engines.shutil.which", lambda _: None)
    monkeypatch.setattr("layerboost.engines.importlib.util.find_spec", lambda name: name if name in there else None)
    assert expected == open_engine("auto").NAME


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="no engine is called tgi"):
        open_engine("tgi")
