"""evaluate: base and changed models compared on text, tasks and long contexts."""
