"""A handful of made-up PIQA items in the Hugging Face field names."""

from __future__ import annotations

import json
from pathlib import Path


def write_items(folder: Path, items: int = 12) -> Path:
    """Write `piqa.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"goal": f"w{3 + index} w{40 + index}", "sol1": f"w{80 + index}", "sol2": f"w{120 + index}", "label": index % 2}
        for index in range(items)
    ]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
