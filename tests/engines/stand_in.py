"""A few lines that pass for `vllm serve` and for its load generator, for tests of our handling of processes.

`stand_in.py serve FOLDER --port P ...` answers /health, /metrics and completions; `stand_in.py load` reads a load per
line of standard input, keeps the server busy with it and writes a result as vLLM does. The folder's `words.txt`, where
there is one, is said instead of serving.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

TOKEN_S = 0.001


class Answers(BaseHTTPRequestHandler):
    """What a benchmark asks of vLLM."""

    running: ClassVar[set[int]] = set()
    tokens: ClassVar[int] = 0

    def do_GET(self) -> None:
        metrics: dict[str, float] = {"generation_tokens_total": self.tokens, "num_requests_running": len(self.running)}
        metrics |= {"kv_cache_usage_perc": 0.25, "num_preemptions_total": 0, "num_requests_waiting": 0}
        metrics |= {"prefix_cache_hits_total": 0, "prefix_cache_queries_total": 0}
        self.say("".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in metrics.items()))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.running.add(threading.get_ident())
        for _ in range(asked["max_tokens"]):
            time.sleep(TOKEN_S)
            type(self).tokens += 1
        self.running.discard(threading.get_ident())
        self.say("{}")

    def say(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path, port: int) -> None:
    """Serve as one process with a child, as vLLM does, until terminated."""
    if (folder / "words.txt").is_file():
        sys.exit((folder / "words.txt").read_text())
    subprocess.Popen(["sleep", "600"])
    print("GPU KV cache size: 1,024 tokens, Maximum concurrency for 512 tokens per request: 2.00x", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever()


def send(given: dict[str, str]) -> dict[str, Any]:
    """Send one load; return the fields that layerboost reads."""
    requests, at_once, tokens = (
        int(given[f"--{name}"]) for name in ("num-prompts", "max-concurrency", "random-output-len")
    )
    completed = 0

    def ask() -> None:
        nonlocal completed
        body = json.dumps({"max_tokens": tokens}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{given['--port']}/v1/completions", body, timeout=60):
            completed += 1

    started = time.monotonic()
    for start in range(0, requests, at_once):
        threads = [threading.Thread(target=ask) for _ in range(min(at_once, requests - start))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.monotonic() - started
    times = {
        f"{kind}_{what}_ms": 1000 * seconds
        for kind in ("median", "p90", "p99")
        for what in ("ttft", "tpot", "itl", "e2el")
    }
    return {
        "duration": seconds,
        "completed": completed,
        "total_output_tokens": completed * tokens,
        "output_throughput": completed * tokens / seconds,
        "request_throughput": completed / seconds,
        **times,
    }


def main() -> None:
    verb, *words = sys.argv[1:]
    if verb == "serve":
        serve(Path(words[0]), int(words[words.index("--port") + 1]))
    for line in sys.stdin:
        words = [word for word in json.loads(line) if word not in {"--ignore-eos", "--disable-tqdm", "--save-result"}]
        given = dict(zip(words[::2], words[1::2], strict=True))
        result = Path(given["--result-dir"]) / given["--result-filename"]
        part = result.with_suffix(".part")
        part.write_text(json.dumps(send(given)))
        part.rename(result)


if __name__ == "__main__":
    main()
