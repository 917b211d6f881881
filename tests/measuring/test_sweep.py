"""The sweep against full forward passes of changed models, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import families, fitted, layer_plans, tiny_model
from transformers import PreTrainedModel

from layerboost.measuring.sweep import candidates, sweep
from layerboost.model.modeling import attention_layers, base_layer_types, decoder_layers
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import apply_plan
from layerboost.model.thinning import thin_mlps
from layerboost.probes.probe import TextProbe
from layerboost.retrieval import Prompts
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Variant
from layerboost.strategies import FEATURE_MAPS, MEASURED, StrategyName

IDS = torch.randint(3, 200, (5, 40), generator=torch.Generator().manual_seed(1))
PROMPTS = Prompts("passkey", IDS[:4].flip(0), (3, 2, 3, 1), (0.2, 0.4, 0.6, 0.8))
FAMILIES = families(sliding=False)


def swept(
    base: PreTrainedModel,
    windows: tuple[int, ...],
    plan: list[LayerPlan] | None = None,
    head_group: int | None = None,
    strategies: tuple[StrategyName, ...] = MEASURED,
    mlp_widths: tuple[int, ...] = (),
) -> list[LayerSensitivity]:
    batches = list(IDS.split(2))
    thinned = thin_mlps(base, batches, [(layer, width) for layer in range(4) for width in mlp_widths])
    stream = LayerStream(
        base, calibrate_sinks(base, batches, attention_layers(base.config.get_text_config()), windows), thinned
    )
    probe = TextProbe(stream, batches, PROMPTS.batches(3), windows)
    found: list[LayerSensitivity] = []
    save = lambda layers: found.__setitem__(slice(None), layers)  # noqa: E731
    options = candidates(base.config.get_text_config(), windows, strategies, mlp_widths)
    sweep([probe], options, [], save, plan, head_group)
    return found


@torch.no_grad()
def naive(base: PreTrainedModel, changed: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a changed model loses, from full logits of both."""
    p, q = (model(IDS).logits.log_softmax(-1)[:, :-1] for model in (base, changed))
    labels = IDS[:, 1:, None]
    answers = []
    for model in (base, changed):
        logits = model(PROMPTS.ids).logits.log_softmax(-1)[:, :-1].gather(-1, PROMPTS.ids[:, 1:, None])[..., 0]
        answers.append(torch.stack([row[-n:].sum() for row, n in zip(logits, PROMPTS.answers, strict=True)]))
    return {
        "kl": (p.exp() * (p - q)).sum(-1).mean(-1),
        "nll": (p.gather(-1, labels) - q.gather(-1, labels)).mean((1, 2)),
        "top1": (p.argmax(-1) != q.argmax(-1)).float().mean(-1),
        "retrieval": answers[0] - answers[1],
    }


def changed_model(family: str, plan: list[LayerPlan]) -> PreTrainedModel:
    base, batches = tiny_model(family, layers=4), list(IDS.split(2))
    windows = [entry.window for entry in plan if entry.sink and entry.window]
    sinks = calibrate_sinks(base, batches, attention_layers(base.config.get_text_config()), windows)
    thinned = thin_mlps(base, batches, [(entry.layer, entry.mlp_width) for entry in plan if entry.mlp_width])
    of_layers = {layer: found for (layer, _), found in thinned.items()}
    return apply_plan(base, plan, {entry.layer: sinks(entry) for entry in plan if entry.sink}, of_layers)


def check_scores(family: str, layer: int, variants: list[Variant], tolerance: float = 2e-5) -> None:
    """Hold the scores to full forward passes of models in which this layer alone has changed."""
    for variant in variants:
        plan = layer_plans(fitted("ffff", family))
        plan[layer] = plan[layer].with_site(variant.plan(layer))
        for metric, values in naive(tiny_model(family, layers=4), changed_model(family, plan)).items():
            assert variant.scores[metric].mean == pytest.approx(float(values.mean()), abs=tolerance), metric


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_full_forward_passes(family: str) -> None:
    base = tiny_model(family, layers=4)
    found = swept(base, (8, 16))
    assert [entry.layer for entry in found] == [0, 1, 2, 3]
    for entry, kind in zip(found, base_layer_types(base.config.get_text_config()), strict=True):
        assert len(entry.variants) == (5 if kind == "full_attention" else 0)
        check_scores(family, entry.layer, entry.variants)
        for variant in entry.variants:
            assert variant.scores["kl"].count == 5 * 39
            assert variant.scores["retrieval"].count == 4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_of_linear_attention_equal_full_forward_passes(family: str) -> None:
    """Untrained; and the sweep leaves nothing of it in the model."""
    base = tiny_model(family, layers=4)
    found = swept(base, (8,), strategies=("linear",))
    assert [variant.label for variant in found[0].variants] == [f"linear 8 {kind}" for kind in FEATURE_MAPS]
    for entry in found:
        check_scores(family, entry.layer, entry.variants)
    assert base.state_dict().keys() == tiny_model(family, layers=4).state_dict().keys()
    assert torch.equal(base(IDS).logits, tiny_model(family, layers=4)(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_kv_heads_equal_full_forward_passes(family: str) -> None:
    base = tiny_model(family, layers=4)
    found = swept(base, (8,), head_group=1)
    if family == "llama":
        assert [entry.variants for entry in found] == [entry.variants for entry in swept(base, (8,))]
    for entry in found:
        assert [(v.window, v.full_kv_heads) for v in entry.heads] == [(8, (1,)), (8, (0,))] * bool(entry.variants)
        whole = {v.sink: v.scores["kl"].mean for v in entry.variants if v.window}
        assert all(variant.sink == (whole[True] < whole[False]) for variant in entry.heads)
        check_scores(family, entry.layer, entry.heads)


@pytest.mark.parametrize("family", families(sliding=False, mlps=True))
def test_scores_of_mlps_equal_full_forward_passes(family: str) -> None:
    base = tiny_model(family, layers=4)
    found = swept(base, (8,), mlp_widths=(48, 24))
    if family == "llama":
        assert [entry.variants[:-3] for entry in found] == [entry.variants for entry in swept(base, (8,))]
    for entry in found:
        mlps = entry.variants[-3:]
        assert [variant.label for variant in mlps] == ["MLP thin 48", "MLP thin 24", "MLP none"]
        assert ["cosine" in variant.scores for variant in mlps] == [False, False, True]
        check_scores(family, entry.layer, mlps, 5e-5)


@pytest.mark.parametrize(
    ("letters", "layer", "letter"), [("nfSs", 1, "n"), ("nfSs", 2, "S"), ("nfSs", 2, "n"), ("ftsf", 2, "t")]
)
def test_on_a_plan_a_score_is_what_this_layer_adds_to_what_the_plan_loses(
    letters: str, layer: int, letter: str
) -> None:
    def loses(kind: str) -> dict[str, torch.Tensor]:
        plan = layer_plans(letters[:layer] + kind + letters[layer + 1 :], 16)
        return naive(tiny_model(layers=4), changed_model("llama", plan))

    found = swept(tiny_model(layers=4), (16,), layer_plans(letters, 16), mlp_widths=(48,))[layer].variants
    [variant] = [each for each in found if each.plan(layer) == layer_plans("fff"[:layer] + letter, 16)[layer]]
    rest, own = loses("f"), loses(letter)
    for metric in ("kl", "nll", "retrieval"):
        added = float((own[metric] - rest[metric]).mean())
        assert variant.scores[metric].mean == pytest.approx(added, abs=5e-5)


def test_groups_of_kv_heads_and_a_single_group() -> None:
    base = tiny_model(layers=4, num_key_value_heads=4)
    of_windows = swept(base, (8, 16), head_group=2)[0].heads
    assert [(v.window, v.full_kv_heads) for v in of_windows] == [(8, (2, 3)), (8, (0, 1)), (16, (2, 3)), (16, (0, 1))]
    assert [entry.heads for entry in swept(tiny_model(layers=4), (8,), head_group=2)] == [[]] * 4


@pytest.mark.parametrize("room", [0.5, 0.0])
def test_positions_that_a_window_leaves_alone_are_left_out(room: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.probes.probe.CACHE_FRACTION", room)
    stream = LayerStream(tiny_model(layers=4), lambda _: torch.zeros(4))
    probe = TextProbe(stream, [IDS], windows=(8, 16, 32))
    probe.streams.advance(0)
    # Half of a sequence is scored whatever the window; a sink is seen from everywhere.
    lengths = {"fsff": 32, "fSff": 40, "fnff": 40, "ffff": 40, "fssf": 40}
    for letters, length in lengths.items():
        [(_, _, _, final)] = probe.streams.runs([layer_plans(letters, 8)])
        assert final.shape[1] == (length if room else 40), letters
    [(_, _, _, final)] = probe.streams.runs([layer_plans("fsff", 32)])
    assert final.shape[1] == (20 if room else 40)


@torch.no_grad()
def test_texts_too_short_for_a_window_lose_nothing() -> None:
    batches = [IDS[:, :length] for length in (40, 3, 2)]
    probe = TextProbe(LayerStream(tiny_model(layers=4)), batches, windows=(8,))
    [losses] = probe.losses([layer_plans("fsff", 8)])
    assert losses["kl"][:5].min() > 1e-4
    assert losses["kl"][5:].abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_local_scores(family: str) -> None:
    """cosine and mse from the definitions, with the hidden states Transformers returns."""
    base = tiny_model(family, layers=4)
    # The last token predicts nothing that is scored.
    states = [state[:, :-1] for state in base(IDS, output_hidden_states=True).hidden_states]
    mlps = family in families(sliding=False, mlps=True)
    found = swept(base, (8,), mlp_widths=(48,) if mlps else ())
    changed = changed_model(family, layer_plans(fitted("fnff", family)))(IDS, output_hidden_states=True).hidden_states
    error = (changed[2][:, :-1] - states[2]).square().sum((1, 2)) / states[2].square().sum((1, 2))
    [removed] = [variant for variant in found[1].variants if variant.attention == "none"]
    assert removed.scores["mse"].mean == pytest.approx(float(error.mean()), rel=1e-4)
    # Removal leaves the stream before the attention; the attention's own part is what cosine sees, next to a state too.
    second: Any = decoder_layers(base)[1]
    for name, module in second.named_children():
        if name in ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "mamba"):
            module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    attended = base(IDS, output_hidden_states=True).hidden_states[2][:, :-1]
    assert removed.scores["cosine"].mean == pytest.approx(float(_turn(states[1], attended)), abs=1e-5)
    cosines = [variant.scores["cosine"].mean for variant in found[1].variants if "cosine" in variant.scores]
    assert len(cosines) == 1 + mlps
    if mlps:
        assert cosines[1] == pytest.approx(float(_turn(attended, states[2])), abs=1e-5)
    assert found[1].block_influence
    assert found[1].block_influence.mean == pytest.approx(float(_turn(states[1], states[2])), abs=1e-5)


def _turn(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return 1 - torch.cosine_similarity(before, after, dim=-1).mean()


def test_a_sweep_goes_on_where_it_stopped() -> None:
    base, options = tiny_model(layers=4), [[plan] for plan in layer_plans("nnnn")]
    saved: list[list[LayerSensitivity]] = []
    again: list[list[LayerSensitivity]] = []
    sweep([TextProbe(LayerStream(base), [IDS])], options, [], lambda layers: saved.append(list(layers)))
    sweep([TextProbe(LayerStream(base), [IDS])], options, saved[1], lambda layers: again.append(list(layers)))
    assert len(again) == 2
    assert again[-1] == saved[-1]


@torch.no_grad()
def test_variants_share_the_norm_and_projections_of_their_layer() -> None:
    base = tiny_model(layers=4)
    stream = LayerStream(base)
    hidden, _ = stream.forward(IDS)
    computed = []

    def counted(name: str) -> None:
        module = base.model.layers[0].get_submodule(name)
        stock = module.forward

        def forward(x: torch.Tensor) -> Any:
            computed.append(name)
            return stock(x)

        module.forward = forward

    plans = layer_plans("fsn")
    alone = [stream.layer(0, hidden, plan) for plan in plans]
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"):
        counted(name)
    with stream.shared(0, hidden):
        together = [stream.layer(0, hidden, plan) for plan in plans]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    assert sorted(computed) == ["input_layernorm", "self_attn.o_proj", "self_attn.o_proj", "self_attn.q_proj"]
    assert "forward" not in vars(base.model.layers[0].self_attn.k_proj)


def test_candidates_are_every_setting_of_every_strategy() -> None:
    windows = ["sliding 8", "sliding 8 + sink", "sliding 16", "sliding 16 + sink", "none"]
    mlps = ["MLP thin 48", "MLP thin 24", "MLP none"]
    [found] = candidates(tiny_model(layers=1).config, (8, 16), mlp_widths=(48, 24))
    assert [plan.label for plan in found] == windows + mlps
