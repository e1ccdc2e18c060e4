"""Benchmarks: ``python -m tests.benchmarks`` prints one table of ratios from one run."""
