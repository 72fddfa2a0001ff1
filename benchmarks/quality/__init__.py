"""What a distilled student keeps of a real teacher: rows of equal time, tuned, fine-tuned on tasks, and drawn."""
