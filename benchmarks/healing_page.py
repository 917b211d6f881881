"""The words and tables of docs/results/healing.md, which healing_results.py fills."""

from __future__ import annotations

from typing import Any

from layerboost.reporting.page import Table, markdown_table
from layerboost.reporting.text import ABSENT, interval, number, percent

PAGE = """# What healing gives back

Made by this command, which goes on where it stopped. Rows of arms that it was not given, healed before on another
machine with the same settings, are kept.

```console
$ python benchmarks/healing_results.py --model MODEL --text TEXT --second-text FILE --wikitext FILE \\
    --bench-data FOLDER --work FOLDER \\
    --arms {arms} \\
    --answers {answering}{settings}
```

Arms named `mixed` heal half on TEXT and half on the second text, in sequences of 256 tokens, so that a step comes every
256 tokens, with a tenth of the next token's cross entropy beside the KL (none in `kl-alone`); the others on TEXT alone,
in sequences of 512, with the KL alone. `fitted` and `repeated` begin with the least squares fit, `repeated` goes three
times over stage 1's text, and the plan of `of-both` was measured on both texts. All arms have these settings, and each
its own, which its name says and the JSON beside this page has in full:

{shared}

The plans lie in the folder `plans` beside this page, and the command takes them from there instead of measuring anew.

## Text never trained on

Nats per token over {sequences} sequences of {length} tokens; in brackets 95 % intervals by bootstrap over
sequences, differences paired.

{texts}

## Retrieval and tasks

Exact answers to prompts of each kind and length in tokens; accuracy, 0-shot, over evenly spaced items of each task (in
brackets how many).

{answers}

## The long run

Validation KL of the arm {longest}, as far as it got.

{curve}
"""


def curve_table(curve: list[list[float]]) -> str:
    """Validation KL by tokens."""
    lines = [[f"{tokens:,.0f}", number(kl)] for tokens, kl in curve]
    return markdown_table(Table("", ["tokens", "validation KL"], lines)) if curve else "Not begun."


def text_table(rows: dict[str, dict[str, Any]]) -> str:
    """KL and loss on both texts."""
    head = ["model", "KL, books", "NLL − base, books", "KL, WikiText-2", "NLL − base, WikiText-2"]
    lines = [
        [name, *(cell for text in ("books", "wikitext") for cell in _losses(row[text]))] for name, row in rows.items()
    ]
    return markdown_table(Table("", head, lines))


def _losses(found: dict[str, Any]) -> list[str]:
    kl, nll = found["kl"], found.get("nll_difference")
    return [
        interval(kl["mean"], kl["low"], kl["high"]),
        interval(nll["mean"], nll["low"], nll["high"], signed=True) if nll else ABSENT,
    ]


def answer_part(rows: dict[str, dict[str, Any]]) -> str:
    """Exact retrievals and accuracy in tasks, of the models that were asked."""
    asked = {name: row for name, row in rows.items() if "tasks" in row}
    if not asked:
        return "Not measured yet."
    first = next(iter(asked.values()))
    head = ["model", *(f"{kind} ({part['prompts']})" for kind, part in first["retrieval"].items())]
    head += [f"{name} ({part['items']})" for name, part in first["tasks"].items()]
    lines = []
    for name, row in asked.items():
        parts = [*row["retrieval"].values(), *row["tasks"].values()]
        lines.append([name, *(percent(part["value"], 0) for part in parts)])
    return markdown_table(Table("", head, lines))
