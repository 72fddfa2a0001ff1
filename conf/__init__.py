"""The Hydra configs of distilkit: this folder is installed as the package ``distilkit.conf``."""
