"""The hooks that a plugin may implement. pluggy registers and configures; it is never in the attention call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from taylor_patch.backends.base import Backend
    from taylor_patch.config import Config
    from taylor_patch.run import RunSummary

PROJECT = "taylor_patch"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def taylor_patch_register_backends() -> Iterable[type[Backend]]:  # type: ignore[empty-body]
    """Return the Backend classes that this plugin offers."""


@hookspec
def taylor_patch_configure(config: Config) -> None:
    """A configuration has come into force: at installation and whenever a file changed."""


@hookspec
def taylor_patch_run_finished(summary: RunSummary) -> None:
    """A sampling run has ended, normally or not."""
