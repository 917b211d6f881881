from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    RUNTIME,
    byte_level_tokenizer,
    byte_tokenizer,
    change_weights,
    convert,
    edit_config,
    edit_json,
    opening_tokenizer,
    plan_file,
    save_checkpoint,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import layerboost
from layerboost.errors import ConfigError, LayerboostError
from layerboost.model import checkpoint
from layerboost.model.base import Base, find_model
from layerboost.model.card import origin_of
from layerboost.model.checkpoint import modeling_source, plan_in, save_boosted
from layerboost.model.linear import OneDNNLinear
from layerboost.model.surgery import apply_plan
from layerboost.recipe import Card
from layerboost.schemas.plan import read_plan

IDS = torch.arange(3, 43)[None]


def again(base: Base) -> Base:
    """The same model as a later stage opens it: nothing is known of it yet."""
    return find_model(base.name, RUNTIME)


def saved(folder: Path, letters: str = "nfSs", **changes: Any) -> tuple[Path, torch.Tensor]:
    """A boosted checkpoint and its logits."""
    plan = plan_file(letters)
    model = apply_plan(tiny_model(layers=len(letters), **changes), plan.layers, {2: torch.randn(4)})
    with torch.no_grad():
        return save_checkpoint(folder, model, plan), model(IDS).logits


def test_a_checkpoint_is_complete_and_speaks_hugging_face(tmp_path: Path) -> None:
    folder, logits = saved(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert config["sliding_window"] == 16
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}}
    assert {"plan.yaml", "recipe.yaml", "README.md", "modeling_layerboost.py", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    card = (folder / "README.md").read_text()
    assert "| 2 | sliding | 16 | yes |" in card
    assert plan_in(folder) == read_plan(folder / "plan.yaml")
    loaded = find_model(str(folder), RUNTIME).load()
    assert torch.equal(loaded(IDS).logits, logits)


ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerboost":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[3])
del model
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
ids = torch.arange(3, 43)[None]
torch.save((model(ids).logits.detach(), model.generate(ids, max_new_tokens=5, do_sample=False)), sys.argv[2])
"""


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_weights_have_the_mode_of_any_new_file(mask: int, tmp_path: Path) -> None:
    """safetensors writes files that their owner alone can read."""
    before = os.umask(mask)
    try:
        folder, _ = saved(tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~mask}


@pytest.mark.multiprocess
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_it_loads_by_its_own_file_where_layerboost_is_not_installed(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "100KB")
    folder, logits = saved(tmp_path / "out", tie_word_embeddings=tied)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(find_model(str(folder), RUNTIME).load()(IDS).logits, logits)
    places = [folder, tmp_path / "logits.pt", tmp_path / "again"]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, places)], check=True, capture_output=True)
    alone, generated = torch.load(tmp_path / "logits.pt")
    assert torch.equal(alone, logits)
    assert generated.shape == (1, 45)
    assert not any("import" in line and "layerboost" in line for line in modeling_source().splitlines())


def test_layerboosts_auto_class_is_transformers_own_and_loads_boosted_checkpoints(tmp_path: Path) -> None:
    folder, logits = saved(tmp_path / "out")
    assert layerboost.AutoModelForCausalLM is transformers.AutoModelForCausalLM
    model = layerboost.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "LayerBoostForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'"):
        layerboost.AutoModel  # noqa: B018


def test_a_loaded_model_is_saved_with_its_code(tmp_path: Path) -> None:
    """As after fine-tuning: others load it where layerboost is not installed."""
    folder, logits = saved(tmp_path / "out")
    for trust in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        model.save_pretrained(tmp_path / f"again-{trust}")
        file = tmp_path / f"again-{trust}" / "modeling_layerboost.py"
        assert file.read_text() == modeling_source()
        again = transformers.AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=True).eval()
        assert type(again).__module__.startswith("transformers_modules.")
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, logits)
        model.save_pretrained(folder)  # in its own place
    assert (folder / "modeling_layerboost.py").read_text() == modeling_source()


def test_the_package_the_command_line_and_the_plugin_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, layerboost.cli, layerboost.vllm_plugin.plugin; print({'torch', 'transformers'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "set()\n"


def test_stock_checkpoints_keep_their_stock_class(tmp_path: Path) -> None:
    model = find_model(str(save_tiny(tmp_path)), RUNTIME).load()
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {OneDNNLinear}
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


def test_weights_that_disagree_with_the_plan(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "out")
    sinks, query = "model.layers.2.self_attn.sinks", "model.layers.0.self_attn.q_proj.weight"
    for change, named in (
        (lambda t: t.pop(sinks), "sinks"),
        (lambda t: t.update({sinks: torch.zeros(4), query: torch.zeros(128, 64)}), "q_proj"),
    ):
        change_weights(folder, change)
        with pytest.raises(ConfigError, match=rf"disagree[\s\S]*{named}"):
            find_model(str(folder), RUNTIME).load()


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a directory, a GGUF file nor a Hub id"):
        find_model("nobody/nothing", RUNTIME)
    with pytest.raises(ConfigError, match="no such GGUF file"):
        find_model(str(tmp_path / "x.gguf"), RUNTIME)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path), RUNTIME)
    with pytest.raises(ConfigError, match="package no-such-package is not installed"):
        find_model("package:no-such-package", RUNTIME)
    tiny_model().config.save_pretrained(tmp_path)
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    with pytest.raises(ConfigError, match=r"a path is not UTF-8[^$]+odd\\xff"):
        find_model(str(odd), RUNTIME)
    with pytest.raises(ConfigError, match="no weights"):
        find_model(str(tmp_path), RUNTIME)


@pytest.mark.parametrize(("model_type", "message"), [("bert", "not supported"), ("t5", "encoder-decoder")])
def test_other_kinds_of_models_are_refused(model_type: str, message: str, tmp_path: Path) -> None:
    import transformers

    transformers.CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        find_model(str(tmp_path), RUNTIME).load()


@pytest.mark.parametrize("key", ["is_causal", "use_bidirectional_attention"])
def test_attention_that_sees_what_follows_is_refused(key: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_config(folder, **{key: key != "is_causal"})
    with pytest.raises(ConfigError, match="bidirectional attention are not supported"):
        find_model(str(folder), RUNTIME).load()


def test_a_truncated_config_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ConfigError, match=r"is not a model directory\nfound: config.json: "):
        find_model(str(folder), RUNTIME).load()


def test_model_info(tmp_path: Path) -> None:
    source = find_model(str(save_tiny(tmp_path)), RUNTIME)
    model, found = source.load(), source.info
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.kv_bytes_per_token == 2 * 2 * 32 * 4
    before = source.fingerprint
    change_weights(tmp_path, lambda t: t["model.layers.2.mlp.up_proj.weight"][40, 40].add_(1))
    assert again(source).fingerprint != before


@pytest.mark.parametrize(
    "name", ["acme/tiny", "my model [v2] (100%) #1 'q' \u00fc\u5317", "-dash", "x.gguf", "~no-such-user", "$HOME"]
)
def test_directories_of_unusual_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path(name), layers=2)
    source = find_model(name, RUNTIME)
    assert (source.name, source.folder, source.gguf) == (name, tmp_path / name, None)
    target, plan = Path(f"{name} out"), plan_file("fs")
    model, origin = apply_plan(source.load(), plan.layers), origin_of(source.folder, source.name, Card())
    save_boosted(model, again(source).tokenizer, plan, target, recipe_yaml="{}\n", origin=origin)
    assert find_model(str(target), RUNTIME).load()(IDS).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(target).vocab_size == 200


def test_packages_of_no_name() -> None:
    with pytest.raises(ConfigError, match="is not installed"):
        find_model("package:", RUNTIME)


GENERATION = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.2, "max_new_tokens": 0}


def test_settings_of_generation_are_passed_on_as_they_are_and_not_used(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", layers=2)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    edit_config(folder, temperature=0.7, max_length=4096, top_k=3)  # as in Llama 2's
    source = find_model(str(folder), RUNTIME)
    model = source.load()
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.eos_token_id == 1
    convert(source, "fs", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION


def test_what_is_not_the_model_once_read_back_takes_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_file("fs")
    model = apply_plan(tiny_model(layers=2), plan.layers)
    save = type(model).save_pretrained

    def without_weights(self: Any, folder: Path, **_: Any) -> None:
        self.config.save_pretrained(folder)

    def with_others(self: Any, folder: Path, **_: Any) -> None:
        save(self, folder)
        change_weights(folder, lambda t: t["model.norm.weight"].add_(1))

    for broken, message in ((without_weights, "has no weights"), (with_others, r"found: model\.norm\.weight")):
        monkeypatch.setattr(type(model), "save_pretrained", broken)
        with pytest.raises(LayerboostError, match=f"could not be written[^$]+{message}"):
            save_checkpoint(tmp_path / "out", model, plan)
        assert not list(tmp_path.iterdir())


def with_tokenizer(folder: Path, tokenizer: Any, **config: Any) -> Base:
    """A model of this tokenizer, as MODEL."""
    save_tiny(folder, layers=2, **config)
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    return find_model(str(folder), RUNTIME)


def test_a_tokenizer_is_what_its_file_says_and_is_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    source = with_tokenizer(tmp_path / "base", tokenizer, vocab_size=300)
    with caplog.at_level("WARNING"):
        _ = again(source).tokenizer
    assert not caplog.text
    # DeepSeek-R1-Distill-Llama: Transformers 5 builds that class with another pre-tokenizer.
    edit_json(source.folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    (source.folder / "special_tokens_map.json").write_text("{}")
    text = "hello world  2023\n ok"
    wanted = Tokenizer.from_file(str(source.folder / "tokenizer.json")).encode(text).ids
    with caplog.at_level("WARNING"):
        loaded = again(source).tokenizer
    assert loaded(text, add_special_tokens=False)["input_ids"] == wanted
    assert loaded.decode(wanted) == text
    rebuilt = AutoTokenizer.from_pretrained(source.folder)(text, add_special_tokens=False)["input_ids"] != wanted
    assert ("is used as it is" in caplog.text) == rebuilt  # Transformers 5.24 reads the file
    convert(source, "fs", tmp_path / "out")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()
    # vLLM loads it by Transformers' class.
    settings = [
        json.loads((place / "tokenizer_config.json").read_text()) for place in (source.folder, tmp_path / "out")
    ]
    assert settings[1] == settings[0] | ({"tokenizer_class": "PreTrainedTokenizerFast"} if rebuilt else {})
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False)["input_ids"] == wanted


def test_a_tokenizer_puts_nothing_behind_a_text(tmp_path: Path) -> None:
    for name, tokenizer, opening in (("plain", tiny_tokenizer(), []), ("opening", opening_tokenizer(), [0])):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=["<s>", "$A", "</s>"] if opening else ["$A", "</s>", "</s>"],
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
        source = with_tokenizer(tmp_path / name, tokenizer)
        assert AutoTokenizer.from_pretrained(source.folder)("w5 w6")["input_ids"][-1] == 1
        assert again(source).tokenizer("w5 w6")["input_ids"] == [*opening, 5, 6]
        # As Transformers 5 says it.
        edit_json(source.folder / "tokenizer_config.json", add_eos_token=True, add_bos_token=bool(opening))
        assert again(source).tokenizer("w5 w6")["input_ids"] == [*opening, 5, 6]


def test_the_end_of_a_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    source = with_tokenizer(tmp_path / "m", tokenizer)
    ends: list[Any] = [1, [1, 2]]
    for named in ends:
        edit_config(source.folder, eos_token_id=named)
        found = again(source).tokenizer
        assert (found.eos_token_id, found.pad_token_id) == (1, 1)
    # Transformers would add it under a new id, which no model learned.
    edit_config(source.folder, eos_token_id=1, vocab_size=300)
    edit_json(source.folder / "tokenizer_config.json", eos_token="<|end|>")
    with caplog.at_level("WARNING"):
        assert again(source).tokenizer.eos_token_id == 1
    assert "has no <|end|>" in caplog.text
    edit_json(source.folder / "tokenizer_config.json", eos_token=None)
    odd: list[Any] = [None, 500, []]
    for named in odd:
        edit_config(source.folder, eos_token_id=named)
        with pytest.raises(ConfigError, match=r"no end-of-text token[^$]+eos_token_id"):
            _ = again(source).tokenizer


def test_ids_beyond_the_embedding(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    source = with_tokenizer(tmp_path / "m", tokenizer)
    # Gemma 3's text models: a token that no text has. Without it, text that has it is read like any other.
    assert again(source).tokenizer("w5 <image> w6")["input_ids"] == [5, 2, 6]
    # Alpaca's: a token for padding beyond the embedding, in no text either.
    edit_json(source.folder / "tokenizer_config.json", pad_token="<image>")
    assert again(source).tokenizer.pad_token_id == 1
    edit_json(source.folder / "tokenizer_config.json", chat_template="{{ '<|im_start|>' }}")
    with pytest.raises(
        ConfigError, match=r"gives ids up to 201 where the model has 200 rows\nfound: <\|im_start\|> 200"
    ):
        _ = again(source).tokenizer
    tokenizer.eos_token = "<image>"
    with pytest.raises(ConfigError, match="gives ids up to 201"):
        _ = with_tokenizer(tmp_path / "end", tokenizer).tokenizer
    with pytest.raises(ConfigError, match=r"ids up to 199 where the model has 150 rows\nfound: w150 150"):
        _ = with_tokenizer(tmp_path / "less", tiny_tokenizer(), vocab_size=150).tokenizer


def test_a_class_that_adds_special_tokens_of_its_own(tmp_path: Path) -> None:
    """Their ids would be the first beyond the embedding, and the model refused."""
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = "t4"
    source = with_tokenizer(tmp_path / "m", tokenizer, vocab_size=257)
    edit_json(source.folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    found = again(source).tokenizer
    assert (len(found), found.bos_token, found.unk_token, found("ab")["input_ids"]) == (257, None, None, [2])


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "m", tiny_tokenizer())
    kept = Path(shutil.copytree(source.folder, tmp_path / "kept"))
    for file in source.folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        _ = again(source).tokenizer
    (source.folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        _ = again(source).tokenizer
    for broken in ("{", "{}", '{"model": {"type": "New"}}'):
        (kept / "tokenizer.json").write_text(broken)
        with pytest.raises(ConfigError, match="cannot load the tokenizer"):
            _ = find_model(str(kept), RUNTIME).tokenizer
