"""The report of a run: complete, with files missing or broken, and safe to open."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import FILES, make_run, metrics, model_info, sensitivity
from plotly import graph_objects
from shown import Elements

from layerboost.errors import ConfigError
from layerboost.reporting.benchmark import accuracy_figure, decode_panel, throughput_figure
from layerboost.reporting.figures import healing_figure, sensitivity_figure
from layerboost.reporting.page import Chart
from layerboost.reporting.quality import position_figure, retrieval_figure, task_figure
from layerboost.reporting.sources import Sources
from layerboost.reporting.stage import run_report
from layerboost.reporting.verdict import summary_table
from layerboost.schemas.artifact import write_json

PANELS = {
    "layers": ["plan.yaml", "sensitivity.json"],
    "search": ["frontier.json", "stability.json"],
    "quality": ["eval/comparison.json"],
    "long-context": ["eval/comparison.json"],
    "healing": ["heal/metrics.jsonl"],
    "throughput": ["bench/comparison.json"],
    "decode": ["bench/decode_sweep.json"],
    "provenance": ["run.json", "recipe.yaml"],
}


def test_what_a_report_says(run: Path, golden: Callable[[str, str], None]) -> None:
    run_report(run)
    golden("report.md", (run / "report.md").read_text())
    text = Elements((run / "report.html").read_text()).text
    shown = {name: "\n".join(line.strip() for line in part.splitlines() if line.strip()) for name, part in text.items()}
    golden("report.txt", "".join(f"== {name}\n{part}\n" for name, part in shown.items() if name != "layers"))


def test_summary_holds_plain_numbers_and_its_table_the_same(run: Path) -> None:
    summary = run_report(run)
    assert summary["kv_fraction"] == pytest.approx((8 + 18 * 64 / 1024) / 30)
    ratio = summary["throughput_ratio"]
    assert (ratio.model, ratio.concurrency) == ("healed", 200)
    spread = ratio.spread
    assert spread.min < spread.median < spread.max
    assert summary["perplexity"] == {"base": 14.457, "converted": 18.912, "healed": 14.913}
    assert summary["tasks"]["piqa"]["healed"] == 0.668
    header, *rows = summary_table(summary)
    assert header == ["metric", "base", "converted", "healed"]
    assert [row[0] for row in rows][-2:] == ["arc_challenge", "average"]
    assert rows[0] == ["KV bytes", "100.0 %", "30.4 %", "30.4 %"]
    assert rows[1][3] == f"{spread.median:.2f} ({spread.min:.2f} to {spread.max:.2f} over 3 repeats)"
    assert {len(row) for row in rows} == {4}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_command_that_makes_it(run: Path, name: str) -> None:
    (run / name).unlink()
    summary = run_report(run)
    page = Elements((run / "report.html").read_text())
    panel = next(panel for panel, files in PANELS.items() if name in files)
    assert f"no {name}: run {FILES[name]}" in page.text[panel]
    assert f"no {name}: run `{FILES[name]}`" in (run / "report.md").read_text()
    if name in {"plan.yaml", "eval/comparison.json", "bench/comparison.json"}:
        assert "not measured" in page.text["top"]
    assert len(summary_table(summary)[0]) == 4


def test_an_empty_folder_gives_a_report_without_charts(tmp_path: Path) -> None:
    summary = run_report(tmp_path)
    assert summary["kv_fraction"] is summary["throughput_ratio"] is summary["average"] is None
    assert (tmp_path / "report.html").stat().st_size < 100_000
    assert summary_table(summary)[1] == ["KV bytes", "–", "–", "–"]


@pytest.mark.parametrize("name", [name for name in FILES if name != "heal/metrics.jsonl"])
def test_a_truncated_file_is_a_config_error(run: Path, name: str) -> None:
    text = (run / name).read_text()
    (run / name).write_text(text[: len(text) // 2] + "\n  [")
    with pytest.raises(ConfigError, match=re.escape(Path(name).name)):
        run_report(run)
    assert not (run / "report.html").exists()


def test_files_of_two_models_are_a_config_error(run: Path) -> None:
    write_json(run / "sensitivity.json", sensitivity(model_info().model_copy(update={"fingerprint": "0" * 16})))
    with pytest.raises(ConfigError, match="different models"):
        run_report(run)


def test_a_missing_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        run_report(tmp_path / "nothing")


def test_metrics_skip_a_cut_last_line_and_take_the_later_of_two(run: Path) -> None:
    file = run / "heal" / "metrics.jsonl"
    again = {**metrics()[-2], "loss": 7.5}
    file.write_text(file.read_text() + json.dumps(again) + '\n{"stage": "lora", "st')
    lines = Sources(run).metrics
    assert lines is not None
    assert len(lines) == len(metrics())
    assert [line.loss for line in lines if (line.stage, line.step) == ("lora", 400)] == [7.5, None]
    file.write_text('{"stage": "lora", "st\n' + json.dumps(again) + "\n")
    with pytest.raises(ConfigError, match="line 1"):
        run_report(run)


def test_a_diverged_healing_is_reported(run: Path) -> None:
    lines = [
        {**line, "loss": float("nan")} if line.get("step") == 400 and "loss" in line else line for line in metrics()
    ]
    (run / "heal" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_report(run)
    assert "not finite" in Elements((run / "report.html").read_text()).text["healing"]


def test_the_summary_tells_one_repeat_and_what_disturbed_it(run: Path) -> None:
    file = run / "bench" / "comparison.json"
    values = json.loads(file.read_text())
    values["measurements"] = [entry for entry in values["measurements"] if entry["repeat"] == 0]
    for entry in values["measurements"]:
        entry["metrics"] |= {"own_cores": 1.0, "other_cores": 0.9 * (entry["model"] == "base")}
    write_json(file, values)
    summary = run_report(run)
    shown = r"\d\.\d\d \(one repeat\); disturbed \(base: other processes used up to 0\.9 of 2 cores\)"
    assert re.fullmatch(shown, summary_table(summary)[2][3])
    text = Elements((run / "report.html").read_text()).text["throughput"]
    assert text.count("repeat), disturbed") == 6  # converted and healed, at each of three concurrencies


def test_the_page_loads_nothing_and_stays_small(run: Path) -> None:
    file = run_report(run)["report"]
    page = Elements(file.read_text())
    loads = [values[key] for _, values in page.tags for key in ("src", "href", "srcset", "data") if key in values]
    assert loads == []
    assert not re.search(
        r"@import|url\(",
        (Path(run_report.__code__.co_filename).parents[1] / "reporting/templates/page.css").read_text(),
    )
    assert any("default-src 'none'" in str(values.get("content")) for tag, values in page.tags if tag == "meta")
    assert file.stat().st_size < 6_000_000


def test_odd_names_are_escaped(tmp_path: Path) -> None:
    name = "</script><script>alert('x')</script>|<b>&"
    run = make_run(tmp_path / "run", name)
    file = run / "bench" / "comparison.json"
    file.write_text(file.read_text().replace('"healed"', '"<img src=x onerror=alert(1)>"'))
    run_report(run)
    page = Elements((run / "report.html").read_text())
    assert name in page.text["top"]
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not any(tag in {"img", "b"} and values for tag, values in page.tags)
    assert "<script" not in (run / "report.md").read_text().split("```yaml")[0]


def test_figures_are_valid_plotly(run: Path) -> None:
    sources = Sources(run)
    assert sources.sensitivity
    assert sources.metrics
    assert sources.bench
    chosen = sensitivity_figure(sources.sensitivity, sources.plan)
    assert sources.quality
    assert sources.quality.positions
    assert sources.quality.retrieval
    evaluated = [
        task_figure(sources.quality),
        position_figure(sources.quality.positions),
        retrieval_figure(sources.quality.retrieval),
    ]
    for figure in (*evaluated, chosen, healing_figure(sources.metrics), throughput_figure(sources.bench)):
        # Names of CSS variables stand for colours that plotly's validator wants to know.
        graph_objects.Figure(json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(figure))))
    rings = chosen["data"][-1]
    assert len(rings["x"]) == 22
    assert sum(trace["visible"] == "legendonly" for trace in chosen["data"][:-1]) == 4


def test_a_model_that_predicts_nothing_is_reported(tmp_path: Path) -> None:
    """A perplexity beyond what a float holds, as without a layer that a model cannot do without."""
    run = make_run(tmp_path / "run")
    file = run / "eval" / "comparison.json"
    quality = json.loads(file.read_text())
    for score in quality["positions"]["models"]["converted"]:
        score["mean"] = 900.0
    file.write_text(json.dumps(quality))
    run_report(run)
    assert "| 1.014e+304 |" in (run / "report.md").read_text()


def test_report_needs_neither_torch_nor_transformers(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from layerboost.reporting.stage import run_report; "
        f"run_report(Path({str(run)!r})); print(sorted({{'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_accuracy_stands_against_throughput_where_both_are_known(run: Path) -> None:
    sources = Sources(run)
    assert sources.bench
    assert sources.quality
    figure = accuracy_figure(sources.bench, sources.quality)
    assert figure
    base, converted, healed = figure["data"]
    assert base["text"] == ["50", "100", "200"]
    assert base["y"] == [pytest.approx(50.7)] * 3
    assert "error_y" not in base
    assert healed["x"] == [result.models["healed"]["output_tokens_per_s"].median for result in sources.bench.results]
    # The bars are the paired interval, laid upon the model's own value.
    assert sources.quality.average
    lost = sources.quality.average.difference["converted"]
    assert converted["error_y"]["array"][0] == pytest.approx(100 * (lost.high - lost.mean))


def test_decoding_draws_the_memory_that_the_model_needs(run: Path) -> None:
    def charts() -> list[Chart]:
        return decode_panel(Sources(run)).charts

    latency, memory = charts()
    assert latency.figure["data"][0]["x"] == [256, 512, 1024, 2048]
    assert latency.figure["data"][1]["y"][-1] == pytest.approx(2.048 * (40 + 0.012 * 2048), rel=0.02)
    assert memory.figure["layout"]["yaxis"]["title"]["text"] == "KV cache in use, GiB"
    assert memory.figure["data"][0]["y"] == pytest.approx([0.175, 0.35, 0.7, 1.4])
    file = run / "bench" / "decode_sweep.json"
    file.write_text(file.read_text().replace("kv_used_gib", "other"))
    assert charts()[1].figure["layout"]["yaxis"]["title"]["text"] == "peak RSS, GiB"
