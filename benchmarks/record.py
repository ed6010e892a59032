"""Results files: JSON lines with what is needed to place a figure."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def environment(named: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit ("+changes" where the tree differs from it) and time (UTC). named: the commit of a copy without git."""
    cuda = torch.cuda.is_available()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {"gpu": torch.cuda.get_device_name() if cuda else None, "driver": driver() if cuda else None, "python": platform.python_version(),
            "torch": str(torch.__version__), "triton": version, "commit": named or commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def commit() -> str:
    """Short hash of the checkout's commit."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def append(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Add rows to results/NAME.jsonl, each with the environment."""
    RESULTS.mkdir(exist_ok=True)
    path, common = RESULTS / f"{name}.jsonl", environment()
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **common}) + "\n")
    return path
