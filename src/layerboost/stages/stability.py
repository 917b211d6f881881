"""measure --compare: this run's sensitivities against others → stability.json."""

from __future__ import annotations

from pathlib import Path

from layerboost.artifacts import SENSITIVITY, file_hash, write_json
from layerboost.search.stability import STABILITY, Stability, compare_files, compare_metrics, read_sensitivity


def run_stability(run: Path, others: list[Path]) -> Stability:
    """Compare RUN/sensitivity.json, metric by metric, with itself and with other files or run folders.

    Raises ConfigError for a missing or incomplete file, and for one that shares no replacement with this run.
    """
    source = run / SENSITIVITY
    mine = read_sensitivity(source)
    comparisons = [compare_files(mine, read_sensitivity(other), str(other)) for other in others]
    found = Stability(sensitivity=file_hash(source), comparisons=[*comparisons, compare_metrics(mine)])
    write_json(run / STABILITY, found)
    return found
