"""Healing on requests in place of text, with images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import PROCESSORS, QUICK_AND_EXHAUSTIVE, save_bases, save_requests, save_with_processor, wrappers
from processes import finish, ranks, run_module
from safetensors.torch import load_file
from test_distillers import END, IDS, made
from test_heal import check_same_healing
from tiny import RUNTIME, image_prompt, layer_plans, plan_file, save_tiny
from torch.nn import functional as F

from layerboost.errors import ConfigError, LayerboostError
from layerboost.healing.data import Data, load_requests
from layerboost.healing.distillers import AttentionDistiller, next_tokens
from layerboost.healing.least_squares import fit_outputs, put
from layerboost.healing.stage import check, heal_identity
from layerboost.healing.training import train_stage
from layerboost.model.base import Base, find_model
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import attention_of
from layerboost.pipeline import run_stage
from layerboost.recipe import Heal, Recipe, parse_recipe, recipe_yaml
from layerboost.schemas.healing import read_metrics
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import CONVERTED, HEALED, PLAN, SENSITIVITY

CPU = torch.device("cpu")


def prompt_of(model_type: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ids `[1, T]` with an end-of-text token inside, and what goes with them: nothing, of a language model."""
    prompt = image_prompt(model_type, IDS[:1]) if model_type in PROCESSORS else {"input_ids": IDS[:1].clone()}
    ids = prompt.pop("input_ids")
    ids[0, 25] = END
    return ids, prompt


@pytest.mark.parametrize("model_type", ["llama", *QUICK_AND_EXHAUSTIVE])
@pytest.mark.parametrize("letters", ["SnfsS", "fSns", "ffSn"])
def test_the_loss_of_a_request_is_that_of_two_whole_models(model_type: str, letters: str) -> None:
    """A template may end each turn with the end-of-text token: it ends no document here."""
    cheap, weights = made(letters, model_type, ce_weight=0.5), torch.rand(1, IDS.shape[1])
    ids, given = prompt_of(model_type)
    student, teacher = (model(input_ids=ids, **given).logits for model in (cheap.student, cheap.teacher))
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    entropy = F.cross_entropy(student.transpose(1, 2), next_tokens(ids, None), reduction="none")
    plain = ((kl + 0.5 * entropy) * weights).sum()
    found = cheap(ids, weights, given)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    trained = [parameter for parameter in cheap.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(plain, trained)
    for gradient, other in zip(torch.autograd.grad(found, trained), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)
        assert gradient.abs().sum() > 0
    assert not torch.allclose(found, cheap(ids, weights))  # packed text, whose documents end, without an image


@wrappers
@pytest.mark.parametrize("kind", ["S", "n"])
@torch.no_grad()
def test_attention_distillation_learns_from_whole_models_that_see_the_image(wrapper: str, kind: str) -> None:
    """Below a lone changed layer student and base are equal, so a whole pass of each gives its layer's input."""
    letters, layer = f"ff{kind}f", 2  # the first that does not slide in the base in Gemma 3
    whole = made(letters, wrapper)
    ids, given = prompt_of(wrapper)
    outputs, inputs = [], []
    for model in (whole.student, whole.teacher):
        module = attention_of(model, layer) if kind == "S" else decoder_layers(model)[layer]
        module.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        decoder_layers(model)[layer].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(input_ids=ids, **given)
    ours, theirs = outputs
    size = theirs if kind == "S" else theirs - inputs[1]
    expected = (ours - theirs).square().mean() / size.square().mean()
    local = AttentionDistiller(whole.student, whole.teacher, layer_plans(letters), END)
    torch.testing.assert_close(local.layer_losses(ids, given=given)[layer], expected)
    assert not torch.allclose(local.layer_losses(ids)[layer], expected)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return save_bases(tmp_path_factory.mktemp("bases"), layers=4)


def recipe_of(base: Base, file: Path, **heal: Any) -> Recipe:
    settings = {"fit_tokens": 256, "attention_tokens": 200, "tokens": 400, "lr": 3e-3, "attention_lr": 3e-3}
    return parse_recipe(
        {
            "model": str(base.folder),
            "trust_remote_code": True,
            "text": {"source": "none.txt", "sequence_tokens": 128},
            "measure": {"windows": [8], "tokens": 300, "traffic": str(file), "retrieval_prompts": 0},
            "heal": {**settings, "traffic": str(file), "save_steps": 2, "validation_steps": 4, **heal},
        },
        "the test",
    )


@pytest.mark.pipeline
@wrappers
def test_a_model_is_healed_on_requests_with_images_of_many_sizes(
    wrapper: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    """The tower stays as it is; what a killed run had not trained is trained to the same weights."""
    base, run = bases[wrapper], tmp_path / "run"
    recipe = recipe_of(base, save_requests(tmp_path, 16, heights=(8, 16, 12)))
    run.mkdir()
    letters = "fnSf" if wrapper == "gemma3" else "fSns"  # Gemma 3's other layers slide already
    write_plan(run / PLAN, plan_file(letters, model=base.info))
    check(recipe, run, base)
    run_stage("convert", recipe, run)
    healed = run_stage("heal", recipe, run)
    lines = read_metrics(run / "heal" / "metrics.jsonl")
    _, requests, _ = load_requests(recipe, base.tokenizer, 400)
    lengths = [len(request.ids) for request in requests]
    for stage, asked in (("attention", 200), ("lora", 400)):
        whole = next(sum(lengths[:count]) for count in range(30) if sum(lengths[:count]) >= asked)
        assert max(line.tokens for line in lines if line.stage == stage) == whole
    validated = [line.validation_kl for line in lines if line.validation_kl is not None]
    assert min(validated) < validated[0]
    assert "LoRA distillation from the base, on the requests in requests.jsonl" in (healed / "README.md").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (run / CONVERTED, healed))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all("language_model" in name or "text_model" in name for name in changed)
    assert {int(name.partition(".layers.")[2].partition(".")[0]) for name in changed} == {1, 2, 3}

    shutil.rmtree(run / HEALED)
    (run / "heal" / "lora.safetensors").unlink()
    sorted((run / "heal" / "checkpoints" / "lora").iterdir())[-1].unlink()
    run_stage("heal", recipe, run)
    again = load_file(healed / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    (tmp_path / "3.png").write_bytes((tmp_path / "6.png").read_bytes())
    shutil.rmtree(run / HEALED)
    with pytest.raises(ConfigError, match="started on another text"):
        run_stage("heal", recipe, run)


@pytest.mark.multiprocess
def test_two_processes_measure_and_heal_on_images_what_one_does(bases: dict[str, Base], tmp_path: Path) -> None:
    """Images of two sizes; the last step has a request fewer than processes."""
    base = bases["llava"]
    file = save_requests(tmp_path, 16, heights=(8, 16))
    recipe = recipe_of(base, file, batch_sequences=1, gradient_accumulation=2)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    alone, together = tmp_path / "alone", tmp_path / "together"

    def both(stage: str) -> None:
        run_stage(stage, recipe, alone)
        words = ("--config", str(tmp_path / "recipe.yaml"), "--run", str(together))
        finish(ranks(run_module, "layerboost.cli", stage, *words, folder=tmp_path))

    both("measure")
    assert (alone / SENSITIVITY).read_bytes() == (together / SENSITIVITY).read_bytes()
    plan = plan_file("fSns", model=base.info)
    for run in (alone, together):
        write_plan(run / PLAN, plan)
        run_stage("convert", recipe, run)
    both("heal")
    check_same_healing(alone, together)


@wrappers
def test_the_loss_falls_on_images_of_two_sizes(wrapper: str, bases: dict[str, Base], tmp_path: Path) -> None:
    recipe = recipe_of(bases[wrapper], save_requests(tmp_path, 24, heights=(8, 16)))
    _, [one, two, *_], _ = load_requests(recipe, bases[wrapper].tokenizer, 600)
    pair = [one, two] * 6
    sequences, given = [torch.tensor(request.ids) for request in pair], [request.reread for request in pair]
    whole = made("fSns", wrapper)
    settings = Heal(lr=1e-2, attention_lr=1e-2, batch_sequences=2, scheduler="constant")
    for stage, distiller in (
        ("attention", AttentionDistiller(whole.student, whole.teacher, layer_plans("fSns"), END)),
        ("lora", whole),
    ):
        data = Data(sequences, sum(map(len, sequences)), settings, given=given)
        train_stage(stage, distiller, data, settings, tmp_path, lambda: {"validation_kl": 0.0})
        lines = read_metrics(tmp_path / "metrics.jsonl")
        losses = [line.loss for line in lines if line.stage == stage and line.loss is not None]
        assert len(losses) == 6
        assert losses[-1] < 0.9 * losses[0]


@wrappers
@torch.no_grad()
def test_a_fit_on_images_brings_sliding_layers_nearer_to_the_base(
    wrapper: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    recipe = recipe_of(bases[wrapper], save_requests(tmp_path, 30))
    validation, requests, _ = load_requests(recipe, bases[wrapper].tokenizer, 1200)
    whole = made("sfSs", wrapper)
    local = AttentionDistiller(whole.student, whole.teacher, layer_plans("sfSs"), END)

    def losses() -> dict[int, float]:
        found = [local.layer_losses(batch.ids, given=batch.given) for batch in validation.batches(1)]
        return {layer: sum(float(each[layer]) for each in found) for layer in found[0]}

    before = losses()
    ids, given = [torch.tensor(request.ids) for request in requests], [request.reread for request in requests]
    fitted = fit_outputs(local, ids, 1200, given)
    assert fitted
    put(local, fitted)
    after = losses()
    assert all(after[layer] < before[layer] for layer in fitted)


def test_a_step_holds_as_many_requests_as_sequences_and_a_batch_one() -> None:
    sequences = [torch.arange(length) for length in (5, 9, 9, 4, 4)]
    answers = [(torch.arange(len(ids)) > 2).float() for ids in sequences]
    given = [lambda number=number: {"pixels": torch.tensor([number])} for number in range(5)]
    data = Data(sequences, 31, Heal(batch_sequences=1, gradient_accumulation=3), weights=answers, given=given)
    steps = [data.batches(step, CPU) for step in (1, 2)]
    assert [[tuple(batch["input_ids"].shape) for batch in batches] for batches in steps] == [
        [(1, 5), (1, 9), (1, 9)],
        [(1, 4), (1, 4)],
    ]
    assert [batch["given"]["pixels"].item() for batches in steps for batch in batches] == list(range(5))
    # The mean over the answers of the step, of which each batch has its part.
    torch.testing.assert_close(steps[0][1]["weights"], 3 * answers[1][None] / 14)
    assert [data.seen(step) for step in range(3)] == [0, 23, 31]


def test_answers_alone_count_and_the_first_requests_validate(bases: dict[str, Base], tmp_path: Path) -> None:
    base, file = bases["llava"], save_requests(tmp_path, 12)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # Logs repeat requests; those that validate are not trained on.
    file.write_text(file.read_text() + "".join(file.read_text().splitlines(keepends=True)[:8]))
    validation, requests, _ = load_requests(recipe_of(base, file), base.tokenizer, 250)
    words = [int(word[1:]) for row in rows for word in row["answer"].split()]
    assert validation.ids[validation.scored].tolist() == words[: 8 * 8]
    assert len(requests) == 4
    others = {tuple(words[start : start + 8]) for start in range(8 * 8, len(words), 8)}
    assert len({tuple(request.ids[-8:]) for request in requests} & others) == 4
    assert all(sum(request.scored) == 8 and not request.given for request in requests)
    assert [request.reread().keys() for request in requests] == [{"pixel_values"}] * 4
    picture = next(row["images"][0] for row in rows if row["answer"].split()[0] == f"w{requests[0].ids[-8]}")
    (tmp_path / picture).unlink()
    with pytest.raises(LayerboostError, match=r"a request of heal.traffic can no longer be read\n(.|\n)*FileNotFound"):
        requests[0].reread()


def test_a_run_without_requests_has_the_identity_of_earlier_releases(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["llava"]
    plan = plan_file("fnSs", model=base.info)
    with_requests = recipe_of(base, tmp_path / "requests.jsonl")
    without = with_requests.model_copy(update={"heal": Heal()})
    assert "traffic" not in heal_identity(without, plan, RUNTIME)["heal"]
    assert heal_identity(with_requests, plan, RUNTIME)["heal"]["traffic"] == str(tmp_path / "requests.jsonl")


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "too few": (
        "llava",
        {"tokens": 5000},
        r"heal\.traffic is too short: 5,000 tokens (.|\n)*found: 1,\d+ tokens in 17",
    ),
    "text's": ("llava", {"retrieval_share": 0.5, "sequence_tokens": [16]}, "found: heal.sequence_tokens, heal.retr"),
    "no pictures": ("llava", {}, r"heal\.traffic is too short(.|\n)*found: 0 tokens (.|\n)*FileNotFoundError"),
    "no processor": ("llava", {}, r"heal\.traffic has images, and the processor of the model cannot be loaded"),
    "no tower": (
        "llama",
        {},
        r"heal\.traffic has images, which this model cannot read\nfound: a language model without",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_message_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    model_type, heal, message = BAD[name]
    tiny = save_tiny(tmp_path / "model") if model_type == "llama" else save_with_processor(tmp_path / "model", "llava")
    file = save_requests(tmp_path, 24)
    if name == "no pictures":
        for picture in tmp_path.glob("*.png"):
            picture.unlink()
    if name == "no processor":
        for settings in tiny.glob("*processor_config.json"):
            settings.unlink()
    base = find_model(str(tiny), RUNTIME)
    with pytest.raises(ConfigError, match=message):
        check(recipe_of(base, file, **heal), tmp_path / "run", base)
