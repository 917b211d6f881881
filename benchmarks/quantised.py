"""What the types of a GGUF export cost in quality: KL to the base in float32, and NLL, on held-out text.

    python benchmarks/quantised.py BASE_DIR BOOSTED_DIR TEXT [--tokens 8192]

Matrices take the values that the file holds; llama.cpp also rounds activations to 8 bits, which is not counted. TEXT is
a file that nothing was chosen or healed on. Prints JSON.
"""

from __future__ import annotations

import copy
import json

import gguf
import timing
import torch
from transformers import AutoTokenizer, PreTrainedModel

from layerboost import AutoModelForCausalLM
from layerboost.exporting.gguf_file import TYPES
from layerboost.probes.metrics import token_losses
from layerboost.recipe import Text
from layerboost.text import load_tokens

SEQUENCE_TOKENS = 512


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy whose matrices have the values of a file of this type."""
    model = copy.deepcopy(model)
    for name, weights in model.named_parameters():
        if weights.dim() == 2:
            head = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            chosen, _ = TYPES["q8_0" if kind == "q4_0" and head else kind]
            values = gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), chosen), chosen)
            weights.copy_(torch.from_numpy(values).view_as(weights))
    return model


@torch.no_grad()
def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__)
    for name in ("base", "boosted", "text"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=8192)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    text = Text(source=asked.text, sequence_tokens=SEQUENCE_TOKENS)
    batches = list(load_tokens(text, tokenizer, "held_out", asked.tokens).batches(4))
    models = {name: AutoModelForCausalLM.from_pretrained(getattr(asked, name)).eval() for name in ("base", "boosted")}
    found = {}
    for kind in ("f32", *(kind for kind in TYPES if kind != "f32")):
        for name, model in models.items():
            changed, kl, nll = rounded(model, kind), [], []
            for ids in batches:
                states = [each.get_decoder()(input_ids=ids).last_hidden_state for each in (models["base"], changed)]
                losses = token_losses(models["base"], states[0], ids, states[1], changed)
                kl.append(losses.kl)
                nll.append(losses.nll - losses.base_nll)
            found[f"{name} {kind}"] = {"kl": float(torch.cat(kl).mean()), "nll_gap": float(torch.cat(nll).mean())}
            print(json.dumps({f"{name} {kind}": found[f"{name} {kind}"]}), flush=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
