"""What the page shows, as plain data and as HTML. No prompt, no picture, and of all paths only the configuration file's."""

from __future__ import annotations

import dataclasses
from typing import Any

import taylor_patch
from taylor_patch.api import status
from taylor_patch.config import Config
from taylor_patch.engine import Engine, engine
from taylor_patch.errors import ConfigError
from taylor_patch.live.settings_file import path_of, set_elsewhere
from taylor_patch.quality import QUALITIES
from taylor_patch.report.page import section
from taylor_patch.report.runs import Run
from taylor_patch.run import open_runs
from taylor_patch.telemetry import step_content

SWITCHES = ("enabled", "backend", "quality")
"""Keys of [taylor_patch] that the page changes."""


def next_config(current: Engine) -> tuple[Config, str | None]:
    """(the configuration that the next sampling run will have, what is wrong with the sources or None)."""
    try:
        return current.load(), None
    except ConfigError as error:
        return current.config, str(error)


def state() -> dict[str, Any]:
    """docs/live-control.md has the keys."""
    current = engine()
    config, problem = next_config(current)
    try:
        path = path_of(current)
        elsewhere = {key: set_elsewhere(config, path, key) for key in SWITCHES}
    except ConfigError:  # said by `problem`
        path, elsewhere = None, dict.fromkeys(SWITCHES)
    running = [run.summary("in progress").line() for run in open_runs()]
    backends = [{"name": name, "summary": declaration.summary, "missing": declaration.missing()}
                for name, declaration in sorted(current.registry.backends.items(), key=lambda item: -item[1].priority)]
    return {"version": taylor_patch.__version__, "patched": bool(status()["patched"]), "problem": problem,
            "file": None if path is None else str(path),
            "settings": {key: {"value": getattr(config.settings, key), "set_elsewhere": elsewhere[key]} for key in SWITCHES},
            "backends": backends, "qualities": QUALITIES, "compare_next": current.compare_next, "running": running,
            "last_run": None if current.last_run is None else current.last_run.line()}


def report() -> str:
    """The last run's charts as a piece of HTML, "" before the first. Its settings are left out: log_file is a path."""
    current = engine()
    if current.last_run is None:
        return ""
    return section(Run("last", [step_content(step) for step in current.last_steps], dataclasses.asdict(current.last_run)))
