"""taylor_patch: faster attention for big images and long videos in ComfyUI.

This module imports nothing: every Python start in the environment runs it (see taylor_patch_startup.pth), and
while TAYLOR_PATCH is unset that must cost next to nothing. Public names are loaded on first use.

PYTEST_DONT_REWRITE: it is imported before pytest could rewrite it, which pytest would warn of.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own costs an import; type checkers take this name for true too
if TYPE_CHECKING:
    from taylor_patch.api import attention, explain, install, status, uninstall
    from taylor_patch.backends.base import Backend
    from taylor_patch.call import AttentionCall, TokenGrid
    from taylor_patch.declaration import LazyBackend
    from taylor_patch.errors import TaylorPatchError
    from taylor_patch.hookspecs import hookimpl
    from taylor_patch.options import option
    from taylor_patch.router import Choice

# Public name -> module that defines it.
_PUBLIC = {
    "AttentionCall": "taylor_patch.call",
    "Backend": "taylor_patch.backends.base",
    "Choice": "taylor_patch.router",
    "LazyBackend": "taylor_patch.declaration",
    "TaylorPatchError": "taylor_patch.errors",
    "TokenGrid": "taylor_patch.call",
    "attention": "taylor_patch.api",
    "explain": "taylor_patch.api",
    "hookimpl": "taylor_patch.hookspecs",
    "install": "taylor_patch.api",
    "option": "taylor_patch.options",
    "status": "taylor_patch.api",
    "uninstall": "taylor_patch.api",
}

__all__ = [
    "AttentionCall",
    "Backend",
    "Choice",
    "LazyBackend",
    "TaylorPatchError",
    "TokenGrid",
    "attention",
    "explain",
    "hookimpl",
    "install",
    "option",
    "status",
    "uninstall",
]


_started = False
"""Whether the start-up files have run with TAYLOR_PATCH on."""


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'taylor_patch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


OFF_WORDS = ("0", "off", "false", "no")
ON_WORDS = ("1", "on", "true", "yes")


def asked_for(value: str) -> str:
    """What a value of TAYLOR_PATCH asks for: "" for off, "1" for on, or the name of a backend, which is on too.

    Case does not count, nor do blanks and quotes around it: of `set TAYLOR_PATCH=0 && ...` Windows keeps the blank.
    """
    word = value.strip(" \t\"'").lower()
    return "" if word in OFF_WORDS else "1" if word in ON_WORDS else word


def _startup() -> None:
    """Entry point of the start-up files: do nothing unless TAYLOR_PATCH asks for it, and never raise.

    Virtual environments run start-up files twice before Python 3.15; the first time that succeeds counts.
    """
    global _started
    import os

    if _started or not asked_for(os.environ.get("TAYLOR_PATCH", "")):
        return
    try:
        from taylor_patch.startup import wait

        wait()
        _started = True
    except (Exception, SystemExit) as error:  # SystemExit here would end the interpreter
        import sys

        print(f"taylor_patch: off: start-up failed ({type(error).__name__}: {error}). "
              "ComfyUI runs as without it; `taylor-patch doctor` says more.", file=sys.stderr)
