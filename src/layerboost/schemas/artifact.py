"""The common parts of all files: a schema version, and reading and writing as JSON or YAML."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.files import write_text

Record = TypeVar("Record", bound="Artifact")


class Part(BaseModel):
    """A part of a file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), serialize_by_alias=True)


class Artifact(BaseModel):
    """A file with a schema version; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    schema_version: int = 1

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != cls.model_fields["schema_version"].default:
            raise ValueError(f"this release cannot read version {value} of this file")
        return value


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits of the SHA-256 over the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def not_finite(value: Any, path: str = "") -> str:
    """Return the first number that is not finite in JSON values, with its keys; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{path.lstrip('.')} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (not_finite(item, f"{path}.{key}") for key, item in items)), "")


def finite(value: Any) -> Any:
    """Return JSON values with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, what: str, **options: Any) -> str:
    """Return `value` as JSON. Raise LayerboostError, naming the number, if one is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        raise LayerboostError(
            f"{what} cannot be written: a number in it is not finite", found=not_finite(value)
        ) from None


def write_json(path: Path, value: Artifact | dict[str, Any]) -> None:
    """Write an artifact or a mapping as indented JSON, atomically."""
    values = value.model_dump(mode="json") if isinstance(value, Artifact) else value
    write_text(path, json_text(values, str(path), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type[Record], made_by: str, parser: Callable[[str], Any] = json.loads) -> Record:
    """Return an artifact, read and validated. `made_by`: the command that writes it, named when the file is missing.

    Raise ConfigError if the file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", do=f"make it with `{made_by}`")
    try:
        values = parser(path.read_text(encoding="utf-8"))
        if wrong := not_finite(values):
            raise ValueError(wrong)
        return kind.model_validate(values)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} is not a valid {kind.__name__} (schema version {kind.model_fields['schema_version'].default})",
            found=problems(error),
            do=f"correct it, or delete it and run `{made_by}` again",
        ) from None


def problems(error: Exception) -> str:
    """Return what is wrong with a file that cannot be parsed: up to three invalid fields, or the error's first line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors()[:3])
