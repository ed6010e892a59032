"""Loading plugins. A broken one costs one line and is left out; the others and ComfyUI go on.

Nothing here imports torch: a plugin that declares its backends as LazyBackend can be listed without it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from taylor_patch import hookspecs
from taylor_patch.declaration import LazyBackend
from taylor_patch.errors import PluginError, said
from taylor_patch.time_limit import within

if TYPE_CHECKING:
    from taylor_patch.backends.base import Backend

log = logging.getLogger("taylor_patch")

LOAD_SECONDS = 30.0
"""A plugin that takes longer to load is left out; TAYLOR_PATCH_PLUGIN_SECONDS sets another limit."""
RESERVED = ("auto", "sdpa")
"""Backend names that no plugin may take: "sdpa" is what everything falls back to."""


@dataclass(frozen=True)
class Plugin:
    """One plugin as `taylor-patch plugins` lists it; error is None when it works, notes name backends that gave way to others."""

    name: str
    origin: str
    backends: tuple[str, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Registry:
    """What the plugins have registered."""

    manager: pluggy.PluginManager
    plugins: list[Plugin] = field(default_factory=list)
    backends: dict[str, LazyBackend] = field(default_factory=dict)
    seconds: float = LOAD_SECONDS
    strict: bool = False
    _kinds: dict[str, type[Backend]] = field(default_factory=dict)

    @property
    def option_types(self) -> dict[str, type]:
        """Backend name -> dataclass of its options. A backend whose options cannot be imported is left out."""
        found = {}
        for name, declaration in list(self.backends.items()):
            try:
                found[name] = within(self.seconds, declaration.options_type) if isinstance(declaration.options, str) else declaration.options
            except (Exception, SystemExit) as error:
                self._problem(f'backend "{name}"', "its options", error)
                del self.backends[name]
        return found

    def kind(self, name: str) -> type[Backend]:
        """The class of a backend, imported at its first use; one that cannot be imported refuses every call and says why."""
        if name not in self._kinds:
            declaration = self.backends[name]
            try:
                self._kinds[name] = within(self.seconds, declaration.load) if isinstance(declaration.target, str) else declaration.load()
            except (Exception, SystemExit) as error:
                self._problem(f'backend "{name}"', str(declaration.target), error)
                self._kinds[name] = _unloadable(declaration, f"it cannot be imported ({said(error)})")
        return self._kinds[name]

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a hook of each plugin by itself, so that one that raises does not keep the others from hearing."""
        for plugin in self.manager.get_plugins():
            others = [other for other in self.manager.get_plugins() if other is not plugin]
            try:
                self.manager.subset_hook_caller(hook, others)(**arguments)
            except Exception as error:
                log.warning("taylor_patch: plugin %s: %s failed (%s)", self.manager.get_name(plugin), hook, said(error))

    def _problem(self, subject: str, origin: str, error: BaseException) -> None:
        """One line about something that is left out, or PluginError with TAYLOR_PATCH_STRICT=1."""
        if self.strict:
            raise PluginError(f"{subject} ({origin}): {said(error)}") from error
        log.warning("taylor_patch: %s is left out (%s). Repair or uninstall it.", subject, said(error))


class BuiltinBackends:
    """Our own backends, registered as any plugin registers its."""

    @staticmethod
    @hookspecs.hookimpl
    def taylor_patch_register_backends() -> Iterable[LazyBackend]:
        """The backends of this package."""
        return (
            LazyBackend("near_far", "taylor_patch.backends.near_far:NearFar", priority=100,
                        summary="exact for important neighbours, second-order Taylor for the rest; accurate on trained models",
                        options="taylor_patch.backends.near_far:NearFarOptions"),
            LazyBackend("triton_full", "taylor_patch.backends.triton_taylor:TritonFull", priority=30, needs=("triton",),
                        summary="global Taylor attention in Triton, all features at once: fastest at modest R, for diffuse attention",
                        options="taylor_patch.backends.taylor:TaylorOptions"),
            LazyBackend("triton_fused", "taylor_patch.backends.triton_taylor:TritonFused", priority=20, needs=("triton",),
                        summary="global Taylor attention in Triton, features streamed in chunks: any R, for diffuse attention",
                        options="taylor_patch.backends.taylor:TaylorOptions"),
            LazyBackend("taylor_torch", "taylor_patch.backends.taylor_torch:TaylorTorch", priority=10,
                        summary="global Taylor attention in plain PyTorch: an oracle and a teaching form, for diffuse attention",
                        options="taylor_patch.backends.taylor:TaylorOptions"),
            LazyBackend("sdpa", "taylor_patch.backends.sdpa:Sdpa",
                        summary="exact attention; in ComfyUI the function that ComfyUI itself chose"),
        )


def load(allow: Iterable[str] = ("*",), found: Iterable[EntryPoint] | None = None,
         environ: Mapping[str, str] = os.environ) -> Registry:
    """Built-in backends, then the entry points of group "taylor_patch" whose names match `allow`.

    TAYLOR_PATCH_PLUGINS=a,b replaces `allow`; TAYLOR_PATCH_STRICT=1 raises PluginError instead of leaving anything out;
    TAYLOR_PATCH_PLUGIN_SECONDS is the time that each plugin has.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registry = Registry(manager, seconds=_seconds(environ), strict=environ.get("TAYLOR_PATCH_STRICT") == "1")
    _register(registry, "taylor_patch", "built in", BuiltinBackends, declared(BuiltinBackends))
    if "TAYLOR_PATCH_PLUGINS" in environ:
        allow = [name for name in environ["TAYLOR_PATCH_PLUGINS"].split(",") if name]
    patterns = tuple(allow)
    for entry in sorted(entry_points(group=hookspecs.PROJECT) if found is None else found, key=lambda entry: entry.name):
        if not any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            registry.plugins.append(Plugin(entry.name, entry.value, error="not allowed by plugins.allow"))
            continue
        try:
            plugin, declarations = within(registry.seconds, partial(_loaded, entry))
            _register(registry, entry.name, entry.value, plugin, declarations)
        except (Exception, SystemExit) as error:
            registry._problem(f"plugin {entry.name}", entry.value, error)
            registry.plugins.append(Plugin(entry.name, entry.value, error=said(error)))
    return registry


def _seconds(environ: Mapping[str, str]) -> float:
    """The time limit, from the variable where that is a number above 0."""
    text = environ.get("TAYLOR_PATCH_PLUGIN_SECONDS", "")
    try:
        seconds = float(text or LOAD_SECONDS)
    except ValueError:
        seconds = 0.0
    if seconds > 0:
        return seconds
    log.warning('taylor_patch: TAYLOR_PATCH_PLUGIN_SECONDS: "%s" is not a number above 0; %g is used.', text, LOAD_SECONDS)
    return LOAD_SECONDS


def _loaded(entry: EntryPoint) -> tuple[Any, tuple[LazyBackend, ...]]:
    plugin = entry.load()
    return plugin, declared(plugin)


def declared(plugin: Any) -> tuple[LazyBackend, ...]:
    """The backends that a plugin registers, checked. Raises PluginError where one is no backend or the API is too new for us."""
    version = getattr(plugin, "taylor_patch_api", hookspecs.API_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PluginError(f"taylor_patch_api = {version!r} is not a whole number from 1")
    if version > hookspecs.API_VERSION:
        raise PluginError(f"it is written for plugin API {version}, and this taylor_patch has {hookspecs.API_VERSION}. "
                          "Upgrade taylor-patch, or install an older version of the plugin")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()
    found: dict[str, LazyBackend] = {}
    for group in manager.hook.taylor_patch_register_backends():
        for item in group:
            declaration = _declaration(item)
            if declaration.name in found:
                raise PluginError(f'it registers backend "{declaration.name}" twice')
            found[declaration.name] = declaration
    return tuple(found.values())


def _declaration(item: Any) -> LazyBackend:
    """The declaration of what a plugin registered. Raises PluginError where it is no backend or has no valid name."""
    declaration = item
    if isinstance(item, type):
        from taylor_patch.backends.base import Backend

        if issubclass(item, Backend):
            name = getattr(item, "name", None)
            declaration = LazyBackend.of(item) if isinstance(name, str) else LazyBackend(repr(name), item)
    if not isinstance(declaration, LazyBackend):
        raise PluginError(f"it registered {item!r}, which is neither a subclass of taylor_patch.Backend nor a taylor_patch.LazyBackend")
    name = declaration.name
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower() or name == "auto":
        raise PluginError(f"backend name {name!r} is not a lower_snake identifier")
    return declaration


def _register(registry: Registry, name: str, origin: str, plugin: Any, declarations: Iterable[LazyBackend]) -> None:
    """Register one plugin and its backends.

    Of two backends with one name that of the higher priority stays, the earlier one where they are equal; a note and a line name both.
    """
    registry.manager.register(plugin, name)
    kept, notes = [], []
    for declaration in declarations:
        before = next((other for other in registry.plugins if declaration.name in other.backends), None)
        if before is None:
            kept.append(declaration)
            continue
        old = registry.backends[declaration.name]
        wins = declaration.priority > old.priority and declaration.name not in RESERVED
        note = (f'backend "{declaration.name}" is offered by {before.name} (priority {old.priority}) and {name} '
                f"(priority {declaration.priority}): that of {name if wins else before.name} is used")
        if registry.strict:
            registry.manager.unregister(plugin)
            raise PluginError(note)
        log.warning("taylor_patch: %s. Uninstall one of them, or leave one out of plugins.allow.", note)
        notes.append(note)
        if wins:
            kept.append(declaration)
            left = tuple(other for other in before.backends if other != declaration.name)
            registry.plugins[registry.plugins.index(before)] = dataclasses.replace(before, backends=left, notes=(*before.notes, note))
    registry.backends.update((declaration.name, declaration) for declaration in kept)
    registry.plugins.append(Plugin(name, origin, tuple(declaration.name for declaration in kept), notes=tuple(notes)))


def _unloadable(declaration: LazyBackend, reason: str) -> type[Backend]:
    """A backend in the place of one that cannot be imported."""
    from taylor_patch.backends.base import Backend

    class Unloadable(Backend):
        name = declaration.name
        summary = declaration.summary
        priority = declaration.priority
        options_type = declaration.options_type()

        def unavailable(self) -> tuple[str, ...]:
            return (reason,)

    return Unloadable
