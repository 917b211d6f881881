"""Files on disk, written atomically: a reader sees the old or the new content."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; raise LayerboostError as `replacing` does."""
    # Half a surrogate pair (an odd file name, say) becomes an escape, which JSON and YAML read back.
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` if the block succeeds and is deleted if it fails.

    A symbolic link is followed: its target, perhaps on a larger disk, is replaced.
    Raise LayerboostError if the disk is full or cannot be written.
    """
    path = path.resolve()
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
