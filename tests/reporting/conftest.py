from __future__ import annotations

from pathlib import Path

import pytest
from made_run import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")
