"""A model's tokenizer: checked against its files and its model when loaded, copied file by file when saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from layerboost.errors import ConfigError, first_line
from layerboost.model.families import WRAPPERS
from layerboost.model.files import check_readable
from layerboost.model.gguf_config import complete_tokenizer
from layerboost.runtime import log
from layerboost.schemas.artifact import write_json
from layerboost.text import opening_ids

# The files of a tokenizer and of a processor, and the generation settings: a boosted checkpoint gets copies of the
# base's.
COPIED = (
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "processing_*.py",
    "image_processing_*.py",
    "generation_config.json",
)
# A processor has one of them.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# A text on which tokenizers must agree: case, digits, runs of spaces, newlines, punctuation, other scripts.
SENTENCE = "Hello world,  it's 2023!\n\tA naïve café costs 1,234.50 € — 北京 🙂 {x = y_1;}  \n ok"


def open_tokenizer(
    folder: Path, name: str, config: PreTrainedConfig, trust_remote_code: bool = False, gguf: str | None = None
) -> Any:
    """Return a tokenizer that encodes as its files say, appends nothing and has an end-of-text and a padding token.

    Raise ConfigError if it cannot be the tokenizer of the model with this config.
    """
    tokenizer = read_tokenizer(folder, name, trust_remote_code, gguf)
    _set_end(tokenizer, config, name)
    _check_ids(tokenizer, config, name)
    _append_nothing(tokenizer, name)
    return tokenizer


def read_tokenizer(folder: Path, name: str, trust_remote_code: bool = False, gguf: str | None = None) -> Any:
    """Return a tokenizer that encodes as its files say; raise ConfigError if it cannot be loaded."""
    for file in [] if gguf else copied_files(folder):
        check_readable(file)
    kwargs = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
        file = folder / "tokenizer.json"
        if file.is_file() and not gguf:
            tokenizer = _as_written(tokenizer, file)
        if gguf:
            complete_tokenizer(tokenizer, folder / gguf)
    except Exception as error:  # each kind of tokenizer has its own
        raise ConfigError(
            f"cannot load the tokenizer of {name}",
            found=first_line(error),
            do="copy or download its tokenizer files again",
        ) from None
    return tokenizer


def copied_files(folder: Path) -> list[Path]:
    """Return the files of a base that boosted checkpoints get copies of."""
    return sorted({file for pattern in COPIED for file in folder.glob(pattern) if not file.is_dir()})


def lacks_processor(folder: Path, model_type: str) -> bool:
    """Return whether a model takes images and has no processor in its directory."""
    return model_type in WRAPPERS and not any((folder / name).is_file() for name in PROCESSORS)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Copy the files of the directory that a tokenizer was loaded from; save one that was not loaded from any."""
    base = Path(tokenizer.name_or_path)
    files = copied_files(base) if tokenizer.name_or_path else []
    for file in files:
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    if files:
        name_class(folder, lambda: opening_ids(tokenizer))
    else:
        tokenizer.save_pretrained(folder)


def name_class(folder: Path, opening: Callable[[], list[int]]) -> None:
    """Have Transformers, and with it vLLM, encode as the tokenizer.json of a model directory says, after `opening()`.

    Which class it takes, of those that it rebuilds from the vocabulary alone, depends on type and name of the model,
    and a copy or an export has others.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if not file.is_file() or "auto_map" in named:
        return
    wanted = opening(), _plain(file).encode(SENTENCE, add_special_tokens=False).ids
    with suppress(Exception):  # each class has its own
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if (opening_ids(found), found(SENTENCE, add_special_tokens=False)["input_ids"]) == wanted:
            return
    write_json(settings, named | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _plain(file: Path) -> Tokenizer:
    """Return what a tokenizer.json says, without truncation and padding."""
    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    return plain


def _as_written(tokenizer: Any, file: Path) -> Any:
    """Return the tokenizer if it encodes a sentence as its tokenizer.json does, or else one that does.

    Transformers 5 rebuilds some classes from the file's vocabulary alone, with another pre-tokenizer. It also gives
    special tokens that the file lacks a new id, which no model knows: such a token is unset.
    """
    plain = _plain(file)
    wanted = plain.encode(SENTENCE, add_special_tokens=False).ids
    if tokenizer(SENTENCE, add_special_tokens=False)["input_ids"] != wanted:
        kind = type(tokenizer).__name__
        log.warning("%s is used as it is: Transformers' %s splits text differently, and vLLM may do so too", file, kind)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
        if tokenizer(SENTENCE, add_special_tokens=False)["input_ids"] != wanted:
            raise ValueError(f"{file} and the tokenizer that Transformers makes of it disagree")
    if tokenizer.eos_token is not None and plain.token_to_id(tokenizer.eos_token) is None:
        log.warning("%s has no %s, which tokenizer_config.json calls the end of a text", file, tokenizer.eos_token)
        tokenizer.eos_token = None
    for name in ("bos_token", "unk_token"):  # defaults of its class
        if (token := getattr(tokenizer, name)) is not None and plain.token_to_id(token) is None:
            setattr(tokenizer, name, None)
    return tokenizer


def _set_end(tokenizer: Any, config: PreTrainedConfig, name: str) -> None:
    """Set a missing end-of-text token, from the config, and padding token; raise ConfigError if neither names one."""
    if tokenizer.eos_token_id is None:
        named = config.eos_token_id
        end = named[0] if isinstance(named, list) and named else named
        token = tokenizer.convert_ids_to_tokens(end) if isinstance(end, int) and 0 <= end < len(tokenizer) else None
        if token is None:
            raise ConfigError(
                f"the tokenizer of {name} has no end-of-text token to separate documents",
                found=f"no eos_token, and eos_token_id {named} in config.json",
                do="name one in tokenizer_config.json (eos_token)",
            )
        tokenizer.eos_token = token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token


def _check_ids(tokenizer: Any, config: PreTrainedConfig, name: str) -> None:
    """Raise ConfigError if a tokenizer has no vocabulary, or ids beyond the model's embedding.

    Gemma 3's text models ship with an image token beyond their embedding. Added tokens that neither the special tokens
    nor the chat template use are removed, so that their text is encoded as any other text.
    """
    vocabulary, rows = tokenizer.get_vocab(), config.vocab_size
    special = set(tokenizer.all_special_ids)
    if not set(vocabulary.values()) - special:
        raise ConfigError(
            f"{name} has no tokenizer",
            found=f"a vocabulary of {', '.join(sorted(vocabulary)) or 'nothing'}",
            do="copy or download its tokenizer files",
        )
    beyond = {token: place for token, place in vocabulary.items() if place >= rows}
    if not beyond:
        return
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    used = [token for token in beyond if token in needed or token in str(tokenizer.chat_template)]
    if used or beyond.keys() - tokenizer.get_added_vocab().keys() or not tokenizer.is_fast:
        shown = ", ".join(f"{token} {place}" for token, place in sorted(beyond.items(), key=lambda item: item[1])[:3])
        raise ConfigError(
            f"the tokenizer of {name} gives ids up to {max(beyond.values())} where the model has {rows} rows",
            found=shown,
            do="use the tokenizer that the model was trained with, or the model whose embeddings were resized",
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _append_nothing(tokenizer: Any, name: str) -> None:
    """Stop a tokenizer from appending tokens to every text: a prompt is followed by its answer."""
    opening = opening_ids(tokenizer)
    if tokenizer("a")["input_ids"] == opening + tokenizer("a", add_special_tokens=False)["input_ids"]:
        return
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {name} appends tokens to every text",
            do="set add_eos_token to false in tokenizer_config.json",
        )
    tokens = tokenizer.convert_ids_to_tokens(opening)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(zip(tokens, opening, strict=True))
    )
