"""A stock model's decoder run one layer at a time, so that variants of a layer can share the layers below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from layerboost.model.modeling import CACHE, base_layer_types, decoder_layers, final_norm
from layerboost.model.surgery import Thinned, family_of, replaced, unchanged
from layerboost.schemas.plan import LayerPlan
from layerboost.strategies import OTHER

Key = TypeVar("Key")
Record = TypeVar("Record")


class PrefixCache:
    """Keys and values `[B, Hkv, positions, D]` of a batch's first positions, in every layer of the base.

    A stock layer takes it for its cache; it never grows.
    """

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers

    @property
    def positions(self) -> int:
        """Return the number of cached positions."""
        return self.layers[0][0].shape[2]

    @property
    def bytes(self) -> int:
        """Return the memory it takes."""
        return sum(cached.nbytes for pair in self.layers for cached in pair)

    def first(self, positions: int) -> PrefixCache:
        """Return a cache of the first positions alone."""
        return PrefixCache([(key[:, :, :positions], value[:, :, :positions]) for key, value in self.layers])

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that a layer attends to: the cached, then its own."""
        before = self.layers[layer]
        return torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)


def decoded(
    model: PreTrainedModel, ids: torch.Tensor, given: Mapping[str, torch.Tensor] | None = None, **kwargs: Any
) -> torch.Tensor:
    """Return the normed output `[B, T, D]` of a model's decoder on ids `[B, T]`; with what a processor made of images,
    `given`, of a wrapper's."""
    part = model.base_model if given else model.get_decoder()
    return part(input_ids=ids, **(given or {}), **kwargs).last_hidden_state


@contextmanager
def recorded(modules: Mapping[Key, nn.Module], record: Callable[..., Record]) -> Iterator[dict[Key, Record]]:
    """Yield a mapping that collects `record(args, kwargs, output)` of each module's last call in the block."""
    records: dict[Key, Record] = {}

    def recorder(key: Key) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            records[key] = record(args, kwargs, hidden_in(output))

        return hook

    hooks = [module.register_forward_hook(recorder(key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


class LayerCall(NamedTuple):
    """A call of a decoder layer: its arguments besides the hidden states, and what an image tower adds to the stream
    before it (Qwen3-VL's deepstack), None if nothing."""

    arguments: dict[str, Any]
    added: torch.Tensor | None


@contextmanager
def recorded_calls(
    layers: Mapping[int, nn.Module], images: bool
) -> Iterator[tuple[list[torch.Tensor], dict[int, LayerCall]]]:
    """Yield a list that gets the hidden states `[B, T, D]` before the first of a decoder's layers, and a mapping that
    collects the call of each. `images`: whether a tower may add to the stream between them."""
    start: list[torch.Tensor] = []
    below: list[torch.Tensor] = []  # the output of the layer below

    def call(args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> LayerCall:
        hidden = input_of(args, kwargs)
        added = hidden - below[0] if images and below and hidden is not below[0] else None
        if not start:
            start.append(hidden)
        below[:] = [output]
        return LayerCall({name: value for name, value in kwargs.items() if name != "hidden_states"}, added)

    with recorded(layers, call) as calls:
        yield start, calls


def hidden_in(output: Any) -> torch.Tensor:
    """Return the hidden states in a module's output, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], *_: Any) -> torch.Tensor:
    """Return the hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def with_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a decoder layer, its hidden states with a gradient."""
    hidden = input_of(args, kwargs)
    if not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class LayerStream:
    """Layers, final norm and head of one model, callable apart.

    The arguments Transformers passes to each layer (masks, rotary embeddings) are recorded once per batch shape, so no
    family's forward is written again here; what they are for images differs by batch, and each has a stream of its own.
    `sinks`: the sink logits of a layer's plan; `thinned`: its thinned MLPs, by layer and width.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sinks: Callable[[LayerPlan], torch.Tensor] | None = None,
        thinned: Mapping[tuple[int, int], Thinned] | None = None,
    ) -> None:
        self.model = model
        self.sinks, self.thinned = sinks, thinned or {}
        self.layers = decoder_layers(model)
        self.unchanged = unchanged(model.config.get_text_config())
        self._arguments: dict[torch.Size, dict[int, dict[str, Any]]] = {}
        self._added: dict[int, torch.Tensor] = {}

    def own(self) -> LayerStream:
        """Return a stream of the same layers, for a batch with images."""
        return LayerStream(self.model, self.sinks, self.thinned)

    def forward(
        self,
        ids: torch.Tensor,
        cache: DynamicCache | None = None,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the whole decoder on ids `[B, T]`; returns the input of layer 0 and the normed output, `[B, T, D]`.

        An empty `cache` is filled. `given`: as of `decoded`; what is added to the stream between layers (Qwen3-VL's
        deepstack) is recorded too.
        """
        with recorded_calls(dict(enumerate(self.layers)), images=bool(given)) as (start, calls):
            output = decoded(self.model, ids, given, use_cache=cache is not None, **{CACHE: cache})
        self._arguments[ids.shape] = {index: call.arguments | {CACHE: None} for index, call in calls.items()}
        self._added = {index - 1: call.added for index, call in calls.items() if call.added is not None}
        return start[0], output

    def forward_with_cache(self, ids: torch.Tensor, positions: int) -> tuple[torch.Tensor, torch.Tensor, PrefixCache]:
        """Return what `forward` does, and a cache of the first positions; only for a model that `can_continue`."""
        cache = DynamicCache()
        first, output = self.forward(ids, cache)
        cached = [
            (layer.keys[:, :, :positions].clone(), layer.values[:, :, :positions].clone()) for layer in cache.layers
        ]
        return first, output, PrefixCache(cached)

    @property
    def can_continue(self) -> bool:
        """Return whether `finish_after` works: full attention and no state in all layers, by PyTorch's kernel."""
        config = self.model.config.get_text_config()
        full = set(base_layer_types(config)) == {"full_attention"} and not family_of(config).mixer
        return full and config._attn_implementation == "sdpa"

    def layer(self, index: int, hidden: torch.Tensor, plan: LayerPlan | None = None) -> torch.Tensor:
        """Return one decoder layer's output on its input `[B, T, D]`, of a batch shape that `forward` has seen."""
        if plan is not None and plan.changed:
            assert self.sinks or not plan.sink
            sinks = self.sinks(plan) if self.sinks and plan.sink else None
            thinned = self.thinned[index, plan.mlp_width] if plan.mlp_width else None
            with replaced(self.model, index, plan, sinks, thinned):
                return self.layer(index, hidden)
        out = self.stock_layer(index, hidden)
        return out + self._added[index] if index in self._added else out

    def stock_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the base's own layer's output, without what an image tower adds to the stream after it."""
        return self._run(index, hidden, self._arguments[hidden.shape[:2]][index])

    def _run(self, index: int, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Call one decoder layer as Transformers does."""
        return hidden_in(self.layers[index](hidden, **arguments))

    def finish(self, start: int, hidden: torch.Tensor, plan: Sequence[LayerPlan] = ()) -> torch.Tensor:
        """Run layers `start` and up, with `plan` if there is one, and the final norm: `[B, T, D]`."""
        for index in range(start, len(self.layers)):
            hidden = self.layer(index, hidden, plan[index] if plan else None)
        return final_norm(self.model)(hidden)

    def finish_after(self, prefix: PrefixCache, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run `finish` with full layers on the last positions `[B, T, D]` alone, after the base's `prefix`."""
        batch, length = hidden.shape[:2]
        before, every = prefix.positions, prefix.positions + length
        place = torch.arange(every, device=hidden.device)
        # Numbers: every layer would convert a mask of bools into them.
        mask = torch.zeros(1, 1, length, every, dtype=hidden.dtype, device=hidden.device)
        mask.masked_fill_(place > place[before:, None], float("-inf"))
        for index in range(start, len(self.layers)):
            given = dict(self._arguments[torch.Size((batch, every))][index])
            cos, sin = given["position_embeddings"]
            given |= {"position_embeddings": (cos[:, before:], sin[:, before:]), CACHE: prefix}
            if (positions := given["position_ids"]) is not None:
                given["position_ids"] = positions[:, before:]
            given["attention_mask"] = mask
            hidden = self._run(index, hidden, given)
        return final_norm(self.model)(hidden)

    def attention_output(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the attention of one stock layer, or what it has in its place, adds to the stream `[B, T, D]`."""
        family, other = family_of(self.model.config), self.unchanged[index].attention == OTHER
        module = getattr(self.layers[index], family.mixer if other else family.norm_after or family.attention)
        with recorded({index: module}, lambda _, __, out: out) as outputs:
            self.layer(index, hidden)
        config = self.model.config.get_text_config()  # Granite's multiplier, and Falcon-H1's
        return outputs[index] * getattr(config, "residual_multiplier", getattr(config, "attention_out_multiplier", 1.0))

    @contextmanager
    def shared(self, index: int, hidden: torch.Tensor) -> Iterator[None]:
        """Inside the block, calls of layer `index` on `hidden` compute once what does not depend on its attention.

        A submodule called with that very tensor, or with what another one made of it (the norm; then q, k and v),
        repeats its first output. Of use without gradients only.
        """
        known = {id(hidden): hidden}
        outputs: dict[tuple[int, int], torch.Tensor] = {}

        def repeat(module: nn.Module) -> Callable[..., Any]:
            stock = module.forward

            def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if id(x) not in known:
                    return stock(x, *args, **kwargs)
                key = id(module), id(x)
                if key not in outputs:
                    outputs[key] = stock(x, *args, **kwargs)
                    known[id(outputs[key])] = outputs[key]
                return outputs[key]

            return forward

        leaves = [module for module in self.layers[index].modules() if not list(module.children())]
        # Accelerate's hooks sit in the same place.
        before = [module.__dict__.get("forward") for module in leaves]
        for module in leaves:
            module.forward = repeat(module)
        try:
            yield
        finally:
            for module, forward in zip(leaves, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


def text_positions(model: PreTrainedModel, positions: torch.Tensor) -> torch.Tensor:
    """Return positions of text `[B, T]` in the form that a model's decoder takes: `[4, B, T]` if it rotates by three
    positions of an image, before which it wants the one that masks go by.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return positions.expand(4, *positions.shape) if "mrope_section" in rope else positions


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits `[..., V]` of normed hidden states `[..., D]`, with the family's scaling and soft-cap."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides, HyperCLOVA X multiplies
        logits = logits * scaling if family_of(config).multiplies_logits else logits / scaling
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere and Falcon-H1 multiply
        logits = logits * scale if (scale := getattr(config, name, None)) else logits
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def head_matrix(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the head's weight `[V, D]` if logits are its product with the hidden state and nothing more; else None."""
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    extras = ("logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping")
    if getattr(head, "bias", None) is not None or any(getattr(config, name, None) for name in extras):
        return None
    return head.weight


@torch.no_grad()
def explain_not_finite(
    model: PreTrainedModel, ids: torch.Tensor, given: Mapping[str, torch.Tensor] | None = None
) -> tuple[str, str]:
    """Return where a forward pass over ids `[T]` first gives a number that is not finite, and what to do about it.

    The first text names module, token and weights that are not finite themselves; empty if all numbers are finite.
    `given`: as of `decoded`.
    """
    modules = {"the embedding": model.get_input_embeddings()}
    modules |= {f"layer {index}": layer for index, layer in enumerate(decoder_layers(model))}
    modules |= {"the final norm": final_norm(model), "the head": model.get_output_embeddings()}
    with recorded(modules, lambda _, __, output: (~output.isfinite()).nonzero()[:1].tolist()) as bad:
        model(input_ids=ids[None].to(model.device), **(given or {}), use_cache=False)
    name = next((name for name in modules if bad[name]), None)
    if name is None:
        return "", ""
    [[_, position, column]] = bad[name]
    token = f"token id {column}" if name == "the head" else f"token {position + 1}, id {int(ids[position])}"
    weights = [key for key, weight in modules[name].named_parameters() if not weight.isfinite().all()]
    holds = f"; not finite in its weights: {', '.join(weights[:3])}" if weights else ""
    if weights:
        do = "the model is damaged: fetch it again, or make it again with `layerboost convert` and `layerboost heal`"
    elif model.dtype == torch.float32:
        do = "the model overflows on this text in float32 already: leave the text out, or use another model"
    else:
        do = "use a dtype of more range and precision: --set dtype=float32"
    return f"first in {name} ({token}){holds}", do
