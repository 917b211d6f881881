"""What layers of each kind keep for generation, as layers of Transformers' dynamic cache.

Travels inside every boosted checkpoint, so it imports nothing of layerboost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

# More tokens than any draft has: what assisted generation crops.
SPARE_TOKENS = 128


class AttentionFreeCacheLayer(DynamicLayer):
    """The cache of a layer without attention: counts tokens, because Transformers asks layer 0 for the length."""

    # Neither True nor False: the masks of full and of sliding layers take their sizes from the first layer of their
    # kind, which this is not.
    is_sliding = None

    def __init__(self, cumulative_length: int = 0) -> None:
        super().__init__()
        self.cumulative_length = cumulative_length

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            self.cumulative_length = min(self.cumulative_length, tokens_to_remove)
        else:
            self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class SlidingCacheLayer(DynamicSlidingWindowLayer):
    """The cache of a sliding layer. Transformers' keeps a view, and with it a whole prompt, until the next token."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values to the cache; return those that the new queries may see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] > 1:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return seen


class MixedCacheLayer(DynamicLayer):
    """The cache of a layer with two kinds of KV heads: it holds the full ones whole, and the others for a window.

    `update` returns keys and values as pairs, of the full heads `[B, Hf, T, D]` and of the windowed ones. `spare`: how
    many tokens more than the window needs are kept, so that as many can be cropped without `activate_past_recording`.
    """

    def __init__(self, window: int, heads: tuple[list[int], list[int]], spare: int = 0) -> None:
        super().__init__()
        self.heads, self.spare = heads, spare
        self.windowed = SlidingCacheLayer(window)
        self.windowed.record_past = spare > 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        full, windowed = self.heads
        keys, values = super().update(take_heads(key_states, full), take_heads(value_states, full))
        near = self.windowed.update(take_heads(key_states, windowed), take_heads(value_states, windowed))
        if self.spare:
            held = self.windowed.sliding_window - 1 + self.spare
            self.windowed.keys = self.windowed.keys[:, :, -held:]
            self.windowed.values = self.windowed.values[:, :, -held:]
        return (keys, near[0]), (values, near[1])

    def activate_past_recording(self) -> None:
        self.windowed.activate_past_recording()

    def reset(self) -> None:
        super().reset()
        self.windowed.reset()

    def crop(self, tokens_to_remove: int) -> None:
        # The window first: it raises where it no longer has what would be left.
        if 0 < self.spare < -tokens_to_remove:
            raise RuntimeError(f"at most {self.spare} tokens can be cropped where KV heads of a layer have a window")
        self.windowed.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.windowed.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.windowed.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.windowed.batch_select_indices(indices)


class LinearCacheLayer(SlidingCacheLayer):
    """The cache of a linear layer: the keys and values of its window, and the state of all that is older.

    `update` returns keys with this layer, whose `state` `[B, ...]` the attention function reads and replaces.
    """

    # A state cannot forget its last tokens.
    is_croppable = False
    state: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return (keys, self), values

    def reset(self) -> None:
        super().reset()
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("the cache of a layer with linear attention cannot be cropped")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.state is not None:
            self.state = self.state[indices]


class AttentionFreeStateCacheLayer(AttentionFreeCacheLayer, LinearAttentionAndFullAttentionLayer):
    """The cache of a layer that has a state and no attention."""

    crop = LinearAttentionLayer.crop  # refuses
    reorder_cache = LinearAttentionLayer.reorder_cache


class SlidingStateCacheLayer(SlidingCacheLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """The cache of a sliding layer with a state next to its attention."""


class MixedStateCacheLayer(MixedCacheLayer, LinearAttentionAndFullAttentionLayer):
    """The cache of a layer with a state next to its attention, which has two kinds of KV heads."""


def take_heads(states: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Return some heads of states `[B, H, T, D]`, as a view if they are consecutive."""
    first, end = heads[0], heads[-1] + 1
    return states[:, first:end] if len(heads) == end - first else states[:, list(heads)]


def place_layers(
    past: DynamicCache, config: Any, skipped: set[int], mixed: Mapping[int, list[int]], linear: Mapping[int, str]
) -> None:
    """Put the layers of our kinds into a cache, which `generate` may have told to expect a crop.

    `skipped`: the layers without attention; `mixed`: the full KV heads of layers with two kinds, an empty list where
    all have the window (see `recorded_full_heads`); `linear`: those with linear attention.
    """
    sliding = [layer for layer in past.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    recording = any(layer.record_past for layer in sliding)
    for index, layer in enumerate(past.layers):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            past.layers[index] = SlidingCacheLayer(layer.sliding_window)
        if not isinstance(layer, CacheLayerMixin):  # a hybrid's state
            layer.is_sliding = AttentionFreeCacheLayer.is_sliding
    while len(past.layers) <= max([*skipped, *mixed, *linear], default=-1):
        past.layers.append(DynamicLayer())
    for index in skipped:
        layer = past.layers[index]
        if not isinstance(layer, AttentionFreeCacheLayer):
            kind = AttentionFreeStateCacheLayer if isinstance(layer, LinearAttentionLayer) else AttentionFreeCacheLayer
            past.layers[index] = kind(layer.get_seq_length())
    for index, full in mixed.items():
        layer = past.layers[index]
        if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer) and not layer.is_initialized:
            past.layers[index] = _windowed(layer, config, full, sliding=bool(sliding))
    for index in linear:
        if type(past.layers[index]) is DynamicLayer and not past.layers[index].is_initialized:
            past.layers[index] = LinearCacheLayer(config.sliding_window)
    if recording:
        past.activate_past_recording()


def _windowed(layer: DynamicLayer, config: Any, full: list[int], *, sliding: bool) -> DynamicLayer:
    """Return the cache to put in place of an empty one, of a layer whose KV heads but for `full` have a window.

    `sliding`: whether the cache has layers that slide by their type.
    """
    if not full:
        return SlidingStateCacheLayer(config.sliding_window)
    state = isinstance(layer, LinearAttentionLayer)
    # Without a sliding layer nothing says whether the cache will be cropped; one with a state never is.
    spare = 0 if sliding or state else SPARE_TOKENS
    windowed = [head for head in range(config.num_key_value_heads) if head not in full]
    kind = MixedStateCacheLayer if state else MixedCacheLayer
    return kind(config.sliding_window, (full, windowed), spare)
