"""Files on disk, written atomically: a reader sees the old or the new content."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from layerboost.errors import ConfigError, LayerboostError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries raise, other than OSError, if a write fails: an error without an errno.
WRITE_ERRORS = ("SafetensorError", "PytorchStreamWriter")
WEIGHTS = ".safetensors"


def check_path(path: Path) -> None:
    """Raise ConfigError for a path that is not UTF-8: safetensors, tokenizers and vLLM cannot open it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raw = os.fsencode(path.absolute())
        raise ConfigError("a path is not UTF-8, which the libraries that read it need", found=repr(raw)[1:],
                          do="rename it, or link to it by another name") from None  # fmt: skip


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys, so that a second `heal:` would silently undo the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As written: constructing a mapping adds the keys that it merges (`<<: *other`) to its node.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.YAMLError(f"{key.value} is given twice, the second time in line {key.start_mark.line + 1}")
            seen.add((key.tag, str(key.value)))
        return node


def local_path(text: str) -> Path | None:
    """Return the path of a file or directory that exists, None for any other text."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name that is too long, an unknown user
        return None


def parse_yaml(text: str) -> Any:
    """Return the values of a YAML text; raise yaml.YAMLError if it is not valid or a mapping has a key twice."""
    return yaml.load(text, _UniqueKeys)


def file_hash(path: Path) -> str:
    """Return 16 hex digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` if the block succeeds.

    Raise LayerboostError if the disk is full or the directory is not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if path.suffix == WEIGHTS:
                set_usual_mode(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # or a crash of the machine can leave the name without the content
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; raise LayerboostError as `replacing` does."""
    # Half a surrogate pair (an odd file name, say) becomes an escape, which JSON and YAML read back.
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


@contextmanager
def new_folder(path: Path, mark: str = "") -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` if the block succeeds and is deleted if it fails.

    A directory there is replaced if it is empty or has the file `mark`, which only ours have: it may hold a user's
    other models. A symbolic link is followed: its target, perhaps on a larger disk, is replaced.
    Raise ConfigError for other content, LayerboostError if the disk is full or cannot be written.
    """
    path = path.resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (mark and (path / mark).is_file())):
        raise ConfigError(f"{path} was not made by layerboost, and would be deleted",
                          found=f"no {mark} in it" if mark and path.is_dir() else "",
                          do="choose another folder, or remove it yourself")  # fmt: skip
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.glob(f"*{WEIGHTS}"):
                set_usual_mode(file)
            # The old directory is renamed first: removing it takes time, in which a kill would leave neither.
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise LayerboostError for an error of the disk in the block, whichever library it comes from."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError):
            if not any(name in repr(error) for name in WRITE_ERRORS):
                raise
            error = OSError(str(error).splitlines()[0])
        raise disk_error(path, error) from error


def set_usual_mode(file: Path) -> None:
    """Give a file the mode that a new file gets here: safetensors writes files that only their owner can read."""
    usual = file.with_name(f".{file.name}.mode")
    usual.touch()
    with suppress(PermissionError):  # a file system without modes
        file.chmod(usual.stat().st_mode & 0o777)
    usual.unlink()


def disk_error(path: Path, error: OSError) -> LayerboostError:
    """Return the error for a write that failed; one without an errno is a library's error for a full disk."""
    full = error.errno is None or error.errno in DISK_FULL
    do = "free space" if full else "make it writable"
    return LayerboostError(f"cannot write {path}", found=str(error), do=f"{do}, or choose another folder")
