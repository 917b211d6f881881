"""The result files of RUN/eval: each written once, kept while its settings hold, refused when they changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from layerboost.errors import ConfigError, first_line
from layerboost.files import write_text
from layerboost.schemas.artifact import Artifact, read_json, write_json

Facts = dict[str, Any]
LEDGER = "made_from.json"


class MadeFrom(Artifact):
    """`eval/made_from.json`: the facts each result file beside it was made from."""

    files: dict[str, Facts] = Field(default_factory=dict)


class Results:
    """The files that one evaluation wants in `folder`, by name, with the facts each must have been made from."""

    def __init__(self, folder: Path, wanted: dict[str, Facts]) -> None:
        """Raises ConfigError when a wanted file is there but was made from other facts."""
        self.folder, self.wanted = folder, wanted
        ledger = folder / LEDGER
        self.made_from = read_json(ledger, MadeFrom, "layerboost evaluate") if ledger.exists() else MadeFrom()
        self._refuse_changed()

    def missing(self, name: str) -> bool:
        """Whether a wanted file is still to be made. One that was written but not noted down counts as missing."""
        return name not in self.made_from.files or not (self.folder / name).is_file()

    def save(self, name: str, text: str) -> None:
        """Write one wanted file, then note down what it was made from."""
        write_text(self.folder / name, text)
        self.made_from.files[name] = self.wanted[name]
        write_json(self.folder / LEDGER, self.made_from)

    def read(self, name: str) -> dict[str, Any]:
        """One wanted file; raises ConfigError when it is damaged."""
        file = self.folder / name
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            do = f"delete {file} and run `layerboost evaluate` again"
            raise ConfigError(f"cannot read {file}", found=first_line(error), do=do) from None
        return values

    def _refuse_changed(self) -> None:
        changed = {
            name: [
                f"{key}: {before.get(key)} there, {facts.get(key)} now"
                for key in facts
                if before.get(key) != facts[key]
            ]
            for name, facts in self.wanted.items()
            if not self.missing(name) and (before := self.made_from.files[name]) != facts
        }
        if changed:
            raise ConfigError(
                f"results in {self.folder} were made from other models, data or settings",
                found="; ".join(f"{name} ({', '.join(what)})" for name, what in changed.items()),
                do=f"delete {' '.join(str(self.folder / name) for name in changed)}, or choose another --run folder",
            )
