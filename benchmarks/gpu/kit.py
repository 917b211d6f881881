"""What a GPU makes of layerboost, in at most 8 minutes and without a network: correct windows, speed, memory.

    python benchmarks/gpu/kit.py --out gpu-results

Each part is a process with a time limit; what fails leaves its error, and the others go on. The same command again
runs the parts that have not ended well. Writes results.json and results.md, and a .json and a .log for each part.
Weights are random, of Qwen3-4B's shape; a few layers stand for all 36. requirements.txt lists the packages it needs.

attention  sliding_attention against its naive reference in bfloat16 and float32, and its time against full attention
decode     a token for each of 16 sequences, by context length: layers with full, windowed and no attention
sweep      layerboost.measure
heal       layerboost.heal, with each kind of activation checkpointing
tests      pytest -m gpu
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / folder) for folder in ("src", "benchmarks", "tests")]
sys.path[:0] = PATHS

import timing
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from layerboost.errors import first_line
from layerboost.model.attention import sliding_attention, sliding_attention_reference
from layerboost.runtime import GIB, git_revision, machine, release_memory, versions
from layerboost.schemas.plan import LayerPlan

Row = dict[str, Any]
TOTAL_S, LEAST_S = 470, 20  # with less than the latter left, no part is started
LIMITS_S = {"attention": 150, "decode": 90, "sweep": 110, "heal": 150, "tests": 150}
CHECKED = 128  # queries in each of the places of a text where outputs are compared with the quadratic reference
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


# Sizes of the model, of which `layers` are built, and of what runs on it, in tokens.
SIZES = SimpleNamespace(
    model={"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "vocab_size": 151_936},
    all_layers=36, layers=8, batch=16, lengths=(4096, 8192, 16_384, 32_768, 65_536), windows=(64, 1024),
    measure=16_384, measured_windows=(64, 256, 1024), sequence=2048, heal_steps=8, words=600_000, repeats=5, tests=".",
)  # fmt: skip
TINY = SimpleNamespace(
    model={"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
           "head_dim": 16, "vocab_size": 200},
    all_layers=4, layers=2, batch=4, lengths=(64, 128), windows=(16,),
    measure=256, measured_windows=(16,), sequence=64, heal_steps=2, words=40_000, repeats=2,
    tests="model/test_attention.py",
)  # fmt: skip


def clock() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def once(call: Callable[[], Any]) -> Row:
    """Seconds of one call, and the most memory that it held above what was held before."""
    if DEVICE.type == "cpu":
        return {"first_s": timing.seconds(call)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return {"first_s": timing.seconds(call, clock), "peak_gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def many(call: Callable[[], Any], calls: int = 5) -> float:
    """Seconds of one of several calls on the device, by CUDA events."""
    if DEVICE.type == "cpu":
        return timing.seconds(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def attempt(call: Callable[[], list[Row]], **about: Any) -> Iterator[Row]:
    """The rows of a call, or one with its error."""
    try:
        rows = call()
    except Exception as error:
        rows = [{"error": f"{type(error).__name__}: {first_line(error)}"}]
    release_memory()
    yield from (about | row for row in rows)


def compare(ways: Mapping[str, Callable[[], Any]], repeats: int) -> list[Row]:
    """A row for each way, which take turns: the first call, which compiles, then median and range, and how many times
    as fast as the first way it is."""
    rows = {name: next(attempt(partial(lambda call: [once(call)], way), way=name)) for name, way in ways.items()}
    taken = timing.in_turn({name: partial(many, ways[name]) for name in ways if "error" not in rows[name]}, repeats)
    for name, seconds in taken.items():
        rows[name] |= {"ms": statistics.median(seconds) * 1e3, "least": min(seconds) * 1e3, "most": max(seconds) * 1e3}
        if (first := next(iter(ways))) in taken:
            rows[name]["times_as_fast"] = timing.times(timing.ratio(taken[first], seconds))
    return list(rows.values())


def inputs(sizes: Any, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value and sinks of a layer, which want gradients."""
    torch.manual_seed(0)
    heads, key_heads, size = list(sizes.model.values())[2:5]
    shapes = [(1, heads, tokens, size), (1, key_heads, tokens, size), (1, key_heads, tokens, size), (heads,)]
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def outcome(tensors: list[torch.Tensor], window: int, fast: bool) -> list[torch.Tensor]:
    """Outputs in a few places of a text, that of the last query alone as in decoding, and the gradients."""
    query, key, value, sinks = tensors
    tokens = query.shape[2]
    whole = sliding_attention(query, key, value, window, sinks) if fast else None
    out, weights = [], torch.linspace(-1, 1, CHECKED, device=DEVICE)[:, None]
    for end in (min(CHECKED, tokens), tokens // 2, tokens):
        start = max(0, end - CHECKED)
        seen = (query[:, :, start:end], key[:, :, :end], value[:, :, :end])
        out.append(sliding_attention_reference(*seen, window, sinks) if whole is None else whole[:, :, start:end])
    attend = sliding_attention if fast else sliding_attention_reference
    out.append(attend(query[:, :, -1:], key, value, window, sinks))
    loss = torch.stack([(each.float() * weights[: each.shape[2]]).sum() for each in out]).sum()
    return [*(each.detach() for each in out), *torch.autograd.grad(loss, tensors)]


def check(sizes: Any, tokens: int, window: int, dtype: torch.dtype) -> list[Row]:
    """The largest error, as a fraction of the largest value, against the reference in float32; in bfloat16 it may be
    twice that of the reference in bfloat16."""
    tensors = inputs(sizes, tokens, dtype)
    exact = outcome([x.detach().float().requires_grad_() for x in tensors], window, fast=False)

    def error(found: list[torch.Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(float((one.float() - other).abs().max() / other.abs().max()) for one, other in pairs)

    own, naive = error(outcome(tensors, window, fast=True)), error(outcome(tensors, window, fast=False))
    most = 1e-3 if dtype == torch.float32 else max(2 * naive, 1e-2)
    return [{"largest_error": own, "of_the_reference": naive, "allowed": most, "holds": own <= most}]


def full_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """FlashAttention: the package if it is installed, else PyTorch's."""
    out: torch.Tensor
    if DEVICE.type == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True).transpose(1, 2)
    else:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out


def race(sizes: Any, tokens: int, backward: bool) -> list[Row]:
    """Full attention against windows with sinks, forward or with backward too."""
    query, key, value, sinks = inputs(sizes, tokens, torch.bfloat16)
    gradient = torch.randn_like(query)
    forms = {"full": partial(full_attention, query, key, value)}
    for window in sizes.windows:
        forms[f"window {window}"] = partial(sliding_attention, query, key, value, window, sinks)

    def call(form: Callable[[], torch.Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            out = form()
        if backward:
            torch.autograd.grad(out, (query, key, value), gradient)

    return compare({name: partial(call, form) for name, form in forms.items()}, sizes.repeats)


def attention(sizes: Any, _: Path) -> Iterator[Row]:
    """Values and gradients against the reference; times."""
    for dtype, lengths in ((torch.float32, sizes.lengths[:1]), (torch.bfloat16, sizes.lengths)):
        for tokens in lengths:
            for window in sizes.windows:
                about = {"dtype": str(dtype), "tokens": tokens, "window": window}
                yield from attempt(partial(check, sizes, tokens, window, dtype), **about)
    for backward in (False, True):
        for tokens in sizes.lengths:
            yield from attempt(partial(race, sizes, tokens, backward), backward=backward, tokens=tokens)


class FixedCache:
    """The keys and values of a decoding step that is repeated: the last position is written, and nothing grows."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        """Return what the new token sees."""
        for held, new in zip(self.layers[layer], (key, value), strict=True):
            held[:, :, -1:] = new
        return self.layers[layer]


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, as in a serving engine: its time is the GPU's and not Python's."""
    if DEVICE.type == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    # With the call, whose tensors the graph reads and does not keep.
    return partial(lambda graph, _: graph.replay(), graph, call)


def random_model(sizes: Any) -> Any:
    """A stock model with random weights on the device."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": True}
    config = Qwen3Config(num_hidden_layers=sizes.layers, max_position_embeddings=131_072, **ids, **sizes.model)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


@torch.no_grad()
def decode(sizes: Any, _: Path) -> Iterator[Row]:
    """A step of layers that are all full, all windowed or all without attention, and of norm and head."""
    from layerboost.model.modeling import CACHE, decoder_layers
    from layerboost.model.surgery import apply_plan

    stock = random_model(sizes)
    hidden = torch.randn(sizes.batch, 1, sizes.model["hidden_size"], device=DEVICE, dtype=DTYPE)
    head = compare({"norm and head": graphed(lambda: stock.lm_head(stock.model.norm(hidden)))}, sizes.repeats)
    yield from head
    kinds: dict[str, Row] = {"full": {"attention": "full"}, "none": {"attention": "none"}}
    kinds |= {f"window {w}": {"attention": "sliding", "window": w, "sink": True} for w in sizes.windows}
    models = {}
    for name, kind in kinds.items():
        shared = copy.deepcopy(stock, {id(weights): weights for weights in stock.parameters()})
        models[name] = apply_plan(shared, [LayerPlan(layer=layer, **kind) for layer in range(sizes.layers)])

    def step(name: str, tokens: int) -> Callable[[], Any]:
        held = {"full": tokens, "none": 0}.get(name, kinds[name].get("window"))
        shape = (sizes.batch, sizes.model["num_key_value_heads"], held, sizes.model["head_dim"])
        made = partial(torch.randn, shape, device=DEVICE, dtype=DTYPE)
        cache = FixedCache([(made(), made()) for _ in range(sizes.layers)]) if held else None
        position = torch.full((1, 1), tokens - 1, device=DEVICE)

        def call() -> torch.Tensor:
            states, embeddings = hidden, stock.model.rotary_emb(hidden, position)
            for layer in decoder_layers(models[name]):
                states = layer(states, position_ids=position, position_embeddings=embeddings, **{CACHE: cache})
            return states

        return call

    def steps(tokens: int) -> list[Row]:
        rows = compare({name: graphed(step(name, tokens)) for name in kinds}, sizes.repeats)
        for row in rows:
            if "ms" in row and "ms" in head[0]:
                whole = row["ms"] * sizes.all_layers / sizes.layers + head[0]["ms"]
                row[f"tokens_per_s_{sizes.all_layers}_layers"] = sizes.batch / whole * 1e3
        return rows

    for tokens in sizes.lengths:
        yield from attempt(partial(steps, tokens), tokens=tokens)


@contextmanager
def opened(sizes: Any, out: Path) -> Iterator[tuple[Any, Any]]:
    """A model of this disk as layerboost opens it, and a text."""
    from tiny import save_text, tiny_tokenizer

    import layerboost as lb

    with tempfile.TemporaryDirectory(dir=out) as folder:
        random_model(sizes).save_pretrained(folder)
        release_memory()
        tiny_tokenizer().save_pretrained(folder)
        text = lb.Text(source=str(save_text(Path(folder) / "text.jsonl", sizes.words)), sequence_tokens=sizes.sequence)
        yield lb.open_base(folder), text


def sweep(sizes: Any, out: Path) -> Iterator[Row]:
    """The first sweep compiles. The time to load the model is not the sweep's."""
    import layerboost as lb

    settings = lb.Measure(windows=sizes.measured_windows, tokens=sizes.measure, retrieval_prompts=0)
    with opened(sizes, out) as (base, text):
        load_s = once(base.load)["first_s"]

        def run() -> list[Row]:
            found: list[Any] = []
            row = once(lambda: found.append(lb.measure(base, text, settings)))
            variants, seconds = sum(len(layer.variants) for layer in found[0].layers), row.pop("first_s") - load_s
            rate = variants * found[0].tokens / seconds
            return [{"seconds": seconds, "variants": variants, "tokens_per_s": rate} | row]

        for number in ("first", "second"):
            yield from attempt(run, sweep=number)


def heal(sizes: Any, out: Path) -> Iterator[Row]:
    """A plan with a quarter of the layers full; the first step of each stage, which compiles, does not count."""
    import layerboost as lb
    from layerboost.schemas.healing import METRICS, read_metrics
    from layerboost.schemas.plan import PlanFile
    from layerboost.schemas.run import HEAL

    with opened(sizes, out) as (base, text):
        layers = timing.evenly(sizes.layers, max(1, sizes.layers // 4), sizes.measured_windows[0])
        plan = PlanFile(model=base.info, method="evenly spaced", layers=layers)
        converted = lb.convert(base, plan, text, lb.Measure(windows=sizes.measured_windows, tokens=sizes.measure))
        converted.model.to("cpu")
        step, tokens = 8 * sizes.sequence, 8 * sizes.sequence * sizes.heal_steps

        def run(checkpointing: str) -> list[Row]:
            settings = lb.Heal(
                fit_tokens=step, attention_tokens=tokens, tokens=tokens, batch_sequences=1, gradient_accumulation=8,
                activation_checkpointing=checkpointing, validation_steps=999, save_steps=999,
            )  # fmt: skip
            with tempfile.TemporaryDirectory(dir=out) as folder:
                memory = once(lambda: lb.heal(converted, text, settings, folder=folder))
                lines = [line for line in read_metrics(Path(folder) / HEAL / METRICS) if line.loss is not None]
            rows = []
            for stage in ("attention", "lora"):
                ends = [line.seconds for line in lines if line.stage == stage]
                rates = [step / max(after - before, 1e-2) for before, after in itertools.pairwise(ends)]
                rows.append({"stage": stage, "first_step_s": ends[0], "tokens_per_s": statistics.median(rates)})
                rows[-1] |= {"least": min(rates), "most": max(rates), "both_stages_peak_gib": memory.get("peak_gib")}
            return rows

        for checkpointing in ("selective", "none", "full"):
            yield from attempt(partial(run, checkpointing), checkpointing=checkpointing)


def tests(sizes: Any, _: Path) -> Iterator[Row]:
    """Failures, and pytest's last line."""
    vllm, xdist = (importlib.util.find_spec(name) is not None for name in ("vllm", "xdist"))
    which = "gpu" if vllm else "gpu and not server"
    workers = ["-n", "4"] if xdist and not vllm and sizes is SIZES else []  # an engine of vLLM wants the GPU alone
    options = ["-m", which, "-rfE", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider", *workers]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / sizes.tests)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.match(r"FAILED|ERROR|.*\b(passed|failed|skipped|errors?|deselected) in \d", line):
            yield {"result": line.strip()}
    process.wait()


PARTS = {"attention": attention, "decode": decode, "sweep": sweep, "heal": heal, "tests": tests}


def measure(name: str, sizes: Any, out: Path) -> None:
    """Run one part in this process and write its rows after each; the last tell of an uncompiled FlexAttention."""
    rows: list[Row] = []
    with warnings.catch_warnings(record=True) as seen:
        for row in PARTS[name](sizes, out):
            rows.append(row)
            (out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    told = {str(warning.message).strip().splitlines()[0] for warning in seen}
    rows += [{"warning": line} for line in sorted(told) if "flex_attention" in line]
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1))


def run(name: str, asked: argparse.Namespace, limit_s: float) -> Row:
    """Run a part as a process, which ends with its children at the limit."""
    log, file, started = asked.out / f"{name}.log", asked.out / f"{name}.json", time.monotonic()
    file.unlink(missing_ok=True)
    words = [sys.executable, __file__, "--alone", name, "--out", str(asked.out), *(["--tiny"] if asked.tiny else [])]
    # What one part has compiled, the others and the next run find.
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(asked.out / "compiled"), **os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(PATHS)}
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = "done" if process.wait(limit_s) == 0 else f"failed: {log.read_text(errors='replace')[-300:]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped at {limit_s:.0f} s"
    rows = json.loads(file.read_text()) if file.is_file() else []
    return {"status": status, "seconds": round(time.monotonic() - started, 1), "rows": rows}


def failed(part: Row) -> bool:
    """Whether a part did not end, or has a row of something wrong."""
    return part["status"] != "done" or any(
        "error" in row or "warning" in row or row.get("holds") is False or row.get("result", "").startswith("FAILED")
        for row in part["rows"]
    )


def page(results: Row) -> str:
    """The results as Markdown: in each part, a table for each kind of row."""
    text = ["# layerboost on a GPU", "", f"{results['machine']}, commit {results['commit']}. {results['note']}"]
    for name, part in results["parts"].items():
        text += ["", f"## {name}", "", f"{part['status']}; {part.get('seconds', 0)} s."]
        columns: tuple[str, ...] = ()
        for row in part.get("rows", []):
            if tuple(row) != columns:
                columns = tuple(row)
                text += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            text.append(f"| {' | '.join(cells)} |".replace("\n", " "))
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the parts that have not ended well, and write the results. The exit code is 1 if anything failed."""
    parser = timing.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="directory of the results")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, which a CPU manages in seconds")
    parser.add_argument("--alone", choices=list(PARTS), help="one part in this process")
    asked = parser.parse_args()
    asked.out = asked.out.absolute()
    asked.out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if asked.tiny else SIZES
    if asked.alone:
        measure(asked.alone, sizes, asked.out)
        return
    note = f"Random weights: {sizes.layers} layers of Qwen3-4B's width stand for its {sizes.all_layers}. Medians of "
    note += (
        f"{sizes.repeats} repeats in turn; first_s is the first call, which compiles. Decoding: ms of these layers, "
    )
    note += "tokens per second of all and the head, computed. A sweep fits sinks, on the CPU, in its seconds."
    file, parts = asked.out / "results.json", {}
    if file.is_file():
        parts = {name: part for name, part in json.loads(file.read_text())["parts"].items() if not failed(part)}
    results = {
        "machine": machine(), "commit": git_revision(), "versions": versions(), "sizes": vars(sizes), "parts": parts,
        "note": "TINY SIZES: a test of this kit, no measurement." if asked.tiny else note,
    }  # fmt: skip
    for name in asked.parts:
        left = TOTAL_S - (time.monotonic() - STARTED)
        if name not in parts and left < LEAST_S:
            parts[name] = {"status": f"skipped with {left:.0f} of {TOTAL_S} s left: run the command again"}
        elif name not in parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            parts[name] = run(name, asked, min(LIMITS_S[name], left))
        file.write_text(json.dumps(results, indent=1))
        (asked.out / "results.md").write_text(page(results))
    print(page(results))
    sys.exit(any(failed(parts[name]) for name in asked.parts))


if __name__ == "__main__":
    main()
