from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, layer_plans, opening_tokenizer, save_text, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from layerboost.errors import ConfigError
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import replaced
from layerboost.probes.probe import TextProbe
from layerboost.recipe import Recipe
from layerboost.schemas.plan import LayerPlan
from layerboost.traffic import Traffic, load_calibration, load_traffic

TEMPLATE = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }}{{ ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def words(first: int, count: int) -> str:
    return " ".join(f"w{first + index}" for index in range(count))


def shown(traffic: Traffic, row: int) -> tuple[list[int], list[int]]:
    """Ids of a row and those that are scored."""
    ids = traffic.ids[row, : traffic.lengths[row]]
    return ids.tolist(), ids[traffic.scored[row, : traffic.lengths[row]]].tolist()


def test_answers_are_scored_and_of_text_every_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [("user", "w20"), ("assistant", "w21 w22"), ("user", "w23"), ("assistant", "w24"), ("user", "w25")]
    file = write(
        tmp_path / "t.jsonl",
        {"prompt": words(10, 4), "answer": " " + words(30, 2)},
        "",
        {"messages": [{"role": role, "content": content} for role, content in chat], "id": 7},
        {"text": words(40, 14), "source": "x"},
    )
    found = load_traffic(file, tokenizer, 64, 10_000)
    assert found.lengths == [14, 12, 6]
    assert shown(found, 0) == (list(range(40, 54)),) * 2
    assert shown(found, 1) == ([3, 20, 1, 4, 21, 22, 1, 3, 23, 1, 4, 24], [21, 22, 24])
    assert shown(found, 2) == ([10, 11, 12, 13, 30, 31], [30, 31])
    first, second = found.batches(2)
    assert (first.ids.shape[1], second.ids.shape[1]) == (14, 6)
    assert found.tokens == 14 + 12 + 6


@pytest.mark.parametrize("opening", [[], ["<s>"]])
def test_what_a_tokenizer_puts_behind_a_text_is_left_out(opening: list[str], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*opening, "$A", "</s>", "<s>"], special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    file = write(tmp_path / "t.jsonl", {"prompt": words(10, 4), "answer": " " + words(30, 2)}, {"text": words(40, 3)})
    found = load_traffic(file, tokenizer, 64, 10_000)
    start = [0] if opening else []
    assert shown(found, 0) == ([*start, 10, 11, 12, 13, 30, 31], [30, 31])
    assert shown(found, 1)[0] == [*start, 40, 41, 42]


def test_a_prompt_that_begins_as_a_model_wants_it_begins_so_once(tmp_path: Path) -> None:
    """As prompts do that are taken from a server's log of rendered chats."""
    file = write(tmp_path / "t.jsonl", {"prompt": "<s> w10 w11", "answer": " w30"}, {"text": "<s> w40 w41"})
    found = load_traffic(file, opening_tokenizer(), 64, 10_000)
    assert [shown(found, row) for row in range(2)] == [([0, 10, 11, 30], [30]), ([0, 40, 41], [40, 41])]


# Pieces of a text have other tokens than the whole: a mark in front, as of Llama 2, one token over the border.
WORDS = ["Y", "e", "s", "2", "+", "=", "<", ">", "q", "é", "\n", "Ye", "Yes", "▁Yes"]
MERGES = [("Y", "e"), ("Ye", "s"), ("▁", "Yes")]
NORMALIZERS: dict[str, Any] = {
    "Prepend": Sequence([Prepend("▁"), Replace(" ", "▁")]),
    "Metaspace first": Metaspace(prepend_scheme="first", split=False),
    "Metaspace always": Metaspace(prepend_scheme="always", split=False),
}


def llama_tokenizer(kind: str = "Prepend") -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", *WORDS])}
    bpe = Tokenizer(BPE(vocabulary, MERGES, unk_token="<unk>"))
    if kind == "Prepend":
        bpe.normalizer = NORMALIZERS[kind]
    else:
        bpe.pre_tokenizer = NORMALIZERS[kind]
    bpe.decoder = MetaspaceDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize(
    ("prompt", "answer", "scored"),
    [
        ("2+2=", "Yes", ["Yes"]),
        ("2+2= ", "Yes", ["▁Yes"]),
        ("2+2=Ye", "s+", ["Yes", "+"]),
        ("2+2", " Yes", ["▁Yes"]),
        ("2+2\n", "YesYes\n", ["Yes", "Yes", "\n"]),
        ("Yes", "\n2", ["\n", "2"]),
        ("é", "éé", ["é", "é"]),
    ],
)
def test_a_row_has_the_tokens_of_its_whole_text(
    kind: str, prompt: str, answer: str, scored: list[str], tmp_path: Path
) -> None:
    tokenizer = llama_tokenizer(kind)
    found = load_traffic(write(tmp_path / "t.jsonl", *[{"prompt": prompt, "answer": answer}] * 2), tokenizer, 64, 1000)
    whole, answers = shown(found, 0)
    assert whole == tokenizer(prompt + answer)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(answers) == scored


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_a_conversation_has_the_tokens_that_it_is_served_with(kind: str, tmp_path: Path) -> None:
    tokenizer = llama_tokenizer(kind)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ 'q' if m.role == 'user' else '=' }}>{{ m.content }}</s>{% endfor %}"
    )
    row = conversation("2+2=", "Yes 2", "é", "Yes\n2")
    whole, answers = shown(load_traffic(write(tmp_path / "t.jsonl", row, row), tokenizer, 64, 1000), 0)
    served = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    assert whole == served[:-1]
    assert tokenizer.convert_ids_to_tokens(answers) == ["Yes", "▁", "2", "Yes", "\n", "2"]


@pytest.mark.parametrize("trimmed", [True, False])
def test_white_space_of_an_answer_is_scored_whatever_the_offsets_say(trimmed: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trimmed)
    rows = [{"prompt": "a: \n ", "answer": "  é  \n\n 日 "}, {"prompt": "a", "answer": " "}, {"text": " a "}]
    found = load_traffic(write(tmp_path / "t.jsonl", *rows), tokenizer, 64, 1000)
    assert tokenizer.decode(shown(found, 0)[1]) == "  é  \n\n 日 "
    assert [tokenizer.decode(part) for part in shown(found, 1)] == [" a ", " a "]
    assert len(found.lengths) == 2


def test_traffic_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [
        {"prompt": "What is it? ", "answer": "A fox."},
        {"text": "A quick brown fox"},
        conversation("What?", "A fox."),
    ]
    for row in rows:
        with pytest.raises(ConfigError, match=r"does not know the text of .*t.jsonl(.|\n)*characters are lost"):
            load_traffic(write(tmp_path / "t.jsonl", row, row), tokenizer, 64, 1000)


def test_neither_the_template_nor_a_missing_space_makes_text_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    for row in ({"prompt": "w3", "answer": "w4"}, {"text": "w5 w6"}, conversation("w3", "w4")):
        load_traffic(write(tmp_path / "t.jsonl", *[row, {"text": "w7 w8"}] * 3), tokenizer, 64, 1000)
    assert "does not know" not in caplog.text


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a fast tokenizer(.|\n)*ByT5Tokenizer"):
        load_traffic(write(tmp_path / "t.jsonl", {"text": "a"}), ByT5Tokenizer(), 64, 1000)


def test_rows_are_cut_taken_and_skipped_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": words(10, 3 + index), "answer": " " + words(50 + index, 3)} for index in range(6)]
    file = write(tmp_path / "t.jsonl", *rows)
    assert load_traffic(file, tiny_tokenizer(), 64, 10_000).lengths == [11, 10, 9, 8, 7, 6]
    assert load_traffic(file, tiny_tokenizer(), 64, 13).lengths == [7, 6]
    assert load_traffic(file, tiny_tokenizer(), 64, 10, skip=13).lengths == [9, 8]
    assert load_traffic(file, tiny_tokenizer(), 7, 10_000).lengths == [7, 7, 7, 6]
    with caplog.at_level("WARNING"):
        cut = load_traffic(file, tiny_tokenizer(), 5, 10_000)
    assert "cannot be scored are skipped: 4; the first is line 3 of" in caplog.text
    assert [shown(cut, row)[1] for row in (0, 1)] == [[50, 51], [51]]


BAD: dict[str, tuple[list[Any], str]] = {
    "no file": ([], "cannot read .*none.jsonl"),
    "no JSON": (["{"], "line 1 of .* is not JSON"),
    "no mapping": (["[1]"], "line 1 of .*: no prompt and answer, no messages and no text, .* among list"),
    "an empty answer": ([{"prompt": "w3", "answer": ""}], "line 1 of .* among prompt, answer"),
    "no template": ([{"messages": []}], "without a chat template"),
    "one row": ([{"text": "w3 w4 w5"}], "must hold two rows(.|\n)*found: 1 in"),
    "one token a row": ([{"text": "w3"}] * 3, "must hold two rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_traffic_is_one_message(name: str, tmp_path: Path) -> None:
    rows, message = BAD[name]
    file = write(tmp_path / "t.jsonl", *rows) if rows else tmp_path / "none.jsonl"
    with pytest.raises(ConfigError, match=message):
        load_traffic(file, tiny_tokenizer(), 64, 1000)


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/x"])
def test_a_name_that_is_no_path_is_one_message(name: str) -> None:
    recipe = Recipe.model_validate({"measure": {"traffic": name}})
    with pytest.raises(ConfigError, match=f"cannot read {name}"):
        load_calibration(recipe, tiny_tokenizer(), 1000, None)


def test_conversations_that_cannot_be_rendered_or_cut_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = {"messages": [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w8"}]}
    for template, row, message in (
        (TEMPLATE, {"messages": [{"role": "assistant"}]}, "line 1 of .*: it has no answer"),
        (TEMPLATE, {"messages": "w3"}, "its messages are not a list"),
        (TEMPLATE, {"messages": [{"role": "user", "content": 7}]}, "is or holds int, not text"),
        (TEMPLATE, {"messages": [{"role": "user", "content": [IMAGE]}]}, "is or holds image_url, not text"),
        (TEMPLATE, {"messages": [{"role": "user", "content": [["w3"]]}]}, "is or holds list, not text"),
        (TEMPLATE + "{{ raise_exception('odd roles') }}", chat, r"cannot render it \(TemplateError: odd roles"),
        (TEMPLATE.replace("m.content", "m.content | reverse"), chat, "rewrites its answers"),
        (TEMPLATE + "{{ messages[-1].content }}", chat, "rewrites its answers"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=message):
            load_traffic(write(tmp_path / "a.jsonl", row, row), tokenizer, 64, 1000)


# What Qwen3's does with thinking: out of earlier turns, an empty one into the last if it has none, white space trimmed.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endfor %}{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}{% set think = '' %}"
    "{% if '</think>' in c %}{% set think = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% if loop.index0 > ns.last %}"
    "{{ '<s>assistant\\n<think>\\n' + think + '\\n</think>\\n\\n' + c }}{% else %}"
    "{{ '<s>assistant\\n' + c }}{% endif %}"
    "{{ '</s>\\n' }}{% else %}{{ '<s>' + m.role + '\\n' + c + '</s>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def conversation(*turns: Any, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]} | more


def scored_texts(tmp_path: Path, *rows: dict[str, Any], template: str = THINKING) -> list[list[str]]:
    """The texts that are scored of each row."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    found = load_traffic(write(tmp_path / "t.jsonl", *rows), tokenizer, 1000, 100_000)
    texts = []
    for ids, scored in zip(found.ids.tolist(), found.scored.tolist(), strict=True):
        runs, before = list[list[int]](), False
        for token, counts in zip(ids, scored, strict=True):
            if counts and not before:
                runs.append([])
            if counts:
                runs[-1].append(token)
            before = counts
        texts.append([tokenizer.decode(run) for run in runs])
    return sorted(texts)


@pytest.mark.parametrize("answer", ["h", "s", "<", "think", "<think>", "assistant", "</s>", "\n\n", "a b"])
def test_an_answer_is_found_where_it_stands(answer: str, tmp_path: Path) -> None:
    """Not within the template's own tags, whatever they are made of."""
    rows = [conversation("user", answer), conversation("assistant", answer, "<think>", answer)]
    if not answer.strip():
        with pytest.raises(ConfigError, match="it has no answer"):
            scored_texts(tmp_path, *rows)
        return
    assert scored_texts(tmp_path, *rows) == [[answer], [answer, answer]]
    ids = load_traffic(tmp_path / "t.jsonl", with_template(THINKING), 1000, 100_000).ids[1].tolist()
    text = byte_tokenizer().decode(ids).rstrip("!")  # what pads a row
    assert text.endswith(f"<think>\n\n</think>\n\n{answer}")


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_thinking_is_scored_as_the_model_writes_it(tmp_path: Path) -> None:
    """Behind the generation prompt; of earlier turns the template has taken it out."""
    thought = "<think>\nw7\n</think>\n\nw8"
    rows = [conversation("w3", thought), conversation("w3", "<think>\nw5\n</think>\n\nw6", "w4", thought)]
    assert scored_texts(tmp_path, *rows) == [[thought], [thought]]


def test_white_space_around_an_answer_is_the_templates_affair(tmp_path: Path) -> None:
    rows = [conversation("w3", "\n w4 \n"), conversation("w3", "\n\nw4\n", "w5", "w6\n\n")]
    for written in ("c", "c.strip()", "c.lstrip()", "c.lstrip('\\n')", "c.rstrip('\\n')"):
        for frame in (" </s> ", "\\n", " \\n", ""):
            template = TEMPLATE.replace(
                "m.content", written.replace("c.", "m.content.") if "." in written else "m.content"
            )
            template = template.replace(" </s> ", frame)
            assert scored_texts(tmp_path, *rows, template=template) == [["w4"], ["w4", "w6"]], (written, frame)


def test_odd_rows_among_good_ones_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = conversation("w3", None)
    called["messages"][1]["tool_calls"] = [call]
    odd: list[Any] = [
        conversation("Hi", "Hello", "And?", "<think>I am</think>fine"),  # written again, with other white space
        called,
        conversation("w3", ""),
        conversation("w3"),
        {"messages": [{"content": "w3"}]},
        {"conversations": [{"from": "human", "value": "w3"}]},
        {"prompt": "w3", "answer": ""},
        {"prompt": None, "answer": "w4"},
        ["w3"],
    ]
    good = [conversation(f"w{index}", f"w{index + 1}") for index in range(4)]
    found = scored_texts(tmp_path, good[0], *odd, *good[1:])
    assert found == [[f"w{index + 1}"] for index in range(4)]
    assert f"rows of {tmp_path / 't.jsonl'} that cannot be scored are skipped: 9; the first is line 2 of" in caplog.text


@pytest.mark.parametrize("word", [None, "nan", "None", "null", " N/A\n", "", "  ", float("nan")])
def test_missing_values_are_neither_scored_nor_in_the_way(word: Any, tmp_path: Path) -> None:
    missing: list[dict[str, Any]] = [
        {"prompt": "w3", "answer": word},
        {"prompt": word, "answer": "w3"},
        {"text": word},
    ]
    if not isinstance(word, float):
        missing.append(conversation("w3", word))
    good = [{"messages": word, "text": "w5"}, {"prompt": "w3", "answer": word, "text": "w6"}]
    with pytest.raises(ConfigError, match=r"0 in .*; line 1 of .*: no prompt and answer"):
        scored_texts(tmp_path, *missing)
    assert scored_texts(tmp_path, *missing, *good) == [["w5"], ["w6"]]


def test_parts_of_text_are_lines(tmp_path: Path) -> None:
    turns = [["w3", "w4"], ["w5", "w6"], ["w7"], ["w8", "w9"]]
    row = conversation(*["\n".join(turn) for turn in turns])
    parts = {
        "messages": [
            turn | {"content": [{"type": "text", "text": text} for text in texts]}
            for turn, texts in zip(row["messages"], turns, strict=True)
        ]
    }
    mixed = conversation("w3\nw4", ["w5", {"type": "text", "text": "w6", "image_url": None}], "w7", "w8\nw9")
    assert scored_texts(tmp_path, row, parts, mixed) == [["w5\nw6", "w8\nw9"]] * 3


def test_fields_of_other_messages_in_a_parquet_column_are_left_out(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [conversation("w3", "w4"), conversation("w3", None, "w5", "w6")]
    rows[1]["messages"][1]["tool_calls"] = [{"name": "f"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    template = TEMPLATE.replace(
        "{{ m.content }}", "{% if 'tool_calls' in m %}{{ m.tool_calls[0].name }}{% endif %}{{ m.content }}"
    )
    found = load_traffic(tmp_path / "t.parquet", with_template(template), 1000, 100_000)
    assert found.lengths[0] > found.lengths[1] > 0


def test_an_answer_after_tool_calls_is_scored(tmp_path: Path) -> None:
    row = conversation("w3", None, "w4", "w5")
    row["messages"][1]["tool_calls"], row["messages"][2]["role"] = [{"function": {"name": "f"}}], "tool"
    assert scored_texts(tmp_path, row, row, template=TEMPLATE) == [["w5"], ["w5"]]
    ids = load_traffic(tmp_path / "t.jsonl", with_template(TEMPLATE), 1000, 100_000).ids[0].tolist()
    assert "None" not in byte_tokenizer().decode(ids)


def test_a_template_that_names_today_is_the_same_tomorrow(tmp_path: Path) -> None:
    """Llama 3.2's does: a measurement could not go on after midnight, as its text had changed."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ 'w' ~ strftime_now('%d') ~ ' w' ~ (strftime_now('%-d %e %F %% %b %Y')[-4:] | int - 2000) ~ ' ' }}"
        + TEMPLATE
    )
    turns = [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21"}]
    found = load_traffic(write(tmp_path / "t.jsonl", *[{"messages": turns}] * 2), tokenizer, 64, 100)
    assert shown(found, 0) == ([26, 24, 3, 20, 1, 4, 21], [21])


def test_a_conversation_of_many_turns_is_rendered_twice(tmp_path: Path) -> None:
    """Rendering the prefix again for every answer took minutes here."""
    rows = [conversation(*["w3", "w4"] * 3000)] * 2
    assert scored_texts(tmp_path, *rows, template=TEMPLATE) == [["w4"] * 45] * 2


def test_another_part_of_the_calibration_text(tmp_path: Path) -> None:
    settings = {"source": str(save_text(tmp_path / "text.jsonl", 120_000)), "sequence_tokens": 48}

    def ids(**measure: int) -> torch.Tensor:
        recipe = Recipe.model_validate({"text": settings, "measure": measure})
        return load_calibration(recipe, tiny_tokenizer(), recipe.measure.tokens, None).ids

    whole = ids(tokens=480)
    assert torch.equal(ids(tokens=240, skip_tokens=240), whole[5:])
    assert torch.equal(ids(tokens=192, skip_tokens=241), whole[6:])


@pytest.mark.parametrize("letters", ["Sf", "sf"])
@torch.no_grad()
def test_scores_of_padded_rows_are_those_of_each_row_alone(letters: str, tmp_path: Path) -> None:
    """Damage on the answers from full logits of one row at a time; sinks do not see the padding either."""
    file = write(tmp_path / "t.jsonl", *[
        {"prompt": words(10 + 9 * index, 5 + 7 * index), "answer": " " + words(3 + 20 * index, 4 + 5 * index)}
        for index in range(4)
    ])  # fmt: skip
    traffic, base = load_traffic(file, tiny_tokenizer(), 64, 10_000), tiny_model(layers=2)
    rows = [traffic.ids[row : row + 1, :length] for row, length in enumerate(traffic.lengths)]
    sinks = calibrate_sinks(base, traffic.batches(3), range(2), [8])
    alone = calibrate_sinks(base, rows, range(2), [8])
    for layer in range(2):
        entry = LayerPlan(layer=layer, attention="sliding", window=8, sink=True)
        # One step of the grid; below -8 a sink takes nothing, and which of such values is chosen is rounding.
        torch.testing.assert_close(sinks(entry).clamp_min(-8), alone(entry).clamp_min(-8), atol=0.26, rtol=0)
    probe = TextProbe(LayerStream(base, sinks), traffic.batches(3), windows=[8])
    plan = layer_plans(letters, 8)
    probe.streams.advance(0)
    (found,) = probe.losses([plan])
    assert probe.counts()["kl"] == int(traffic.scored.sum())
    for row, ids in enumerate(rows):
        scored = traffic.scored[row, 1 : ids.shape[1]]
        before = base(ids, output_hidden_states=True)
        with replaced(base, 0, plan[0], sinks(plan[0]) if plan[0].sink else None):
            after = base(ids, output_hidden_states=True, use_cache=False)
        p, q = (out.logits.log_softmax(-1)[0, :-1][scored] for out in (before, after))
        labels = ids[0, 1:][scored][:, None]
        assert float(found["kl"][row]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
        assert float(found["nll"][row]) == pytest.approx(float((p - q).gather(-1, labels).mean()), abs=1e-5)
        x, y = (out.hidden_states[1][0, :-1][scored] for out in (before, after))
        error = (x - y).square().sum() / x.square().sum()
        assert float(found["mse"][row]) == pytest.approx(float(error), rel=1e-4)
