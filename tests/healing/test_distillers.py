from __future__ import annotations

import pytest
import torch
from test_losses import distillation_loss_reference
from tiny import Products, boosted, families, fitted, layer_plans, tiny_model

from layerboost.healing import distillers
from layerboost.healing.data import Data
from layerboost.healing.distillers import AttentionDistiller, LogitDistiller, next_tokens, positions_of
from layerboost.model import linear
from layerboost.model.linear import ONEDNN_PRODUCT
from layerboost.model.stream import LayerStream, head_logits
from layerboost.recipe import Heal

END = 1
IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))


def made(letters: str, model_type: str = "llama", **options: object) -> LogitDistiller:
    letters = fitted(letters, model_type)
    student = boosted(letters, model_type).requires_grad_(False)
    first = min(letters.index(letter) for letter in letters if letter not in "fx")
    for name, parameter in student.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        in_mlp = any(part in name for part in ("mlp", "moe", "feed_forward")) and not name.endswith(
            ("expert_bias", "e_score_correction_bias")
        )
        in_tower = "vis" in name
        parameter.requires_grad_(not in_tower and layer >= first and (in_mlp or name.endswith("sinks")))
    teacher = tiny_model(model_type, len(letters)).requires_grad_(False)
    return LogitDistiller(student, teacher, layer_plans(letters), END, **options)  # type: ignore[arg-type]


def check_same_loss(cheap: LogitDistiller, found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected)
    trained = [parameter for parameter in cheap.parameters() if parameter.requires_grad]
    for gradients in zip(*(torch.autograd.grad(loss, trained) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", families())
@pytest.mark.parametrize("letters", ["ffSns", "SnfsS", "ftoom"])
def test_the_cheap_way_equals_two_whole_models(model_type: str, letters: str) -> None:
    cheap = made(letters, model_type)
    weights = torch.rand(IDS.shape)
    hidden, target = (model.get_decoder()(input_ids=IDS).last_hidden_state for model in (cheap.student, cheap.teacher))
    models = cheap.student, cheap.teacher
    heads = [lambda rows, model=model: head_logits(model, rows) for model in models]
    torch.testing.assert_close(heads[0](hidden), cheap.student(IDS).logits)
    plain = distillation_loss_reference(hidden, target, heads[0], heads[1], weights)
    check_same_loss(cheap, cheap(IDS, weights), plain)


def test_layers_below_the_first_change_run_once_and_get_no_gradient() -> None:
    cheap, calls = made("ffSns"), []
    for model in (cheap.student, cheap.teacher):
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda *_, at=(model is cheap.student, index): calls.append(at))
    cheap(IDS).backward()
    assert calls == [(False, 0), (False, 1), (False, 2), (False, 3), (False, 4), (True, 2), (True, 3), (True, 4)]
    assert all(parameter.grad is None for parameter in cheap.teacher.parameters())
    assert all(parameter.grad is None for parameter in cheap.student.model.layers[:2].parameters())


@pytest.mark.parametrize("kind", [ONEDNN_PRODUCT, "aten::mm"])
def test_checkpointing_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    gradients, products = [], []
    monkeypatch.setattr(distillers, "SAVED_WIDTH", 20)
    monkeypatch.setattr(linear, "IS_FASTER", kind == ONEDNN_PRODUCT)
    for checkpointing in ("none", "selective", "full"):
        cheap = made("fSns", checkpointing=checkpointing)
        linear.use_onednn(cheap)
        with Products(kind) as counted:
            cheap(IDS).backward()
        products.append(len(counted.rows))
        gradients.append({name: p.grad for name, p in cheap.named_parameters() if p.requires_grad})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)
        torch.testing.assert_close(gradients[2][name], value)
    # Selective checkpointing computes no wide product again.
    assert products[0] == products[1] < products[2]


def test_further_terms_of_the_loss() -> None:
    plain = made("fSns")(IDS)
    logits = made("fSns").student(IDS).logits
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    with_entropy = made("fSns", ce_weight=0.5)(IDS)
    torch.testing.assert_close(with_entropy, plain + 0.5 * entropy / IDS.numel(), rtol=1e-4, atol=1e-4)


def test_answers_weigh_more_in_the_mean_of_a_step() -> None:
    """A step of two lengths, with the last three tokens beyond the count, against two whole models."""
    cheap = made("ffSns")
    sequences = [IDS[0, :20], IDS[0, 20:], IDS[1]]
    weights = [torch.ones(20), torch.ones(20), torch.ones(40)]
    weights[1][[4, 5]] = weights[2][[30, 38]] = 9
    batches = Data(sequences, 77, Heal(batch_sequences=4), weights=weights).batches(1, IDS.device)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 20), (1, 40)]
    found = sum(cheap(**batch) for batch in batches) / len(batches)
    total, weight = torch.zeros(()), 0.0
    for ids, each, count in zip(sequences, weights, (20, 20, 37), strict=True):
        student, teacher = (
            model(ids[None]).logits[0, :count].log_softmax(-1) for model in (cheap.student, cheap.teacher)
        )
        total = total + ((teacher.exp() * (teacher - student)).sum(-1) * each[:count]).sum()
        weight += float(each[:count].sum())
    check_same_loss(cheap, found, total / weight)


@pytest.mark.parametrize("kind", ["S", "s", "n", "f", "l", "L"])
def test_documents_of_a_packed_sequence_do_not_see_each_other(kind: str) -> None:
    packed = torch.cat([IDS[:1, :17], torch.tensor([[END]]), IDS[1:, :22]], 1)
    alone = made(f"fS{kind}")
    whole = alone.compute_targets(packed)
    parts = [alone.compute_targets(packed[:, :18]), alone.compute_targets(packed[:, 18:])]
    torch.testing.assert_close(whole.output, torch.cat([part.output for part in parts], 1), rtol=1e-4, atol=1e-4)
    ends = [alone.student_output(targets) for targets in (whole, *parts)]
    torch.testing.assert_close(ends[0], torch.cat(ends[1:], 1), rtol=1e-4, atol=1e-4)


def test_positions_and_labels_keep_to_their_document() -> None:
    ids = torch.tensor([[5, 6, END, 7, 8, 9], [END, 5, 5, 5, END, 6]])
    assert positions_of(ids, END).tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 0]]
    assert positions_of(ids, None).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert next_tokens(ids, END).tolist() == [[6, END, -100, 8, 9, -100], [-100, 5, 5, END, -100, -100]]


def test_attention_distillation_crosses_no_layer_and_runs_the_base_once() -> None:
    letters = "fSns"
    student = boosted(letters, window=8)
    made = AttentionDistiller(student, tiny_model(layers=4).requires_grad_(False), layer_plans(letters, 8), END)
    calls: list[int] = []
    made.teacher.register_forward_hook(lambda *_: calls.append(0))
    made.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    made.layer_losses(IDS)[3].backward()
    assert calls == [1]
    touched = {name.split(".")[2] for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert touched == {"3"}


@torch.no_grad()
def test_a_thinned_mlp_learns_what_its_layer_adds() -> None:
    letters = "ftozu"
    student, teacher = boosted(letters), tiny_model(layers=5).requires_grad_(False)
    found = AttentionDistiller(student, teacher, layer_plans(letters), END).layer_losses(IDS)
    assert list(found) == [1, 2, 4]  # layer 3 has nothing to train
    states, stream = teacher(IDS, output_hidden_states=True).hidden_states, LayerStream(student)
    stream.forward(IDS)
    for layer in (1, 2):
        error = (stream.layer(layer, states[layer]) - states[layer + 1]).square().mean(-1)
        added = (states[layer + 1] - states[layer]).square().mean((1, 2))
        torch.testing.assert_close(found[layer], (error.mean(-1) / added).mean(), rtol=1e-4, atol=1e-5)
