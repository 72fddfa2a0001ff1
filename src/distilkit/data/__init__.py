"""From text to batches: corpora, tokenizers, the token cache, masks and blocks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilkit.data.batches import DistillationDataModule

__all__ = ["DistillationDataModule"]


def __getattr__(name: str) -> Any:
    """Import the data module on first use, because the pure files of this package do not need Lightning."""
    if name == "DistillationDataModule":
        from distilkit.data.batches import DistillationDataModule

        return DistillationDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
