"""Foreign code that must not hold up ComfyUI's start."""

from __future__ import annotations

import importlib
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from taylor_patch.errors import PluginError

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], set_by: str = "TAYLOR_PATCH_PLUGIN_SECONDS") -> T:
    """What `work()` returns or raises; PluginError, which says where it stands, where that takes more than `seconds`.

    set_by: the name under which the user can set `seconds`, for the error.
    It runs in a thread of its own, because Python cannot stop a thread: one that hangs is left behind, and ends with the process.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # SystemExit too: it would end this thread only, without a word
            raised.append(error)

    thread = threading.Thread(target=run, name="taylor_patch plugin", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if result:
        return result[0]
    raise PluginError(f"still loading after {seconds:g} s{_place(thread)}. {set_by} sets the limit")


def _place(thread: threading.Thread) -> str:
    """", at file:line" of the innermost frame that is not Python's import machinery or this module."""
    frame = sys._current_frames().get(thread.ident or 0)
    machinery = (__file__, importlib.__file__)
    lines = [entry for entry in traceback.extract_stack(frame) if not entry.filename.startswith("<") and entry.filename not in machinery]
    return f", at {lines[-1].filename}:{lines[-1].lineno}" if frame and lines else ""
