"""The boosted model as the draft of its own base, in Transformers: what is accepted, and what it gains by context.

    python benchmarks/speculative.py BASE_DIR BOOSTED_DIR TEXT [--contexts 1024 4096 8192] [--drafts 2 4] [--output 64]

The base continues a passage of TEXT greedily, alone and with drafts of a fixed number of tokens by the boosted model
(arXiv 2211.17192, section 2), in turns. Says whether the tokens are the base's, the fraction of drafted tokens that the
base accepts, and how many times as fast tokens come once both models have read the prompt; the draft's prompt is an
extra cost, given apart. Prints a table, then JSON.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import timing
import torch
from transformers import AutoTokenizer, PreTrainedModel

from layerboost import AutoModelForCausalLM
from layerboost.model.modeling import CACHE
from layerboost.recipe import Text
from layerboost.text import load_tokens


@dataclass(frozen=True)
class Generation:
    """One continuation: its tokens, forward passes of the base, and the times."""

    tokens: list[int]
    passes: int
    first_s: float
    ms_per_token: float


class Passes:
    """The base's forward passes: the tokens cached before each, and when each ended."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cached: list[int] = []
        self.ended: list[float] = []
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def _before(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.cached.append(kwargs[CACHE].get_seq_length())

    def _after(self, *_: Any) -> None:
        self.ended.append(time.perf_counter())

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def generation(base: PreTrainedModel, ids: torch.Tensor, output: int, draft: PreTrainedModel | None) -> Generation:
    """A greedy continuation of `ids` `[1, T]` by `output` tokens."""
    passes, started = Passes(base), time.perf_counter()
    try:
        found = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output,
            min_new_tokens=output,
            do_sample=False,
            **({} if draft is None else {"assistant_model": draft}),
        )
    finally:
        passes.remove()
    ended, prompt = time.perf_counter(), ids.shape[1]
    # Tokens known before the second pass came with the prompt.
    rest = output - (passes.cached[1] + 1 - prompt)
    return Generation(
        found[0, prompt:].tolist(),
        len(passes.ended),
        passes.ended[0] - started,
        1e3 * (ended - passes.ended[0]) / rest,
    )


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__, repeats=3)
    for name in ("base", "boosted", "text"):
        parser.add_argument(name)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--drafts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--output", type=int, default=64)
    asked = parser.parse_args()
    base, boosted = (AutoModelForCausalLM.from_pretrained(getattr(asked, name)).eval() for name in ("base", "boosted"))
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    settings = boosted.generation_config
    settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = "constant", 0.0

    def drafted(ids: torch.Tensor, size: int) -> Generation:
        settings.num_assistant_tokens = size
        return generation(base, ids, asked.output, boosted)

    print("| context | drafted | same tokens | accepted | ms per token: base, with drafts | ratio | first token, s |")
    print("|--:|--:|---|--:|--:|--:|--:|")
    rows = []
    for context in asked.contexts:
        text = Text(source=asked.text, sequence_tokens=context - asked.output)
        [ids] = load_tokens(text, tokenizer, "held_out", text.sequence_tokens).batches(1)
        ways: dict[str, Any] = {"base": lambda ids=ids: generation(base, ids, asked.output, None)}
        ways |= {str(size): lambda ids=ids, size=size: drafted(ids, size) for size in asked.drafts}
        found = timing.in_turn(ways, asked.repeats)
        alone = found.pop("base")
        for size, each in found.items():
            rounds = each[0].passes
            ratio = timing.ratio([one.ms_per_token for one in alone], [one.ms_per_token for one in each])
            row = {
                "context_tokens": context,
                "drafted": int(size),
                "same_tokens": all(one.tokens == alone[0].tokens for one in each),
                "accepted": (asked.output - rounds) / rounds / int(size),
                "base_ms": min(one.ms_per_token for one in alone),
                "drafts_ms": min(one.ms_per_token for one in each),
                "ratio": ratio,
                "first_s": [min(one.first_s for one in ones) for ones in (alone, each)],
            }
            rows.append(row)
            print(
                f"| {context:,} | {size} | {'yes' if row['same_tokens'] else 'no'} | {row['accepted']:.0%} | "
                f"{row['base_ms']:.1f}, {row['drafts_ms']:.1f} | {timing.times(ratio)} | "
                f"{row['first_s'][0]:.1f}, {row['first_s'][1]:.1f} |",
                flush=True,
            )
    timing.show(rows, asked)


if __name__ == "__main__":
    main()
