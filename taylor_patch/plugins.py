"""Loading plugins. A broken one costs one line and is left out; the others and ComfyUI go on.

Nothing here imports torch: a plugin that declares its backends as LazyBackend can be listed without it.
"""

from __future__ import annotations

import dataclasses
import inspect
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
from taylor_patch.declaration import LazyBackend, NoOptions
from taylor_patch.errors import PluginError, nearest, said
from taylor_patch.time_limit import within

if TYPE_CHECKING:
    from taylor_patch.backends.base import Backend

log = logging.getLogger("taylor_patch")

LOAD_SECONDS = 30.0
"""A plugin that takes longer to load is left out; TAYLOR_PATCH_PLUGIN_SECONDS sets another limit."""
RESERVED = ("auto", "sdpa")
"""Backend names that no plugin may take: "sdpa" is what everything falls back to."""
FIRST_PARTY = {"sage": "sage", "kitchen_int8": "kitchen", "kitchen_sol": "kitchen", "chunked": "example"}
"""Backend -> entry point of the package taylor-patch-... that offers it: those of this repository's folder plugins/."""


@dataclass(frozen=True)
class Plugin:
    """One plugin as `taylor-patch plugins` lists it.

    error: why it is left out, None when it works. disallowed: whether the user has left it out. notes: its backends that gave way to
    others or cannot be used.
    """

    name: str
    origin: str
    backends: tuple[str, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()
    disallowed: bool = False


@dataclass
class Registry:
    """What the plugins have registered."""

    manager: pluggy.PluginManager
    plugins: list[Plugin] = field(default_factory=list)
    backends: dict[str, LazyBackend] = field(default_factory=dict)
    seconds: float = LOAD_SECONDS
    strict: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    """Backend -> why it is left out while its plugin is not."""
    _options: dict[str, type] = field(default_factory=dict)
    _kinds: dict[str, type[Backend]] = field(default_factory=dict)
    _overruled: dict[str, tuple[str, LazyBackend]] = field(default_factory=dict)
    """Backend -> the plugin and the declaration that gave way to another's of that name."""

    @property
    def option_types(self) -> dict[str, type]:
        """Backend name -> dataclass of its options. A backend whose options cannot be imported or used is left out."""
        for name in list(self.backends):
            self._check_options(name)
        return dict(self._options)

    def why_absent(self, name: str) -> str | None:
        """Why there is no backend `name`, where that may be another reason than a mistake in the name; else None."""
        entry = FIRST_PARTY.get(name, name)
        plugin = next((plugin for plugin in self.plugins if plugin.name == entry), None)
        if name in self.left_out:
            return f"it is left out: {self.left_out[name]}"
        if plugin is not None and plugin.error:
            return f'plugin "{entry}" offers it and is left out: {plugin.error}'
        if plugin is None and name in FIRST_PARTY:
            return f"taylor-patch-{entry} offers it, which is not installed"
        absent = [f"{plugin.name} ({plugin.error})" for plugin in self.plugins if plugin.error]
        return f"it may be of a plugin that is left out: {', '.join(absent)}" if absent else None

    def unknown(self, name: str, names: Iterable[str]) -> str:
        """What to say of a backend `name` that is none of `names`: why, or which is meant."""
        why = self.why_absent(name)
        return f'"{name}" is not one of {", ".join(names)}' + (f": {why}." if why else ".") + nearest(name, names)

    def kind(self, name: str) -> type[Backend]:
        """The class of a backend, imported at its first use; one that cannot be imported refuses every call and says why."""
        if name not in self._kinds:
            declaration = self.backends[name]
            try:
                self._kinds[name] = within(self.seconds, declaration.load) if isinstance(declaration.target, str) else declaration.load()
            except (Exception, SystemExit) as error:
                self._kinds[name] = self.refusing(name, error, "it cannot be imported")
        return self._kinds[name]

    def refusing(self, name: str, error: BaseException, what: str = "it is left out") -> type[Backend]:
        """A class that refuses every call and says why, in the place of a backend that raised `error`; a line says so."""
        self._problem(self.label(name), error)
        return _refusing(self.backends[name], self._options.get(name), f"{what} ({said(error)})")

    def label(self, name: str) -> str:
        """'backend "x" (plugin y)'."""
        owner = next((plugin.name for plugin in self.plugins if name in plugin.backends), None)
        return f'backend "{name}"' + (f" (plugin {owner})" if owner else "")

    def _check_options(self, name: str) -> None:
        """Look at a backend's options class, once; leave the backend out where it cannot be used."""
        if name in self._options:
            return
        try:
            self._options[name] = within(self.seconds, self.backends[name].options_type)
        except (Exception, SystemExit) as error:
            self._problem(self.label(name), error)
            owner = next(plugin for plugin in self.plugins if name in plugin.backends)
            note = f'backend "{name}" is left out: {said(error)}'
            self._change(owner, backends=tuple(other for other in owner.backends if other != name), notes=(*owner.notes, note))
            del self.backends[name]
            if name not in self._overruled:
                self.left_out[name] = said(error)
                return
            before, self.backends[name] = self._overruled.pop(name)
            owner = next(plugin for plugin in self.plugins if plugin.name == before)
            self._change(owner, backends=(*owner.backends, name))
            self._check_options(name)

    def _change(self, plugin: Plugin, **values: Any) -> None:
        self.plugins[self.plugins.index(plugin)] = dataclasses.replace(plugin, **values)

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a hook of each plugin by itself, so that one that raises does not keep the others from hearing."""
        for plugin in self.manager.get_plugins():
            others = [other for other in self.manager.get_plugins() if other is not plugin]
            try:
                self.manager.subset_hook_caller(hook, others)(**arguments)
            except (Exception, SystemExit) as error:
                log.warning("taylor_patch: plugin %s: %s failed (%s)", self.manager.get_name(plugin), hook, said(error))

    def _problem(self, subject: str, error: BaseException) -> None:
        """One line about something that is left out, or PluginError with TAYLOR_PATCH_STRICT=1."""
        if self.strict:
            raise PluginError(f"{subject}: {said(error)}") from error
        text = said(error)
        log.warning("taylor_patch: %s is left out: %s%s Repair or uninstall it.", subject, text, "" if text.endswith((".", "?")) else ".")


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
            LazyBackend("triton_full", "taylor_patch.backends.taylor.gpu:TritonFull", priority=30, needs=("triton",),
                        summary="global Taylor attention in Triton, all features at once: fastest at modest R, for diffuse attention",
                        options="taylor_patch.backends.taylor.options:TaylorOptions"),
            LazyBackend("triton_fused", "taylor_patch.backends.taylor.gpu:TritonFused", priority=20, needs=("triton",),
                        summary="global Taylor attention in Triton, features streamed in chunks: any R, for diffuse attention",
                        options="taylor_patch.backends.taylor.options:TaylorOptions"),
            LazyBackend("taylor_torch", "taylor_patch.backends.taylor.plain:TaylorTorch", priority=10,
                        summary="global Taylor attention in plain PyTorch: an oracle and a teaching form, for diffuse attention",
                        options="taylor_patch.backends.taylor.options:TaylorOptions"),
            LazyBackend("sdpa", "taylor_patch.backends.sdpa:Sdpa",
                        summary="exact attention; in ComfyUI the function that ComfyUI itself chose"),
        )


def load(allow: Iterable[str] = ("*",), found: Iterable[EntryPoint] | None = None,
         environ: Mapping[str, str] = os.environ) -> Registry:
    """Built-in backends, then the entry points of group "taylor_patch" whose names match `allow`.

    TAYLOR_PATCH_PLUGINS=a,b replaces `allow`; TAYLOR_PATCH_STRICT=1 (or true, yes, on) raises PluginError instead of leaving anything
    out; TAYLOR_PATCH_PLUGIN_SECONDS is the time that each plugin has.
    """
    strict = environ.get("TAYLOR_PATCH_STRICT", "").lower() in ("1", "true", "yes", "on")
    registry = Registry(_manager(), seconds=_seconds(environ), strict=strict)
    _register(registry, "taylor_patch", "built in", BuiltinBackends, declared(BuiltinBackends))
    patterns = tuple(allow)
    source = f"plugins.allow = [{', '.join(f'{chr(34)}{pattern}{chr(34)}' for pattern in patterns)}]"
    if "TAYLOR_PATCH_PLUGINS" in environ:
        source = f"TAYLOR_PATCH_PLUGINS={environ['TAYLOR_PATCH_PLUGINS']}"
        patterns = tuple(name for name in environ["TAYLOR_PATCH_PLUGINS"].split(",") if name)
    entries = sorted(entry_points(group=hookspecs.PROJECT) if found is None else found, key=lambda entry: entry.name)
    _warn_of_idle(patterns, source, [entry.name for entry in entries])
    for entry in entries:
        if not any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            registry.plugins.append(Plugin(entry.name, entry.value, error=f"not allowed by {source}", disallowed=True))
            continue
        try:
            plugin, declarations = within(registry.seconds, partial(_loaded, entry))
            _register(registry, entry.name, entry.value, plugin, declarations)
        except (Exception, SystemExit) as error:
            registry._problem(f"plugin {entry.name}", error)
            registry.plugins.append(Plugin(entry.name, entry.value, error=said(error)))
            continue
        for declaration in declarations:
            if not isinstance(declaration.options, str) and registry.backends.get(declaration.name) is declaration:
                registry._check_options(declaration.name)
    return registry


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _warn_of_idle(patterns: Iterable[str], source: str, names: list[str]) -> None:
    """A line for each pattern that allows no installed plugin."""
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            log.warning('taylor_patch: %s: "%s" is the name of no installed plugin; %s.%s', source, pattern,
                        f"there are {', '.join(names)}" if names else "there are none", nearest(pattern, names))


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
    manager = _manager()
    _check_hooks(plugin, manager)
    manager.register(plugin)
    manager.check_pending()
    hook = manager.hook.taylor_patch_register_backends
    groups = hook()  # without the results that are None
    if hook.get_hookimpls() and not groups:
        raise PluginError("taylor_patch_register_backends returned None. Return a list of backends")
    found: dict[str, LazyBackend] = {}
    for group in groups:
        for item in _items(group):
            declaration = _declaration(item)
            if declaration.name in found:
                raise PluginError(f'it registers backend "{declaration.name}" twice')
            found[declaration.name] = declaration
    return tuple(found.values())


def _check_hooks(plugin: Any, manager: pluggy.PluginManager) -> None:
    """Raises PluginError where a plugin implements no hook, or a function that is meant as one is none."""
    hooks = [name for name in vars(hookspecs) if name.startswith("taylor_patch_")]
    implemented = False
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is not None:
            implemented, hook = True, options.get("specname") or name
            if hook not in hooks:
                raise PluginError(f"{hook} is not a hook; there are {', '.join(hooks)}." + nearest(hook, hooks))
        elif name in hooks and inspect.isroutine(getattr(plugin, name)):
            raise PluginError(f"{name} is not marked as a hook. Put @taylor_patch.hookimpl above it (below @staticmethod)")
    if not implemented:
        raise PluginError(f"{getattr(plugin, '__name__', repr(plugin))} implements no hook; there are {', '.join(hooks)}")


def _items(group: Any) -> Iterable[Any]:
    """The backends in what the hook returned; one backend stands for a list of it. Raises PluginError where it is no list."""
    if isinstance(group, type | LazyBackend):
        return (group,)
    if isinstance(group, str | Mapping) or not isinstance(group, Iterable):
        raise PluginError(f"taylor_patch_register_backends returned {group!r}. Return a list of backends")
    return group


def _declaration(item: Any) -> LazyBackend:
    """The declaration of what a plugin registered. Raises PluginError where it is no backend or its declaration has a wrong value."""
    declaration = item
    if isinstance(item, type):
        from taylor_patch.backends.base import Backend

        if issubclass(item, Backend):
            if not hasattr(item, "name"):
                raise PluginError(f'{item.__name__} has no name. Give it one: name = "..."')
            declaration = LazyBackend.of(item)
    if not isinstance(declaration, LazyBackend):
        raise PluginError(f"it registered {item!r}, which is neither a subclass of taylor_patch.Backend nor a taylor_patch.LazyBackend")
    name = declaration.name
    if name == "auto":
        raise PluginError('backend name "auto" is reserved. Choose another')
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise PluginError(f"backend name {name!r} is not a lower_snake identifier")
    if not isinstance(declaration.priority, int):
        raise PluginError(f'backend "{name}" has priority = {declaration.priority!r}, which is not a whole number')
    if isinstance(declaration.needs, str):
        raise PluginError(f'backend "{name}" has needs = {declaration.needs!r}, which is not a tuple of module names')
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
        advice = "Uninstall one of them, or leave one out of plugins.allow"
        if before.name == hookspecs.PROJECT:  # built in
            advice = "Rename yours" + ("" if declaration.name in RESERVED else " if that is not wanted" if wins else " or raise its priority")
        if registry.strict:
            registry.manager.unregister(plugin)
            raise PluginError(f"{note}. {advice}")
        log.warning("taylor_patch: %s. %s.", note, advice)
        notes.append(note)
        if wins:
            kept.append(declaration)
            registry._overruled[declaration.name] = (before.name, old)
            left = tuple(other for other in before.backends if other != declaration.name)
            registry._change(before, backends=left, notes=(*before.notes, note))
    registry.backends.update((declaration.name, declaration) for declaration in kept)
    registry.plugins.append(Plugin(name, origin, tuple(declaration.name for declaration in kept), notes=tuple(notes)))


def _refusing(declaration: LazyBackend, options: type | None, reason: str) -> type[Backend]:
    """A backend in the place of one that cannot be used."""
    from taylor_patch.backends.base import Backend

    class Refusing(Backend):
        name = declaration.name
        summary = declaration.summary
        priority = declaration.priority
        options_type = options or NoOptions

        def reasons_against(self, call: Any) -> tuple[str, ...]:
            return self.unavailable()

        def unavailable(self) -> tuple[str, ...]:
            return (reason,)

    return Refusing
