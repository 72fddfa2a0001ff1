"""What is seen of a run while it trains: its progress, throughput, gradient norms and predictions, here and in W&B."""
