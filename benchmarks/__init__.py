"""Benchmarks of distilkit against a naive step after the original's formulas, timed in turn; see ``make bench``."""
