"""The Hydra configs of distilkit.evaluate: a root of their own, where teacher= and tokenizer= are values."""
