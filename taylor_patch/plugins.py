"""Loading plugins. A broken one costs one line and is left out; the others and ComfyUI go on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from taylor_patch import hookspecs
from taylor_patch.backends.base import Backend
from taylor_patch.errors import PluginError

log = logging.getLogger("taylor_patch")


@dataclass(frozen=True)
class Plugin:
    """One plugin as `taylor-patch plugins` lists it; error is None when it works."""

    name: str
    origin: str
    backends: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Registry:
    """What the plugins have registered."""

    manager: pluggy.PluginManager
    plugins: list[Plugin] = field(default_factory=list)
    backends: dict[str, type[Backend]] = field(default_factory=dict)

    @property
    def option_types(self) -> dict[str, type]:
        """Backend name -> dataclass of its options."""
        return {name: kind.options_type for name, kind in self.backends.items()}

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a hook of each plugin by itself, so that one that raises does not keep the others from hearing."""
        for plugin in self.manager.get_plugins():
            others = [other for other in self.manager.get_plugins() if other is not plugin]
            try:
                self.manager.subset_hook_caller(hook, others)(**arguments)
            except Exception as error:
                log.warning("taylor_patch: plugin %s: %s failed (%s: %s)", self.manager.get_name(plugin), hook,
                            type(error).__name__, error)


class BuiltinBackends:
    """Our own backends, registered as any plugin registers its."""

    @staticmethod
    @hookspecs.hookimpl
    def taylor_patch_register_backends() -> Iterable[type[Backend]]:
        """The backends of this package."""
        from taylor_patch.backends.near_far import NearFar
        from taylor_patch.backends.sdpa import Sdpa
        from taylor_patch.backends.taylor_torch import TaylorTorch
        from taylor_patch.backends.triton_taylor import TritonFull, TritonFused

        return (NearFar, TritonFull, TritonFused, TaylorTorch, Sdpa)


def load(allow: Iterable[str] = ("*",), found: Iterable[EntryPoint] | None = None,
         environ: Mapping[str, str] = os.environ) -> Registry:
    """Built-in backends, then the entry points of group "taylor_patch" whose names match `allow`.

    TAYLOR_PATCH_PLUGINS=a,b replaces `allow`; TAYLOR_PATCH_STRICT=1 raises PluginError instead of leaving a plugin out.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registry = Registry(manager)
    _register(registry, "taylor_patch", "built in", BuiltinBackends)
    if "TAYLOR_PATCH_PLUGINS" in environ:
        allow = [name for name in environ["TAYLOR_PATCH_PLUGINS"].split(",") if name]
    patterns = tuple(allow)
    for entry in sorted(entry_points(group=hookspecs.PROJECT) if found is None else found, key=lambda entry: entry.name):
        if not any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            registry.plugins.append(Plugin(entry.name, entry.value, error="not allowed by plugins.allow"))
            continue
        try:
            _register(registry, entry.name, entry.value, entry.load())
        except (Exception, SystemExit) as error:
            message = f"{type(error).__name__}: {error}"
            if environ.get("TAYLOR_PATCH_STRICT") == "1":
                raise PluginError(f"plugin {entry.name} ({entry.value}): {message}") from error
            log.warning("taylor_patch: plugin %s is left out (%s). Repair or uninstall it.", entry.name, message)
            registry.plugins.append(Plugin(entry.name, entry.value, error=message))
    return registry


def _register(registry: Registry, name: str, origin: str, plugin: Any) -> None:
    """Register one plugin and its backends, or raise with nothing of it left behind."""
    manager = registry.manager
    manager.register(plugin, name)
    try:
        others = [other for other in manager.get_plugins() if other is not plugin]
        manager.check_pending()
        groups = manager.subset_hook_caller("taylor_patch_register_backends", others)()
        kinds: dict[str, type[Backend]] = {}
        for kind in (kind for group in groups for kind in group):
            kinds[_free_name(kind, {**registry.backends, **kinds})] = kind
    except BaseException:
        manager.unregister(plugin)
        raise
    registry.backends.update(kinds)
    registry.plugins.append(Plugin(name, origin, tuple(kinds)))


def _free_name(kind: Any, taken: Mapping[str, type[Backend]]) -> str:
    """The name under which `kind` is registered. Raises PluginError where it is no backend or its name is not free."""
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise PluginError(f"registered {kind!r}, which is not a subclass of taylor_patch.Backend")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise PluginError(f"backend name {name!r} is not a lower_snake identifier")
    if name in taken:
        raise PluginError(f'backend name "{name}" is taken by {taken[name].__module__}')
    return name
