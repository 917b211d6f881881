"""The result files of RUN/eval: written once, reused with the same settings, refused with other ones."""

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
    """`eval/made_from.json`: the facts from which each result file in its directory was made."""

    files: dict[str, Facts] = Field(default_factory=dict)


class Results:
    """The result files of one evaluation in `folder`, by name, with the facts from which each must have been made."""

    def __init__(self, folder: Path, required: dict[str, Facts]) -> None:
        """Raise ConfigError if a required file exists but was made from other facts."""
        self.folder, self.required = folder, required
        ledger = folder / LEDGER
        self.made_from = read_json(ledger, MadeFrom, "layerboost evaluate") if ledger.exists() else MadeFrom()
        self._refuse_changed()

    def missing(self, name: str) -> bool:
        """Return whether a required file is missing; one that is not in the ledger counts as missing."""
        return name not in self.made_from.files or not (self.folder / name).is_file()

    def save(self, name: str, text: str) -> None:
        """Write one required file, then its facts to the ledger."""
        write_text(self.folder / name, text)
        self.made_from.files[name] = self.required[name]
        write_json(self.folder / LEDGER, self.made_from)

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of one required file; raise ConfigError if it cannot be read."""
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
            for name, facts in self.required.items()
            if not self.missing(name) and (before := self.made_from.files[name]) != facts
        }
        if changed:
            raise ConfigError(
                f"results in {self.folder} were made from other models, data or settings",
                found="; ".join(f"{name} ({', '.join(what)})" for name, what in changed.items()),
                do=f"delete {' '.join(str(self.folder / name) for name in changed)}, or choose another --run folder",
            )
