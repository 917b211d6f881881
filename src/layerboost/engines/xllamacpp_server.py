"""llama.cpp's server from the package xllamacpp, with the flags of `llama-server` that matter here.

`python -m layerboost.engines.xllamacpp_server --model FILE --port 8080` is a process of its own, until interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from layerboost.errors import ConfigError

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# Flag of llama-server and its short name -> the field of llama.cpp's parameters.
NUMBERS = {
    ("--port",): "port",
    ("--ctx-size", "-c"): "n_ctx",
    ("--parallel", "-np"): "n_parallel",
    ("--batch-size", "-b"): "n_batch",
    ("--ubatch-size", "-ub"): "n_ubatch",
    ("--cache-ram", "-cram"): "cache_ram_mib",
    ("--verbosity", "-lv"): "verbosity",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            "xllamacpp's server would refuse its arguments",
            found=message,
            do=f"use {', '.join(flag for action in self._actions for flag in action.option_strings[:1])}; or install "
            "llama-server, which takes all of llama.cpp's flags",
        )


def check_arguments(given: Sequence[str]) -> None:
    """Raise ConfigError for arguments that this server does not take."""
    _parser().parse_args(["--model", "", *given])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="xllamacpp", allow_abbrev=False, add_help=False)
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--threads", "-t", type=int)
    parser.add_argument("--flash-attn", "-fa", choices=("on", "off", "auto"), default="auto")
    parser.add_argument("--cache-type-k", "-ctk", choices=CACHE_TYPES, default="f16")
    parser.add_argument("--cache-type-v", "-ctv", choices=CACHE_TYPES, default="f16")
    parser.add_argument("--swa-full", action="store_true")
    parser.add_argument("--slot-save-path", default="")
    for names, field in NUMBERS.items():
        parser.add_argument(*names, type=int, dest=field)
    return parser


def parameters(given: Sequence[str]) -> Any:
    """Return llama.cpp's parameters for these arguments; raise ConfigError for others."""
    import xllamacpp

    asked = _parser().parse_args(given)
    found = xllamacpp.CommonParams()
    found.model.path, found.hostnames, found.swa_full = asked.model, [asked.host], asked.swa_full
    found.slot_save_path = asked.slot_save_path and f"{asked.slot_save_path}/"
    found.port = 8080
    for field in NUMBERS.values():
        if (value := getattr(asked, field)) is not None:
            setattr(found, field, value)
    if asked.threads:
        found.cpuparams.n_threads = found.cpuparams_batch.n_threads = asked.threads
    kinds = xllamacpp.llama_flash_attn_type
    found.flash_attn_type = {
        "on": kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "auto": kinds.LLAMA_FLASH_ATTN_TYPE_AUTO,
    }[asked.flash_attn]
    types = {name: getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}") for name in CACHE_TYPES}
    found.cache_type_k, found.cache_type_v = types[asked.cache_type_k], types[asked.cache_type_v]
    return found


def main() -> None:
    """Serve until interrupted."""
    import xllamacpp

    server = xllamacpp.Server(parameters(sys.argv[1:]))
    sys.stderr.write(f"listening on {server.listening_address}\n")
    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, signal.SIG_DFL)
    signal.pause()


if __name__ == "__main__":
    main()
