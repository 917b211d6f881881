from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, opening_tokenizer, save_text, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFKD, Lowercase, Sequence, StripAccents
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerboost.errors import ConfigError
from layerboost.recipe import Text
from layerboost.text import Split, check_samples, is_local, load_tokens, opening_ids, read_documents, token_ids

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


def test_a_large_file_is_read_only_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents of a data set of many gigabytes do not fit in memory."""
    small = save_text(tmp_path / "t.jsonl")
    rows = [json.loads(line)["text"] for line in small.read_text().splitlines()]
    small.write_text(small.read_text() * 2 + "not JSON")
    with pytest.raises(ConfigError, match=r"line 201 of .* is not JSON"):
        documents(small)
    monkeypatch.setattr("layerboost.text.LARGE_BYTES", 1000)
    found = read_documents(str(small), "text")
    assert [next(found) for _ in rows] == rows  # in the order of the file, each once
    words = load_tokens(settings(small), TOKENIZER, "calibration", 1600).ids.flatten().tolist()
    assert " ".join(f"w{index}" for index in words[:200]) == rows[0]
    assert " ".join(f"w{index}" for index in words[201:401]) == rows[10]
    with pytest.raises(ConfigError, match=r"line 201 of .* is not JSON"):
        list(found)


def test_the_end_of_a_text_within_a_document_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in chats that were rendered to text, or in web pages: healing would hide each part from the next."""
    rows = [f"w{3 + row} w4 " * 40 for row in range(100)]
    for name, between in (("plain", "w5"), ("chats", "</s>")):
        assert not caplog.text
        file = save_rows(tmp_path / f"{name}.jsonl", [f"{row} {between} {row}" for row in rows])
        load_tokens(settings(file), TOKENIZER, "calibration", 1500)
    assert re.search(r"10 of 10 documents of .*chats.jsonl hold </s> themselves", caplog.text)


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


def test_what_a_rendered_text_has_already_is_not_put_around_it_again(tmp_path: Path) -> None:
    plain = save_text(tmp_path / "plain.jsonl")
    rows = [json.loads(line)["text"] for line in plain.read_text().splitlines()]
    rendered = save_rows(tmp_path / "rendered.jsonl", [f"<s> {row} </s>" for row in rows])
    one, other = (load_tokens(settings(file), opening_tokenizer(), "all", 3200).ids for file in (plain, rendered))
    assert torch.equal(one, other)


def test_formats(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"body": "w3"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["w4"]}), tmp_path / "b.parquet")
    assert sorted(read_documents(str(tmp_path), "body")) == ["w3", "w4"]
    (tmp_path / "c.jsonl").write_text('{"body": null}\n')
    assert sorted(read_documents(str(tmp_path), "body")) == ["w3", "w4"]
    for name in ("a.jsonl.gz", "b.parquet"):
        with pytest.raises(ConfigError, match=r"no column 'text'[\s\S]*body"):
            list(read_documents(str(tmp_path / name), "text"))


@pytest.mark.parametrize(
    ("content", "message"), [("", "no text"), ("w3 w4", "too short"), ('{"text": "w3"', "line 1 of .* is not JSON")]
)
def test_bad_text(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / ("t.jsonl" if content.startswith("{") else "t.txt")
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_tokens(settings(file), TOKENIZER, "calibration", 64)


def test_sources_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="package no-such-package is not installed"):
        list(read_documents("package:no-such-package", "text"))
    for name in ("nobody/nothing", "x" * 300, "~no-such-user/x"):
        assert not is_local(name)
        with pytest.raises(ConfigError, match="neither a file, a folder nor a Hub data set"):
            list(read_documents(name, "text"))


def test_sources_share_the_tokens_by_their_weights(tmp_path: Path) -> None:
    for name, word in (("one", "w3"), ("other", "w4")):
        rows = (f"w{100 + index // 20} w{100 + index % 20} " + " ".join([word] * 50) for index in range(400))
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
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


def test_samples_that_cannot_fill_a_split_are_refused() -> None:
    text = Text(source="self", self_samples=100, sequence_tokens=32)
    check_samples(text, 80 * 32, "train")
    check_samples(text, 10 * 32, "held_out")
    too_many: list[tuple[int, Split]] = [(80 * 32 + 1, "train"), (10 * 32 + 1, "held_out")]
    for tokens, split in too_many:
        with pytest.raises(ConfigError, match=f"own samples are too few[\\s\\S]*to the {split} split"):
            check_samples(text, tokens, split)


def test_a_language_whose_words_the_tokenizer_splits_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    (tmp_path / "t.txt").write_text("слово " * 400)
    with caplog.at_level("WARNING"):
        load_tokens(settings(tmp_path / "t.txt"), tokenizer, "all", 64)
    assert "11.0 tokens per word" in caplog.text
    caplog.clear()
    (tmp_path / "t.txt").write_text("言葉" * 400)  # no spaces: three bytes a sign are not shredded more than most
    load_tokens(settings(tmp_path / "t.txt"), tokenizer, "all", 64)
    (tmp_path / "t.txt").write_text("of a word or two " * 400)
    load_tokens(settings(tmp_path / "t.txt"), tokenizer, "all", 64)
    assert not caplog.text


def bpe_tokenizer(characters: str, **settings: Any) -> PreTrainedTokenizerFast:
    """Of single characters, without an unknown token."""
    bpe = Tokenizer(BPE({each: index for index, each in enumerate(["</s>", *characters])}, []))
    for name, part in settings.items():
        setattr(bpe, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


ENGLISH = "The quick brown fox, no. 7, jumps over the lazy dog. "
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (tiny_tokenizer(), ENGLISH),  # nothing but <unk>
        (bpe_tokenizer(LETTERS[:10] + ". "), ENGLISH),  # characters dropped
        (bpe_tokenizer(LETTERS + LETTERS.upper() + ",. 7"), "Съешь же ещё этих мягких французских булок. "),
        (tiny_tokenizer(), "w3 w4 w5 w6 w200 w201 "),
    ],
)
@pytest.mark.parametrize("rows", [1, 50])
def test_a_text_that_the_tokenizer_does_not_know_is_refused(
    tokenizer: Any, text: str, rows: int, tmp_path: Path
) -> None:
    """Of one long document, and of many that are each too short to judge by."""
    file = save_rows(tmp_path / "a.jsonl", [f"{text * (200 // rows)} w{index}" for index in range(rows)])
    with pytest.raises(ConfigError, match=r"does not know the text of .*a.jsonl(.|\n)*% of its characters are lost"):
        load_tokens(settings(file), tokenizer, "all", 64)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (bpe_tokenizer(LETTERS + ",. 7", normalizer=Lowercase()), ENGLISH),
        (
            bpe_tokenizer(LETTERS + " ", normalizer=Sequence([NFKD(), StripAccents(), Lowercase()])),
            "Ça ﬁne naïve ÅNGSTRÖM ",
        ),
        (bpe_tokenizer(LETTERS.upper() + LETTERS + ".,7", pre_tokenizer=WhitespaceSplit()), ENGLISH),
        (bpe_tokenizer(LETTERS.upper() + LETTERS + ".,7▁", pre_tokenizer=Metaspace()), ENGLISH),
        (byte_tokenizer(), "Съешь же 🙂 北京 ещё\u0301 한국어 \u200b"),
        (tiny_tokenizer(), "w3 w4 </s> <unk> w5\u2028w6 "),
    ],
)
def test_what_a_tokenizer_normalises_is_known(
    tokenizer: Any, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.eos_token = tokenizer.eos_token or "!"
    load_tokens(settings(save_rows(tmp_path / "a.jsonl", [text * 100])), tokenizer, "all", 64)
    assert "does not know" not in caplog.text


def documents(source: Path, column: str = "text") -> list[str]:
    return sorted(read_documents(str(source), column))


def save_rows(file: Path, rows: list[Any], column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({column: rows}), file)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_missing_values_are_passed_over(name: str, tmp_path: Path) -> None:
    words = ["nan", "None", "<NA>", "null", "NULL", "NaN", "N/A", " NaN\n", "", " "]
    missing: list[Any] = [None, *words] + ([float("nan")] if name == "a.jsonl" else [])
    assert documents(save_rows(tmp_path / name, ["w3", *missing, "w4", "a nan of None"])) == [
        "a nan of None",
        "w3",
        "w4",
    ]
    for rows in ([None, None], words):
        assert "no text" in refusal(save_rows(tmp_path / name, rows))
    (tmp_path / "a.txt").write_text("null\n")
    assert "no text" in refusal(tmp_path / "a.txt")


def refusal(source: Path, column: str = "text") -> str:
    with pytest.raises(ConfigError) as caught:
        documents(source, column)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    "rows", [[[{"role": "user", "content": "w3"}]] * 3, [1, 2, 3], [1.5, 2.5], [True, False], [["w3", "w4"], []]]
)
def test_a_column_without_text_is_refused(name: str, rows: list[Any], tmp_path: Path) -> None:
    file = save_rows(tmp_path / name, rows)
    assert f"column 'text' of {file} holds no text" in refusal(file)
    assert type(rows[0]).__name__ in refusal(file)


def test_bytes_are_no_text(tmp_path: Path) -> None:
    assert "bytes in row 1 of" in refusal(save_rows(tmp_path / "a.parquet", [b"w3", b"w4"]))


def test_single_rows_without_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_rows(tmp_path / "a.jsonl", ["w3", 7, ["w9"], "w4"])
    file.write_text(file.read_text() + '{"body": "w5"}\n"w6"\n')
    assert documents(file) == ["w3", "w4"]
    assert f"{file}: 4 rows without a text are skipped" in caplog.text
    assert f"int in line 2 of {file}" in caplog.text
    caplog.clear()
    assert documents(file) == ["w3", "w4"]
    assert not caplog.text  # said once, however often the text is read


def test_a_wrong_column_of_a_large_file_is_soon_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "w3"}\n' * 2000 + "not JSON")
    assert "line 1 of" in refusal(file)


def test_of_a_folder_only_documents_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_rows(tmp_path / "data" / "train.jsonl", ["w3", "w4"])
    save_rows(tmp_path / "data" / "MORE.JSONL".lower(), ["w5"]).rename(tmp_path / "data" / "MORE.JSONL")
    (tmp_path / "data" / "._train.jsonl").write_bytes(b"\x00\x05\x16\x07\xb0\xff")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "x.jsonl").write_text("{")
    for name in ("README.md", "LICENSE.txt", "notes.txt", "rows.csv"):
        (tmp_path / name).write_text("w9 " * 100)
    assert documents(tmp_path) == ["w3", "w4", "w5"]
    assert "2 data files are read; left out: LICENSE.txt, README.md, notes.txt, rows.csv" in caplog.text


def test_of_a_folder_of_texts_the_readme_is_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "part/b.md", "Readme.md", "part/LICENCE", "part/licence-mit.txt", "c.TXT", "licensed.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a.txt", "c.TXT", "licensed.txt", "part/b.md"]
    assert documents(tmp_path / "Readme.md") == ["Readme.md"]  # by its own name it is meant
    (tmp_path / "empty").mkdir()
    assert "no text in" in refusal(tmp_path / "empty")


ABOUT = "README_zh.md README2.md readme.en.txt LICENSE_DATA.txt LICENSES.txt licence-mit.txt NOTICES.txt COPYING.txt"
NOT_ABOUT = "licensed.txt noticed.txt citations.txt about_licences.txt history.md copy.txt"


def test_documentation_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ABOUT.split(), *NOT_ABOUT.split()):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == sorted(NOT_ABOUT.split())
    # Of an installed package too, whose metadata are not read either.
    metadata = tmp_path / "site" / "speeches-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Name: speeches\nVersion: 1\n")
    for name in ("speeches/data/one.TXT", "speeches/data/README_zh.md", "speeches-1.dist-info/entry_points.txt"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(name)
        with (metadata / "RECORD").open("a") as record:
            record.write(f"{name},,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert list(read_documents("package:speeches", "text")) == ["speeches/data/one.TXT"]


def test_run_folders_and_models_in_a_folder_hold_no_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run's own files were read as soon as there were any: in the run's default folder, with `--text .`."""
    for name in ("a.txt", "runs.txt", "sub/b.txt", "sub/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a.txt", "runs.txt", "sub/b.txt"]
    for folder, mark in (("begun", ".lock"), ("runs/ended", "run.json"), ("runs/ended/converted", "config.json")):
        (tmp_path / folder / "heal").mkdir(parents=True)
        (tmp_path / folder / mark).write_text('{"model_type": "llama"}')
        (tmp_path / folder / "report.md").write_text("report")
        save_rows(tmp_path / folder / "heal" / "metrics.jsonl", ["metrics"], "loss")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert documents(tmp_path) == ["a.txt", "runs.txt", "sub/b.txt"]
    assert "3 texts are read; left out: begun, model, runs/ended, sub/config.json" in caplog.text
    for folder in ("begun", "model", "runs/ended"):
        assert "its files are not documents" in refusal(tmp_path / folder)
    assert documents(tmp_path / "model" / "merges.txt") == ["#version: 0.2\na b\n"]


def test_directories_that_are_links_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_rows(tmp_path / "large" / "a.jsonl", ["w3"])
    save_rows(tmp_path / "data" / "b.jsonl", ["w4"])
    (tmp_path / "data" / "more").symlink_to(tmp_path / "large")
    (tmp_path / "large" / "back").symlink_to(tmp_path / "data")  # a loop
    assert documents(tmp_path / "data") == ["w3", "w4"]
    assert "left out" not in caplog.text


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    save_rows(tmp_path / "a.jsonl", ["w3"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "cannot read" in refusal(tmp_path)
    assert "b.jsonl" in refusal(tmp_path)


def splits(text: Text) -> dict[str, set[str]]:
    """The words that each split holds, of documents that are words of their own."""
    found: dict[str, set[str]] = {}
    names: list[Split] = ["calibration", "held_out", "train"]
    for split in names:
        ids = load_tokens(text, TOKENIZER, split, 16 * 8 if split == "train" else 16)
        found[split] = set(ids.ids.flatten().tolist()) - {TOKENIZER.eos_token_id}
    return found


@pytest.mark.parametrize("how", ["one file", "test repeats train", "two sources"])
def test_a_text_that_occurs_twice_is_in_one_split(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [f"w{3 + index}\n" * 8 for index in range(180)]
    again = words[::-1]
    if how == "one file":
        source: Any = str(save_rows(tmp_path / "a.jsonl", words + again))
    else:
        files = [save_rows(tmp_path / "d" / f"{name}.jsonl", rows) for name, rows in (("a", words), ("b", again[:90]))]
        source = str(tmp_path / "d") if how == "test repeats train" else {str(file): 1.0 for file in files}
    if how == "two sources":
        save_rows(tmp_path / "d" / "b.jsonl", [*again[:90], *(f"{word} w190" for word in words)])
    found = splits(Text.model_validate({"source": source, "sequence_tokens": 16}))
    for one, other in (("calibration", "held_out"), ("calibration", "train"), ("held_out", "train")):
        assert not (found[one] & found[other]) - {190}
    assert "repeat others" in caplog.text


@pytest.mark.parametrize("again", ["{}", "{}\n", " {} ", "NFD"])
@pytest.mark.parametrize("end", ["\r", "\r\n", " \n", "\n\n", "\n  "])
def test_a_text_is_the_same_however_it_was_saved(again: str, end: str, tmp_path: Path) -> None:
    rows = [f"Café {index}\nline" for index in range(40)]
    for row in rows[:]:
        text = unicodedata.normalize("NFD", row) if again == "NFD" else again.format(row)
        rows.append(text.replace("\n", end))
    found = documents(save_rows(tmp_path / "a.jsonl", rows))
    assert found == sorted(rows[:40])  # as it stands in the file


def test_one_long_row_among_others_is_packed(tmp_path: Path) -> None:
    """Copying the rest of a row for every sequence made of it took minutes here."""
    long = " ".join(f"w{3 + index % 180}" for index in range(600_000))
    text = settings(
        save_rows(tmp_path / "a.jsonl", [f"w{index}" for index in range(3, 40)] + [long]), sequence_tokens=16
    )
    ids = load_tokens(text, TOKENIZER, "all", 599_000).ids.flatten()
    start = int((ids[:-1].eq(3) & ids[1:].eq(4)).nonzero()[0])
    assert torch.equal(ids[start:].clone(), (torch.arange(len(ids) - start) % 180 + 3)[: len(ids) - start])


def test_of_a_very_long_text_no_more_is_tokenized_than_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.text.TOKENIZED_CHARACTERS", 1000)
    given: list[int] = []

    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        given.append(len(text))
        return {"input_ids": list(text.encode())}

    assert token_ids(tokenizer, "a" * 10_000, 1500) == [97] * 2000
    assert given == [1000, 1000]
    assert token_ids(tokenizer, "a" * 2500, 10_000) == [97] * 2500
