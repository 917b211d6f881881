"""The base's own samples as text: by vLLM if it is installed, or else by Transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from layerboost.engines.server import MODULE, guarded
from layerboost.engines.vllm import runs_on_cpu, vllm_environment, vllm_version
from layerboost.model.base import Base
from layerboost.recipe import Recipe, parse_recipe
from layerboost.runtime import GIB, log
from layerboost.text import Generate, sample_documents, samples_missing


def write_samples(recipe: Recipe, run: Path, base: Base) -> None:
    """Write the model's samples to the run folder if the recipe needs them (`text.source: self`) and they are missing.

    Plain ancestral sampling at temperature 1 from the begin-of-text token, by vLLM in a process of its own; if that
    fails, Transformers continues from where it stopped.
    """
    if "self" not in recipe.text.sources:
        return
    made_from = {"model": base.fingerprint, "seed": recipe.seed, "text": recipe.text.model_dump(mode="json")}
    if not samples_missing(recipe.text, run, made_from):
        return
    if vllm_version() and _sampled_by_vllm(recipe, run, base, made_from):
        return
    generate = transformers_generate(base.load(), base.tokenizer, recipe.text.sequence_tokens)
    sample_documents(generate, recipe.text, run, recipe.seed, made_from)


def transformers_generate(model: Any, tokenizer: Any, tokens: int) -> Generate:
    """Return a function that samples texts of at most `tokens` tokens by Transformers."""

    def generate(count: int, seed: int) -> list[str]:
        torch.manual_seed(seed)
        prompt = torch.full((count, 1), _start(tokenizer), device=model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            # A model's own generation settings would sharpen its text.
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts: list[str] = tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)
        return texts

    return generate


def vllm_generate(folder: str, start: int, tokens: int, dtype: str, trust_remote_code: bool) -> Generate:
    """Return a function that samples texts of at most `tokens` tokens by vLLM."""
    from vllm import LLM, SamplingParams

    on_cpu: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": GIB} if runs_on_cpu() else {}
    llm = LLM(
        folder,
        dtype=dtype,
        max_model_len=tokens + 1,
        generation_config="vllm",
        trust_remote_code=trust_remote_code,
        **on_cpu,
    )

    def generate(count: int, seed: int) -> list[str]:
        settings = [SamplingParams(temperature=1.0, max_tokens=tokens, seed=seed + index) for index in range(count)]
        answers = llm.generate([{"prompt_token_ids": [start]}] * count, settings, use_tqdm=False)
        return [answer.outputs[0].text for answer in answers]

    return generate


def _sampled_by_vllm(recipe: Recipe, run: Path, base: Base, made_from: dict[str, Any]) -> bool:
    """Return whether a process that runs this module wrote all samples; its log is RUN/self_samples.log."""
    job = [
        recipe.model_dump(mode="json"),
        str(run),
        str(base.folder),
        _start(base.tokenizer),
        base.runtime.dtype_name,
        made_from,
    ]
    log_file = run / "self_samples.log"
    log.info("sampling text from the model with vLLM; its log is %s", log_file)
    command = [*MODULE, __name__, json.dumps(job)]
    # Its stderr is not redirected: it shows the progress.
    with log_file.open("wb") as output, guarded(command, vllm_environment(), output, errors=None) as process:
        process.wait()
    if samples_missing(recipe.text, run, made_from):
        log.warning("vLLM could not sample (see %s); Transformers is used", log_file)
        return False
    return True


def _start(tokenizer: Any) -> int:
    start: int = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return start


def _main(argument: str) -> None:
    settings, run, folder, start, dtype, made_from = json.loads(argument)
    recipe = parse_recipe(settings, "of the run")
    generate = vllm_generate(folder, start, recipe.text.sequence_tokens, dtype, recipe.trust_remote_code)
    sample_documents(generate, recipe.text, Path(run), recipe.seed, made_from)


if __name__ == "__main__":
    _main(sys.argv[1])
