"""A continued stream against a whole one."""

from __future__ import annotations

import pytest
import torch
from tiny import OTHERS, SLIDING_BASES, boosted, families, layer_plans, tiny_model

from layerboost.model.stream import LayerStream, explain_not_finite

IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", families(sliding=False, others=False))
@torch.no_grad()
def test_the_positions_after_a_window_alone_are_those_of_the_whole(family: str) -> None:
    stream = LayerStream(tiny_model(family, layers=4))
    assert stream.can_continue
    first, output, cache = stream.forward_with_cache(IDS, 12)
    plan = layer_plans("fsff", 8)
    state = stream.layer(1, stream.layer(0, first), plan[1])
    whole = stream.finish(2, state, plan)
    assert torch.allclose(whole[:, :8], output[:, :8], atol=1e-5)
    assert not torch.allclose(whole[:, 8:], output[:, 8:], atol=1e-3)
    assert torch.allclose(stream.finish_after(cache.first(8), 2, state[:, 8:]), whole[:, 8:], atol=1e-5)
    # The recorded arguments hold no cache: a whole stream after it is as before.
    assert torch.equal(stream.finish(2, state, plan), whole)


@pytest.mark.parametrize("family", [*SLIDING_BASES, *OTHERS, "falcon_h1"])
def test_bases_that_slide_or_have_states_do_not_continue(family: str) -> None:
    assert not LayerStream(tiny_model(family, layers=4)).can_continue


DAMAGE = {
    "the embedding": ("embed_tokens", (5, 0), "first in the embedding (token 1, id 5)", ": weight"),
    "layer 2": ("layers.2.mlp.up_proj", (0, 0), "first in layer 2 (token 1, id 5)", ": mlp.up_proj.weight"),
    "the head": ("lm_head", (7, 0), "first in the head (token id 7)", ": weight"),
}


@pytest.mark.parametrize("where", DAMAGE)
@pytest.mark.parametrize("letters", ["", "fSns"])
def test_the_first_number_that_is_not_finite_is_found(where: str, letters: str) -> None:
    model = boosted(letters) if letters else tiny_model(layers=4)
    ids = torch.tensor([5, 6, 7, 5])
    assert explain_not_finite(model, ids) == ("", "")
    name, place, found, weights = DAMAGE[where]
    module = next(module for key, module in model.named_modules() if key.endswith(name))
    with torch.no_grad():
        module.weight[place] = float("nan")
    told, do = explain_not_finite(model, ids)
    assert told == f"{found}; not finite in its weights{weights}"
    assert "damaged" in do
    assert "float32" not in do  # which no weight would mend


@pytest.mark.parametrize(("dtype", "do"), [(torch.float16, "dtype=float32"), (torch.float32, "leave the text out")])
def test_weights_that_overflow_are_not_called_damaged(dtype: torch.dtype, do: str) -> None:
    model = tiny_model(layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e30 if dtype == torch.float32 else 1e4)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e20 if dtype == torch.float32 else 1.0)
    told, advice = explain_not_finite(model.to(dtype), torch.tensor([5, 6, 7]))
    assert told == "first in layer 1 (token 1, id 5)"
    assert do in advice
