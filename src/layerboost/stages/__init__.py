"""One file a stage, in pipeline order: measure, plan, convert, heal, evaluate, bench, report."""
