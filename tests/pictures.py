"""Tiny processors of vision-language models, of the parts that need no torchvision, and pictures for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import IMAGE_TOKEN, RUNTIME, VOCABULARY, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from layerboost.model.base import Base, find_model

IMAGE = "<image>"
CHAT = (
    "{% for turn in messages %}{{ turn['role'] == 'user' and 'w5 ' or 'w6 ' }}{% if turn['content'] is string %}"
    "{{ turn['content'] }} {% else %}{% for part in turn['content'] %}{{ part['text'] if part['type'] == 'text' else "
    "'<image>' }} {% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}w6 {% endif %}"
)
# Processors with code of their own: Qwen's and InternVL's take a video processor, Pixtral's is for torchvision alone.
QWEN = """
from transformers import ProcessorMixin
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor


class TinyProcessor(Qwen3VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
"""
INTERNVL = """
import re

from transformers import ProcessorMixin
from transformers.models.internvl.processing_internvl import InternVLProcessor


class TinyProcessor(InternVLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=4, chat_template=None, **kwargs):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.start_image_token_id = tokenizer.bos_token, tokenizer.bos_token_id
        self.end_image_token, self.end_image_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile(f"(?P<image>{self.image_token})|(?P<video>{self.video_token})")
"""
PIXTRAL = """
from transformers import LlavaProcessor
from transformers.processing_utils import MultiModalData


class TinyProcessor(LlavaProcessor):
    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        sizes = [[-(-side * 16 // max(16, *size) // 8) for side in size] for size in image_sizes]
        tokens = [rows * columns for rows, columns in sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(sizes))
"""
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
LLAVA = {
    "processor_class": "LlavaProcessor", "patch_size": 4, "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}  # fmt: skip
REMOTE = {"processor_class": "TinyProcessor", "auto_map": {"AutoProcessor": "processing_tiny.TinyProcessor"}}
QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "size": {"shortest_edge": 64, "longest_edge": 256},
}
# SmolVLM's own also takes a video processor.
IDEFICS = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
IDEFICS_IMAGES = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}
# Of each wrapper with a processor here: its settings, its image processor's, and its code, for `tiny.TOWERS`.
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "llava": (
        LLAVA,
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
        },
        "",
    ),
    "mistral3": (
        REMOTE | {"patch_size": 8, "vision_feature_select_strategy": "full"},
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 16}, "patch_size": 8},
        PIXTRAL,
    ),
    "internvl": (
        REMOTE | {"image_seq_length": 4},
        {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 8, "width": 8}},
        INTERNVL,
    ),
    "idefics3": (IDEFICS, IDEFICS_IMAGES | {"image_processor_type": "Idefics3ImageProcessor"}, ""),
    "smolvlm": (IDEFICS, IDEFICS_IMAGES | {"image_processor_type": "SmolVLMImageProcessor"}, ""),
    "qwen2_vl": (REMOTE, QWEN_IMAGES, QWEN),
    "qwen2_5_vl": (REMOTE, QWEN_IMAGES, QWEN),
    "qwen3_vl": (REMOTE, QWEN_IMAGES, QWEN),
    "gemma3": (
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 8, "width": 8}},
        "",
    ),
}
# The simplest, one with rotary positions of three dimensions and deepstack, one whose images see themselves both ways.
QUICK = ("llava", "qwen3_vl", "gemma3")
QUICK_AND_EXHAUSTIVE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in PROCESSORS
]
wrappers = pytest.mark.parametrize("wrapper", QUICK_AND_EXHAUSTIVE)


def save_bases(root: Path, layers: int = 3) -> dict[str, Base]:
    """Bases with a processor, by wrapper."""
    folders = {name: save_with_processor(root / name, name, layers) for name in PROCESSORS}
    return {name: find_model(str(folder), RUNTIME, trust_remote_code=True) for name, folder in folders.items()}


def picture_tokenizer(wrapper: str = "") -> PreTrainedTokenizerFast:
    """Words w5 to w199, and the tokens of images: Gemma 3's prompts have another one in place of each image."""
    names = {"image_token": IMAGE, "video_token": "<video>"}
    if wrapper == "gemma3":
        names = {"image_token": "<soft>", "boi_token": IMAGE, "eoi_token": "</s>"}
    if wrapper in ("idefics3", "smolvlm"):
        names |= {"fake": "<fake_token_around_image>", "end_of_utterance": "<end_of_utterance>"}
    one, other, *more = names.values()
    special = {"<s>": 0, "</s>": 1, one: IMAGE_TOKEN, "<unk>": 3, other: 4}
    special |= {token: VOCABULARY - place for place, token in enumerate(more, 1) if token not in special}
    known = range(5, VOCABULARY - len(special) + 5)
    words = Tokenizer(WordLevel(special | {f"w{index}": index for index in known}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        extra_special_tokens=names, chat_template=CHAT,
    )  # fmt: skip


def save_with_processor(folder: Path, wrapper: str, layers: int = 3, **changes: Any) -> Path:
    """A stock wrapper with a tokenizer and a processor that read pictures."""
    tiny_model(wrapper, layers, **changes).save_pretrained(folder)
    picture_tokenizer(wrapper).save_pretrained(folder)
    settings, images, code = PROCESSORS[wrapper]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(images | NORMAL))
    if code:
        (folder / "processing_tiny.py").write_text(code)
    return folder


def save_picture(file: Path, seed: int = 0, height: int = 8) -> Path:
    """A picture of 16 x 8 random pixels, or of another height."""
    pixels = torch.randint(0, 256, (height, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(file)
    return file


def save_requests(folder: Path, rows: int = 6, words: int = 50, heights: tuple[int, ...] = (8,)) -> Path:
    """Requests with a picture each, of these heights in turn, and one of text alone."""
    draw = torch.Generator().manual_seed(3)

    def text(count: int) -> str:
        return " ".join(f"w{word}" for word in torch.randint(5, VOCABULARY, (count,), generator=draw).tolist())

    asked: list[dict[str, Any]] = [{"prompt": f"{text(words)} ", "answer": text(8)}]
    for row in range(rows):
        name = save_picture(folder / f"{row}.png", row, heights[row % len(heights)]).name
        asked.append({"prompt": f"{text(4)} {IMAGE} {text(words)} ", "answer": text(8), "images": [name]})
    file = folder / "requests.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    return file
