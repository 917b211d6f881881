from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from tiny import opening_tokenizer, save_text, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from layerboost.errors import ConfigError
from layerboost.recipe import Text
from layerboost.text import (
    check_samples,
    load_tokens,
    opening_ids,
    read_documents,
    sample_documents,
    samples_missing,
)

TOKENIZER = tiny_tokenizer()


def settings(source: Path, **changes: object) -> Text:
    return Text.model_validate({"source": str(source), "sequence_tokens": 32} | changes)


def test_splits_share_no_document_and_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    text = settings(save_text(tmp_path / "t.jsonl"))
    assert len(set(read_documents(text.name, text.column))) == 100
    calibration = load_tokens(text, TOKENIZER, "calibration", 320)
    assert calibration.ids.shape == (10, 32)
    assert torch.equal(load_tokens(text, TOKENIZER, "calibration", 320, seed=5).ids, calibration.ids)
    documents = {
        split: load_tokens(text, TOKENIZER, split, 1600).ids.flatten().tolist()
        for split in ("calibration", "held_out", "train")
    }
    joined = {split: " ".join(map(str, rows)) for split, rows in documents.items()}
    opening = [" ".join(map(str, rows[:20])) for rows in documents.values()]
    for split, start in zip(documents, opening, strict=True):
        assert [other for other in documents if start in joined[other]] == [split]


def test_the_train_order_follows_the_seed(tmp_path: Path) -> None:
    text = settings(save_text(tmp_path / "t.jsonl"))
    first, same, other = (load_tokens(text, TOKENIZER, "train", 640, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_the_opening_is_all_that_stands_before_a_text_and_nothing_behind() -> None:
    tokenizer = tiny_tokenizer()
    tokens = [("<s>", 0), ("</s>", 1), ("w9", 9)]
    for single, opening in (
        (["<s>", "w9", "$A", "</s>"], [0, 9]),
        (["w9", "$A"], [9]),
        (["$A", "</s>"], []),
        (["$A", "<s>"], []),
    ):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
        assert opening_ids(tokenizer) == opening


def test_documents_are_joined_by_the_end_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w3 w4 w5 " * 2000)
    ids = load_tokens(settings(tmp_path / "a.txt"), TOKENIZER, "all", 2000).ids
    assert (ids == TOKENIZER.eos_token_id).sum() > 0
    assert set(ids.unique().tolist()) <= {1, 2, 3, 4, 5}  # a piece may cut a word in two


def test_documents_and_sequences_open_as_the_tokenizer_opens_a_text(tmp_path: Path) -> None:
    opening = opening_tokenizer()
    text = settings(save_text(tmp_path / "t.jsonl"))
    plain, opened = (load_tokens(text, tokenizer, "all", 3200).ids for tokenizer in (TOKENIZER, opening))
    assert opening_ids(TOKENIZER) == []
    assert opening_ids(opening) == [0]
    assert opened.shape == plain.shape
    assert opened[:, 0].eq(0).all()
    stream, ends = opened.flatten(), opened.flatten().eq(TOKENIZER.eos_token_id).nonzero().flatten()
    assert stream[ends[:-1] + 1].eq(0).all()
    # Nothing of the text is lost or said twice.
    words = stream[stream != 0]
    assert torch.equal(words, plain.flatten()[: len(words)])


def test_formats(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"body": "w3"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["w4"]}), tmp_path / "b.parquet")
    assert sorted(read_documents(str(tmp_path), "body")) == ["w3", "w4"]
    (tmp_path / "c.jsonl").write_text('{"body": null}\n')
    assert sorted(read_documents(str(tmp_path), "body")) == ["w3", "w4"]
    with pytest.raises(ConfigError, match=r"no column 'text'[\s\S]*body"):
        list(read_documents(str(tmp_path / "a.jsonl.gz"), "text"))
    with pytest.raises(ConfigError, match=r"no column 'text'[\s\S]*body"):
        list(read_documents(str(tmp_path / "b.parquet"), "text"))


@pytest.mark.parametrize(
    ("content", "message"), [("", "no text"), ("w3 w4", "too short"), ('{"text": "w3"', "cannot read text")]
)
def test_bad_text(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / ("t.jsonl" if content.startswith("{") else "t.txt")
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tokens(settings(file), TOKENIZER, "calibration", 64)


def test_sources_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="package no-such-package is not installed"):
        list(read_documents("package:no-such-package", "text"))
    with pytest.raises(ConfigError, match="neither a file, a folder nor a Hub data set"):
        list(read_documents("nobody/nothing", "text"))


def test_sources_share_the_tokens_by_their_weights(tmp_path: Path) -> None:
    for name, word in (("one", "w3"), ("other", "w4")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{" ".join([word] * 50)}"}}\n' * 400)
    one, other = (str(tmp_path / f"{name}.jsonl") for name in ("one", "other"))
    text = Text.model_validate({"source": {one: 3, other: 1}, "sequence_tokens": 32})
    ids = load_tokens(text, TOKENIZER, "train", 4000).ids
    share = (ids == 3).sum() / ((ids == 3) | (ids == 4)).sum()
    assert float(share) == pytest.approx(0.75, abs=0.02)
    with pytest.raises(ConfigError, match="train text is too short") as caught:
        load_tokens(text, TOKENIZER, "train", 40_000)
    assert f"train split of {one}" in str(caught.value)
    for wrong in ({one: 0}, {}):
        with pytest.raises(ValueError, match="source"):
            Text.model_validate({"source": wrong})


def test_own_samples_go_on_whatever_characters_they_hold(tmp_path: Path) -> None:
    text, made_from = Text(source="self", self_samples=5, sequence_tokens=32), {"model": "tiny"}
    odd = "w3 \u2028 w4 \u2029 w5 \x85 w6"
    sample_documents(
        lambda count, _: [odd] * count, text.model_copy(update={"self_samples": 2}), tmp_path, 0, made_from
    )
    assert samples_missing(text, tmp_path, made_from)
    sample_documents(lambda count, _: [odd] * count, text, tmp_path, 0, made_from)
    assert not samples_missing(text, tmp_path, made_from)
    assert not samples_missing(text.model_copy(update={"self_samples": 5}), tmp_path, made_from)
    assert "".join(read_documents("self", "text", tmp_path)).count("w5") == 5


def test_samples_that_cannot_fill_a_split_are_refused() -> None:
    text = Text(source="self", self_samples=100, sequence_tokens=32)
    check_samples(text, 80 * 32, "train")
    check_samples(text, 10 * 32, "held_out")
    for tokens, split in ((80 * 32 + 1, "train"), (10 * 32 + 1, "held_out")):
        with pytest.raises(ConfigError, match=f"own samples are too few[\\s\\S]*for the {split} split"):
            check_samples(text, tokens, split)


def test_a_language_that_the_tokenizer_shreds_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bytes:
        eos_token_id, bos_token_id = 0, None

        def __call__(self, words: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(words.encode())}

    (tmp_path / "t.txt").write_text("слово " * 400)
    with caplog.at_level("WARNING"):
        load_tokens(settings(tmp_path / "t.txt"), Bytes(), "all", 64)
    assert "11.0 tokens per word" in caplog.text
    caplog.clear()
    (tmp_path / "t.txt").write_text("言葉" * 400)  # no spaces: three bytes a sign are not shredded more than most
    load_tokens(settings(tmp_path / "t.txt"), Bytes(), "all", 64)
    (tmp_path / "t.txt").write_text("of a word or two " * 400)
    load_tokens(settings(tmp_path / "t.txt"), Bytes(), "all", 64)
    assert not caplog.text
