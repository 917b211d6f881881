"""The model card of a boosted checkpoint or an unpacked base, with the licence from the base's own card and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from layerboost.costs.budget import plan_parameters
from layerboost.costs.memory import CPU_DEFAULTS, GPU_DEFAULTS, Serving, plan_serving
from layerboost.model.families import FAMILIES, WRAPPERS, Served
from layerboost.recipe import Card
from layerboost.schemas.plan import PlanFile, counted, counts, layer_rows
from layerboost.strategies import FULL, MLP_STRATEGIES, STRATEGIES

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_FILES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


@dataclass(frozen=True)
class Origin:
    """The base in a card: its Hub id, its licence in the Hub's keys, and the licence files to copy."""

    base_model: str | None = None
    licence: tuple[tuple[str, str], ...] = ()
    files: tuple[Path, ...] = ()


UNKNOWN = Origin()
# The auto class, and the Hub's name of what a model does.
LANGUAGE_MODEL = ("AutoModelForCausalLM", "text-generation")
WRAPPER = ("AutoModelForImageTextToText", "image-text-to-text")
INSTALL = """```console
pip install ".[serve]"    # in a checkout of layerboost; with a vLLM that is there: pip install .
"""
HEADS = """
`full KV heads`: those of a sliding layer that keep full attention, each with its query heads."""


def origin_of(folder: Path, name: str, settings: Card) -> Origin:
    """Return what is known of the base in `folder`, which was asked for by `name`.

    Its own card comes before the settings; the Hub id is `name` where that is one.
    """
    data = card_data(folder)
    licence = {key: str(data[key]) for key in LICENCE_KEYS if data.get(key)}
    if not licence and settings.license:
        licence = {"license": settings.license}
    return Origin(name if _is_hub_id(name) else settings.base_model, tuple(licence.items()), licence_files(folder))


def card_data(folder: Path) -> dict[str, Any]:
    """Return the metadata of a model's card, empty without a valid one."""
    file = folder / CARD
    try:
        data: dict[str, Any] = ModelCard(file.read_text(encoding="utf-8")).data.to_dict() if file.is_file() else {}
    except Exception:  # a card is free text: ignore a broken one
        return {}
    return data


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence and notice files next to the weights, which must be copied with them."""
    named = (found for found in sorted(folder.iterdir()) if found.name.upper().startswith(LICENCE_FILES))
    return tuple(found for found in named if found.is_file())


def front_matter(origin: Origin, tags: tuple[str, ...], task: str = "text-generation") -> str:
    """Return the card's metadata block for the Hub."""
    licence: dict[str, Any] = dict(origin.licence)
    data = ModelCardData(
        base_model=origin.base_model,
        library_name="transformers",
        pipeline_tag=task,
        tags=["layerboost", *tags],
        **licence,
    )
    return f"---\n{data.to_yaml()}\n---"


def licence_sentence(origin: Origin) -> str:
    """Return the card's sentence on the licence."""
    licence = dict(origin.licence)
    named = licence.get("license_name") or licence.get("license")
    if named is None:
        return "The base's own files name no licence: look it up before you share this model."
    return f"The base's licence applies: {named}."


STOCK = """
Without either, Transformers loads a stock model, which ignores windows and sinks and has random numbers for attention
that was removed.
"""


def model_card(plan: PlanFile, origin: Origin, healing: str = "") -> str:
    """Return `README.md` for the Hub: metadata, the plan as a table, how to load and serve, limits."""
    mixed = any(entry.full_kv_heads for entry in plan.layers)
    head, *body = layer_rows(plan.layers)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
    name = origin.base_model or Path(plan.model.name).name
    predicted = plan.valid_prediction
    cache = (
        f" At {predicted.context_tokens} tokens of context it holds {predicted.kv_fraction:.0%} of the base's KV cache."
        if predicted
        else ""
    )
    if any(entry.mlp_changed for entry in plan.layers):
        kept = plan_parameters(plan.model, plan.layers) / plan.model.parameters
        cache += f" It has {kept:.0%} of the base's parameters."
    experts = (
        f" Each token uses {plan.model.active_parameters / 1e6:,.0f} M of the base's "
        f"{plan.model.parameters / 1e6:,.0f} M parameters."
        if plan.model.expert_parameters
        else ""
    )
    own, reach = _full_layers(plan)
    auto, task = WRAPPER if plan.model.model_type in WRAPPERS else LANGUAGE_MODEL
    meanings = _meanings(plan, own)
    return f"""{front_matter(origin, ("sliding-window-attention",) if plan.window else (), task)}

# {name}, boosted

Made by layerboost after the method of LayerBoost (arXiv 2604.22050) from `{name}`.
Of {plan.model.layers} layers: {counted(plan.layers)}.{cache}{experts}
{licence_sentence(origin)}

{healing or "Not healed: the weights that remain are the base's own."}

## Load

PATH is this directory or its Hub id.

```python
from transformers import {auto}  # without trust_remote_code: from layerboost

model = {auto}.from_pretrained("PATH", trust_remote_code=True)
```
{STOCK}
## Serve

{_serve(plan)}
## The plan

{meanings}.
`sink`: a learned logit per head in the softmax's denominator.{mixed * HEADS}

{table}

## Limits

A token can be looked up beyond the window only through the {reach}: test retrieval at your context length before
serving.{" A window counts the tokens of images too." * (auto == WRAPPER[0])} Generation needs Transformers' dynamic
cache.
"""


def base_card(folder: Path, name: str, gguf: str | None) -> str:
    """Return the card of an unpacked model, with the licence that its own card or a GGUF file's metadata names."""
    if gguf is None:
        origin = origin_of(folder, name, Card())
        return f"{front_matter(origin, ())}\n\nDequantised from `{name}`. {licence_sentence(origin)}\n"
    from gguf import GGUFReader

    field = GGUFReader(folder / gguf).get_field("general.license")
    origin = Origin(licence=(("license", str(field.contents())),) if field else ())
    return f"{front_matter(origin, ())}\n\nUnpacked from `{name}`. {licence_sentence(origin)}\n"


def _meanings(plan: PlanFile, own: str) -> str:
    """Return what the strategies of a plan mean; `own`: what full layers do in the base."""
    meanings = "; ".join(
        f"`{each.name}`: {each.meaning}{own * (each.name == FULL)}"
        for each in STRATEGIES.values()
        if each.name in counts(plan.layers)
    )
    if any(entry.mlp_changed for entry in plan.layers):
        meanings += "; of MLPs " + "; ".join(f"`{each.name}`: {each.meaning}" for each in MLP_STRATEGIES.values())
    return meanings


def _full_layers(plan: PlanFile) -> tuple[str, str]:
    """Return which full layers slide as in the base, and the name of those that reach beyond a window."""
    heads = " and full KV heads" * any(entry.full_kv_heads for entry in plan.layers)
    if not (slide := ", ".join(map(str, plan.sliding_as_base))):
        return "", f"full layers{heads}"
    return (
        f" (layers {slide}: the last {plan.model.sliding_window} tokens, as in the base)",
        f"full layers that do not slide{heads}",
    )


def _serve(plan: PlanFile) -> str:
    """Return the commands that serve the model, with the flags for each kind of vLLM, and what these gain and cost."""
    row: Served = WRAPPERS.get(plan.model.model_type) or FAMILIES[plan.model.model_type]
    if not row.vllm:
        return "vLLM does not serve this model. Generate with Transformers.\n"
    if not all(entry.strategy.served for entry in plan.layers):
        return "vLLM does not serve this plan. Generate with Transformers.\n"
    commands = f"{INSTALL}{vllm_commands(plan)}\n```\n"
    if row.cpu_lacks:
        commands += f"\nOn CPUs vLLM does not serve this model: {row.cpu_lacks}.\n"
    if not (found := _advised(plan)):
        return commands
    gains = " ".join(f"{where} {advised.gain}." for where, advised in found.items())
    return commands + (
        "\nvLLM reserves room for the tokens of a step in every sliding layer. With these flags "
        f"and `--max-model-len {plan.settings['context_tokens']}`: {gains}\n"
    )


def vllm_commands(plan: PlanFile, flags: tuple[str, ...] = ()) -> str:
    """Return the line that serves a plan, with more `flags`; one for each kind of vLLM if these need different ones."""
    command = ("vllm serve PATH", *flags)
    if not (found := _advised(plan)):
        return " ".join(command)
    return "\n".join(f"{' '.join((*command, *advised.flags))}    # {where}" for where, advised in found.items())


def _advised(plan: PlanFile) -> dict[str, Serving]:
    """Return what serving needs on each kind of vLLM; none if no flag is needed on any."""
    kinds = {"On a GPU": GPU_DEFAULTS, "On a CPU": CPU_DEFAULTS}
    found = {where: advised for where, engine in kinds.items() if (advised := plan_serving(plan, engine))}
    return found if any(advised.flags for advised in found.values()) else {}


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()
