"""The command line: one command a stage, plus run, serve, check and ls. Results on stdout, progress on stderr."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerboost import __version__, tables
from layerboost.errors import LayerboostError

if TYPE_CHECKING:
    from layerboost.recipe import Recipe

INTERRUPTED = 130
PIPED_COLUMNS = 200  # a pipe has no width: rich would take 80 and cut numbers short


class Command(click.Command):
    """A command whose help ends with examples as they are typed."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"  {example}\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Give each layer of a language model the cheapest attention it can live with; heal it; serve it with vLLM.

    MODEL is a Hub id, a directory, a GGUF file, or package:NAME (a GGUF file inside an installed PyPI package).
    """


def with_recipe(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command MODEL and the options of every stage; it is called with the recipe they resolve to."""

    @functools.wraps(function)
    def command(
        model: str | None,
        run: Path,
        config: str | None,
        settings: tuple[str, ...],
        text: str | None,
        trust_remote_code: bool,
        as_json: bool,
        on_plan: Path | None = None,
        engine: str | None = None,
        **rest: Any,
    ) -> None:
        given = {"model": model, "text.source": text, "trust_remote_code": trust_remote_code or None}
        given |= {"measure.plan": str(on_plan) if on_plan else None, "bench.engine": engine}
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
    """The recipe: defaults, then the run folder's own, then --config, then --set, then MODEL and other options."""
    from layerboost.recipe import find_recipe, load_recipe, set_option

    files = [file for file in (run / "recipe.yaml", find_recipe(config) if config else None) if file and file.is_file()]
    return load_recipe(files, dict(map(set_option, settings)) | given)


def show(result: Any, as_json: bool, rows: Callable[[Any], list[list[str]]]) -> None:
    """Print a result on stdout: JSON for machines, else as a table of rows, header first."""
    from layerboost.artifacts import json_text
    from layerboost.pipeline import plain
    from layerboost.runtime import is_main_process

    if not is_main_process():
        return
    if as_json:
        click.echo(json_text(plain(result), "the result", indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    head, *body = rows(result)
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPED_COLUMNS
    Console(width=width, markup=False).print(table)  # a path may hold [brackets]


def _stage(name: str, help_text: str, examples: tuple[str, ...], rows: Callable[[Any, Path], list[list[str]]]) -> None:
    """Make the command of one stage."""

    @cli.command(name, cls=Command, help=help_text, examples=examples)
    @with_recipe
    def command(recipe: Recipe, run: Path, as_json: bool) -> None:
        from layerboost.pipeline import run_stage

        show(run_stage(name, recipe, run), as_json, lambda result: rows(result, run))


@cli.command(
    "measure",
    cls=Command,
    help="Measure how much each layer's attention matters: what the model loses when it is replaced.",
    examples=(
        "layerboost measure Qwen/Qwen3-4B --run runs/qwen3 --text wikitext.txt",
        "layerboost measure --run runs/qwen3 --compare runs/qwen3-other-text",
    ),
)
@click.option(
    "--compare",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Compare what RUN holds with another sensitivity.json or run folder, by rank correlation.",
)
@click.option(
    "--plan",
    "on_plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure each layer of the model as this plan.yaml changes it, to see whether the ranking holds.",
)
@with_recipe
def measure(recipe: Recipe, run: Path, as_json: bool, compare: tuple[Path, ...]) -> None:
    """Run the measure stage."""
    from layerboost.pipeline import run_stage
    from layerboost.reporting.search import stability_rows

    show(
        run_stage("measure", recipe, run, compare=compare), as_json, stability_rows if compare else tables.measured_rows
    )


@cli.command(
    "plan",
    cls=Command,
    help="Choose a strategy for every layer and write plan.yaml, which you may edit.",
    examples=(
        "layerboost plan --run runs/qwen3 --set plan.kv_fraction=0.35",
        "layerboost plan --diff runs/qwen3 runs/other/plan.yaml",
    ),
)
@click.option("--frontier", is_flag=True, help="Plan for every budget: damage against cost, frontier.json.")
@click.option("--diff", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Show two plans side by side.")
@with_recipe
def plan(recipe: Recipe, run: Path, as_json: bool, frontier: bool, diff: tuple[Path, Path] | None) -> None:
    """Run the plan stage."""
    from layerboost.pipeline import run_stage
    from layerboost.reporting.difference import difference_table, plan_difference
    from layerboost.reporting.search import frontier_rows

    if diff:
        show(plan_difference(*diff), as_json, difference_table)
        return
    show(run_stage("plan", recipe, run, curve=frontier), as_json, frontier_rows if frontier else tables.planned_rows)


@cli.command(
    "convert",
    cls=Command,
    help="Apply the plan to the base's weights: converted/, a Hugging Face checkpoint.",
    examples=(
        "layerboost convert --run runs/qwen3",
        "layerboost convert --run runs/llama --compat && vllm serve runs/llama/compat --trust-remote-code",
    ),
)
@click.option(
    "--compat", is_flag=True, help="Also write healed/ or converted/ as compat/, which vLLM serves without us."
)
@with_recipe
def convert(recipe: Recipe, run: Path, as_json: bool, compat: bool) -> None:
    """Run the convert stage."""
    from layerboost.pipeline import run_stage

    show(run_stage("convert", recipe, run, compat=compat), as_json, tables.written_rows)


@cli.command(
    "heal",
    cls=Command,
    help="Train the converted model against the base, by attention distillation and LoRA distillation: healed/.",
    examples=(
        "layerboost heal --run runs/qwen3 --text HuggingFaceFW/fineweb-edu",
        "layerboost heal --run runs/qwen3 --resume",
    ),
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from the last checkpoint.")
@with_recipe
def heal(recipe: Recipe, run: Path, as_json: bool, resume: bool) -> None:
    """Run the heal stage."""
    from layerboost.pipeline import run_stage

    show(run_stage("heal", recipe, run, resume=resume), as_json, tables.written_rows)


_stage(
    "evaluate",
    "Perplexity, KL and lm-eval tasks of base, converted and healed, with paired differences.",
    (
        "layerboost evaluate --run runs/qwen3",
        "layerboost evaluate --run runs/qwen3 --set 'evaluate.tasks=[piqa,mmlu]' --set evaluate.bench_data=data/bench",
    ),
    lambda result, run: tables.summarized_rows(run),
)


@cli.command(
    "bench",
    cls=Command,
    help="Serve base and boosted with vLLM in turn and measure throughput and latency.",
    examples=(
        "layerboost bench --run runs/qwen3 --set 'bench.concurrency=[16,64]' --set bench.repeats=3",
        "layerboost bench --run runs/qwen3 --decode-sweep",
    ),
)
@click.option("--decode-sweep", is_flag=True, help="Latency and memory against the length of the answers instead.")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), help="Default: bench.engine, which is vllm.")
@with_recipe
def bench(recipe: Recipe, run: Path, as_json: bool, decode_sweep: bool) -> None:
    """Run the bench stage."""
    from layerboost.pipeline import run_stage

    found = run_stage("bench", recipe, run, decode_sweep=decode_sweep)
    show(found, as_json, tables.decoded_rows if decode_sweep else lambda _: tables.summarized_rows(run))


@cli.command(
    "report",
    cls=Command,
    help="Write report.html and report.md from the files of the run folder.",
    examples=("layerboost report --run runs/qwen3", "layerboost report --run runs/qwen3 --png"),
)
@click.option("--png", is_flag=True, help="Also write figures/*.png, for a model card; draws them with Chromium.")
@with_recipe
def report(recipe: Recipe, run: Path, as_json: bool, png: bool) -> None:
    """Run the report stage."""
    from layerboost.pipeline import run_stage

    show(run_stage("report", recipe, run, png=png), as_json, lambda _: tables.reported_rows(run))


@cli.command(
    "run",
    cls=Command,
    help="All stages from one recipe; what an earlier run finished is kept.",
    examples=("layerboost run --config demo --run runs/demo", "layerboost run --config qwen3-4b --run runs/qwen3"),
)
@with_recipe
def run_command(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Run every stage."""
    from layerboost.pipeline import run_all

    show(run_all(recipe, run), as_json, lambda _: tables.reported_rows(run))


@cli.command(
    "compare",
    cls=Command,
    help="Ours, the paper's tiers, LLM-Drop and controls at equal cost, before and after healing, with intervals.",
    examples=(
        "layerboost compare --run runs/qwen3",
        "layerboost compare --run runs/qwen3 --set plan.kv_fraction=0.35 --set heal.tokens=50000",
    ),
)
@with_recipe
def compare_command(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Compare plans."""
    from layerboost.compare import run_compare

    show(run_compare(recipe, run), as_json, lambda _: [["written"], [str(run / "compare" / "comparison.md")]])


@cli.command(
    "check",
    cls=Command,
    help="Look for everything that could go wrong before hours of compute: recipe, model, data, memory, disk.",
    examples=(
        "layerboost check --config demo",
        "layerboost check Qwen/Qwen3-4B --config qwen3-4b --text books.jsonl",
    ),
)
@with_recipe
def check_command(recipe: Recipe, run: Path, as_json: bool) -> None:
    """Check a recipe."""
    from layerboost.pipeline import check, plain

    show(
        check(recipe, run), as_json, lambda found: [["what", "found"], *([k, str(v)] for k, v in plain(found).items())]
    )


@cli.command(
    "serve",
    cls=Command,
    help="Print and run the `vllm serve` command for a checkpoint; further arguments go to vLLM.",
    examples=(
        "layerboost serve runs/qwen3/healed",
        "layerboost serve runs/qwen3/healed --port 9000 -- --max-model-len 4096",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--port", default=8000, show_default=True)
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def serve(folder: Path, port: int, extra: tuple[str, ...]) -> None:
    """Serve a checkpoint."""
    import shlex

    from layerboost.serving.command import serve_argv

    argv, added = serve_argv(folder, port, extra)
    click.echo(shlex.join([*(f"{name}={value}" for name, value in added.items()), *argv]), err=True)
    os.execvpe(argv[0], argv, os.environ | added)


@cli.command(
    "ls",
    cls=Command,
    help="List the supported model families or the recipes that come with layerboost.",
    examples=("layerboost ls families", "layerboost ls recipes"),
)
@click.argument("what", type=click.Choice(["families", "recipes"]))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def ls(what: str, as_json: bool) -> None:
    """List families or recipes."""
    if what == "families":
        from layerboost.model.families import FAMILIES

        found = {
            name: {kind: kind in family.supports for kind in ("none", "sliding", "sink")} | {"vllm": family.vllm}
            for name, family in FAMILIES.items()
        }
        show(found, as_json, tables.supported_rows)
        return
    from layerboost.recipe import RECIPES

    show({file.stem: str(file) for file in sorted(RECIPES.glob("*.yaml"))}, as_json, tables.recipe_rows)


def main() -> None:
    """The console script: runs a command and turns every failure into one message and the right exit code."""
    if not os.environ.get("LAYERBOOST_DEBUG"):
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours are not tqdm's
    logger = logging.getLogger("layerboost")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    # Of several ranks under torchrun, one speaks.
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    # A terminated job ends as an interrupted one does: servers stopped, run.json written.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        cli(standalone_mode=False)
    except LayerboostError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; run the same command again to go on", INTERRUPTED)
    except Exception as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            _fail("the disk is full\ndo: free space or choose another --run folder", 1)
        _fail(f"{type(error).__name__}: {error}\ndo: set LAYERBOOST_DEBUG=1 to see where", 1)


def _fail(message: str, code: int) -> None:
    from layerboost.runtime import leave

    if os.environ.get("LAYERBOOST_DEBUG"):
        traceback.print_exc()
    click.echo(f"layerboost: {message}", err=True)
    leave(code)


if __name__ == "__main__":
    main()
