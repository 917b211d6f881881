"""Text, rows, calibration prompts and retrieval prompts."""
