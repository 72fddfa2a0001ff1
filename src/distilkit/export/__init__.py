"""Get a student out of a run: a Hugging Face folder and its card, ONNX files, a repository of the hub."""

from distilkit.export.folder import export_checkpoint, student_files

__all__ = ["export_checkpoint", "student_files"]
