"""A benchmark folder, a model and a tokenizer, all tiny and built on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the glass cup river stone under bright door never holds green water because seven birds leave early"
WORDS = TEXT.split()
MMLU = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
SUBJECTS = sorted(file.stem.removeprefix("mmlu_") for file in MMLU.glob("mmlu_*.yaml"))


def phrase(number: int, length: int = 5) -> str:
    return " ".join(WORDS[(number * 7 + step * (number % 5 + 1)) % len(WORDS)] for step in range(length))


def rows(task: str, count: int) -> list[dict[str, Any]]:
    """`count` items of a task (of each subject for MMLU) in the Hugging Face field names."""
    numbers = range(count)
    if task == "piqa":
        return [{"goal": phrase(n), "sol1": phrase(n + 1), "sol2": phrase(n + 2, 7), "label": n % 2} for n in numbers]
    if task == "winogrande":
        return [
            {
                "sentence": f"{phrase(n)} so _ {phrase(n + 3)}",
                "option1": "Ann",
                "option2": "Robert",
                "answer": str(n % 2 + 1),
            }
            for n in numbers
        ]
    if task == "hellaswag":
        return [
            {
                "activity_label": "Cups",
                "ctx_a": phrase(n),
                "ctx_b": "he",
                "endings": [phrase(n + k) for k in range(4)],
                "label": str(n % 4),
            }
            for n in numbers
        ]
    if task == "mmlu":
        return [
            {
                "question": phrase(n),
                "subject": subject,
                "choices": [phrase(n + k, 2) for k in range(4)],
                "answer": n % 4,
            }
            for subject in SUBJECTS
            for n in numbers
        ]
    return [
        {
            "id": f"{task}{n}",
            "question_stem" if task == "openbookqa" else "question": phrase(n),
            "choices": {"text": [phrase(n + k, k + 2) for k in range(4)], "label": list("ABCD" if n % 2 else "1234")},
            "answerKey": ("ABCD" if n % 2 else "1234")[n % 4],
        }
        for n in numbers
    ]


def write_jsonl(file: Path, lines: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_bench(folder: Path) -> Path:
    """12 items of every task, 2 of every MMLU subject."""
    for task in ("piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag", "openbookqa"):
        write_jsonl(folder / f"{task}.jsonl", rows(task, 12))
    write_jsonl(folder / "mmlu.jsonl", rows("mmlu", 2))
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of two layers with logits far enough from uniform for losses to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
