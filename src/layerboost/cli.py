"""The command line: a command per stage, and run, compare, check, serve, costs and ls.

Results are printed on stdout, progress on stderr. Imports are local, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerboost import __version__, tables
from layerboost.errors import LayerboostError
from layerboost.tables import show
from layerboost.terminal import prepare_terminal

if TYPE_CHECKING:
    from layerboost.model.families import Served
    from layerboost.recipe import Recipe

INTERRUPTED = 130


class Command(click.Command):
    """A command whose help ends with its examples, the lines of its epilogue."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in (self.epilog or "").splitlines():
                formatter.write(f"  {example}\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Give each layer of a language model the cheapest attention that keeps its quality; heal it; serve it with vLLM.

    MODEL is a Hub id, a directory, a GGUF file, or package:NAME (a GGUF file inside an installed PyPI package).
    """


def _command(*examples: str, name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command whose help ends with these examples."""
    return cli.command(name, cls=Command, epilog="\n".join(examples))


def with_recipe(function: Callable[..., None]) -> Callable[..., None]:
    """Add MODEL and the options of every stage to a command, which is called with the resolved recipe."""

    @functools.wraps(function)
    def command(
        model: str | None,
        run: Path,
        config: str | None,
        settings: tuple[str, ...],
        text: str | None,
        trust_remote_code: bool,
        as_json: bool,
        engine: str | None = None,
        **rest: Any,
    ) -> None:
        given = {"model": model, "text.source": text, "trust_remote_code": trust_remote_code or None}
        given |= {"bench.engine": engine}
        recipe = resolve(run, config, settings, {key: value for key, value in given.items() if value is not None})
        function(recipe=recipe, run=run, as_json=as_json, **rest)

    decorators = [
        click.argument("model", required=False),
        click.option("--run", "run", type=click.Path(path_type=Path), default=Path("layerboost-run"), show_default=True,
                     help="Run folder: every stage reads and writes its files there."),
        click.option("--config", metavar="RECIPE", help="A YAML file or a name from `layerboost ls recipes`."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Such as heal.lr=1e-4."),
        click.option("--text", metavar="SOURCE", help="Calibration and healing text; `self`: the model's own samples."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]  # fmt: skip
    return functools.reduce(lambda done, decorator: decorator(done), reversed(decorators), command)


def resolve(run: Path, config: str | None, settings: tuple[str, ...], given: dict[str, Any]) -> Recipe:
    """Return the recipe of defaults, run folder, --config, --set, and MODEL with other options; later ones override."""
    from layerboost.recipe import find_recipe, load_recipe, set_option
    from layerboost.run_folder import no_run_folder

    try:
        files = [run / "recipe.yaml"] if (run / "recipe.yaml").is_file() else []
    except OSError as error:  # no permission, a name that is too long
        raise no_run_folder(run, str(error)) from None
    files += [find_recipe(config)] if config else []
    return load_recipe(files, dict(map(set_option, settings)) | given)


def _run(stage: str, recipe: Recipe, run: Path, **options: Any) -> Any:
    from layerboost.pipeline import run_stage

    return run_stage(stage, recipe, run, **options)


@_command(
    "layerboost measure Qwen/Qwen3-4B --run runs/qwen3 --text wikitext.txt",
    "layerboost measure --run runs/qwen3 --compare runs/qwen3-other-text",
)
@click.option(
    "--compare",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Compare RUN's sensitivities with another sensitivity.json or run folder, by rank correlation.",
)
@with_recipe
def measure(recipe: Recipe, run: Path, as_json: bool, compare: tuple[Path, ...]) -> None:
    """Measure the sensitivity of each layer: the quality that the model loses when its attention is replaced."""
    from layerboost.reporting.search import stability_table

    result = _run("measure", recipe, run, compare=compare)
    show(result, as_json, stability_table if compare else tables.measured_rows)


@_command(
    "layerboost plan --run runs/qwen3 --set plan.kv_fraction=0.35",
    "layerboost plan --run runs/qwen3 --frontier",
)
@click.option("--frontier", is_flag=True, help="Plan for every budget: quality loss against cost, frontier.json.")
@with_recipe
def plan(recipe: Recipe, run: Path, as_json: bool, frontier: bool) -> None:
    """Choose a strategy for every layer and write plan.yaml, which you may edit."""
    from layerboost.reporting.search import frontier_table

    result = _run("plan", recipe, run, curve=frontier)
    show(result, as_json, frontier_table if frontier else tables.planned_rows)


@_command(
    "layerboost convert --run runs/qwen3",
    "layerboost convert --run runs/llama && layerboost export runs/llama/converted --to auto",
)
@with_recipe
def convert(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Apply the plan to the base's weights: converted/, a Hugging Face checkpoint."""
    show(_run("convert", recipe, run), as_json, tables.written_rows)


@_command(
    "layerboost heal --run runs/qwen3 --text HuggingFaceFW/fineweb-edu",
    "layerboost heal --run runs/qwen3",
)
@with_recipe
def heal(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Train the converted model against the base, by attention distillation and LoRA distillation: healed/."""
    show(_run("heal", recipe, run), as_json, tables.written_rows)


@_command(
    "layerboost evaluate --run runs/qwen3",
    "layerboost evaluate --run runs/qwen3 --set 'evaluate.tasks=[piqa,mmlu]' --set evaluate.bench_data=data/bench",
)
@with_recipe
def evaluate(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Perplexity, KL and lm-eval tasks of base, converted and healed, with paired differences."""
    show(_run("evaluate", recipe, run), as_json, lambda _: tables.summarized_rows(run))


@_command(
    "layerboost bench --run runs/qwen3 --set 'bench.concurrency=[16,64]' --set bench.repeats=3",
    "layerboost bench --run runs/qwen3 --decode-sweep",
)
@click.option("--decode-sweep", is_flag=True, help="Measure latency and memory against the length of answers instead.")
@click.option("--engine", metavar="NAME", help="vllm, llama.cpp or transformers; default: bench.engine.")
@with_recipe
def bench(recipe: Recipe, run: Path, as_json: bool, decode_sweep: bool) -> None:
    """Serve base and boosted in turn and measure throughput and latency."""
    result = _run("bench", recipe, run, decode_sweep=decode_sweep)
    if decode_sweep:
        from layerboost.reporting.benchmark import decode_table

        show(result, as_json, decode_table)
    else:
        show(result, as_json, lambda _: tables.summarized_rows(run))


@_command("layerboost report --run runs/qwen3", "layerboost report --run runs/qwen3 --json")
@with_recipe
def report(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Write report.html and report.md from the files of the run folder."""
    show(_run("report", recipe, run), as_json, tables.reported_rows)


@_command(
    "layerboost run --config demo --run runs/demo",
    "layerboost run --config qwen3-4b --run runs/qwen3",
    name="run",
)
@with_recipe
def run_command(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Run all stages from one recipe; what an earlier run finished is kept."""
    from layerboost.pipeline import run_all

    show(run_all(recipe, run), as_json, tables.reported_rows)


@_command(
    "layerboost compare --run runs/qwen3 --set plan.kv_fraction=0.35 --set heal.tokens=50000",
    "layerboost compare rows.yaml Qwen/Qwen3-4B --run runs/rows --text books.jsonl",
    name="compare",
)
@click.argument("rows", default="equal-cost")
@with_recipe
def compare_command(recipe: Recipe, run: Path, as_json: bool, rows: str) -> None:
    """Compare plans, each healed and evaluated in the same way, with intervals. ROWS is a YAML file; by default the
    recipe's plan, the paper's tiers, LLM-Drop and controls at equal cost.
    """
    from layerboost.compare import run_compare

    result = run_compare(recipe, run, rows)
    show(result, as_json, lambda _: tables.written_rows(run / "compare" / "comparison.md"))


@_command(
    "layerboost check --config demo",
    "layerboost check Qwen/Qwen3-4B --config qwen3-4b --text books.jsonl",
    name="check",
)
@with_recipe
def check_command(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Check recipe, model, data, memory and disk for what would fail in a run, before hours of compute."""
    from layerboost.check import check

    def rows(estimate: Any) -> list[list[str]]:
        return [["what", "found"], *([name, str(value)] for name, value in asdict(estimate).items())]

    show(check(recipe, run), as_json, rows)


@_command(
    "layerboost serve runs/qwen3/healed --port 9000 -- --max-model-len 4096",
    "layerboost serve runs/llama/healed-q8_0.gguf -- --ctx-size 8192",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--port", default=8000, show_default=True)
@click.option("--engine", default="auto", metavar="NAME", help="vllm or llama.cpp; default: llama.cpp for a GGUF file.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def serve(model: Path, port: int, engine: str, extra: tuple[str, ...]) -> None:
    """Print and run the engine's command that serves a checkpoint or a GGUF file; extra arguments go to the engine."""
    from layerboost.engines import open_engine
    from layerboost.runtime import clean_environment

    clean_environment()
    if engine == "auto" and model.suffix.lower() == ".gguf":
        engine = "llama.cpp"
    argv, added = open_engine(engine).serve_command(model, port, extra)
    click.echo(shlex.join([*(f"{name}={value}" for name, value in added.items()), *argv]), err=True)
    os.execvpe(argv[0], argv, os.environ | added)


@_command(
    "layerboost costs runs/qwen3/base --out costs.json",
    "layerboost costs runs/llama/base --out laptop.json --engine llama.cpp --type q8_0",
)
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("costs.json"), show_default=True)
@click.option("--cache-gib", default=1.5, show_default=True, help="vLLM: KV cache of the engines that are timed.")
@click.option("--engine", default="auto", metavar="NAME", help="vllm or llama.cpp; default: the first installed.")
@click.option("--type", "kind", default="f16", show_default=True, help="llama.cpp: type of the GGUF files.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def costs(model: str, out: Path, cache_gib: float, engine: str, kind: str, as_json: bool) -> None:
    """Measure this machine's rates under a real engine with MODEL, a base: plan.costs needs them to plan for time."""
    from layerboost.benching.costs import run_costs

    show(run_costs(model, out, cache_gib, engine, kind), as_json, tables.costs_rows)


@_command(
    "layerboost export runs/llama/healed --to granite-swa --out llama-stock && vllm serve llama-stock",
    "layerboost export runs/llama/healed --to gguf --type q8_0 && llama-server -m runs/llama/healed-q8_0.gguf",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="TARGET", help="A format from `layerboost ls targets`, or auto.")
@click.option("--out", type=click.Path(path_type=Path), help="A new directory or file; default: FOLDER-TARGET.")
@click.option(
    "--type", "kind", help="GGUF: f32, f16 (default), bf16, q8_0, q4_0 or, by llama-quantize, q4_k_m and others."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(folder: Path, to: str, out: Path | None, kind: str | None, as_json: bool) -> None:
    """Write FOLDER, a boosted checkpoint, in a stock format for engines without layerboost."""
    from layerboost.exporting.stage import run_export

    show(run_export(folder, to, out, kind), as_json, tables.exported_rows)


@_command(
    "layerboost ls recipes",
    "layerboost ls settings",
)
@click.argument("what", type=click.Choice(["families", "unsupported", "recipes", "settings", "targets"]))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def ls(what: str, as_json: bool) -> None:
    """List the model families, Transformers' others with the reason, our recipes, the settings of a recipe, or export's
    targets.
    """
    if what == "families":
        from layerboost.model.families import FAMILIES, WRAPPERS

        head = ["family", "vLLM", "what vLLM lacks"]
        rows: dict[str, Served] = {**FAMILIES}
        rows |= {f"{name} ({', '.join(row.inside)})": row for name, row in WRAPPERS.items()}
        listing: dict[str, Any] = {
            name: {"vllm": row.vllm or None, "lacks": row.vllm_lacks or row.cpu_lacks} for name, row in rows.items()
        }
    elif what == "unsupported":
        from layerboost.model.unsupported import unsupported_families

        head, listing = ["model type", "reason"], dict(unsupported_families())
    elif what == "recipes":
        from layerboost.recipe import RECIPES

        head = ["recipe", "file"]
        listing = {file.stem: str(file) for file in sorted(RECIPES.glob("*.yaml"))}
    elif what == "targets":
        from layerboost.exporting.targets import described_targets

        listing = described_targets()
        head = ["target", *next(iter(listing.values()))]
    else:
        from layerboost.recipe import described_settings

        head, listing = ["setting", "default", "meaning"], described_settings()

    def row(name: str, cells: Any) -> list[str]:
        values = cells.values() if isinstance(cells, dict) else [cells]
        return [name, *("not served" if value is None else value for value in values)]

    show(listing, as_json, lambda _: [head, *(row(name, cells) for name, cells in listing.items())])


def main() -> None:
    """Run a command; turn every failure into one message and its exit code."""
    if not os.environ.get("LAYERBOOST_DEBUG"):
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours are not tqdm's
    prepare_terminal()
    logger = logging.getLogger("layerboost")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.filters = [_is_logged]
    logger.setLevel(logging.INFO)
    # A terminated job ends like an interrupted one: servers are stopped, run.json is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli(standalone_mode=False)
    except LayerboostError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; run the same command again to resume", INTERRUPTED)
    except Exception as error:
        if any(full in str(error) for full in ("No space left", "os error 28", "quota exceeded")):
            _fail("the disk is full\ndo: free space or choose another --run folder", 1)
        _fail(f"{type(error).__name__}: {error}\ndo: set LAYERBOOST_DEBUG=1 to see where", 1)


def _is_logged(record: logging.LogRecord) -> bool:
    """Return whether to log a record: under torchrun, only errors and the records of rank 0."""
    from layerboost.runtime import is_main_process

    return record.levelno >= logging.ERROR or is_main_process()


def _fail(message: str, code: int) -> None:
    from layerboost.runtime import leave

    if os.environ.get("LAYERBOOST_DEBUG"):
        traceback.print_exc()
    click.echo(f"layerboost: {message}", err=True)
    leave(code)


if __name__ == "__main__":
    main()
