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
    """The result files of one evaluation in `folder`, by model and part, with what each must be made from."""

    def __init__(self, folder: Path, required: dict[tuple[str, str], Facts]) -> None:
        """Raise ConfigError if a required file exists but was made from other facts."""
        self.folder, self.required = folder, required
        ledger = folder / LEDGER
        self.made_from = read_json(ledger, MadeFrom, "layerboost evaluate") if ledger.exists() else MadeFrom()
        changed: dict[Path, list[str]] = {}
        for (model, part), facts in required.items():
            file = self._file(model, part)
            before = facts if part in self.missing(model) else self.made_from.files[file.name]
            if differing := [key for key in facts if before.get(key) != facts[key]]:
                changed[file] = [f"{key}: {before.get(key)} there, {facts[key]} now" for key in differing]
        if changed:
            raise ConfigError(
                f"results in {folder} were made from other models, data or settings",
                found="; ".join(f"{file.name} ({', '.join(what)})" for file, what in changed.items()),
                do=f"delete {' '.join(map(str, changed))}, or choose another --run folder",
            )

    def missing(self, model: str) -> list[str]:
        """Return the parts of a model whose files are missing; a file that is not in the ledger counts as missing."""
        files = {part: self._file(model, part) for name, part in self.required if name == model}
        return [part for part, file in files.items() if file.name not in self.made_from.files or not file.is_file()]

    def save(self, model: str, part: str, text: str) -> None:
        """Write one required file, then its facts to the ledger."""
        file = self._file(model, part)
        write_text(file, text)
        self.made_from.files[file.name] = self.required[model, part]
        write_json(self.folder / LEDGER, self.made_from)

    def _file(self, model: str, part: str) -> Path:
        return self.folder / f"{model}.{part}.json"


def read_result(folder: Path, model: str, part: str) -> dict[str, Any]:
    """Return the content of one result file; raise ConfigError if it cannot be read."""
    file = folder / f"{model}.{part}.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        do = f"delete {file} and run `layerboost evaluate` again"
        raise ConfigError(f"cannot read {file}", found=first_line(error), do=do) from None
    return values
