"""A checkpoint's tokenizer in a GGUF file: byte-level BPE, or SentencePiece's BPE with tokens for single bytes."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from layerboost.errors import ConfigError
from layerboost.model.tokenizer import read_tokenizer
from layerboost.text import opening_ids

# How llama.cpp splits text into words, by a tokenizer's own pattern and whether it takes whole words before merges.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    (CONTRACTIONS + r"\p{N}{1,3}" + REST, True): "llama-bpe",
    (CONTRACTIONS + r"\p{N}{1,3}" + REST, False): "dbrx",
    (CONTRACTIONS + r"\p{N}" + REST, False): "qwen2",
    (TEKKEN, True): "tekken",
}
SENTENCEPIECE = "sentencepiece"
SPACE = "▁"
# llama.cpp merges the pair whose token has the highest score. A token that no merge makes is never made.
NEVER = -1e9


def splitter(folder: Path) -> str:
    """Return llama.cpp's name for how a tokenizer splits text. Raise ConfigError if it is not known."""
    file = folder / "tokenizer.json"
    found = "no tokenizer.json"
    if file.is_file():
        plain = json.loads(file.read_text(encoding="utf-8"))
        model, parts = plain["model"], _parts(plain, "pre_tokenizer")
        kinds = [part["type"] for part in parts]
        if model.get("type") == "BPE" and model.get("byte_fallback"):
            if _is_sentencepiece(plain):
                return SENTENCEPIECE
            kinds.append("byte_fallback, unlike SentencePiece's")
        elif model.get("type") == "BPE":
            name, kinds = _byte_level(plain, parts)
            if name:
                return name
        found = f"{model.get('type')}, {', '.join(kinds)}"
    raise ConfigError(
        f"the tokenizer of {folder} cannot be written to GGUF",
        found=f"{found}; known: byte-level BPE as in Llama 3, OLMo 2, Qwen2, Mistral Nemo, SmolLM and GPT-2, and "
        "SentencePiece's BPE with tokens for bytes, as in Mistral and Gemma",
        do="export to another format (`layerboost ls targets`), or serve the checkpoint itself",
    )


def _byte_level(plain: dict[str, Any], parts: list[dict[str, Any]]) -> tuple[str | None, list[str]]:
    """Return llama.cpp's name for how a byte-level BPE tokenizer splits text, None if it has none, and what it does in
    words: its steps, with what llama.cpp does otherwise."""
    kinds = [part["type"] for part in parts]
    whole = bool(plain["model"].get("ignore_merges"))
    # llama.cpp normalises nothing. Qwen's NFC changes text that is rarely written.
    odd = [step["type"] for step in _parts(plain, "normalizer") if step["type"] != "NFC"]
    if kinds[-1:] == ["ByteLevel"]:
        odd += ["add_prefix_space"] if parts[-1].get("add_prefix_space", True) else []
        splits = parts[-1].get("use_regex", True)
        odd += [f"use_regex {splits}"] if splits == (kinds[0] == "Split") else []
    name = None
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]):
        odd += ["ignore_merges"] if whole else []
        odd += ["digits in groups"] if len(kinds) == 2 and not parts[0]["individual_digits"] else []
        name = "gpt-2" if len(kinds) == 1 else "smollm"
    elif kinds == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex")
        name = SPLITTERS.get((pattern, whole))
        odd += [] if name else [f"pattern {pattern}, ignore_merges {whole}"]
        odd += (
            [] if parts[0]["behavior"] == "Isolated" and not parts[0]["invert"] else [f"split {parts[0]['behavior']}"]
        )
    return None if odd else name, kinds + odd


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Add tokens, merges or scores, special tokens and chat template."""
    plain, split = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), splitter(folder)
    model = plain["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in plain.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if split == SENTENCEPIECE:
        kinds |= {
            model["vocab"][token]: TokenType.BYTE
            for byte in range(256)
            if (token := f"<0x{byte:02X}>") in model["vocab"]
        }
        if model.get("unk_token") in model["vocab"]:
            kinds[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
        ranks = {token: -float(rank) for rank, (token, _) in enumerate(groupby(map("".join, _merges(model))))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([ranks.get(tokens.get(index, ""), NEVER) for index in range(vocabulary)])
        writer.add_add_space_prefix(_starts_with_space(plain))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocabulary)])
    writer.add_token_types([kinds.get(index, TokenType.UNUSED) for index in range(vocabulary)])
    special = gguf.SpecialVocab(folder, load_merges=split != SENTENCEPIECE, n_vocab=vocabulary)
    _set_opening(special, read_tokenizer(folder, str(folder)))
    special.add_to_gguf(writer, quiet=True)


def _set_opening(special: Any, tokenizer: Any) -> None:
    """Have llama.cpp put around a text what Transformers does: its default is by the kind of tokenizer, and the library
    gguf reads settings which Transformers may not follow. Raise ConfigError for more than one token before a text."""
    opening = opening_ids(tokenizer)
    if len(opening) > 1:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} puts more than one token before a text, llama.cpp one",
            found=", ".join(tokenizer.convert_ids_to_tokens(opening)),
            do="serve the checkpoint itself, or export to another format (`layerboost ls targets`)",
        )
    closed = tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    special.add_special_token = {"bos": bool(opening), "eos": closed}
    special.special_token_ids |= {"bos": opening[0]} if opening else {}


def _parts(plain: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Return the steps of a stage of tokenizer.json."""
    found = plain.get(stage) or {"type": "Sequence"}
    if found["type"] != "Sequence":
        return [found]
    return list(found.get("pretokenizers") or found.get("normalizers") or [])


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that merge, first to last."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _is_sentencepiece(plain: dict[str, Any]) -> bool:
    """Return whether a tokenizer turns spaces into a character, splits nothing off, and has a score per token.

    It has one if all merges that make a token follow each other.
    """
    steps = [*_parts(plain, "normalizer"), *_parts(plain, "pre_tokenizer")]
    known = (
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # Gemma's splits at spaces, of which none is left.
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    )
    whole = all(step in known or (step["type"] == "Metaspace" and not step.get("split", True)) for step in steps)
    replaces = any(step["type"] in ("Replace", "Metaspace") for step in steps)
    made = [token for token, _ in groupby(map("".join, _merges(plain["model"])))]
    return whole and replaces and len(made) == len(set(made))


def _starts_with_space(plain: dict[str, Any]) -> bool:
    """Return whether a text is encoded as if a space stood before it."""
    prepends = any(part["type"] == "Prepend" and part["prepend"] == SPACE for part in _parts(plain, "normalizer"))
    spaces = [part for part in _parts(plain, "pre_tokenizer") if part["type"] == "Metaspace"]
    return prepends or any(part.get("prepend_scheme", "always") != "never" for part in spaces)
