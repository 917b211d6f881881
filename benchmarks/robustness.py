"""A server under unruly clients: random lengths, answers cancelled midway, connections dropped before the first token.

    python benchmarks/robustness.py runs/smollm2/healed

Prints whether every other request got every token it asked for, what the server says once all are gone (requests,
KV cache), and its resident memory as the requests went by; then JSON. Exit code 1 when one was lost or memory grew.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import timing

from layerboost.engines.server import Server
from layerboost.engines.vllm_server import served
from layerboost.recipe import Bench
from layerboost.runtime import GIB

INPUT_TOKENS, OUTPUT_TOKENS = (8, 512), (8, 128)
# Shares of the requests that are cancelled after some tokens, and dropped before the first.
CANCELLED, DROPPED, DROP_AFTER_S = 0.15, 0.15, 0.5
GONE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
SETTLE_S = 60
# Allocators and caches fill in the first part; from there on memory is to stay within a few per cent.
WARM, FLAT = 0.3, 1.03


async def send(session: aiohttp.ClientSession, server: Server, index: int) -> str:
    """One request, told in a word: complete, cancelled, dropped, or what went wrong."""
    draw = random.Random(index)
    wanted, fate = draw.randint(*OUTPUT_TOKENS), draw.random()
    stop_after = draw.randint(1, max(wanted // 2, 1)) if fate < CANCELLED else None
    body = {
        "model": str(server.folder.absolute()),
        "prompt": [draw.randint(100, 190) for _ in range(draw.randint(*INPUT_TOKENS))],
        "max_tokens": wanted,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = read(session, f"{server.url}/v1/completions", body, stop_after)
    if CANCELLED <= fate < CANCELLED + DROPPED:
        with suppress(TimeoutError):
            await asyncio.wait_for(answer, draw.uniform(0, DROP_AFTER_S))
        return "dropped"
    tokens = await answer
    if stop_after is not None:
        return "cancelled" if tokens >= stop_after else f"{tokens} tokens before it was cancelled at {stop_after}"
    return "complete" if tokens == wanted else f"{tokens} tokens, {wanted} wanted"


async def read(session: aiohttp.ClientSession, url: str, body: dict[str, Any], stop_after: int | None) -> int:
    """Tokens of an answer, hung up on after `stop_after` pieces."""
    pieces, tokens = 0, 0
    async with session.post(url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            pieces += len(event["choices"])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if stop_after is not None and pieces >= stop_after:
                return pieces
    return tokens


async def load(server: Server, requests: int, concurrency: int) -> tuple[Counter[str], list[dict[str, float]]]:
    """All requests: how they ended, and resident memory at every tenth of them."""
    ends: Counter[str] = Counter()
    memory: list[dict[str, float]] = []
    slots = asyncio.Semaphore(concurrency)
    timeout, connections = aiohttp.ClientTimeout(total=3600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connections) as session:

        async def one(index: int) -> None:
            async with slots:
                try:
                    ends[await send(session, server, index)] += 1
                except aiohttp.ClientError as error:
                    ends[f"{type(error).__name__}: {error}"] += 1
            if ends.total() % max(requests // 10, 1) == 0:
                memory.append({"requests": ends.total(), "rss_gib": round(server.rss_bytes() / GIB, 4)})
                print(memory[-1], file=sys.stderr, flush=True)

        await asyncio.gather(*(one(index) for index in range(requests)))
    return ends, memory


def settled(server: Server) -> dict[str, float]:
    """The server's counters once it has noticed that all clients are gone."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        metrics = server.metrics()
        found = {name: sum(metrics[f"vllm:{name}"]) for name in (*GONE, "num_preemptions_total")}
        if not found["num_requests_running"] + found["num_requests_waiting"] or time.monotonic() > deadline:
            return found
        time.sleep(1)


def main() -> None:
    """Serve, load, print."""
    parser = timing.parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--port", type=int, default=8331)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--server-arg", action="append", default=[], help="a further argument of vllm serve")
    asked = parser.parse_args()
    bench = Bench(
        concurrency=(asked.concurrency,),
        port=asked.port,
        kv_cache_gib=asked.kv_cache_gib,
        server_args=tuple(asked.server_arg),
    )
    with tempfile.TemporaryDirectory() as root:
        started = time.monotonic()
        with served("the model", asked.model, bench, Path(root) / "server.log") as server:
            ends, memory = asyncio.run(load(server, asked.requests, asked.concurrency))
            after = settled(server)
            server.check_alive()
    warm = [row["rss_gib"] for row in memory if row["requests"] >= WARM * asked.requests]
    growth, lost = warm[-1] / warm[0], asked.requests - ends.total()
    left = {name: after[name] for name in GONE}
    print(f"{asked.requests} requests in {time.monotonic() - started:.0f} s: {dict(ends)}, lost: {lost}")
    print(f"afterwards: {left}; preemptions {after['num_preemptions_total']:.0f}")
    print(f"memory from {WARM:.0%} of the requests on: {warm[0]:.3f} to {warm[-1]:.3f} GiB, {growth:.3f} times")
    timing.show({"ends": ends, "lost": lost, "left": left, "memory": memory, "growth": growth}, asked)
    wrong = ends.keys() - {"complete", "cancelled", "dropped"}
    sys.exit(bool(wrong or lost or any(left.values()) or growth > FLAT))


if __name__ == "__main__":
    main()
