"""`taylor-patch run`: the second door, for interpreters without start-up files."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(command: Sequence[str]) -> None:
    """Run `python [flags] script args` in that interpreter, or `script args` in this one."""
    if os.environ.get("TAYLOR_PATCH", "") in ("", "0"):
        os.environ["TAYLOR_PATCH"] = "1"
    first = command[0]
    if Path(first).name.lower().startswith("python"):
        at = next((i for i, word in enumerate(command[1:], 1) if not word.startswith("-")), len(command))
        package = str(Path(__file__).resolve().parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), package]))
        os.execvp(first, [*command[:at], "-m", "taylor_patch", "run", *command[at:]])
    from taylor_patch import _startup

    _startup()
    sys.argv = list(command)
    sys.path[0] = str(Path(first).resolve().parent)
    runpy.run_path(first, run_name="__main__")
