"""Transformers as an engine: a load is answered in one batch after another, for machines without vLLM.

`python -m layerboost.engines.transformers JOB RESULT` is a process of its own: its peak memory is the model's.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PreTrainedModel, StoppingCriteria

from layerboost.engines.protocol import WARMUP_OUTPUT_TOKENS, Answer, Command, Load, latencies
from layerboost.engines.server import MODULE, failed, guarded
from layerboost.errors import ConfigError
from layerboost.files import write_text
from layerboost.model.base import find_model
from layerboost.model.modeling import CACHE
from layerboost.recipe import Bench, EngineName, Recipe
from layerboost.runtime import GIB, peak_rss_bytes, start_runtime
from layerboost.schemas.artifact import json_text
from layerboost.schemas.plan import PlanFile

NAME: EngineName = "transformers"
UNUSED = frozenset({"port", "startup_timeout_s", "kv_cache_gib", "server_args", "gguf_type"})


def check(bench: Bench, folders: Iterable[Path]) -> str:
    """Return that no server is needed."""
    return "not needed"


def environment(recipe: Recipe) -> dict[str, Any]:
    """Return the version of Transformers, the device and the dtype."""
    runtime = start_runtime(recipe)
    version = importlib.metadata.version("transformers")
    return {"transformers": version, "device": runtime.device.type, "dtype": runtime.dtype_name}


def serving_flags(plan: PlanFile, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return no flags: a plan saves memory without any."""
    return ()


def serve_command(model: Path, port: int, given: tuple[str, ...]) -> Command:
    """Raise ConfigError: Transformers has no server."""
    raise ConfigError("transformers does not serve models", do="choose --engine vllm or llama.cpp")


@dataclass(frozen=True)
class RunningTransformers:
    """A model directory. Each load runs in a process of its own, whose output goes to `output`, the file `log_file`."""

    name: str
    folder: Path
    settings: dict[str, Any]
    log_file: Path
    output: IO[bytes]

    def answer(self, load: Load, advance: Callable[[float], None]) -> Answer:
        """Answer `load` in a process of its own. Raise LayerboostError if it fails."""
        job = {"folder": str(self.folder.absolute()), "settings": self.settings, "load": asdict(load)}
        with tempfile.TemporaryDirectory(prefix="layerboost-bench-") as scratch:
            result = Path(scratch) / "result.json"
            with guarded([*MODULE, __name__, json.dumps(job), str(result)], {}, self.output) as process:
                process.wait()
            if not result.is_file():
                raise failed(f"Transformers failed at concurrency {load.concurrency} on {self.name}", self.log_file)
            raw: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        advance(load.tokens)
        return Answer(raw, {key: raw[key] for key in ("peak_rss_gib", "gpu_memory_gib") if key in raw})


@contextmanager
def launch(name: str, folder: Path, recipe: Recipe, log_file: Path) -> Iterator[RunningTransformers]:
    """Yield a model directory that answers loads; nothing is started before the first load."""
    settings = recipe.model_dump(include={"device", "dtype", "trust_remote_code"})
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as output:
        yield RunningTransformers(name, folder, settings, log_file, output)


class Clock(StoppingCriteria):
    """Records the time of each token of a batch; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(
    model: PreTrainedModel, batch: torch.Tensor, prefix_tokens: int, output_tokens: int
) -> tuple[torch.Tensor, list[float]]:
    """Return greedy answers `[B, output]` to prompts `[B, T]`, and the time of each step's tokens in seconds.

    The first `prefix_tokens` are in the cache when the clock starts.
    """
    cache = None
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if prefix_tokens:
        prefix = batch[:, :prefix_tokens]
        known = model.generate(
            prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=1, return_dict_in_generate=True, **settings
        )
        cache = known[CACHE]
    clock = Clock()
    started = time.perf_counter()
    answers = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        **{CACHE: cache},
        max_new_tokens=output_tokens,
        stopping_criteria=[clock],
        **settings,
    )
    return answers[:, batch.shape[1] :], [moment - started for moment in clock.times]


def measure(model: PreTrainedModel, load: Load) -> dict[str, Any]:
    """Answer all requests, `concurrency` per batch; return throughput and latency under vLLM's names for them."""
    text = load.prompts(model.config.get_text_config().vocab_size).to(model.device)
    warm = min(WARMUP_OUTPUT_TOKENS, load.output_tokens)
    generate(model, text[: load.concurrency], load.shared_prefix_tokens, warm)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for batch in text.split(load.concurrency):
        _, times = generate(model, batch, load.shared_prefix_tokens, load.output_tokens)
        runs.append((len(batch), times))
    answered = [times for size, times in runs for _ in range(size)]
    result: dict[str, Any] = latencies(answered, sum(times[-1] for _, times in runs))
    result["peak_rss_gib"] = round(peak_rss_bytes() / GIB, 3)
    if torch.cuda.is_available():
        result["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return result


def main(job_text: str, result: Path) -> None:
    """Answer one load and write the result."""
    job = json.loads(job_text)
    recipe, folder = Recipe(**job["settings"]), Path(job["folder"])
    model = find_model(str(folder), start_runtime(recipe), None, recipe.trust_remote_code).load()
    write_text(result, json_text(measure(model, Load(**job["load"])), str(result)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
