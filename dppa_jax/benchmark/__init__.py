"""Benchmarks: how long merges take, how they scale, and what a GPU makes of them."""
