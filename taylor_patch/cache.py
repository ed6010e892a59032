"""Values that took a run to settle, kept for the next one in the user's cache folder; safe to delete. Tensors are in tensor_cache.py.

An entry is filed under what it depends on: a kind ("auto_tune"), and a key of model, GPU and shapes. Nothing in it comes from prompts,
pictures or file names. Trouble with the file costs a line, never a run: what cannot be read is not there, what cannot be written is lost.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from taylor_patch import calibration
from taylor_patch.call import AttentionCall

log = logging.getLogger("taylor_patch")

VERSION = 1
LIMIT = 512
"""Entries kept; beyond it those that were stored longest ago go."""
Scalar = str | int | float

_lock = threading.Lock()
_state = {"on": True, "can_write": True}


def path() -> Path:
    """The file."""
    return calibration.path().with_name("settled.json")


def switch(on: bool) -> None:
    """Use the file or leave it alone: `cache` in [taylor_patch]."""
    _state.update(on=on, can_write=True)


def is_on() -> bool:
    """Whether anything is kept on disk."""
    return _state["on"]


def cannot_write(file: Path, error: Exception) -> None:
    """One line for all that cannot be written."""
    if _state["can_write"]:
        log.warning("taylor_patch: %s cannot be written (%s: %s); the next run settles such values anew.", file, type(error).__name__, error)
    _state["can_write"] = False


def place(call: AttentionCall) -> dict[str, Scalar] | None:
    """The key of calls like this one: model, GPU, dtype and shapes; None where the model is not known. Add block or sigma where they count."""
    if call.fingerprint is None:
        return None
    return {"model": call.fingerprint, "device": calibration.device_name(call.q.device), "dtype": str(call.q.dtype).removeprefix("torch."),
            "q": "x".join(map(str, call.q.shape)), "k": "x".join(map(str, call.k.shape))}


def load(kind: str, key: Mapping[str, Scalar]) -> dict[str, Any] | None:
    """A copy of what was stored last under this kind and key, or None. Its values are as the file has them: check them before use."""
    found = _entries().get(name_of(kind, key)) if _state["on"] else None
    return None if found is None else json.loads(json.dumps(found))  # type: ignore[no-any-return]


def store(kind: str, key: Mapping[str, Scalar], value: Mapping[str, Any]) -> None:
    """Keep `value` (what JSON can hold, finite numbers) in the place of an older one; a failure is one line."""
    if not _state["on"]:
        return
    with _lock:
        entries = dict(_entries())
        entries.pop(name_of(kind, key), None)
        entries[name_of(kind, key)] = dict(value)
        try:
            _write({name: entries[name] for name in list(entries)[-LIMIT:]})
        except (OSError, TypeError, ValueError) as error:
            cannot_write(path(), error)


def clear() -> int:
    """Remove the file; the number of entries that it held. Raises OSError where it cannot be removed."""
    with _lock:
        count = len(_entries())
        path().unlink(missing_ok=True)
        return count


def kinds() -> Counter[str]:
    """Kind -> entries in the file."""
    return Counter(json.loads(name)[0] for name in _entries())


def name_of(kind: str, key: Mapping[str, Scalar]) -> str:
    """Kind and key as one text."""
    return json.dumps([kind, dict(sorted(key.items()))])


def _entries() -> Mapping[str, dict[str, Any]]:
    """Name -> value, the oldest first."""
    file = path()
    try:
        stat = file.stat()
    except OSError:
        return {}
    return _read(file, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=1)
def _read(file: Path, *stamp: int) -> Mapping[str, dict[str, Any]]:
    """The file's entries; read again only when `stamp` says that it changed, so that one that is broken costs one line."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r}, this taylor_patch has {VERSION}")
        return {name_of(str(entry["kind"]), dict(entry["key"])): dict(entry["value"]) for entry in data["entries"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("taylor_patch: %s is not used (%s: %s). It will be written anew; taylor-patch cache --clear removes it.", file,
                    type(error).__name__, error)
        return {}


def _write(entries: Mapping[str, dict[str, Any]]) -> None:
    rows = [dict(zip(("kind", "key"), json.loads(name), strict=True), value=value) for name, value in entries.items()]
    replace_file(path(), json.dumps({"version": VERSION, "entries": rows}, indent=1, allow_nan=False).encode())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file in one move, so that nobody reads half of it. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
