"""Comparisons of the strategies on real data: `python -m benchmarks.compare --help`."""
