"""Runs of a log file (docs/telemetry.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taylor_patch.errors import TaylorPatchError
from taylor_patch.telemetry import SCHEMA_VERSION


@dataclass
class Run:
    """One sampling run: its steps as they were written, and the closing line (empty while it is in progress)."""

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Family of the model."""
        return str(self.summary.get("model") or next((step["model"] for step in self.steps if step["model"]), "model"))

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks that a backend answered."""
        return sorted({block["block"] for step in self.steps for block in step["blocks"] if block["block"] is not None})

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason -> calls that were exact for it, most first."""
        total: dict[str, int] = {}
        for step in self.steps:
            for reason, count in step["fallbacks"].items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def exact_milliseconds(self) -> list[float | None]:
        """For each step what exact attention is estimated to take for the calls that backends answered; None where one is not known."""
        found: list[float | None] = []
        for step in self.steps:
            times = [block.get("exact_milliseconds") for block in step["blocks"]]
            found.append(sum(times) if times and None not in times else None)
        return found

    def figures(self, name: str) -> list[float]:
        """A figure of all sampled calls."""
        return [block["figures"][name] for step in self.steps for block in step["blocks"]
                if block["figures"].get(name) is not None]


def load(path: Path) -> list[Run]:
    """The runs of a log file, oldest first. Lines of another version or that are cut off are skipped.

    Raises TaylorPatchError where there is no file or no run in it.
    """
    runs: dict[str, Run] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TaylorPatchError(f"{path} cannot be read ({error}). Name the file that log_file in taylor_patch.toml names.") from None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or entry.get("version") != SCHEMA_VERSION:
            continue
        run = runs.setdefault(entry["run"], Run(entry["run"]))
        if entry["kind"] == "step":
            run.steps.append(entry)
        else:
            run.summary = entry
    found = [run for run in runs.values() if run.steps]
    if not found:
        raise TaylorPatchError(f'{path} holds no run. Set log_file = "{path}" in [taylor_patch] and make a picture.')
    return found
