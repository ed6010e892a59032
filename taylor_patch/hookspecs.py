"""The hooks that a plugin may implement. pluggy registers and configures; it is never in the attention call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from taylor_patch.backends.base import Backend
    from taylor_patch.config import Config
    from taylor_patch.declaration import LazyBackend
    from taylor_patch.run import RunSummary

PROJECT = "taylor_patch"
API_VERSION = 1
"""Of the hooks and the Backend contract. A plugin that needs a newer one says so by `taylor_patch_api = 2` and is refused here."""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def taylor_patch_register_backends() -> Iterable[type[Backend] | LazyBackend]:  # type: ignore[empty-body]
    """Return the backends that this plugin offers: Backend classes, or LazyBackend declarations, which import nothing."""


@hookspec
def taylor_patch_configure(config: Config) -> None:
    """A configuration has come into force: at installation and whenever a file changed."""


@hookspec
def taylor_patch_run_finished(summary: RunSummary) -> None:
    """A sampling run has ended, normally or not."""
