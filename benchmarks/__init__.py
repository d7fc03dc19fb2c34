"""Benchmarks: `python -m benchmarks [name ...]`. Ratios against named peers, measured in turns in one process."""
