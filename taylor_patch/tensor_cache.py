"""Tensors that took a run to settle, kept for the next one: a folder beside cache.py's file, one file a kind and key; safe to delete.

The same rules hold: nothing in a file comes from prompts, pictures or file names, and trouble with the disk costs a line, never a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from taylor_patch import cache

log = logging.getLogger("taylor_patch")

VERSION = 1
LIMIT = 64 << 20
"""Bytes of all files; beyond them those go that were not asked for for longest."""

_lock = threading.Lock()
_reported: set[tuple[str, int, int]] = set()
"""(path, inode, bytes) of files that were reported."""


def folder() -> Path:
    """Where the files are."""
    return cache.path().with_suffix("")


def load(kind: str, key: Mapping[str, cache.Scalar]) -> dict[str, Tensor] | None:
    """What was stored last under this kind and key, on the CPU, or None. Check shapes and values before use."""
    if not cache.is_on():
        return None
    file = _file(kind, key)
    if not file.exists():
        return None
    try:
        if file.stat().st_size > LIMIT:
            raise ValueError(f"larger than {LIMIT >> 20} MiB")
        data = torch.load(io.BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}, this taylor_patch has {VERSION}")
        if data["name"] != cache.name_of(kind, key):
            raise ValueError("not what its name says")
        tensors = {str(name): tensor for name, tensor in data["tensors"].items()}
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("not tensors only")
    except Exception as error:  # of a broken file torch.load raises a bit of everything
        unusable(kind, key, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    return tensors


def unusable(kind: str, key: Mapping[str, cache.Scalar], error: Exception) -> None:
    """One line for a file whose content cannot be used."""
    file = _file(kind, key)
    with contextlib.suppress(OSError):
        stat = file.stat()
        if (one := (str(file), stat.st_ino, stat.st_size)) not in _reported:
            _reported.add(one)
            log.warning("taylor_patch: %s is not used (%s: %s). It will be written anew; taylor-patch cache --clear removes it.", file,
                        type(error).__name__, str(error).partition("\n")[0])


def store(kind: str, key: Mapping[str, cache.Scalar], tensors: Mapping[str, Tensor]) -> None:
    """Keep `tensors` (on the CPU) in the place of older ones; a failure is one line."""
    if not cache.is_on():
        return
    file, content = _file(kind, key), io.BytesIO()
    with _lock:
        try:
            torch.save({"version": VERSION, "name": cache.name_of(kind, key), "tensors": dict(tensors)}, content)
            if content.tell() > LIMIT:
                raise ValueError(f"{content.tell() >> 20} MiB, more than the {LIMIT >> 20} MiB of all files")
            cache.replace_file(file, content.getvalue())
            _bound(file)
        except (OSError, ValueError, RuntimeError) as error:
            cache.cannot_write(file, error)


def clear() -> int:
    """Remove all files; their number. Raises OSError where one cannot be removed."""
    with _lock:
        files = _files()
        for file, _ in files:
            file.unlink(missing_ok=True)
        if folder().is_dir():
            folder().rmdir()
        return len(files)


def kinds() -> Counter[str]:
    """Kind -> files."""
    return Counter(file.name.rpartition("-")[0] for file, _ in _files() if file.suffix == ".pt")


def nbytes() -> int:
    """Bytes of all files."""
    return sum(stat.st_size for _, stat in _files())


def _file(kind: str, key: Mapping[str, cache.Scalar]) -> Path:
    return folder() / f"{kind}-{hashlib.sha256(cache.name_of(kind, key).encode()).hexdigest()[:32]}.pt"


def _files() -> list[tuple[Path, os.stat_result]]:
    """The folder's files, those first that were asked for last; what an interrupted process left is among them."""
    found = []
    with contextlib.suppress(OSError):
        for file in folder().iterdir():
            with contextlib.suppress(OSError):  # another process may remove it
                found.append((file, file.stat()))
    return sorted(found, key=lambda one: -one[1].st_mtime_ns)


def _bound(newest: Path) -> None:
    """Remove what goes beyond LIMIT, never the file that was just written."""
    total = 0
    for file, stat in _files():
        total += stat.st_size
        if total > LIMIT and file != newest:
            file.unlink(missing_ok=True)
