"""A model on this disk as a run reads it: one handle for Hub ids, directories, GGUF files and packages."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from layerboost.errors import ConfigError, first_line
from layerboost.files import check_path, file_hash, new_folder
from layerboost.model import files as model_files
from layerboost.model import integrity
from layerboost.model.card import CARD, LICENCE_FILES, base_card, licence_files
from layerboost.model.families import WRAPPERS
from layerboost.model.gguf_config import check_every_tensor, complete_config
from layerboost.model.linear import use_onednn
from layerboost.model.mlp import mlp_output, set_mlp
from layerboost.model.modeling import (
    attention_layers,
    auto_class,
    base_layer_types,
    decoder_layers,
    make_attention_free,
)
from layerboost.model.surgery import experts_per_token, family_of, native_window, packed_parameters
from layerboost.model.tokenizer import open_tokenizer, save_tokenizer
from layerboost.recipe import Recipe, model_of
from layerboost.rows import package_files
from layerboost.runtime import Runtime, log
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.run import BASE

# In RUN/base: which model it was unpacked from.
UNPACKED_FROM = "layerboost_source.txt"
# The form in which it was unpacked: earlier releases left settings of GGUF files out.
FORM = "form 2"


@dataclass(frozen=True)
class Base:
    """A model that a stage works on: its place, how this run reads it, and its properties, read on first use.

    `folder` is a Hugging Face directory or, with `gguf`, contains that GGUF file. All errors are ConfigErrors.
    """

    name: str
    folder: Path
    runtime: Runtime
    gguf: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """Return the configuration of the model, checked to be of a supported causal LM or a wrapper of one."""
        if self.gguf:
            config = integrity.read_config(self.folder, self.name, gguf_file=self.gguf)
            complete_config(config.get_text_config(), self.folder / self.gguf)
        else:
            config = integrity.read_config(self.folder, self.name, trust_remote_code=self.trust_remote_code)
        family_of(config)
        return config

    @property
    def config(self) -> PreTrainedConfig:
        """Return the configuration of the language model: in a wrapper a part of `model_config`, else the same."""
        return self.model_config.get_text_config()

    @cached_property
    def dequantised(self) -> dict[str, Any] | None:
        """Return the settings by which Transformers dequantises the weights; None if it need not or cannot."""
        settings = None if self.gguf else model_files.plain_config(self.folder).get("quantization_config")
        known = isinstance(settings, dict) and settings.get("quant_method") in integrity.DEQUANTISED
        return {**settings, "dequantize": True} if settings and known else None

    @property
    def packed(self) -> bool:
        """Return whether the model is unpacked before it is used: a GGUF file, or weights that can be dequantised."""
        return bool(self.gguf or self.dequantised)

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer, checked against its files and the configuration."""
        return open_tokenizer(self.folder, self.name, self.config, self.trust_remote_code, self.gguf)

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits of the SHA-256 over the configuration and every weight file."""
        files = (
            [self.folder / self.gguf]
            if self.gguf
            else [self.folder / "config.json", *sorted(model_files.weight_files(self.folder))]
        )
        digest = hashlib.sha256()
        for file in files:
            digest.update(bytes.fromhex(model_files.remembered("sha256", [file], partial(_sha256, file))))
        return digest.hexdigest()[:16]

    @cached_property
    def info(self) -> ModelInfo:
        """Return the facts about the model that plans and sensitivities record."""
        config = self.config
        types = base_layer_types(config)
        return ModelInfo(
            name=self.name,
            model_type=self.model_config.model_type,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            bytes_per_element=self.runtime.dtype.itemsize,
            max_context_tokens=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            tied_head=self.model_config.tie_word_embeddings,
            **parameter_facts(self.model_config),
            fingerprint=self.fingerprint,
            sliding_layers=[layer for layer, kind in enumerate(types) if kind == "sliding_attention"],
            sliding_window=native_window(config),
            other_layers=sorted({*range(config.num_hidden_layers)} - {*attention_layers(config)}),
        )

    def check(self) -> None:
        """Raise ConfigError if the directory cannot be MODEL. Every weight is read, once for the same files."""
        if self.gguf:
            return
        files = {*model_files.weight_files(self.folder), *(file for file in self.folder.iterdir() if file.is_file())}
        # Another version of the checks, or of Transformers, may find what this one did not.
        checks = [file_hash(Path(module.__file__ or "")) for module in (integrity, model_files)]
        what = f"base {self.runtime.dtype_name} {self.trust_remote_code} {checks} {transformers.__version__}"

        def check() -> str:
            integrity.check_base(self.folder, self.runtime.dtype, self.trust_remote_code)
            return "checked"

        model_files.remembered(what, files, check)

    def load(self, dequantise: bool = False) -> PreTrainedModel:
        """Load the model in eval mode, stock or boosted; raise ConfigError when weights and configuration disagree.

        GGUF files are always dequantised.
        """
        kwargs: dict[str, Any] = {"config": self.model_config}
        if implementation := family_of(self.model_config).attn_implementation:
            kwargs["attn_implementation"] = implementation
        if self.gguf:
            from transformers import GgufConfig

            dequantised = GgufConfig(gguf_file=self.gguf, dequantize=True)
            kwargs |= {"gguf_file": self.gguf, "quantization_config": dequantised}
        else:
            integrity.check_checkpoint(self.folder, self.trust_remote_code)
            if self.model_config.model_type in WRAPPERS or (dequantise and self.dequantised):
                kwargs["config"] = copy.deepcopy(self.model_config)
            if dequantise and self.dequantised:
                kwargs["config"].quantization_config = self.dequantised
            # Not the model's own generation settings: they would change samples, and Transformers refuses to save some.
            # A wrapper's own ids come first: Gemma 3's end of a turn is not in its text_config.
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            own = {name: getattr(self.model_config, name, None) for name in names}
            ids = {name: getattr(self.config, name, None) if own[name] is None else own[name] for name in names}
            kwargs["generation_config"] = GenerationConfig(**ids)
        try:
            model, loading = auto_class(self.model_config).from_pretrained(
                self.folder,
                dtype=self.runtime.dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
        except Exception as error:  # each format and each quantisation has its own
            raise ConfigError(f"cannot load {self.name}", found=first_line(error)) from None
        wrong = {kind: sorted(loading[kind])[:3] for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
        if wrong:
            raise ConfigError(f"weights and configuration of {self.name} disagree", found=json.dumps(wrong))
        if self.gguf:
            check_every_tensor(model, self.folder / self.gguf)
            model_files.check_finite_weights(self.name, dict(model.named_parameters()), self.runtime.dtype)
        use_onednn(model)
        return model.to(self.runtime.device).eval()


def find_model(name: str, runtime: Runtime, run: Path | None = None, trust_remote_code: bool = False) -> Base:
    """Resolve MODEL: a directory, a GGUF file, `package:NAME` (a GGUF file in a PyPI package) or a Hub id.

    A model that was unpacked to the run folder is read from there. Raise ConfigError if there is no such model.
    """
    gguf = None
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~name of no user
        path = Path(name)
    if name.startswith("package:"):
        folder, gguf = _package_gguf(name.removeprefix("package:"))
    elif path.is_dir():
        check_path(path)
        model_files.plain_config(path)
        model_files.weight_files(path)
        folder = path.absolute()
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError("no such GGUF file", found=str(path))
        model_files.check_readable(path)
        folder, gguf = path.parent.absolute(), path.name
    else:
        folder = _hub_folder(name)
        model_files.weight_files(folder)
    found = Base(name, folder, runtime, gguf, trust_remote_code)
    note = run / BASE / UNPACKED_FROM if run else None
    if (
        run
        and note
        and note.is_file()
        and note.read_text(encoding="utf-8").splitlines() == [name, found.fingerprint, FORM]
    ):
        return Base(name, (run / BASE).absolute(), runtime, trust_remote_code=trust_remote_code)
    return found


def find_base(recipe: Recipe, run: Path, runtime: Runtime) -> Base:
    """Return the recipe's model, checked unless it is a GGUF file; raise ConfigError if it cannot be used."""
    base = find_model(model_of(recipe), runtime, run, recipe.trust_remote_code)
    family_of(base.model_config)
    base.check()
    return base


def open_base(recipe: Recipe, run: Path, runtime: Runtime) -> Base:
    """Return the recipe's model as a Hugging Face directory; GGUF and quantised ones are unpacked to `RUN/base` once.

    Raise ConfigError if the recipe names no model or one that cannot be used.
    """
    base = find_base(recipe, run, runtime)
    if not base.packed:
        return base
    log.info("unpacking %s to %s", base.gguf or base.name, run / BASE)
    # On the CPU, whatever the run's device: the model is only written, and may be larger than a GPU.
    on_cpu = replace(base, runtime=replace(runtime, device=torch.device("cpu")))
    model, tokenizer = on_cpu.load(dequantise=True), base.tokenizer
    with new_folder(run / BASE, UNPACKED_FROM) as folder:
        # In the form of an unquantised checkpoint: undoing what loading did would quantise it again. Scales may stay in
        # its state.
        vars(model)["_weight_conversions"] = None
        with torch.device("meta"):
            stock = auto_class(base.model_config).from_config(base.model_config).state_dict()
        state = {name: value for name, value in model.state_dict().items() if name in stock}
        original = model_files.in_original_format(model.config)
        model.save_pretrained(folder, state_dict=state, save_original_format=original)
        if base.gguf:
            tokenizer.save_pretrained(folder)
        else:
            save_tokenizer(tokenizer, folder)
        (folder / CARD).write_text(base_card(base.folder, base.name, base.gguf), encoding="utf-8")
        for file in licence_files(base.folder):
            shutil.copy(file, folder)
        (folder / UNPACKED_FROM).write_text(f"{base.name}\n{base.fingerprint}\n{FORM}\n", encoding="utf-8")
    return Base(base.name, (run / BASE).absolute(), runtime, trust_remote_code=base.trust_remote_code)


def parameter_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the facts of ModelInfo about the parameters of a language model of this configuration; none about MLPs for
    a model whose MLPs cannot be thinned.

    A wrapper's tower does not count. No memory is used.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    layers: Any = decoder_layers(model)
    experts = [module.get_parameter(name) for module in layers.modules() for name in packed_parameters(module)]
    outputs = [mlp_output(layer.mlp) if hasattr(layer, "mlp") else None for layer in layers]

    def count() -> int:
        found = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
        return sum(parameter.numel() for parameter in found)

    whole, text = count(), config.get_text_config()
    layer = attention_layers(text)[0]
    make_attention_free(layers[layer], layer, family_of(config))
    facts = {
        "parameters": whole,
        "attention_parameters": whole - count(),
        "expert_parameters": sum(parameter.numel() for parameter in experts),
        "expert_fraction": experts_per_token(text) / len(experts[0]) if experts else 1.0,
    }
    widths = {output.in_features for output in outputs if output}
    if None in outputs or len(widths) > 1:
        return facts
    [width] = widths
    sizes = [sum(parameter.numel() for parameter in layers[0].mlp.parameters())]
    set_mlp(layers[0], width - 1)
    sizes.append(sum(parameter.numel() for parameter in layers[0].mlp.parameters()))
    return facts | {"mlp_width": width, "mlp_parameters": sizes[0], "neuron_parameters": sizes[0] - sizes[1]}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _package_gguf(package: str) -> tuple[Path, str]:
    found = [file for file in package_files(package) if file.suffix == ".gguf"]
    if not found:
        raise ConfigError(f"package {package} holds no GGUF file")
    return found[0].parent, found[0].name


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
