"""Tables on the device that outlive a model evaluation."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def allocation() -> AbstractContextManager[Any]:
    """Around the making of such a table. ComfyUI's compiler, where a version has it, records what an evaluation allocates and plays it
    back; what stays allocated must not be in the record."""
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()  # type: ignore[no-any-return]
