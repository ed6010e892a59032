"""Measured crossovers of this machine, kept in the user's cache folder; safe to delete."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("taylor_patch")

VERSION = 1


def path() -> Path:
    """The file."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("taylor_patch", appauthor=False)) / "crossovers.json"


def device_name(device: torch.device) -> str:
    """What a measurement is filed under: the GPU's name, or the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=4)
def _load(file: Path, stamp: int) -> Mapping[str, Mapping[str, int | None]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] == VERSION:
            return {str(name): {str(backend): None if n is None else int(n) for backend, n in found.items()}
                    for name, found in data["devices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("taylor_patch: %s is not used (%s: %s). Delete it, or run taylor-patch bench --calibrate.", file,
                    type(error).__name__, error)
    return {}


def measured(device: torch.device) -> Mapping[str, int | None]:
    """Backend -> tokens from which it was measured to be faster than exact attention here; None where it never was."""
    file = path()
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _load(file, stamp).get(device_name(device), {})


def clear() -> None:
    """Remove the file. Raises OSError where that cannot be done."""
    path().unlink(missing_ok=True)


def store(device: torch.device, crossovers: Mapping[str, int | None]) -> Path:
    """Keep crossovers of this device beside those of others."""
    file = path()
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        devices = data["devices"] if data["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        devices = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    devices[device_name(device)] = dict(crossovers)
    file.write_text(json.dumps({"version": VERSION, "devices": devices}, indent=2) + "\n", encoding="utf-8")
    return file
