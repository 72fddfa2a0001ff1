"""The Hydra configs of distilkit.train, distilkit.prepare and distilkit.export."""
