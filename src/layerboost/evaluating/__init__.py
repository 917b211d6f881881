"""evaluate: compare base and changed models on text, tasks and long contexts."""
