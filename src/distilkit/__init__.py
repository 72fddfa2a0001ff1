"""Task-agnostic knowledge distillation of pretrained language models (DistilBERT, arXiv 1910.01108)."""

from importlib.metadata import version

__version__ = version("distilkit")
