"""Random token streams, and what the tests of blocks and batches share."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from distilkit.data.blocks import Blocks
from distilkit.data.masking import Ids, Masking
from distilkit.language_model import Batch
from distilkit.losses import IGNORE_INDEX
from tiny import SPECIAL, VOCABULARY

PAD, CLS, SEP = (SPECIAL.index(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
MASKING = Masking(mlm_probability=0.15, mask_share=0.8, random_share=0.1, smoothing=0.0, whole_word=False)

MakeBlocks = Callable[..., Blocks]

causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])


def stream_of(num_tokens: int, *, separators: float = 0.1) -> Ids:
    rng = np.random.default_rng(num_tokens)
    tokens = rng.integers(len(SPECIAL), len(VOCABULARY), num_tokens)
    tokens[rng.random(num_tokens) < separators] = SEP
    return tokens.astype(np.uint16)


def originals(batch: Batch) -> Ids:
    """Undo the masks."""
    return torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"]).numpy()
