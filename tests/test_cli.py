"""The command line: help, bad input, exit codes, interruption."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import command
from test_pipeline import layerboost, refused, sets, write_recipe
from tiny import save_text, save_tiny

from layerboost.cli import cli
from layerboost.run_folder import locked
from layerboost.tables import show


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run that got as far as converted/."""
    folder = tmp_path_factory.mktemp("measured")
    recipe = write_recipe(folder, save_tiny(folder / "model"))
    for stage in ("measure", "plan", "convert"):
        layerboost(stage, "--config", recipe, "--run", folder / "run")
    return folder


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(measured / "run", tmp_path / "run")


def test_help_imports_nothing_that_takes_long() -> None:
    heavy = {"torch", "transformers", "datasets", "lm_eval", "numpy", "pandas", "scipy", "plotly", "vllm"}
    script = "import sys; from layerboost.cli import cli\n" \
        "try: cli(['--help'])\nexcept SystemExit: pass\n" \
        f"print(sorted({heavy} & set(sys.modules)))"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", cli.commands)
def test_every_help_ends_with_two_examples(name: str) -> None:
    text = layerboost(name, "--help").stdout
    examples = text.split("Examples:\n")[1].strip().splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith("layerboost " + name) for line in examples)


def test_brackets_in_a_path_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show(None, False, lambda _: [["runs/[/x]"], ["runs/[v1]/converted"]])
    assert re.search(r"runs/\[/x\][\s\S]*runs/\[v1\]/converted", capsys.readouterr().out)


def test_ls() -> None:
    families = json.loads(layerboost("ls", "families", "--json").stdout)
    assert families["llama"] == {"vllm": "Llama classes", "lacks": ""}
    assert families["lfm2"]["vllm"] is None
    assert families["gemma3 (gemma3_text)"]["lacks"].startswith("vLLM's attention on CPUs does not")
    assert all(row["vllm"] or row["lacks"] for row in families.values())
    others = json.loads(layerboost("ls", "unsupported", "--json").stdout)
    assert others["deepseek_v3"] == "multi-head latent attention"
    assert not others.keys() & families.keys()
    assert {"demo", "qwen3-4b", "smollm2-135m"} <= set(json.loads(layerboost("ls", "recipes", "--json").stdout))
    found = json.loads(layerboost("ls", "settings", "--json").stdout)
    assert found["heal.lr"] == {"default": "0.001", "meaning": "peak learning rate of stage 2"}


BAD = {
    "unknown command": (["mesure"], "No such command"),
    "unknown model": (["measure", "nobody/nothing", "--set", "text.source=TEXT"], "neither a directory"),
    "no model": (["measure"], "no model given"),
    "unknown key": (["measure", "MODEL", "--set", "measure.window=[8]"], "did you mean measure.windows"),
    "a value that is not YAML": (["measure", "MODEL", "--set", "measure.windows=[64"], "not YAML"),
    "no windows": (["measure", "MODEL", "--set", "measure.windows=[]"], "measure.windows"),
    "no requests": (["bench", "MODEL", "--set", "bench.concurrency=[0]"], "bench.concurrency"),
    "too few samples": (["measure", "MODEL"], "samples are too few"),
    "window of zero": (["measure", "MODEL", "--set", "measure.windows=[0]"], "window of 0"),
    "window too long": (["measure", "MODEL", "--set", "measure.windows=[512]"], "cannot be measured"),
    "short text": (["measure", "MODEL", *sets("text.source=TEXT", "measure.tokens=9999999")], "too short"),
    "no sensitivities": (["plan"], "layerboost measure"),
    "no plan": (["convert", "MODEL"], "layerboost plan"),
    "no checkpoint": (["heal", "MODEL"], "does not exist"),
    "serve nothing": (["serve", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(name: str, tmp_path: Path) -> None:
    arguments, message = BAD[name]
    known = {
        "MODEL": save_tiny(tmp_path / "model"),
        "text.source=TEXT": f"text.source={save_text(tmp_path / 't.jsonl')}",
    }
    words = [str(known.get(word, word)) for word in arguments]
    if arguments[0] not in {"serve", "mesure"}:
        words += ["--run", str(tmp_path / "run")]
    found = layerboost(*words, check=False)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""
    assert {file.name for file in (tmp_path / "run").glob("*")} <= {"run.json", ".lock"}


@pytest.mark.pipeline
def test_frontier_and_comparison(run: Path, measured: Path, tmp_path: Path) -> None:
    before = (run / "plan.yaml").read_text()
    points = json.loads(layerboost("plan", "--run", run, "--frontier", "--json").stdout)["points"]
    assert points == json.loads((run / "frontier.json").read_text())["points"]
    assert len(points) > 2
    assert (run / "plan.yaml").read_text() == before
    assert "…" not in layerboost("plan", "--run", run, "--frontier").stdout
    other = shutil.copytree(measured / "run", tmp_path / "other")
    comparisons = json.loads(layerboost("measure", "--run", run, "--compare", other, "--json").stdout)
    same, metrics = comparisons["comparisons"]
    assert all(row["spearman"] == pytest.approx(1) for row in same["agreements"])
    assert "kl" in {row["metric"] for row in metrics["agreements"]}
    layerboost("report", "--run", run)
    page = (run / "report.html").read_text()
    assert "Plans of every budget" in page
    assert "Stability" in page


def test_a_window_as_long_as_the_context_is_warned_of(run: Path) -> None:
    settings = sets("plan.context_tokens=8", "plan.kv_fraction=1", "plan.method=threshold", "plan.full_layers=1")
    assert "gain nothing over full ones" in layerboost("plan", "--run", run, *settings).stderr


def test_a_budget_that_cannot_be_met_exits_with_3_and_leaves_the_recipe_alone(run: Path) -> None:
    before = (run / "recipe.yaml").read_text()
    text = (run / "sensitivity.json").read_text()
    sensitivity = json.loads(text)
    for layer in sensitivity["layers"]:
        layer["variants"] = [variant for variant in layer["variants"] if variant["window"]]
    (run / "sensitivity.json").write_text(json.dumps(sensitivity))
    told = refused("plan", "--run", run, "--set", "plan.kv_fraction=0.001", code=3)
    assert "has 12.5% of the base's KV cache" in told
    assert (run / "recipe.yaml").read_text() == before
    (run / "sensitivity.json").write_text(text.replace('"none"', '"sliding"'))
    assert "a sliding layer needs a window" in refused("plan", "--run", run)


def test_two_commands_do_not_share_a_run_folder(run: Path) -> None:
    with locked(run):
        assert "another layerboost command works in" in refused("plan", "--run", run)


def test_a_plan_for_another_model(run: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", hidden_size=32)
    for stage in ("convert", "heal", "evaluate"):
        assert "is for another model" in refused(stage, other, "--run", run)
    assert str(other) not in (run / "recipe.yaml").read_text()


def test_a_checkpoint_of_an_older_plan_is_not_evaluated(run: Path) -> None:
    layerboost("plan", "--run", run, "--set", "plan.kv_fraction=0.9")
    told = refused("evaluate", "--run", run)
    assert "was made from another plan" in told
    assert "`layerboost convert`" in told


def test_measuring_with_other_settings_in_the_same_folder(run: Path) -> None:
    told = refused("measure", "--run", run, "--set", "measure.windows=[8]")
    assert "windows: [8, 16] there, [8] here" in told


def test_healing_is_refused_before_it_begins(run: Path, measured: Path) -> None:
    assert "q_prog" in refused("heal", "--run", run, "--set", "heal.lora_targets=[q_prog]")
    assert (run / "recipe.yaml").read_text() == (measured / "run" / "recipe.yaml").read_text()
    assert not (run / "heal").exists()


def test_a_damaged_checkpoint_is_one_message_and_is_made_again(run: Path) -> None:
    weights = run / "converted" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    for words in (["heal", "--run", run], ["evaluate", "--run", run], ["serve", run / "converted"]):
        assert "model.safetensors is damaged" in refused(*words)
    assert "model.safetensors is damaged" in layerboost("convert", "--run", run).stderr
    assert weights.read_bytes() == whole


def test_check_says_what_it_found(measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="check looks for vLLM")
    words = ("check", "--config", measured / "recipe.yaml", "--run", tmp_path)
    found = json.loads(layerboost(*words, "--json").stdout)
    assert found["family"] == "llama"
    assert found["layers"] == 4
    assert found["parameters"] > 10_000
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused(*words, "--set", f"bench.port={port}")


def test_a_broken_history_is_found_before_a_stage_runs(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("plan.yaml", "recipe.yaml")}
    (run / "run.json").write_text("{")
    assert "run.json" in refused("plan", "--run", run, "--set", "plan.kv_fraction=0.6")
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("heal.tokens=100000000", "the train text is too short"),
        ("plan.metric=benchmark", "the plan needs benchmark, which is not measured"),
        ("plan.method=block_influence", "the plan needs scores of MLPs, which are not measured"),
        ("plan.window=9", "plan.window 9 is not measured"),
        ("plan.costs=nowhere.json", "plan.costs nowhere.json is not a file"),
        ("bench.checkpoints={other: nowhere}", "nowhere"),
    ],
)
def test_check_sees_what_later_stages_would_refuse(measured: Path, tmp_path: Path, setting: str, message: str) -> None:
    pytest.importorskip("vllm", reason="check looks for vLLM")
    words = ("--config", measured / "recipe.yaml", "--run", tmp_path, "--set", setting)
    assert message in refused("check", *words)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_exits_with_130_and_is_noted(number: signal.Signals, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model", layers=12), measure={"tokens": 960})
    run = tmp_path / "run"
    process = command("measure", "--config", recipe, "--run", run, folder=tmp_path)
    process.wait_until((run / "sensitivity.json").exists)
    process.send(number)
    assert process.wait() == 130
    messages = process.errors.read_text()
    assert "interrupted; run the same command again to resume" in messages
    assert "Traceback" not in messages
    (stage,) = json.loads((run / "run.json").read_text())["stages"]
    assert stage["status"] == "interrupted"


def test_the_resolved_recipe_repeats_the_run(measured: Path) -> None:
    saved = yaml.safe_load((measured / "run" / "recipe.yaml").read_text())
    assert saved["plan"]["kv_fraction"] == 0.4
    assert saved["heal"]["lora_rank"] == 16
