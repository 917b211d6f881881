"""A run folder: locked while a command works in it; `run.json` records the stages."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from layerboost.errors import ConfigError
from layerboost.files import check_path
from layerboost.recipe import Recipe
from layerboost.runtime import git_revision, is_main_process, log, versions
from layerboost.schemas.artifact import read_json, write_json
from layerboost.schemas.run import RunFile, StageRecord

# Errors of a file system without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def recorded(run: Path, stage: str, recipe: Recipe) -> Iterator[None]:
    """Append a record of the block to `run.json`, whether it succeeds, fails or is interrupted."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    file = run / "run.json"
    # Before the stage: a file that cannot be read must not cost its work.
    history = read_json(file, RunFile, "layerboost run") if file.exists() else RunFile()
    status, error = "done", None
    try:
        yield
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except BaseException as failure:
        status, error = "failed", f"{type(failure).__name__}: {failure}"
        raise
    finally:
        if run.is_dir() and is_main_process():
            record = {
                "stage": stage,
                "argv": sys.argv,
                "started": started,
                "seconds": round(time.monotonic() - clock, 2),
                "status": status,
                "error": error,
                "seed": recipe.seed,
                "device": recipe.device if recipe.device != "auto" else _auto_device(),
                "versions": versions(),
                "git_revision": git_revision(),
                "model": recipe.model,
            }
            history.stages.append(StageRecord.model_validate(record))
            write_json(file, history)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run folder against other commands; the lock ends with the process.

    Raise ConfigError if another command holds it, or if `run` cannot be a run folder. Only warn on a file system
    without locks.
    """
    check_path(run)
    from filelock import FileLock, Timeout

    lock = FileLock(run / ".lock", blocking=False, fallback_to_soft=False)
    try:
        run.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another layerboost command works in {run}", do="wait for it, or use another --run folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise no_run_folder(run, str(error)) from None
        log.warning("%s cannot be locked (%s): do not start a second command in it", run, error.strerror)
    try:
        yield
    finally:
        lock.release()


def no_run_folder(run: Path, found: str) -> ConfigError:
    """Return the error for a path that cannot be a run folder."""
    return ConfigError(f"{run} cannot be a run folder", found=found, do="name a writable directory: --run")


def _auto_device() -> str:
    torch = sys.modules.get("torch")  # some stages never import it
    return "none" if torch is None else "cuda" if torch.cuda.is_available() else "cpu"
