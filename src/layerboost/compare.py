"""compare: plans side by side, each row of a YAML file in a run folder of its own → RUN/compare/comparison.json."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from layerboost.converting import write_windows_alone
from layerboost.costs.budget import base_kv_bytes, plan_kv_bytes, plan_parameters
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.evaluating.comparison import average_against
from layerboost.evaluating.results import read_result
from layerboost.evaluating.stage import run_evaluate
from layerboost.evaluating.statistics import difference
from layerboost.files import parse_yaml, write_text
from layerboost.healing.data import batch_of_process
from layerboost.healing.least_squares import check_fit
from layerboost.measuring.stage import run_measure
from layerboost.model.base import Base, find_model, open_base
from layerboost.model.surgery import check_plan, windows_alone
from layerboost.pipeline import checkpoints, only_one_process, run_stage, saved_recipe
from layerboost.probes.calibration import MEASURED
from layerboost.recipe import RECIPES, Recipe, find_recipe, parse_recipe
from layerboost.reporting.page import Table, markdown_table
from layerboost.reporting.text import ABSENT, number, percent, with_interval
from layerboost.run_folder import locked, recorded
from layerboost.runtime import Runtime, log, start_runtime
from layerboost.schemas.artifact import problems, write_json
from layerboost.schemas.comparison import Against, Compared, EveryLayer, Row, RowResult, Rows
from layerboost.schemas.evaluation import Change, EvalComparison
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, PlanFile, all_full, counts, read_plan, write_plan
from layerboost.schemas.run import BASE, CONVERTED, HEALED, PLAN, SENSITIVITY
from layerboost.strategies import MLP_STRATEGIES, MLP_WIDTH, OTHER, SLIDING, STRATEGIES, WINDOW, StrategyName
from layerboost.tasks.lm_eval import BenchTask, load_bench
from layerboost.text import SAMPLES, SAMPLES_FROM

FOLDER, DEFAULT, SHIPPED = "compare", "equal-cost", RECIPES / "rows"


class NotApplicable(ConfigError):
    """A plan that cannot be made with this model or this text."""


def run_compare(recipe: Recipe, run: Path, rows: str = DEFAULT) -> Compared:
    """Plan, convert and heal every row, evaluate all of them together, and write RUN/compare/comparison.json and .md.

    What an earlier call finished is kept. `rows`: a YAML file, or the name of one that ships with the package. RUN is
    measured first if a row has to be planned and RUN has no sensitivities. A row without a plan within the budget, or
    with one that this model or text does not allow, is skipped and named. Raise ConfigError, and what the stages raise.
    """
    only_one_process("compare")
    file = read_rows(rows)
    recipe = with_settings(recipe, file.set)
    for row in file.rows.values():
        settings = row_recipe(recipe, row)
        batch_of_process(settings.heal)
        check_fit(settings)
    with locked(run), saved_recipe(recipe, run), recorded(run, "compare", recipe):
        planned = any(not (row.plan or row.run or row.window_only) for row in file.rows.values())
        if planned and not (run / SENSITIVITY).is_file():
            run_measure(recipe, run)
        return _compare(file, recipe, run)


def _compare(file: Rows, recipe: Recipe, run: Path) -> Compared:
    runtime = start_runtime(recipe)
    base = open_base(recipe, run, runtime)
    recipe = with_settings(recipe, {"model": str(base.folder)})
    context_tokens = recipe.plan.context_tokens
    compared = Compared(reference=file.reference, context_tokens=context_tokens, left_out={}, rows={}, evaluations={})
    plans: dict[str, PlanFile | None] = {}
    models: dict[str, dict[str, Base]] = {}
    for name, row in file.rows.items():
        log.info("compare: plan of %s", name)
        _copy_inputs(run, run / FOLDER / name)
        try:
            plans[name] = _plan(row, row_recipe(recipe, row), run / FOLDER / name, plans, base)
        except (InfeasibleBudget, NotApplicable) as error:
            if name == file.reference:
                raise
            plans[name], compared.left_out[name] = None, error.wrong
            log.warning("%s is skipped: %s", name, error)
    for name, plan in plans.items():
        if plan is None:
            continue
        log.info("compare: models of %s", name)
        row, settings = file.rows[name], row_recipe(recipe, file.rows[name])
        models[name] = _models(row, settings, run / FOLDER / name, runtime, models)
        compared.rows[name] = RowResult(
            plan=plan.hash(),
            layers=counts(plan.layers),
            window=plan.window,
            sinks=sum(entry.sink for entry in plan.layers),
            full_kv_heads=sum(len(entry.full_kv_heads) for entry in plan.layers),
            mlps=Counter(entry.mlp for entry in plan.layers if entry.mlp_changed),
            kv_fraction=plan_kv_bytes(base.info, plan.layers, context_tokens)
            / base_kv_bytes(base.info, context_tokens),
            parameter_fraction=plan_parameters(base.info, plan.layers) / base.info.parameters,
            predicted_kl=plan.valid_prediction.quality_loss.get("kl") if plan.valid_prediction else None,
            healing_tokens=None if row.run or row.window_only else healing_tokens(settings),
            models=list(models[name]),
        )
    for part, each in file.evaluations.items():
        settings, place = with_settings(recipe, each.set), run / FOLDER / part
        _copy_inputs(run, place)
        chosen = [name for name in models if each.rows is None or name in each.rows]
        evaluated = {f"{name}-{stage}": model for name in chosen for stage, model in models[name].items()}
        comparison = compared.evaluations[part] = run_evaluate(settings, place, {BASE: base} | evaluated)
        last = {name: f"{name}-{compared.rows[name].models[-1]}" for name in chosen}
        if reference := last.pop(file.reference, None):
            tasks = [task for task in load_bench(settings.evaluate) if not comparison.tasks[task.name].selection]
            for name, model in last.items():
                compared.rows[name].against[part] = _against(comparison, model, reference, place / "eval", tasks)
    write_json(run / FOLDER / "comparison.json", compared)
    write_text(run / FOLDER / "comparison.md", page(compared))
    return compared


def read_rows(name: str) -> Rows:
    """Return the content of a file of rows, or of one that ships with the package; raise ConfigError."""
    path = find_recipe(name, SHIPPED, "rows")
    try:
        return Rows.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        do = "see docs/reference/compare.md"
        raise ConfigError(f"{path} is not a valid file of rows", found=problems(error), do=do) from None


def with_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with changed settings, by dotted key; raise ConfigError for one that no recipe has."""
    return parse_recipe(recipe.model_dump(mode="json"), "rows", changes)


def row_recipe(recipe: Recipe, row: Row) -> Recipe:
    """Return the recipe of one row."""
    changed = with_settings(recipe, row.set)
    one_stage = {"heal.fit_tokens": 0, "heal.attention_tokens": 0, "heal.tokens": healing_tokens(changed)}
    return with_settings(changed, one_stage) if row.one_stage else changed


def healing_tokens(recipe: Recipe) -> int:
    """Return the tokens of both stages."""
    return recipe.heal.attention_tokens + recipe.heal.tokens


def _copy_inputs(run: Path, folder: Path) -> None:
    """Copy sensitivities, plans measured before and the model's own samples from the run to the folder of a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SENSITIVITY, MEASURED, SAMPLES, SAMPLES_FROM):
        # A search that was killed has measured more than the run.
        if (run / name).is_file() and not (name == MEASURED and (folder / name).is_file()):
            shutil.copyfile(run / name, folder / name)


def _plan(row: Row, settings: Recipe, folder: Path, earlier: Mapping[str, PlanFile | None], base: Base) -> PlanFile:
    """Return the row's plan, which is also written to its folder; raise NotApplicable, or InfeasibleBudget."""
    if (folder / CONVERTED).is_symlink():  # what is converted here must not replace another row's
        (folder / CONVERTED).unlink()
    if row.run:
        return read_plan(Path(row.run) / PLAN)
    if isinstance(source := row.window_only or row.plan, str) and source in earlier:
        found = earlier[source]
        if found is None:
            raise NotApplicable(f"its plan is that of {source}, which is skipped")
        plan = found
        if row.window_only:
            return plan.model_copy(update={"layers": windows_alone(plan.layers), "predicted": None})
        if not row.sliding and not (folder / CONVERTED).exists():
            (folder / CONVERTED).symlink_to(Path("..", source, CONVERTED), target_is_directory=True)
    elif row.plan is None:
        run_stage("plan", settings, folder)
        return read_plan(folder / PLAN)
    elif isinstance(row.plan, EveryLayer):
        plan = every_layer_plan(row.plan, base, settings)
    else:
        plan = read_plan(Path(row.plan))
    if row.sliding:
        plan = with_sliding_as(plan, row.sliding)
    if row.sliding or isinstance(row.plan, EveryLayer):
        check_applicable(plan, base.config, settings.text.sequence_tokens)
    write_plan(folder / PLAN, plan)
    return plan


def with_sliding_as(plan: PlanFile, fields: Mapping[str, Any]) -> PlanFile:
    """Return a plan whose sliding layers have other fields; raise NotApplicable for fields that they cannot have."""
    try:
        layers = [
            LayerPlan(**{**entry.model_dump(), **fields}) if entry.attention == SLIDING else entry
            for entry in plan.layers
        ]
    except ValueError as error:
        raise NotApplicable("its sliding layers cannot be replaced", found=problems(error)) from None
    method = f"{plan.method}, sliding layers with {', '.join(f'{name} {value}' for name, value in fields.items())}"
    return PlanFile(model=plan.model, method=method, layers=layers)


def every_layer_plan(given: EveryLayer, base: Base, recipe: Recipe) -> PlanFile:
    """Return a plan with the same attention and MLP in every layer; raise NotApplicable without a width that fits."""
    longest = max(1, int(recipe.plan.kv_fraction * recipe.plan.context_tokens))
    window = (given.window or longest) if WINDOW in STRATEGIES[given.attention].settings else None
    values = given.model_dump() | {"window": window}
    if MLP_WIDTH in MLP_STRATEGIES[given.mlp].settings and given.mlp_width is None:
        values[MLP_WIDTH] = _widest(given.attention, base.info, recipe.plan.parameter_fraction or 1.0)
    layers = [
        entry.model_copy(update={"mlp": given.mlp, MLP_WIDTH: values[MLP_WIDTH]})
        if entry.attention == OTHER
        else LayerPlan(layer=entry.layer, **values)
        for entry in all_full(base.info)
    ]
    method = f"all {layers[base.info.attention_layers[0]].label}"
    return PlanFile(model=base.info, method=method, layers=layers)


def _widest(attention: StrategyName, model: ModelInfo, fraction: float) -> int:
    """Return the neurons of every layer's MLP with which a model has this fraction of the base's parameters; raise
    NotApplicable if that thins none or leaves none."""
    full = model.mlp_width or 0
    excess = (1 - fraction) * model.parameters
    if not STRATEGIES[attention].keeps_weights:
        excess -= len(model.attention_layers) * model.attention_parameters
    width = full - math.ceil(excess / (model.layers * model.neuron_parameters)) if full else 0
    if not 0 < width < full:
        raise NotApplicable(
            "no width of its MLPs fits plan.parameter_fraction",
            found=f"{width} of {full} neurons at {fraction:g}",
            do="set plan.parameter_fraction, or mlp_width in the row",
        )
    return width


def check_applicable(plan: PlanFile, config: Any, sequence_tokens: int) -> None:
    """Raise NotApplicable for what `convert` would refuse later, when other rows are healed already."""
    try:
        check_plan(config, plan.layers)
    except ConfigError as error:
        raise NotApplicable(error.wrong, found=error.found, do=error.do) from None
    if any(entry.sink for entry in plan.layers) and plan.window and plan.window >= sequence_tokens:
        raise NotApplicable(
            f"sinks are fitted on text longer than the window of {plan.window}",
            found=f"sequences of {sequence_tokens} tokens",
            do="lower plan.kv_fraction or raise text.sequence_tokens",
        )


def _models(
    row: Row, settings: Recipe, folder: Path, runtime: Runtime, earlier: Mapping[str, dict[str, Base]]
) -> dict[str, Base]:
    """Return the models that the row adds, by stage; those that are missing are made.

    A converted model that is an earlier row's is not among them.
    """
    if row.run:
        existing = checkpoints(settings, Path(row.run), runtime)
        if not existing.keys() - {BASE}:
            raise ConfigError(f"{row.run} has no converted and no healed model", do="make one, or drop the row")
        return {stage: model for stage, model in existing.items() if stage != BASE}
    stages = [CONVERTED]
    if row.window_only:
        write_windows_alone(list(earlier[row.window_only].values())[-1], folder / CONVERTED, settings)
    else:
        run_stage("convert", settings, folder)
        if healing_tokens(settings) + settings.heal.fit_tokens:
            run_stage("heal", settings, folder)
            stages = [HEALED] if (folder / CONVERTED).is_symlink() else [CONVERTED, HEALED]
    return {name: find_model(str(folder / name), runtime, None, settings.trust_remote_code) for name in stages}


def _against(comparison: EvalComparison, model: str, reference: str, results: Path, tasks: list[BenchTask]) -> Against:
    """Return the differences of two models of one evaluation, from its files; `tasks`: those that chose no layers."""

    def read(part: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return read_result(results, reference, part), read_result(results, model, part)

    def change(values: list[list[float]], **options: bool) -> Any:
        return difference([own - other for other, own in zip(*values, strict=True)], **options)

    differences: dict[str, Any] = {}
    if comparison.perplexity:
        differences["kl"] = change([each["kl"] for each in read("text")])
    if tasks:
        differences["average"] = average_against([(task, *read(task.name)) for task in tasks])
    if comparison.retrieval:
        exact = [[float(answer["exact"]) for answer in each["answers"]] for each in read("retrieval")]
        differences["retrieval"] = change(exact, right_or_wrong=True)
    return Against.model_validate(differences)


def page(compared: Compared) -> str:
    """Return the table in Markdown."""
    names = ("row", "model", "layers", "parameters", "KV bytes", "healing tokens", "predicted KL")
    of_base = dict.fromkeys(names, ABSENT) | {"row": BASE, "parameters": percent(1), "KV bytes": percent(1)}
    entries = [(of_base, BASE, dict[str, Against]())]
    for name, row in compared.rows.items():
        layers = ", ".join(f"{count} {kind}" for kind, count in row.layers.items() if count)
        layers += f"; window {row.window}, {row.sinks} sinks" if row.window else ""
        layers += f", {row.full_kv_heads} full KV heads in them" if row.full_kv_heads else ""
        mlps = ", ".join(f"{count} {kind}" for kind, count in row.mlps.items())
        layers += f"; MLPs: {mlps}" if mlps else ""
        for stage in row.models:
            healed = stage == HEALED and row.healing_tokens is not None
            facts = {
                "row": name,
                "model": stage,
                "layers": layers,
                "parameters": percent(row.parameter_fraction),
                "KV bytes": percent(row.kv_fraction),
                "healing tokens": f"{row.healing_tokens:,}" if healed else ABSENT,
                "predicted KL": number(row.predicted_kl),
            }
            entries.append((facts, f"{name}-{stage}", row.against if stage == row.models[-1] else {}))
    lines = []
    for facts, model, against in entries:
        cells = {
            f"{key}, {part}".removesuffix(", "): cell
            for part, quality in compared.evaluations.items()
            for key, cell in _cells(quality, model, against.get(part, Against()), compared.reference).items()
        }
        lines.append(facts | cells)
    header = [key for key in lines[0] if any(line[key] != ABSENT for line in lines)]
    table = Table("", header, [[line[key] for key in header] for line in lines], text_columns=(0, 1, 2))
    notes = [
        "# Plans side by side",
        f"KV bytes at {compared.context_tokens:,} tokens of context, KL in nats per token, differences of accuracy and "
        "of exact retrievals in points. In brackets 95 % intervals; differences are paired over the same sequences, "
        "items and prompts. Bold: the interval does not contain zero.",
        *(f"`{row}` is skipped: {why}." for row, why in compared.left_out.items()),
    ]
    return "\n\n".join([*notes, markdown_table(table)]) + "\n"


def _cells(quality: EvalComparison, model: str, against: Against, reference: str) -> dict[str, str]:
    """Return one model's cells in one evaluation, by column; ABSENT for what was not measured."""
    text, groups = quality.perplexity.get(model), quality.retrieval.groups if quality.retrieval else []
    average = quality.average.difference.get(model) if quality.average else None

    def score(part: Any) -> str:
        return percent(part[model].value, 0) if model in part else ABSENT

    return {
        "KL": with_interval(text.kl if text else None, signed=False),
        f"KL − {reference}": _change(against.kl),
        "NLL − base": _change(text.nll_difference if text else None),
        **{name: score(task.models) for name, task in quality.tasks.items()},
        "average − base": _change(average, 100),
        f"average − {reference}": _change(against.average, 100),
        **{f"{group.kind} {group.length_tokens:,}": score(group.models) for group in groups},
        f"retrieval − {reference}": _change(against.retrieval, 100),
    }


def _change(change: Change | None, scale: float = 1) -> str:
    text = with_interval(change, scale=scale)
    return f"**{text}**" if change and (change.low > 0 or change.high < 0) else text
