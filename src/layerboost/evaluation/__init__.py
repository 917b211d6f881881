"""Quality of models: benchmark items from the disk, lm-eval's tasks, held-out text, and the paired comparison."""
