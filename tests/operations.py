"""Watch the operations of torch: the largest tensors, and what makes the host wait for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.is_nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def makes_the_host_wait(func: Any, args: Any) -> bool:
    """Whether an operation reads a value, or a size that depends on values, from the device."""
    if func.overloadpacket in INDEXING:  # by truth values: it counts them inside its kernel
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func.overloadpacket in WAITING


class Watch(TorchDispatchMode):
    """Note the largest tensor, the largest as wide as the vocabulary, and the operations that make the host wait."""

    def __init__(self, vocabulary: int = -1) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.largest = self.largest_logits = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if self.vocabulary in tensor.shape:
                    self.largest_logits = max(self.largest_logits, tensor.numel())
        if makes_the_host_wait(func, args):
            self.waits.append(str(func))
        return result
