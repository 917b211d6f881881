"""Strategies, surgery and checkpoints: the part other projects may import."""
