"""What surrounds a run: its signals, checkpoints, records and folder, its ranks, and the sweep it belongs to."""
