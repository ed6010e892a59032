"""A backend that ran out of device memory on a kind of call works on fewer heads at a time from then on."""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from taylor_patch.backends.base import Backend
from taylor_patch.call import AttentionCall


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's out-of-memory errors, also where they arrive as AcceleratorError code 2; ComfyUI's own judgement where it has one."""
    judge = getattr(sys.modules.get("comfy.model_management"), "is_oom", None)
    if judge is not None:
        return bool(judge(error))
    return isinstance(error, torch.OutOfMemoryError) or (type(error).__name__ == "AcceleratorError" and getattr(error, "error_code", 0) == 2)


class HeadGroups:
    """(backend name, call signature) -> key heads that the backend may work on at once; all of them until it ran out of memory."""

    def __init__(self) -> None:
        self._most: dict[tuple[str, Any], int] = {}
        self._lock = threading.Lock()

    def of(self, name: str, call: AttentionCall) -> int | None:
        """The number, or None for all."""
        return self._most.get((name, call.signature)) if self._most else None

    def halve(self, name: str, call: AttentionCall) -> int | None:
        """Half as many from now on, rounded up; None where it was a single one already."""
        key = (name, call.signature)
        with self._lock:
            now = self._most.get(key, call.k.shape[1])
            if now == 1:
                return None
            self._most[key] = -(-now // 2)
            return self._most[key]


def part_of(call: AttentionCall, first: int, most: int | None) -> AttentionCall:
    """`call` with `most` of its key heads (all for None) from `first` on, and the query heads that go with them."""
    if most is None:
        return call
    group = call.q.shape[1] // call.k.shape[1]
    keys = slice(first, first + most)
    return dataclasses.replace(call, q=call.q[:, first * group : (first + most) * group], k=call.k[:, keys], v=call.v[:, keys],
                               first_head=first * group)


def run_in_groups(backend: Backend, call: AttentionCall, most: int | None) -> Tensor:
    """backend.run(call) over at most so many key heads at a time. Heads do not depend on each other, so the result is the same.

    What a backend returns for a group with the wrong shape or dtype is handed back as it is; it fails the engine's check of the whole.
    """
    if most is None or most >= call.k.shape[1]:
        return backend.run(call)
    batch, heads, tokens, head_dim = call.q.shape
    out = torch.empty(batch, tokens, heads, head_dim, dtype=call.q.dtype, device=call.q.device).transpose(1, 2)
    group, first = heads // call.k.shape[1], 0
    while first < call.k.shape[1]:
        part = part_of(call, first, most)
        answer = backend.run(part)
        if not isinstance(answer, Tensor) or answer.shape != part.q.shape or answer.dtype != out.dtype or answer.device != out.device:
            return answer
        out[:, first * group : first * group + part.q.shape[1]] = answer
        first += most
    return out
