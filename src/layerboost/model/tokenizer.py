"""A model's tokenizer: held to its files and to its model when it is loaded, passed on as its files are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from layerboost.errors import ConfigError
from layerboost.model.files import check_readable, first_line
from layerboost.runtime import log
from layerboost.text import opening_ids

# What a tokenizer is made from, and the settings of generation: a boosted checkpoint has the base's own.
PASSED_ON = (
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
    "generation_config.json",
)
# On which AutoTokenizer and tokenizer.json must agree: cases, digits, runs of spaces, lines, signs, other scripts.
SENTENCE = "Hello world,  it's 2023!\n\tA naïve café costs 1,234.50 € — 北京 🙂 {x = y_1;}  \n ok"


def open_tokenizer(
    folder: Path, name: str, config: PreTrainedConfig, trust_remote_code: bool = False, gguf: str | None = None
) -> Any:
    """The tokenizer of a model as its files say, with a token for the end of a text and one for padding.

    It puts nothing behind a text. Raises ConfigError for a tokenizer that is not of this model.
    """
    for file in [] if gguf else passed_on(folder):
        check_readable(file)
    kwargs = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
        file = folder / "tokenizer.json"
        if file.is_file() and not gguf:
            tokenizer = _as_written(tokenizer, file)
    except Exception as error:  # each kind of tokenizer has its own
        raise ConfigError(
            f"cannot load the tokenizer of {name}",
            found=first_line(error),
            do="copy or download its tokenizer files again",
        ) from None
    _set_end(tokenizer, config, name)
    _check_ids(tokenizer, config, name)
    _put_nothing_behind(tokenizer, name)
    return tokenizer


def passed_on(folder: Path) -> list[Path]:
    """The files of a base that its boosted checkpoints have as they are, beside its licence."""
    return sorted({file for pattern in PASSED_ON for file in folder.glob(pattern) if not file.is_dir()})


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The files that a tokenizer was loaded from, and those beside them; one that was not loaded is saved."""
    base = Path(tokenizer.name_or_path)
    files = passed_on(base) if tokenizer.name_or_path else []
    for file in files:
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    if not files:
        tokenizer.save_pretrained(folder)


def _as_written(tokenizer: Any, file: Path) -> Any:
    """The tokenizer if it reads a sentence as its tokenizer.json says, else one that does.

    Transformers builds some classes anew, with another treatment of spaces, from no more than the file's vocabulary.
    """
    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    wanted = plain.encode(SENTENCE, add_special_tokens=False).ids
    if tokenizer(SENTENCE, add_special_tokens=False)["input_ids"] == wanted:
        return tokenizer
    as_written = PreTrainedTokenizerFast.from_pretrained(file.parent)
    if as_written(SENTENCE, add_special_tokens=False)["input_ids"] != wanted:
        raise ValueError(f"{file} and what Transformers makes of it disagree")
    log.warning(
        "%s is read as it is written: Transformers' %s splits text in another way, and so may vLLM",
        file,
        type(tokenizer).__name__,
    )
    return as_written


def _set_end(tokenizer: Any, config: PreTrainedConfig, name: str) -> None:
    """Give a tokenizer without an end-of-text token the one of the config; raises ConfigError without either."""
    if tokenizer.eos_token is None:
        named = config.eos_token_id
        end = named[0] if isinstance(named, list) and named else named
        token = tokenizer.convert_ids_to_tokens(end) if isinstance(end, int) and 0 <= end < len(tokenizer) else None
        if token is None:
            raise ConfigError(
                f"the tokenizer of {name} has no end-of-text token, which parts documents",
                found=f"no eos_token, and eos_token_id {named} in config.json",
                do="name one in tokenizer_config.json (eos_token)",
            )
        tokenizer.eos_token = token
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token


def _check_ids(tokenizer: Any, config: PreTrainedConfig, name: str) -> None:
    """Raise ConfigError for a tokenizer without words, or with ids beyond the model's embedding.

    Gemma 3's text models come with a token for images beyond theirs. Tokens that are added and that neither the end of
    a text nor the chat template needs are taken out: such text is then read like any other.
    """
    vocabulary, rows = tokenizer.get_vocab(), config.vocab_size
    special = set(tokenizer.all_special_ids)
    if not set(vocabulary.values()) - special:
        raise ConfigError(
            f"{name} has no tokenizer",
            found=f"a vocabulary of nothing but {', '.join(sorted(vocabulary))}",
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


def _put_nothing_behind(tokenizer: Any, name: str) -> None:
    """Have a tokenizer that closes every text leave that out: a prompt goes on with its answer."""
    opening = opening_ids(tokenizer)
    if tokenizer("a")["input_ids"] == opening + tokenizer("a", add_special_tokens=False)["input_ids"]:
        return
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {name} puts tokens behind every text",
            do="set add_eos_token to false in tokenizer_config.json",
        )
    tokens = tokenizer.convert_ids_to_tokens(opening)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(zip(tokens, opening, strict=True))
    )
