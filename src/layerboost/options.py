"""The common parts of the commands: MODEL, the options of every stage, and help with examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from layerboost.recipe import Recipe


class Command(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"  {example}\n")


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
