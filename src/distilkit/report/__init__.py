"""Report on scores and training runs: ``python -m distilkit.report``."""
