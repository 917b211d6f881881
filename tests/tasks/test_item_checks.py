from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tiny_bench import rows, tiny_model, tiny_tokenizer, write_jsonl

from layerboost.errors import ConfigError, LayerboostError
from layerboost.evaluating.comparison import compare_tasks
from layerboost.recipe import Evaluate
from layerboost.tasks.checks import check_items
from layerboost.tasks.lm_eval import BenchTask, item_margins, item_scores, load_bench, run_task

CONTEXT = 512
CHOICES = "doc_to_choice: c\n"
ITEM: dict[str, Any] = {"q": "who", "c": ["one", "two", "three"], "a": 0}
# What the columns must hold for a data set to be made of them.
TARGETS = {"field": "doc_to_target: a\n", "template": 'doc_to_target: "{{a}}"\n'}
# A task whose answers a model generates, short ones.
GENERATED = {"output": "generate_until", "choices": "", "metric": "exact_match"}
SHORT = 'generation_kwargs: {until: ["."], max_gen_toks: 8}\n'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def load(
    folder: Path, items: list[dict[str, Any]], target: str = TARGETS["template"], more: str = "", **kinds: str
) -> BenchTask:
    write_jsonl(folder / "own.jsonl", items)
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'own.jsonl'}}}}}\n"
        f"test_split: test\noutput_type: {kinds.get('output', 'multiple_choice')}\n"
        f"doc_to_text: {kinds.get('text', 'q')}\n{kinds.get('choices', CHOICES)}{target}"
        f"metric_list: [{{metric: {kinds.get('metric', 'acc')}, aggregation: mean, higher_is_better: true}}]\n{more}"
    )
    [task] = load_bench(Evaluate(tasks=(str(folder / "own.yaml"),)))
    return task


def refusal(task: BenchTask, tokenizer: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_items([task], tokenizer, CONTEXT)
    return str(caught.value)


FIXED = "have the same score whatever a model answers"
ODD: dict[str, tuple[dict[str, Any], float]] = {
    "an index beyond the choices": ({"a": 7}, 0.0),
    "no answer, as -1": ({"a": -1}, 0.0),
    "a single choice": ({"c": ["one"]}, 1.0),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ODD)
def test_odd_items_are_scored_as_lm_eval_does_and_counted(
    name: str, target: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, score = ODD[name]
    items = [ITEM | {"a": index % 3} for index in range(6)]
    items[2] = ITEM | change
    task = load(tmp_path, items, TARGETS[target])
    with caplog.at_level("WARNING"):
        check_items([task], tokenizer, CONTEXT)
    assert f"1 of 6 items of task own {FIXED}" in caplog.text
    assert f"the first is line 3 of {tmp_path / 'own.jsonl'}" in caplog.text
    found = json.loads(run_task(task, tiny_model(), tokenizer, 8, lambda items: None))
    scores, margins = item_scores(task, found), item_margins(task, found)
    assert scores["own", 2] == score
    assert set(margins) == {("own", index) for index in range(6) if index != 2}
    compared, _ = compare_tasks([task], {"own": {"base": found, "healed": found}}, [])
    assert compared["own"].margin
    assert compared["own"].margin.difference["healed"].mean == 0


def test_a_choice_by_its_text_in_other_case_is_no_answer(tokenizer: Any, tmp_path: Path) -> None:
    items = [ITEM | {"a": "one"} for _ in range(3)] + [ITEM | {"a": "TWO"}]
    task = load(tmp_path, items, TARGETS["field"])
    check_items([task], tokenizer, CONTEXT)
    found = json.loads(run_task(task, tiny_model(), tokenizer, 8, lambda items: None))
    assert set(item_margins(task, found)) == {("own", index) for index in range(3)}


@pytest.mark.parametrize("change", [{"a": "TWO"}, {"c": ["one"]}])
def test_a_task_that_says_nothing_about_a_model_is_refused(
    change: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    assert f"3 of 3 items of task own {FIXED}" in refusal(load(tmp_path, [ITEM | change] * 3), tokenizer)


LONG = " ".join(["one"] * CONTEXT)
UNSCORABLE: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "no choices": ({"c": []}, "template", "its choices are []"),
    "an answer that is null": ({"a": None}, "field", "acc of its answer None raises TypeError"),
    "an index far below 0": ({"a": -7}, "field", "acc of its answer -7 raises IndexError"),
    "a choice longer than the context": ({"c": ["one", LONG]}, "template", "tokens, in a model with a context of 512"),
    "an empty prompt": ({"q": "  "}, "template", "its prompt is empty"),
    "a prompt that is null": ({"q": None}, "template", "AssertionError: Context is not a string"),
}
# What lm-eval scores all the same, as the word None.
READ_AS_NONE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a question that is null": ({"q": None}, {"text": '"Q: {{q}} A:"'}),
    "a choice that is null": ({"x": None}, {"choices": """doc_to_choice: "{{[x|string, 'two', 'three']}}"\n"""}),
    "an answer to generate": ({"x": None}, GENERATED | {"target": 'doc_to_target: "{{x}}"\n', "more": SHORT}),
    "a text to score": ({"x": None}, {"target": 'doc_to_target: "{{x}}"\n', "output": "loglikelihood", "choices": ""}),
}


@pytest.mark.parametrize("name", READ_AS_NONE)
def test_a_field_that_is_null_is_not_read_as_a_word(name: str, tokenizer: Any, tmp_path: Path) -> None:
    change, kinds = READ_AS_NONE[name]
    items = [ITEM | {"x": "one"} for _ in range(6)]
    items[2] |= change
    shown = refusal(load(tmp_path, items, **kinds), tokenizer)
    [field] = change
    assert f"line 3 of {tmp_path / 'own.jsonl'}: its {field!r} is null, which is read as 'None'" in shown


def test_choices_as_a_list_of_templates_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    task = load(tmp_path, [ITEM] * 3, choices='doc_to_choice: ["{{q}}", "{{a}}"]\n')
    assert "which lm-eval does not fill in: write them as one text" in refusal(task, tokenizer)


@pytest.mark.parametrize("name", UNSCORABLE)
def test_what_lm_eval_would_fail_on_is_refused_before_a_model_runs(name: str, tokenizer: Any, tmp_path: Path) -> None:
    change, target, message = UNSCORABLE[name]
    items = [dict(ITEM) for _ in range(6)]
    items[2] = items[4] = ITEM | change
    task = load(tmp_path, items, TARGETS[target])
    with pytest.raises((AssertionError, IndexError, TypeError, ValueError)):  # and lm-eval does fail
        run_task(task, tiny_model(), tokenizer, 8, lambda items: None)
    shown = refusal(task, tokenizer)
    assert "2 of 6 items of task own cannot be scored" in shown
    assert f"line 3 of {tmp_path / 'own.jsonl'}" in shown
    assert message in shown


def test_items_are_named_by_their_number_in_the_file_under_a_limit(tokenizer: Any, tmp_path: Path) -> None:
    items = [dict(ITEM) for _ in range(9)]
    items[6] = ITEM | {"c": []}
    load(tmp_path, items)
    (tmp_path / "own.jsonl").write_text((tmp_path / "own.jsonl").read_text().replace("\n", "\n\n"))
    [task] = load_bench(Evaluate(tasks=(str(tmp_path / "own.yaml"),), limit=3))
    assert f"line 13 of {tmp_path / 'own.jsonl'}" in refusal(task, tokenizer)


@pytest.mark.parametrize(
    ("settings", "wanted", "context"),
    [("max_gen_toks: 2048", 2048, 512), ("max_new_tokens: 512", 512, 512), ("", 256, 256)],
)
def test_answers_longer_than_the_context_are_refused(
    settings: str, wanted: int, context: int, tokenizer: Any, tmp_path: Path
) -> None:
    task = load(tmp_path, [ITEM], more=f'generation_kwargs: {{until: ["."], {settings}}}\n', **GENERATED)
    with pytest.raises(ConfigError, match=rf"lets a model generate {wanted:,} tokens\n.*a context of {context}"):
        check_items([task], tokenizer, context)


def test_generated_answers_are_checked(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"more": SHORT, "output": "generate_until", "metric": "exact_match"}
    task = load(tmp_path, [ITEM, ITEM | {"a": 7}, ITEM | {"q": ""}], TARGETS["field"], **kinds)
    shown = refusal(task, tokenizer)
    assert "2 of 3 items" in shown
    assert "IndexError: list index out of range" in shown
    check_items([load(tmp_path, [ITEM, ITEM | {"q": LONG}], TARGETS["field"], **kinds)], tokenizer, CONTEXT)
    assert "1 of 2 items of task own are longer than the model's context" in caplog.text


def test_the_examples_before_a_question_are_lm_evals_own(tokenizer: Any, tmp_path: Path) -> None:
    """Too few of them, or one that cannot be shown, ends lm-eval; and reading them does not change what is drawn."""
    items = [ITEM | {"q": f"who {index}", "a": index % 3} for index in range(6)]
    more = "num_fewshot: {}\nfewshot_split: test\n"
    assert "6 of 6 items" in refusal(load(tmp_path, items, more=more.format(7)), tokenizer)
    assert "cannot be scored" in refusal(load(tmp_path, [*items, ITEM | {"a": 7}], more=more.format(6)), tokenizer)
    results = []
    for check in (False, True):
        task = load(tmp_path, items, more=more.format(2))
        if check:
            check_items([task], tokenizer, CONTEXT)
        results.append(json.loads(run_task(task, tiny_model(), tokenizer, 8, lambda items: None))["samples"])
    assert results[0] == results[1]


def test_a_metric_without_a_score_for_each_item_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    shown = refusal(load(tmp_path, [ITEM], metric="brier_score"), tokenizer)
    assert "brier_score of its answer 0 raises TypeError" in shown


def test_answers_to_generate_that_are_missing(tokenizer: Any, tmp_path: Path) -> None:
    several = load(tmp_path, [ITEM | {"a": ["x"]}, ITEM | {"a": None}], TARGETS["field"], SHORT, **GENERATED)
    assert "TypeError: 'NoneType' object is not iterable" in refusal(several, tokenizer)
    unread = load(tmp_path, [ITEM], more=SHORT.replace("8", "many"), **GENERATED)
    assert "generation_kwargs that lm-eval cannot read" in refusal(unread, tokenizer)


def test_several_right_choices(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = load(tmp_path, [ITEM | {"a": [0, 1]}, ITEM | {"a": []}, ITEM | {"a": [9]}], TARGETS["field"])
    check_items([task], tokenizer, CONTEXT)
    assert f"2 of 3 items of task own {FIXED}" in caplog.text


def test_lengths_are_those_of_lm_eval(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A request that fits to the token is scored and one token more is cut, in lm-eval's own tokens."""
    lm = HFLM(pretrained=tiny_model(), tokenizer=tokenizer)
    for extra, cut in ((0, False), (1, True)):
        question = "who"
        while sum(map(len, lm._encode_pair(question, " one"))) < CONTEXT + 1 + extra:
            question += "."
        task = load(tmp_path, [ITEM | {"q": question, "c": ["one", "one"]}])
        caplog.clear()
        check_items([task], tokenizer, CONTEXT)
        assert ("are longer than the model's context" in caplog.text) == cut


def test_numbers_that_are_not_finite_are_no_scores(tokenizer: Any, tmp_path: Path) -> None:
    """lm-eval takes the first NaN for the best choice."""
    write_jsonl(tmp_path / "piqa.jsonl", rows("piqa", 4))
    tasks = load_bench(Evaluate(tasks=("piqa",), bench_data=str(tmp_path)))
    tasks.append(load(tmp_path, [ITEM], more=SHORT, **GENERATED))
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.finfo().max
        with pytest.raises(LayerboostError, match=r"logits of model are (-?inf|nan) in task own"):
            run_task(tasks[1], model, tokenizer, 8, lambda items: None, "model")
        model.lm_head.weight[7] = 0
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    for task, message in zip(
        tasks,
        (
            r"log-likelihood in piqa of healed, item 1 of piqa is nan\nfound: first in layer 1 \(token 1, id \d+\); "
            r"not finite in its weights: mlp.down_proj.weight",
            "logits of healed are nan in task own",
        ),
        strict=True,
    ):
        with pytest.raises(LayerboostError, match=message):
            run_task(task, model, tokenizer, 4, lambda items: None, "healed")
