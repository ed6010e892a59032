"""A live table of the run in progress, read from the log file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.live import Live
from rich.table import Table

from taylor_patch.errors import TaylorPatchError
from taylor_patch.report.runs import Run, load
from taylor_patch.telemetry import gain_text


def table(run: Run, rows: int = 12) -> Table:
    """The last steps of a run."""
    state = "in progress" if not run.summary else run.summary["outcome"]
    made = Table(title=f"{run.model}: {len(run.steps)} model evaluations, {state}")
    for name in ("step", "sigma", "seconds", "calls", "time in backends", "estimated", "error", "exact because"):
        made.add_column(name)
    for step in run.steps[-rows:]:
        errors = [block["figures"]["quality_raw"] for block in step["blocks"] if block["figures"].get("quality_raw") is not None]
        made.add_row(str(step["step"]), f"{step['sigma'] or 0:.3g}", f"{step['seconds']:.2f}",
                     ", ".join(f"{name} {count}" for name, count in step["calls"].items()),
                     ", ".join(f"{name} {value:.0f} ms" for name, value in step["milliseconds"].items()),
                     "" if step.get("saved_milliseconds") is None else gain_text(step["saved_milliseconds"]),
                     f"{max(errors):.3g}" if errors else "", "; ".join(step["fallbacks"]))
    return made


def watch(path: Path, seconds: float, once: bool = False) -> None:
    """Show the newest run of `path` and look again every `seconds`, until interrupted; `once` shows it and returns."""
    if not (once or path.exists()):
        print(f"waiting for {path}", file=sys.stderr)
    with Live(refresh_per_second=4) as live:
        while True:
            try:
                live.update(table(load(path)[-1]))
            except TaylorPatchError:
                if once:
                    raise
                live.update(f"waiting for {path}: set log_file to it in [taylor_patch] and make a picture")
            if once:
                return
            time.sleep(seconds)
