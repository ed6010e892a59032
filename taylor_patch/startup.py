"""Activation: wait for ComfyUI's first import, then register post-import hooks for its modules, and nothing else.

Runs at interpreter start, in pip and git helpers too, and before the folders of packages are all on sys.path: wrapt may be in one that comes
later (a user site, the system's below a virtual environment). So it uses nothing but sys until then, and never torch or comfy. A hook that
raised would make ComfyUI's own import fail: each one is guarded here.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own costs an import; type checkers take this name for true too
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# ComfyUI module -> our module whose install(module) patches it.
HOOKS = {
    "comfy.ldm.modules.attention": "taylor_patch.hooks.attention",
    "comfy.samplers": "taylor_patch.hooks.sampling",
    "comfy.model_base": "taylor_patch.hooks.evaluation",
    "comfy.sampler_helpers": "taylor_patch.hooks.memory",
    "server": "taylor_patch.hooks.server",
}

FIRST = frozenset(target.partition(".")[0] for target in HOOKS)
"""Top-level modules; the import of one of them ends the wait."""

registered = False
failure: str | None = None
"""Why the hooks could not be registered when ComfyUI was imported; read by `doctor`."""
fired: dict[str, str] = {}
"""ComfyUI module -> "ok", or why its hook failed; read by `doctor` and `taylor_patch.status()`."""


class Waiting:
    """An entry of sys.meta_path that finds nothing itself: the first import of ComfyUI's registers the hooks.

    It stays there afterwards, because another thread that is in the list would miss an entry where one is taken out.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """None for other modules; for ComfyUI's first one what the others find, hooks included."""
        global failure
        if name not in FIRST or registered or failure is not None:
            return None
        try:
            activate()
        except (Exception, SystemExit) as error:
            failure = f"{type(error).__name__}: {error}"
            print(f"taylor_patch: off: start-up failed ({failure}). ComfyUI runs as without it; `taylor-patch doctor` says more.",
                  file=sys.stderr)
        from importlib.util import find_spec

        return None if name in sys.modules else find_spec(name)


def wait() -> None:
    """Register the hooks when ComfyUI is first imported; now where it is already."""
    if "comfy" in sys.modules:
        activate()
    elif Waiting not in sys.meta_path:
        sys.meta_path.insert(0, Waiting)


def activate() -> None:
    """Register the hooks, once in a process. Raises ImportError where wrapt is missing."""
    global registered
    if registered:
        return
    from wrapt import register_post_import_hook

    registered = True
    for target in HOOKS:
        module = sys.modules.get(target)
        if module is None:
            register_post_import_hook(_guarded(target), target)
        elif not getattr(module.__spec__, "_initializing", False):
            # Half-initialised modules are left alone: their names are not there yet.
            fire(target, module)


def _guarded(target: str) -> Callable[[ModuleType], None]:
    def hook(module: ModuleType) -> None:
        fire(target, module)

    return hook


def fire(target: str, module: ModuleType) -> None:
    """Run the hook for `target`; a failure is one line on stderr and a record, never an exception."""
    try:
        from importlib import import_module

        import_module(HOOKS[target]).install(module)
        fired[target] = "ok"
    except (Exception, SystemExit) as error:
        fired[target] = f"{type(error).__name__}: {error}"
        print(f"taylor_patch: {target} is not patched ({fired[target]}). "
              "ComfyUI uses its own attention; `taylor-patch doctor` says more.", file=sys.stderr)
