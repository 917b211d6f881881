"""vLLM's own load generator, `vllm bench serve`, kept running: importing it takes longer than many loads.

Run in a process of its own. Each line of standard input is a JSON list of the arguments of `vllm bench serve`; the
result file that they name appears when it is complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Send one load after another until standard input ends."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as send
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        given = parser.parse_args(json.loads(line))
        result = Path(given.result_dir) / given.result_filename
        given.result_filename += ".part"
        send(given)
        result.with_name(given.result_filename).rename(result)


if __name__ == "__main__":
    main()
