"""Results of the benchmark, processor time, and the base's own samples."""
