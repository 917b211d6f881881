"""Files on disk: one type per file, shared by what writes it and what reads it."""
