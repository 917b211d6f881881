"""lm-eval's tasks: their items, checks and scores."""
