"""The most memory that a piece of code holds at once beside what was there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Sums up the storages that operators return, as long as they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {x.untyped_storage()._cdata for x in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_nbytes = max(self.peak_nbytes, sum(nbytes for _, nbytes in self._alive.values()))
        return result


def peak_nbytes(work: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Bytes that `work` holds at its peak, its result counted, `inputs` not.

    On the CPU what operators return is counted, not what they use inside; on CUDA the allocator's own figure is taken.
    """
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Storages(inputs) as storages:
        work()
    return storages.peak_nbytes
