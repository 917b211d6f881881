"""A checkpoint's tokenizer in a GGUF file: byte-level BPE, or SentencePiece's BPE with tokens for single bytes."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import AutoTokenizer

from layerboost.errors import ConfigError
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
        plain = json.loads(file.read_text())
        model, parts = plain["model"], _parts(plain, "pre_tokenizer")
        kinds = [part["type"] for part in parts]
        if model.get("type") == "BPE" and model.get("byte_fallback"):
            if _is_sentencepiece(plain):
                return SENTENCEPIECE
            kinds.append("byte_fallback, unlike SentencePiece's")
        elif model.get("type") == "BPE":
            if kinds == ["ByteLevel"]:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
                return "smollm"
            if kinds == ["Split", "ByteLevel"]:
                pattern = parts[0]["pattern"].get("Regex")
                if name := SPLITTERS.get((pattern, bool(model.get("ignore_merges")))):
                    return name
                kinds.append(f"pattern {pattern}, ignore_merges {bool(model.get('ignore_merges'))}")
        found = f"{model.get('type')}, {', '.join(kinds)}"
    raise ConfigError(
        f"the tokenizer of {folder} cannot be written to GGUF",
        found=f"{found}; known: byte-level BPE as in Llama 3, OLMo 2, Qwen2, Mistral Nemo, SmolLM and GPT-2, and "
        "SentencePiece's BPE with tokens for bytes, as in Mistral and Gemma",
        do="export to another format (`layerboost ls targets`), or serve the checkpoint itself",
    )


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Add tokens, merges or scores, special tokens and chat template."""
    plain, split = json.loads((folder / "tokenizer.json").read_text()), splitter(folder)
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
    # The library reads it from settings that not all tokenizers have or obey, and llama.cpp has defaults of its own.
    opening = opening_ids(AutoTokenizer.from_pretrained(folder))
    special.add_special_token["bos"] = bool(opening)
    if opening:
        special.special_token_ids["bos"] = opening[0]
    special.add_to_gguf(writer, quiet=True)


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
