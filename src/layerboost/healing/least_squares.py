"""Stage 0: fit each sliding layer's output projection to the base's attention by least squares, without training.

A window removes keys, and with them a part of what attention adds to the stream. Much of that part is a linear
function of what the window still holds, and the best such function has a closed form (ridge regression).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from layerboost.errors import ConfigError, LayerboostError
from layerboost.files import replacing
from layerboost.healing.data import lengths_of
from layerboost.healing.distillers import AttentionDistiller
from layerboost.healing.training import Metrics
from layerboost.model.ridge import Sums, best_change, held_out
from layerboost.model.stream import input_of, recorded
from layerboost.model.surgery import output_projection
from layerboost.recipe import Recipe
from layerboost.runtime import Progress, log, main_process_first
from layerboost.schemas.healing import METRICS
from layerboost.schemas.plan import LayerPlan
from layerboost.strategies import SLIDING
from layerboost.traffic import Given, Reread, to_device

MOST_BYTES = 2 << 30  # of sums at once: a wide model needs several passes of the base
STAGE = "fit"


def check_fit(recipe: Recipe) -> None:
    """Raise ConfigError for a fit that cannot be made."""
    tokens, length = recipe.heal.fit_tokens, max(lengths_of(recipe))
    if 0 < tokens < 2 * length:
        raise ConfigError(
            "heal.fit_tokens are too few: the fit needs one sequence and another to judge it",
            found=f"{tokens} in sequences of {length}",
            do=f"set heal.fit_tokens to {2 * length} or more, or to 0",
        )
    if tokens and recipe.heal.shard:
        raise ConfigError(
            "a sharded model cannot be fitted by least squares",
            found=f"heal.shard, heal.fit_tokens {tokens}",
            do="set heal.fit_tokens to 0, or heal.shard to false",
        )


def fit_stage(
    distiller: AttentionDistiller,
    sequences: Sequence[torch.Tensor],
    tokens: int,
    folder: Path,
    validate: Callable[[], dict[str, float]],
    given: Sequence[Reread] = (),
) -> list[int]:
    """Fit the student's output projections to the first `tokens` tokens of the sequences `[L]`; return the layers
    changed. `given`: what goes with each sequence's ids if they are requests.

    `folder/fit.safetensors` stores them; an existing fit is only loaded. One that does not lower `validation_kl` of
    `validate()` is dropped, with a warning. Under torchrun the first process fits and the others read its file. Raise
    LayerboostError if a layer's output is not finite.
    """
    file = folder / f"{STAGE}.safetensors"
    with main_process_first():
        if not file.is_file():
            metrics = Metrics(STAGE, folder / METRICS, after_step=-1)
            before = validate()
            metrics.write(0, 0, before)
            fitted = fit_outputs(distiller, sequences, tokens, given)
            before_fit = {layer: projection_of(distiller, layer).weight for layer in fitted}
            put(distiller, fitted)
            after = validate()
            metrics.write(1, tokens, after)
            if not fitted:
                log.warning("no output projection is fitted: none has a smaller error on the held-out sequences")
            elif not after["validation_kl"] < before["validation_kl"]:
                log.warning(
                    "the least-squares fit is dropped: validation KL %.4f with it, %.4f without",
                    after["validation_kl"],
                    before["validation_kl"],
                )
                put(distiller, before_fit)
                fitted = {}
            with replacing(file) as temporary:
                save_file({str(layer): weight.contiguous() for layer, weight in fitted.items()}, temporary)
    fitted = {int(layer): weight for layer, weight in load_file(file).items()}
    put(distiller, fitted)
    return sorted(fitted)


@torch.no_grad()
def fit_outputs(
    distiller: AttentionDistiller, sequences: Sequence[torch.Tensor], tokens: int, given: Sequence[Reread] = ()
) -> dict[int, torch.Tensor]:
    """Return the output projection `[E, I]` of each sliding layer, fitted to the first `tokens` tokens of `sequences`.

    The student's attention gets the input of the base's, as in stage 1; the target is the base's output. Left out
    are layers in which no ridge lowers the error on the held-out last fifth of the tokens.
    """
    # Full sequences: a shorter last one might fit into the window, and would show nothing.
    ends = [end for end in accumulate(map(len, sequences)) if end <= tokens]
    total, device = ends[-1], next(distiller.student.parameters()).device
    sites = [site for entry in distiller.changed for site in entry.sites()]
    sliding = [site for site in sites if site.attention == SLIDING]
    # Groups of layers whose sums stay within MOST_BYTES.
    size = max(1, MOST_BYTES // sums_bytes(*projection_of(distiller, sliding[0].layer).weight.shape)) if sliding else 1
    groups = [sliding[start : start + size] for start in range(0, len(sliding), size)]
    fitted = {}
    with Progress("fitting output projections", len(groups) * total, "tokens") as progress:
        for group in groups:
            sums = {
                entry.layer: tuple(Sums.zeros(projection_of(distiller, entry.layer)) for _ in range(2))
                for entry in group
            }
            for index, (row, end) in enumerate(zip(sequences, ends, strict=False)):
                images = to_device(given[index](), device) if given else None
                for layer, inputs, error in _errors(distiller, group, row[None].to(device), images):
                    sums[layer][held_out(end, total)].add(inputs, error)
                progress.advance(len(row))
            for layer, (seen, unseen) in sums.items():
                if not math.isfinite(seen.error + unseen.error):
                    raise LayerboostError(
                        f"the attention of layer {layer} is not finite on the text it is fitted to",
                        do="look for the cause in the base: `layerboost evaluate` names layer and token",
                    )
                change = best_change(seen, unseen)
                if change is not None:
                    weight = projection_of(distiller, layer).weight
                    fitted[layer] = (weight.double() + change).to(weight.dtype)
    return fitted


def projection_of(distiller: AttentionDistiller, layer: int) -> nn.Linear:
    """Return the student's output projection; if it has an adapter, the linear layer below."""
    module: Any = output_projection(distiller.student, layer)
    return getattr(module, "base_layer", module)


def put(distiller: AttentionDistiller, weights: dict[int, torch.Tensor]) -> None:
    """Replace the student's output projections, by layer; the base keeps its own."""
    for layer, weight in weights.items():
        projection = projection_of(distiller, layer)
        projection.weight = nn.Parameter(weight.to(projection.weight.device), requires_grad=False)


def sums_bytes(outer: int, inner: int) -> int:
    """Return the bytes of a layer's sums, of fitted and held-out sequences, for a projection `[outer, inner]`."""
    return 2 * 8 * inner * (inner + outer)


def _errors(
    distiller: AttentionDistiller, entries: Sequence[LayerPlan], ids: torch.Tensor, given: Given | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each layer, its output projection's input `[B, T, I]`, and the base's output less its own `[B, T, E]`."""
    calls = distiller.teacher_calls(ids, entries, given)
    for entry in entries:
        call = calls.pop(entry.layer)
        with recorded({entry.layer: projection_of(distiller, entry.layer)}, input_of) as inputs:
            output = distiller.student_output(entry, call)
        yield entry.layer, inputs[entry.layer], call.output.float() - output.float()
