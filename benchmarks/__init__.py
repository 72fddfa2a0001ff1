"""Measure distilkit beside a step written after the original's formulas, in turn and in one run; see ``make bench``."""
