"""Score models: a task reads examples and measures a model, and each job leaves its scores in results.json."""
