"""What is known of a backend before its module is imported. Needs neither torch nor any kernel library."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taylor_patch.errors import PluginError
from taylor_patch.options_check import checked

if TYPE_CHECKING:
    from taylor_patch.backends.base import Backend


@dataclass(frozen=True)
class NoOptions:
    """Options of a backend that has none."""


@dataclass(frozen=True)
class LazyBackend:
    """A backend that is imported when it is first used, so that listing plugins imports nothing.

    name, priority and options say the same as the attributes of the class; loading compares them.
    target: "package.module:Class" of a taylor_patch.Backend, or the class itself.
    options: the dataclass of [backends.NAME], or its "package.module:Class"; put it where importing it costs little.
    needs: modules that have to be installed, by their import names. They are looked up, not imported.
    """

    name: str
    target: str | type[Backend]
    summary: str = ""
    priority: int = 0
    options: str | type = NoOptions
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: type[Backend]) -> LazyBackend:
        """The declaration of a class that is imported already."""
        return cls(kind.name, kind, kind.summary, kind.priority, kind.options_type)

    def missing(self) -> tuple[str, ...]:
        """A reason for each module of `needs` that is not installed; nothing is imported."""
        return tuple(f"{module} is not installed" for module in self.needs if not _is_installed(module))

    def options_type(self) -> type:
        """The dataclass of the options. Raises what importing it raises, PluginError where options.checked refuses it."""
        return checked(imported(self.options))

    def load(self) -> type[Backend]:
        """The Backend class. Raises what its import raises, PluginError where it is not what was declared."""
        from taylor_patch.backends.base import Backend

        kind = imported(self.target)
        if not (isinstance(kind, type) and issubclass(kind, Backend)):
            raise PluginError(f"{self.target} is {kind!r}, which is not a subclass of taylor_patch.Backend")
        declared = {"name": self.name, "priority": self.priority, "options_type": self.options_type()}
        for attribute, value in declared.items():
            if (found := getattr(kind, attribute, None)) != value:
                raise PluginError(f"{self.target} has {attribute} = {found!r}, its declaration says {value!r}: make them the same")
        for problem in kind.declaration_problems():
            raise PluginError(f"{kind.__name__}.{problem}")
        return kind


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module inside one that is not there
        return False


def imported(target: Any) -> Any:
    """The object that "package.module:name" stands for; anything but a string is returned as it is."""
    if not isinstance(target, str):
        return target
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise PluginError(f'"{target}" is not like "package.module:Class"')
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise PluginError(f"module {module} has no {name}")
    return getattr(found, name)
