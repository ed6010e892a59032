"""A line in the log before kernels are compiled, which may take seconds: one for each backend and kind of kernels in a process."""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch

log = logging.getLogger("taylor_patch")

_announced: set[tuple[str, Hashable]] = set()


def announce(backend: str, what: str, kind: Hashable) -> None:
    """Say that `backend` is about to compile kernels, where this process has not yet used any of this kind.

    what: the kind in words, "head_dim 128, bfloat16". kind: all that makes Triton compile anew, as far as it is known before the launch.
    Nothing is said while torch.compile traces.
    """
    if torch.compiler.is_compiling() or (backend, kind) in _announced:
        return
    _announced.add((backend, kind))
    log.info("taylor_patch: %s: compiling kernels for %s where the cache on disk lacks them; this call takes longer than later ones", backend,
             what)
