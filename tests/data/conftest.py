"""Blocks of random tokens."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from distilkit.data.blocks import Blocks
from distilkit.data.masking import Ids, Masker
from streams import MASKING, MakeBlocks
from tiny import VOCABULARY


@pytest.fixture
def make_blocks(tokenizer: PreTrainedTokenizerBase, causal_tokenizer: PreTrainedTokenizerBase) -> MakeBlocks:
    """Make blocks of 16 tokens, masked or causal."""

    def make(
        tokens: Ids, *, causal: bool = False, attend_across_documents: bool = True, packing: Any = "blocks"
    ) -> Blocks:
        counts = np.ones(len(VOCABULARY), dtype=np.int64)
        return Blocks(
            tokens,
            tokenizer=causal_tokenizer if causal else tokenizer,
            block_size=16,
            masker=None if causal else Masker(MASKING, tokenizer=tokenizer, token_counts=counts, seed=0),
            attend_across_documents=attend_across_documents,
            packing=packing,
        )

    return make
