"""Naive references of fast paths: the same values, token by token or without sums, differentiable by PyTorch."""

from __future__ import annotations

import torch

from layerboost.model.linear_attention import FEATURES, hedgehog


def lolcats_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: int,
    documents: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Return `lolcats_attention` token by token; as many queries as keys."""
    batch, heads, length, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
    groups = heads // key.shape[1]
    query_features = hedgehog(query.unflatten(1, (-1, groups)), maps[0]).flatten(1, 2)
    key_features = hedgehog(key[:, :, None], maps[1]).flatten(1, 2)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mix = maps[2].sigmoid()[:, None]
    rows = []
    for one in range(batch):
        numerator, denominator = query.new_zeros(heads, 2 * FEATURES, size), query.new_zeros(heads, 2 * FEATURES)
        for now in range(length):
            document, old = documents[one, now], now - window
            if now and documents[one, now - 1] != document:
                numerator, denominator = torch.zeros_like(numerator), torch.zeros_like(denominator)
            if old >= 0 and documents[one, old] == document >= 0:
                added = key_features[one, :, old]
                numerator = numerator + added[:, :, None] * value[one, :, old, None]
                denominator = denominator + added
            near = [i for i in range(max(0, old + 1), now + 1) if documents[one, i] == document]
            scores = (query[one, :, now, None] * key[one, :, near]).sum(-1) * scaling
            weights = mix * (scores - scores.amax(-1, keepdim=True)).exp()
            features = query_features[one, :, now]
            above = (weights[..., None] * value[one, :, near]).sum(1) + torch.einsum("hf,hfd->hd", features, numerator)
            rows.append(above / (weights.sum(-1) + (features * denominator).sum(-1))[:, None])
    return torch.stack(rows).view(batch, length, heads, size).transpose(1, 2)


def gated_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_gate: torch.Tensor,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of `gated_attention` token by token."""
    batch, heads, length, size = query.shape
    documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
    groups = heads // key.shape[1]
    key, value, log_gate = (x.repeat_interleave(groups, 1) for x in (key, value, log_gate))
    rows = []
    for one in range(batch):
        state = query.new_zeros(heads, size, value.shape[-1])
        for now in range(length):
            if now and documents[one, now - 1] != documents[one, now]:
                state = torch.zeros_like(state)
            if documents[one, now] >= 0:
                state = log_gate[one, :, now, :, None].exp() * state
                state = state + key[one, :, now, :, None] * value[one, :, now, None]
            rows.append(torch.einsum("hk,hkv->hv", query[one, :, now], state))
    return torch.stack(rows).view(batch, length, heads, -1).transpose(1, 2)


def delta_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rate: torch.Tensor,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of `delta_attention` token by token."""
    batch, heads, length, size = query.shape
    documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
    groups, last = heads // key.shape[1], -1
    key, value, log_decay, rate = (x.repeat_interleave(groups, 1) for x in (key, value, log_decay, rate))
    rows = []
    for one in range(batch):
        state = query.new_zeros(heads, size, value.shape[-1])
        for now in range(length):
            if documents[one, now] >= 0:
                if documents[one, now] != last:
                    state, last = torch.zeros_like(state), int(documents[one, now])
                state = log_decay[one, :, now, None, None].exp() * state
                error = value[one, :, now] - torch.einsum("hk,hkv->hv", key[one, :, now], state)
                state = state + rate[one, :, now, None, None] * key[one, :, now, :, None] * error[:, None]
            rows.append(torch.einsum("hk,hkv->hv", query[one, :, now], state))
    return torch.stack(rows).view(batch, length, heads, -1).transpose(1, 2)


def refit_reference(inputs: torch.Tensor, weight: torch.Tensor, neurons: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the fitted columns `[D, w]` by least squares on the tokens themselves; `Activations.thinned` has sums.

    `inputs` `[N, W]`: activations of all neurons; `weight` `[D, W]`. The penalty is a row more for each neuron kept.
    """
    kept = inputs[:, neurons]
    penalty = (ridge * kept.square().sum(0).mean() + 1e-12).sqrt()
    error = (inputs @ weight.T) - kept @ weight[:, neurons].T
    rows = torch.cat([kept, penalty * torch.eye(len(neurons), dtype=kept.dtype)])
    targets = torch.cat([error, error.new_zeros(len(neurons), error.shape[1])])
    return weight[:, neurons].add(torch.linalg.lstsq(rows, targets).solution.T)
