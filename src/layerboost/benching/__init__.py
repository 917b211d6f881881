"""bench: base and boosted models under a real server; costs: a machine's rates."""
