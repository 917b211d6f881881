"""Choosing a strategy for every layer: what strategies cost, and the selection methods."""
