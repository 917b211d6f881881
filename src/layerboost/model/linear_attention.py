"""Linear attention with a window: LoLCATs' and Liger's layers and the gated delta rule, as tensor functions.

Travels inside every boosted checkpoint. `documents` int `[B, T]` says which keys a query may see: those of the same
number; -1 is padding. A state holds what a layer keeps of tokens beyond its window, for generation.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layerboost.model.attention import boolean_mask, sliding_attention

LINEAR = "layerboost_linear"
# Outputs of a feature map's matrix. σ⁻¹ of 0.1: the weight that LoLCATs' window and the delta rule's state start with.
FEATURES, FIRST_MIX = 64, -2.1972
GATE_TEMPERATURE = 16
# Tokens in a block of gated attention, which holds a decay per pair of tokens and number of a head.
GATED_BLOCK = 16
# The delta rule's decay as it begins, before σ and the temperature: half of a token is left after 600. The logarithm of
# the decay between documents, which leaves nothing.
FIRST_DECAY, FORGOTTEN = 4.0, -60.0
# Tokens in a block of the delta rule.
DELTA_BLOCK = 64
# An attention module's parameters that its base lacks: LoLCATs', and what the delta rule has beside them.
LOLCATS_PARAMETERS = ("feature_map_q", "feature_map_k", "window_mix")
FEATURE_PARAMETERS = (*LOLCATS_PARAMETERS, "state_gates")


def hedgehog(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the features `[softmax(xW), softmax(−xW)]` `[B, Hkv, G, T, 2·F]` of x `[B, Hkv, G or 1, T, D]`.

    weight `[H, D, F]`: one matrix per query head.
    """
    projected = x @ weight.to(x.dtype).unflatten(0, (x.shape[1], -1))
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


def lolcats_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: int,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Return softmax attention over the last `window` keys and linear attention to the older ones, under one
    denominator (LoLCATs, arXiv 2410.10254).

    query `[B, H, Tq, D]`, key and value `[B, Hkv, Tk, D]`, the queries being the last Tq positions. `maps`: the feature
    maps of queries and keys `[H, D, F]` and γ `[H]`: the window's terms are weighted by σ(γ). `state`: that of
    `lolcats_state`, of the tokens before the keys. Returns `[B, H, Tq, D]`, in O(Tk · (window + F)) time.
    """
    queries, keys, dtype = query.shape[2], key.shape[2], query.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (_wide(x) for x in (query, key, value))
    query, key, value = query.unflatten(1, (key.shape[1], -1)), key[:, :, None], _with_ones(value)[:, :, None]
    query_features = hedgehog(query, maps[0])
    if queries == 1 and keys <= window:  # generating: no key is older than the window, but for the state
        visible = None if documents is None else (documents == documents[:, -1:])[:, None, None, None]
        total = _window_terms(query * scaling, key, value, maps[2].sigmoid(), visible)
        total = total if state is None else total + query_features @ state.to(total.dtype)
        return _divided(total).flatten(1, 2).to(dtype)
    key_features = hedgehog(key, maps[1])
    if documents is not None:
        key_features = key_features * (documents >= 0)[:, None, None, :, None]
    front, end = keys - queries, -keys % window
    # [B, Hkv, G, N, n, ·]: blocks of the window's length
    query, query_features = (_blocks(F.pad(x, (0, 0, front, end)), window) for x in (query, query_features))
    key, value, key_features = (_blocks(F.pad(x, (0, 0, 0, end)), window) for x in (key, value, key_features))
    row, column = torch.arange(window, device=query.device)[:, None], torch.arange(window, device=query.device)
    near, far = column <= row, column > row  # own block; the block before, where the rest is beyond the window
    before = torch.arange(key.shape[3], device=query.device)[:, None, None] > 0
    far, old = far & before, near & before
    if documents is not None:
        documents = _blocks(_extended(documents, end)[..., None], window)[..., 0]  # [B, N, n]
        same, same_before = (
            documents[..., :, None] == _shifted(documents, 1, shift)[..., None, :] for shift in (0, 1)
        )  # fmt: skip
        near, far, old = (x[:, None, None] for x in (near & same, far & same_before, old & same_before))
    key_before, value_before, features_before = (_shifted(x, 3, 1) for x in (key, value, key_features))
    visible = torch.cat(torch.broadcast_tensors(far, near), dim=-1)
    key, values = torch.cat([key_before, key], dim=-2), torch.cat([value_before, value], dim=-2)
    total = _window_terms(query * scaling, key, values, maps[2].sigmoid(), visible)
    total = total + (query_features @ features_before.transpose(-1, -2) * old) @ value_before
    # Blocks before the last one: the state after block n - 2.
    states = _scan(_products(key_features, value, documents), state, documents)
    states = [states[0], *states[: query.shape[3] - 1]]
    reach = None if documents is None else _reach(documents, 2)
    total = total + _read(query_features, states, reach)
    out = _divided(total).flatten(3, 4).flatten(1, 2)
    return out[:, :, front : front + queries].to(dtype)


def lolcats_state(
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: torch.Tensor,
    window: int,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the state of `lolcats_attention` for the token after `key` and `value` `[B, Hkv, T, D]`.

    `[B, Hkv, G, 2·F, D + 1]`: sums of features times values, and in the last column of features, over the tokens that
    the window of that token leaves out.
    """
    left = max(0, key.shape[2] - window + 1)
    features = hedgehog(_wide(key[:, :, None, :left]), feature_map)
    if documents is not None:
        seen = (documents[:, :left] == documents[:, -1:]) & (documents[:, :left] >= 0)
        features = features * seen[:, None, None, :, None]
    added = features.transpose(-1, -2) @ _with_ones(_wide(value[:, :, :left]))[:, :, None]
    return added if state is None else state.to(added.dtype) + added


def gated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_gate: torch.Tensor,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gated linear attention qS, where S decays by exp(log_gate) and adds the outer product of key and value.

    query `[B, H, T, D]`; key, value and log_gate `[B, Hkv, T, D]`. Returns `[B, H, T, D]` and the state
    `[B, Hkv, D, D]` after the last token. (Gated linear attention, arXiv 2312.06635, Eq. 3, without a denominator.)
    """
    length, dtype, end = query.shape[2], query.dtype, -query.shape[2] % GATED_BLOCK
    query, key, value, log_gate = (_wide(x) for x in (query, key, value, log_gate))
    if documents is not None:
        seen = (documents >= 0)[:, None, :, None]
        key, log_gate = key * seen, log_gate * seen
    query = query.unflatten(1, (key.shape[1], -1))
    query, key, value, gate = (_blocks(F.pad(x, (0, 0, 0, end)), GATED_BLOCK) for x in (query, key, value, log_gate))
    gate = gate.cumsum(-2)
    causal = torch.ones(GATED_BLOCK, GATED_BLOCK, dtype=torch.bool, device=query.device).tril()
    if documents is not None:
        documents = _blocks(_extended(documents, end)[..., None], GATED_BLOCK)[..., 0]
        causal = (causal & (documents[..., :, None] == documents[..., None, :]))[:, None]
    # [B, Hkv, N, n, n, D]: the differences of the logarithms are at most 0, so that nothing overflows.
    decay = (gate[..., :, None, :] - gate[..., None, :, :]).masked_fill(~causal[..., None], -torch.inf).exp()
    scores = torch.einsum("bhgnid,bhnijd->bhgnij", query, decay * key[..., None, :, :])
    total = gate[..., -1:, :]
    products = _products(key * (total - gate).exp(), value, documents)
    states = _scan(products, state, documents, total.transpose(-1, -2).exp())
    reach = None if documents is None else _reach(documents, 1)
    far = _read(query * gate.exp()[:, :, None], [each[:, :, None] for each in states[:-1]], reach)
    out = scores @ value[:, :, None] + far
    return out.flatten(3, 4).flatten(1, 2)[:, :, :length].to(dtype), states[-1]


def delta_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rate: torch.Tensor,
    documents: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what queries read from a state that decays and is corrected towards each token's value, at its key.

    S ← e^log_decay · S, then S ← S + rate · k ⊗ (v − Sᵀk); the output is Sᵀq (gated delta rule, arXiv 2412.06464, Eq.
    10). query `[B, H, T, F]`, key `[B, Hkv, T, F]`, value `[B, Hkv, T, D]`, log_decay and rate `[B, Hkv, T]`. Returns
    `[B, H, T, D]` and the state `[B, Hkv, F, D]` after the last token. (Blocks: arXiv 2406.06484, Eq. 10 and 11.)
    """
    length, dtype = query.shape[2], query.dtype
    size = min(DELTA_BLOCK, length)
    query, key, value, log_decay, rate = (_wide(x) for x in (query, key, value, log_decay[..., None], rate[..., None]))
    if documents is not None:
        last = documents.cummax(1).values  # of what is no padding
        starts = F.pad((last[:, 1:] != last[:, :-1]) & (last[:, :-1] >= 0), (1, 0))
        seen, starts = ((x[:, None, :, None]) for x in (documents >= 0, starts))
        rate, log_decay = rate * seen, log_decay * seen + FORGOTTEN * starts
    query = query.unflatten(1, (key.shape[1], -1))
    query, key, value, log_decay, rate = (
        _blocks(F.pad(x, (0, 0, 0, -length % size)), size) for x in (query, key, value, log_decay, rate)
    )
    decay = log_decay.cumsum(-2)  # [B, Hkv, N, n, 1]
    lower = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    between = (decay - decay.transpose(-1, -2)).masked_fill(~lower, -torch.inf).exp()
    # What a block writes, once the values that earlier keys of the block read are taken off: a triangular system.
    system = rate * (key @ key.transpose(-1, -2)) * between
    given = torch.cat([rate * value, rate * decay.exp() * key], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    own, read = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    scores = (query @ key[:, :, None].transpose(-1, -2)) * between[:, :, None]
    query, key = query * decay.exp()[:, :, None], key * (decay[..., -1:, :] - decay).exp()
    kept = decay[..., -1:, :].exp()
    current = query.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1]) if state is None else _wide(state)
    out = []
    for index in range(key.shape[2]):
        written = own[:, :, index] - read[:, :, index] @ current
        out.append(query[:, :, :, index] @ current[:, :, None] + scores[:, :, :, index] @ written[:, :, None])
        current = current * kept[:, :, index] + key[:, :, index].transpose(-1, -2) @ written
    return torch.cat(out, dim=3).flatten(1, 2)[:, :, :length].to(dtype), current


def documents_of(mask: torch.Tensor | None, queries: int) -> torch.Tensor | None:
    """Return the document of each key, -1 of padding, int `[B, Tk]`, of a mask bool `[B, 1, Tq or 1, Tk]`.

    A mask of all positions tells documents of packed text apart, by the first key that a query sees.
    """
    if mask is None:
        return None
    rows = mask[:, 0]
    if queries > 1 and rows.shape[1] == rows.shape[2]:
        return torch.where(rows.diagonal(dim1=1, dim2=2), rows.int().argmax(-1), -1)
    return rows[:, -1].long() - 1


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_ones(value: torch.Tensor) -> torch.Tensor:
    """Return values with a last column of ones, whose weighted sum is the denominator."""
    return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.unflatten(-2, (-1, size))


def _shifted(x: torch.Tensor, dim: int, shift: int) -> torch.Tensor:
    """Return blocks moved up by `shift` along `dim`, zeros first."""
    if not shift:
        return x
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _extended(documents: torch.Tensor, end: int) -> torch.Tensor:
    return torch.cat([documents, documents[:, -1:].expand(-1, end)], dim=1)


def _window_terms(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mix: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    """Return mix · e^(score − its maximum) of the visible keys, times their values: numerator and denominator.

    query `[B, Hkv, G, ..., n, D]`, scaled; mix `[H]`.
    """
    scores = query @ key.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    per_head = mix.to(scores.dtype).view(*scores.shape[1:3], *[1] * (scores.dim() - 3))
    return ((scores - scores.amax(-1, keepdim=True)).exp() * per_head) @ value


def _divided(total: torch.Tensor) -> torch.Tensor:
    return total[..., :-1] / total[..., -1:]


def _products(key: torch.Tensor, value: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Return Σ key ⊗ value of each block's last document, `[..., N, F, D]`; documents `[B, N, n]`."""
    if documents is not None:
        last = documents == documents[..., -1:]
        key = key * last.view(len(last), *[1] * (key.dim() - 4), *last.shape[1:], 1)
    return key.transpose(-1, -2) @ value


def _scan(
    products: torch.Tensor,
    state: torch.Tensor | None,
    documents: torch.Tensor | None,
    decay: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return the state `[..., F, D]` before the first block and after each, from `products` `[..., N, F, D]`.

    `decay` `[..., N, F, 1]`. Of a block in which another document starts, nothing older stays.
    """
    current = torch.zeros_like(products[..., 0, :, :]) if state is None else state.to(products.dtype)
    states = [current]
    for index in range(products.shape[-3]):
        if documents is not None and index:
            stays = documents[:, index, -1] == documents[:, index - 1, -1]
            current = current * stays.view(-1, *[1] * (current.dim() - 1))
        if decay is not None:
            current = current * decay[..., index, :, :]
        current = current + products[..., index, :, :]
        states.append(current)
    return states


def _reach(documents: torch.Tensor, distance: int) -> torch.Tensor:
    """Return `[B, N, n]`: whether a query is in the last document of the block `distance` before; there is none before
    the first blocks, but a state."""
    first = torch.ones_like(documents[:, :distance], dtype=torch.bool)
    return torch.cat([first, documents[:, distance:] == documents[:, :-distance, -1:]], dim=1)[:, : documents.shape[1]]


def _read(query: torch.Tensor, states: list[torch.Tensor], reach: torch.Tensor | None) -> torch.Tensor:
    """Return what queries `[B, Hkv, G, N, n, F]` read from the state of their block, one per block."""
    out = query @ torch.stack(states, dim=3)
    return out if reach is None else out * reach[:, None, None, :, :, None]


def make_linear(attention: Any, window: int, feature_map: str) -> None:
    """Send an attention module through linear attention, and add the parameters that its feature map has.

    LoLCATs' begin as their authors'; those of the delta rule as queries and keys before their rotary embedding, a slow
    decay, a rate of a half and nine tenths of the window.
    """
    attention.layerboost_window, attention.layerboost_feature_map = window, feature_map
    config = attention.config = copy.copy(attention.config)
    config._attn_implementation = LINEAR
    if feature_map != "lolcats":
        attention.register_forward_pre_hook(_note_rotation, with_kwargs=True)
    if feature_map == "liger" or hasattr(attention, FEATURE_PARAMETERS[0]):
        return
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    names: tuple[str, ...] = LOLCATS_PARAMETERS
    if feature_map == "lolcats":
        # Kaiming's uniform distribution, for queries and keys the same, and in `measure` the same as in `convert`.
        generator = torch.Generator().manual_seed(attention.layer_idx)
        start = torch.rand(heads, size, FEATURES, generator=generator, device="cpu") * 2 - 1
        start = start * (6 / (size * FEATURES)) ** 0.5
        parameters = [start, start, torch.full((heads,), FIRST_MIX)]
    else:
        names, gates = FEATURE_PARAMETERS, torch.zeros(kv_heads, size + 1, 2)
        gates[:, -1, 0] = FIRST_DECAY
        parameters = [torch.eye(size).repeat(count, 1, 1) for count in (heads, kv_heads)]
        parameters += [torch.full((heads,), -FIRST_MIX), gates]
    weight = next(attention.parameters())
    for name, values in zip(names, parameters, strict=True):
        setattr(attention, name, nn.Parameter(values.to(weight, copy=True)))


def _note_rotation(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
    module.layerboost_rotation = kwargs["position_embeddings"]


def _unrotated(module: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys as they were before the rotary embedding: a rotation, which the opposite one undoes."""
    cos, sin = module.layerboost_rotation
    scale = cos.square() + sin.square()  # not 1 where an embedding also scales
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    return rotate(query, key, cos / scale, -sin / scale)


def linear_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention `[B, T, H, D]` of a linear layer: a function of Transformers' attention interface.

    `key`: keys, or a pair of keys and the `LinearCacheLayer` that holds the state.
    """
    key, cache = key if isinstance(key, tuple) else (key, None)
    state, window, queries = cache.state if cache else None, module.layerboost_window, query.shape[2]
    mask = boolean_mask(attention_mask, key.shape[2])
    documents = documents_of(mask, queries)
    # Autocast would take products back to half precision, also those that add up the state.
    with torch.autocast(query.device.type, enabled=False):
        if module.layerboost_feature_map == "lolcats":
            maps = tuple(getattr(module, name) for name in LOLCATS_PARAMETERS)
            out = lolcats_attention(query, key, value, maps, window, documents, state, scaling)
            state = lolcats_state(key, value, maps[1], window, documents, state) if cache else state
        else:
            plain_query, plain_key = map(_wide, _unrotated(module, query, key[:, :, -queries:]))
            own, values = None if documents is None else documents[:, -queries:], value[:, :, -queries:]
            near = sliding_attention(query, key, value, window, None, mask, scaling)
            if module.layerboost_feature_map == "liger":
                gate = F.logsigmoid(plain_key) / GATE_TEMPERATURE
                features = plain_query.softmax(-1), plain_key.softmax(-1)
                far, state = gated_attention(*features, values, gate, own, state)
                out = (near + far.to(near.dtype)) / 2
            else:
                maps = tuple(_wide(getattr(module, name)) for name in FEATURE_PARAMETERS)
                # Of unit keys: some families' are so long that the gates would be shut after a few steps.
                gates = F.pad(F.normalize(plain_key, dim=-1), (0, 1), value=1.0) @ maps[3]
                features = F.normalize(plain_query @ maps[0], dim=-1), F.normalize(plain_key @ maps[1], dim=-1)
                log_decay, rate = F.logsigmoid(gates[..., 0]) / GATE_TEMPERATURE, gates[..., 1].sigmoid()
                far, state = delta_attention(*features, values, log_decay, rate, own, state)
                mix = maps[2].sigmoid()[:, None, None]
                out = (mix * near + (1 - mix) * far).to(near.dtype)
    if cache and state is not None:
        cache.state = state  # in float32: sums over all tokens
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(LINEAR, linear_attention_forward)
