"""Score models: ``python -m distilkit.evaluate``."""
