"""Configuration: layers of TOML and environment variables, checked and frozen.

Order, first wins: `overrides` of Engine or load (the demo's) > TAYLOR_PATCH_* variables > the file named by TAYLOR_PATCH_CONFIG (replaces
the search) > ./taylor_patch.toml > ComfyUI's user folder > the user's configuration folder > defaults.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from taylor_patch import OFF_WORDS, ON_WORDS, asked_for
from taylor_patch.errors import ConfigError, nearest, said
from taylor_patch.options import option, problems_of
from taylor_patch.quality import DEFAULT, QUALITIES
from taylor_patch.rules import CONDITIONS, RESPECT, Rule, parse_conditions
from taylor_patch.toml_location import locate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "taylor_patch.toml"
RULE_KEYS = {
    "when": "conditions, all of which must hold",
    "backend": "takes the place of `[taylor_patch]`'s",
    "quality": "takes the place of `[taylor_patch]`'s",
    "respect": '`"override"`, what goes without saying: a node\'s override and the checkpoint\'s own attention win; `"rule"`: the rule wins',
}
"""Keys of one of [[rules]] and what they mean."""

KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""Type of a value -> how a message calls it."""

PREFIX = "TAYLOR_PATCH_"
# TAYLOR_PATCH_<NAME> variables that are not configuration keys.
RESERVED_VARIABLES = {"TAYLOR_PATCH_CONFIG", "TAYLOR_PATCH_PLUGINS", "TAYLOR_PATCH_PLUGIN_SECONDS", "TAYLOR_PATCH_STRICT"}


@dataclass(frozen=True)
class Settings:
    """The table [taylor_patch]."""

    enabled: bool = option(True, "`false`: exact everywhere")
    profile: str = option("", "the profile in force, of `[profiles.NAME]`")
    backend: str = option(
        "auto", 'a backend\'s name, `"sdpa"` for exact, or `"auto"`: the best one that was measured to be faster on this device')
    quality: str | float = option(
        DEFAULT, "relative L2 error aimed at per attention call: " + ", ".join(f'`"{name}"` {error:g}' for name, error in QUALITIES.items())
        + ", or a number", above=0, at_most=1)
    min_tokens: int | Literal["auto"] = option(
        "auto", 'calls with fewer query tokens are exact; `"auto"`: each backend\'s own bound, or its measured crossover', at_least=1)
    start_percent: float = option(0.0, "exact before this part of the schedule", at_least=0, at_most=1)
    end_percent: float = option(1.0, "exact after this part of the schedule", at_least=0, at_most=1)
    quality_check: bool = option(True, "compare sampled query rows with exact attention, and time exact attention to estimate what is saved")
    quality_check_samples: int = option(16, "query rows of a sampled call of 24 heads or more; with fewer heads as many more", at_least=1)
    quality_check_log_every: int = option(1, "sample in every so many steps; a run's first is sampled in any case", at_least=1)
    quality_limit: float = option(
        2.0, "a block whose sampled error is above this many times the error asked for is exact for the rest of the run, and its step is "
        "computed again; `0`: never", at_least=0)
    hook: Literal["module", "override"] = option("module", "where calls are met: ComfyUI's functions, or its slot for overrides")
    override_models: tuple[str, ...] = option((), "model families, with `*`, that are met at the override slot as well")
    memory_reserve: bool | Literal["free_memory"] = option(
        True, 'ask ComfyUI to keep the backends\' workspace free when it places the weights; `"free_memory"`: unload models for it instead')
    memory_reserve_factor: float = option(1.1, "the workspace times this is reserved", at_least=0, at_most=10)
    memory_reserve_log: bool = option(True, "say at INFO how much is reserved")
    cache: bool = option(True, "keep on disk what a run has settled or measured, for later runs of such a model at such a size")
    log: Literal["off", "run", "step", "call"] = option(
        "run", "lines in the log: none, one a sampling run, one a model evaluation too, one an attention call too")
    log_file: str = option("", "write every step and run to this file as JSON lines; empty: none")
    page: bool = option(True, "the page at `/taylor_patch` of ComfyUI's server")

    def problems(self) -> dict[str, str]:
        """Key -> what is wrong with its value besides bounds; empty when all is well."""
        found = {}
        if isinstance(self.quality, str) and self.quality not in QUALITIES:
            found["quality"] = (f'"{self.quality}" is not one of {", ".join(QUALITIES)} or a number.'
                                + nearest(self.quality, QUALITIES))
        if self.start_percent >= self.end_percent:
            found["start_percent"] = f"{self.start_percent} is not below end_percent = {self.end_percent}: every step would be exact"
        return found


@dataclass(frozen=True)
class PluginSettings:
    """The table [plugins]."""

    allow: tuple[str, ...] = option(("*",), "names, with `*`, of the plugins that may be loaded")


@dataclass(frozen=True)
class Layer:
    """One source of settings: where it comes from and the values it gives."""

    origin: str
    data: Mapping[str, Any]
    text: str = ""
    profile: str = ""
    """The profile whose table stands for [taylor_patch] and [[rules]] here."""
    variables: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """Path of a key -> the environment variable that gives it."""

    def place(self, *path: str | int) -> str:
        """file:line:column of a key for files, the variable's name for the environment, the name of the source for everything else."""
        if not self.text:
            return next((variable for key, variable in self.variables.items() if key[: len(path)] == path), self.origin)
        if self.profile:
            path = ("profiles", self.profile, *(path[1:] if path[0] == "taylor_patch" else path))
        line, column = locate(self.text, path)
        return f"{self.origin}:{line}:{column}"


@dataclass(frozen=True)
class Config:
    """The effective configuration: frozen, comparable, swapped as a whole."""

    settings: Settings = Settings()
    plugins: PluginSettings = PluginSettings()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Backend name -> its options object (options_type)."""
    rules: tuple[Rule, ...] = ()
    layers: tuple[Layer, ...] = field(default=(), compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """A sentence for each table of a backend that is not there, with file:line:column."""

    @property
    def target_error(self) -> float:
        """Relative L2 error aimed at per attention call."""
        return quality_value(self.settings.quality)

    def describe(self) -> str:
        """The settings that matter most, for a line, and those of `auto` or of the named backend that are not at their defaults."""
        s, changed = self.settings, plain(self)["backends"]
        options = [f"{name}.{key} = {value}"
                   for name, values in changed.items() if s.backend in ("auto", name) for key, value in values.items()]
        rules = [f"{len(self.rules)} rules"] if self.rules else []
        return ", ".join([f'backend = "{s.backend}", quality = {s.quality}, min_tokens = {s.min_tokens}', *options, *rules])


def quality_value(quality: str | float) -> float:
    """The relative L2 error that a quality name or number stands for. Raises ConfigError for one that is neither."""
    if problem := problems_of(Settings(quality=quality)).get("quality"):
        raise ConfigError(f"quality: {problem}")
    return QUALITIES[quality] if isinstance(quality, str) else float(quality)


def files(environ: Mapping[str, str] = os.environ, comfyui_user: Path | None = None, folder: Path | None = None) -> list[Path]:
    """Configuration files that exist, strongest first. folder: instead of the one that this process runs in.

    Raises ConfigError when TAYLOR_PATCH_CONFIG names none.
    """
    if named := environ.get("TAYLOR_PATCH_CONFIG", "").strip():
        if not Path(named).is_file():
            raise ConfigError(f"TAYLOR_PATCH_CONFIG: {named} is not a file. Correct the variable or unset it.")
        return [Path(named)]
    import platformdirs

    places = [folder or Path.cwd(), comfyui_user, Path(platformdirs.user_config_dir("taylor_patch", appauthor=False))]
    return [place / FILE_NAME for place in places if place is not None and (place / FILE_NAME).is_file()]


def stamp(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """What tells whether any of the files changed: path, mtime_ns and size of each."""
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def file_layer(path: Path) -> Layer:
    """Read one TOML file. Raises ConfigError when it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Correct or remove the file.") from error
    return text_layer(path, text)


def text_layer(path: Path, text: str) -> Layer:
    """The layer of a file `path` that holds `text`. Raises ConfigError when it is not TOML."""
    try:
        return Layer(str(path), tomllib.loads(text), text)
    except tomllib.TOMLDecodeError as error:
        import re

        place = re.search(r"line (\d+), column (\d+)", str(error))
        line, column = place.groups() if place else ("1", "1")
        wrong = (text.splitlines() or [""])[min(int(line), len(text.splitlines())) - 1]
        hint = ". In double quotes \\ begins an escape: write / in paths, or put them in single quotes" if re.search(r'".*\\', wrong) else ""
        raise ConfigError(f"{path}:{line}:{column}: not valid TOML: {str(error).split(' (at')[0]}{hint}") from error


def environment_layer(environ: Mapping[str, str] = os.environ) -> Layer:
    """TAYLOR_PATCH_BACKEND=..., TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY=...; TAYLOR_PATCH itself may name a backend."""
    data: dict[str, Any] = {}
    variables: dict[tuple[str, ...], str] = {}
    switch = environ.get("TAYLOR_PATCH", "")
    if asked_for(switch) not in ("", "1"):
        data["taylor_patch"] = {"backend": asked_for(switch)}
        variables["taylor_patch", "backend"] = f"TAYLOR_PATCH={switch.strip()}"
    for name, raw in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in RESERVED_VARIABLES:
            continue
        path = name.removeprefix(PREFIX).lower().split("__")
        if len(path) == 1:
            path = ["taylor_patch", *path]
        elif path[0] == "backends" and len(path) == 3:
            path[2] = "P" if path[2] == "p" else "max_feature_dim_R" if path[2] == "max_feature_dim_r" else path[2]
        table = data
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: another variable gives {part} a value, so it cannot hold {path[-1]}. Unset one.")
        value = _scalar(raw.strip())
        table[path[-1]] = value.lower() if path == ["taylor_patch", "backend"] and isinstance(value, str) else value
        variables[tuple(path)] = name
    return Layer("environment", data, variables=variables)


def _scalar(raw: str) -> Any:
    """A variable's text as a TOML value, or as it is where it is none (near_far needs no quotes)."""
    try:
        return tomllib.loads(f"x = {raw.lower() if raw in ('True', 'TRUE', 'False', 'FALSE') else raw}")["x"]
    except tomllib.TOMLDecodeError:
        return raw


def _check_variables(layer: Layer, option_types: Mapping[str, type]) -> None:
    """Raises ConfigError for a variable that stands for no key; a backend that is not there is found by _check_tables."""
    owners = {"": Settings, "PLUGINS__": PluginSettings, **{f"BACKENDS__{name}__".upper(): kind for name, kind in option_types.items()}}
    known = [f"{table}{f.name}".upper() for table, kind in owners.items() for f in dataclasses.fields(kind)]
    for path, variable in layer.variables.items():
        name = variable.removeprefix(PREFIX)
        if name in known or name == variable or path[0] == "profiles" or (path[0] == "backends" and path[1:2] and path[1] not in option_types):
            continue
        ending = "_" + name.replace("__", "_")
        nested = [full for full in known if ("_" + full.replace("__", "_")).endswith(ending)]
        hint = f" Write {PREFIX}{nested[0]}, with two underscores between table, backend and option." if nested else \
            nearest(name, known).replace('"', f'"{PREFIX}', 1)
        raise ConfigError(f"{variable}: there is no such setting." + hint)


def load(option_types: Mapping[str, type], overrides: Mapping[str, Any] | None = None,
         environ: Mapping[str, str] = os.environ, comfyui_user: Path | None = None,
         why_absent: Callable[[str], str | None] = lambda name: None) -> Config:
    """The effective configuration. option_types, why_absent: as in merge.

    Raises ConfigError with file:line:column at the first mistake.
    """
    return merge(layers_of(overrides, environ, comfyui_user), option_types, why_absent)


def layers_of(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ,
              comfyui_user: Path | None = None, folder: Path | None = None) -> list[Layer]:
    """All sources of settings, strongest first. Raises ConfigError for one that cannot be read."""
    return [Layer("overrides", overrides or {}), environment_layer(environ), *map(file_layer, files(environ, comfyui_user, folder))]


def allowed_plugins(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ,
                    comfyui_user: Path | None = None, folder: Path | None = None) -> tuple[str, ...]:
    """plugins.allow of the strongest layer that has it; it has to be known before plugins, and so their options, are loaded."""
    try:
        layers = layers_of(overrides, environ, comfyui_user, folder)
    except ConfigError:
        return ("*",)  # reported when the configuration is loaded
    for layer in layers:
        table = layer.data.get("plugins")
        if isinstance(table, dict) and isinstance(table.get("allow"), list):
            return tuple(str(name) for name in table["allow"])
    return ("*",)


def merge(layers: Iterable[Layer], option_types: Mapping[str, type],
          why_absent: Callable[[str], str | None] = lambda name: None) -> Config:
    """Check each layer and join them, first wins; `rules` of the strongest layer that has them replace the others.

    option_types: backend name -> dataclass of its options. why_absent: backend name -> why there is none, or None where the name is a
    mistake; a table of such a backend is left aside, with a sentence in Config.ignored.
    """
    layers = _with_profile(tuple(layers))
    for layer in layers:
        _check_variables(layer, option_types)
    ignored = tuple(sentence for layer in layers for sentence in _check_tables(layer, option_types, why_absent))
    settings = _build(Settings, layers, ("taylor_patch",))
    plugins = _build(PluginSettings, layers, ("plugins",))
    options = {name: _build(kind, layers, ("backends", name)) for name, kind in option_types.items()}
    for layer in layers:
        _check_backend_name(layer, option_types, why_absent)
    return Config(settings, plugins, options, _rules(layers, option_types, why_absent), layers, ignored)


def check(layers: Iterable[Layer], option_types: Mapping[str, type], why_absent: Callable[[str], str | None] = lambda name: None) -> Config:
    """merge, and besides every profile in force in turn, and rules that others replace. Raises ConfigError at the first mistake."""
    layers = tuple(layers)
    found = merge(layers, option_types, why_absent)
    for layer in layers:
        merge([dataclasses.replace(layer, data={"rules": layer.data.get("rules", [])})], option_types, why_absent)
    for name in dict.fromkeys(name for layer in layers for name in layer.data.get("profiles", ())):
        merge((Layer("overrides", {"taylor_patch": {"profile": name}}), *layers), option_types, why_absent)
    return found


def _with_profile(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """`layers` with the chosen profile's table of each layer put before that layer."""
    chosen = next((found for layer in layers if (found := _find(layer.data, ("taylor_patch", "profile"))) is not None), "")
    if not chosen:
        return layers
    names = [name for layer in layers for name in _find(layer.data, ("profiles",)) or ()]
    if chosen not in names:
        place = next(layer.place("taylor_patch", "profile") for layer in layers if _find(layer.data, ("taylor_patch", "profile")) == chosen)
        known = f"there are {', '.join(names)}." if names else "there are none; write [profiles.NAME]."
        raise ConfigError(f'{place}: taylor_patch.profile: no profile is named "{chosen}"; {known}' + nearest(str(chosen), names))
    joined = []
    for layer in layers:
        table = _find(layer.data, ("profiles", chosen))
        if isinstance(table, dict):
            settings = {key: value for key, value in table.items() if key != "rules"}
            data = {"taylor_patch": settings, **({"rules": table["rules"]} if "rules" in table else {})}
            joined.append(Layer(layer.origin, data, layer.text, chosen))
        joined.append(layer)
    return tuple(joined)


def _check_tables(layer: Layer, option_types: Mapping[str, type], why_absent: Callable[[str], str | None]) -> list[str]:
    """A sentence for each table of a backend that is not there."""
    ignored = []
    tables = {"taylor_patch": dict, "plugins": dict, "backends": dict, "rules": list, "profiles": dict}
    for key, value in layer.data.items():
        if key not in tables:
            raise ConfigError(f"{layer.place(key)}: {key}: unknown table; allowed are {', '.join(tables)}."
                              + (" Put it under [taylor_patch]." if key in typing.get_type_hints(Settings) else nearest(key, tables)))
        if not isinstance(value, tables[key]):
            raise ConfigError(f"{layer.place(key)}: {key}: must be {'[[rules]]' if key == 'rules' else 'a table'}")
    for name, table in layer.data.get("backends", {}).items():
        place = f"{layer.place('backends', name)}: backends.{name}"
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: must be a table")
        if name in option_types:
            continue
        why = why_absent(name)
        if why is None:
            raise ConfigError(f"{place}: unknown backend; known are {', '.join(sorted(option_types))}." + nearest(name, option_types))
        ignored.append(f"{place} is ignored: {why}." + nearest(name, option_types))
    return ignored


def _not_one_of(name: str, valid: Iterable[str], why: str | None) -> str:
    return f'"{name}" is not one of {", ".join(valid)}' + (f": {why}." if why else ".") + nearest(name, valid)


def _check_backend_name(layer: Layer, known: Mapping[str, type], why_absent: Callable[[str], str | None]) -> None:
    name, valid = _find(layer.data, ("taylor_patch", "backend")), ["auto", *sorted(known)]
    if isinstance(name, str) and name not in valid:
        place = layer.place("taylor_patch", "backend")
        why = why_absent(name)
        if place.startswith("TAYLOR_PATCH=") and why is None:
            raise ConfigError(f"{place}: neither on (1), off (0) nor a backend: {', '.join(sorted(known))}."
                              + nearest(name, [*known, *ON_WORDS, *OFF_WORDS]))
        raise ConfigError(f"{place}: taylor_patch.backend: {_not_one_of(name, valid, why)}")


def _find(data: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = data
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _build(kind: type, layers: tuple[Layer, ...], table: tuple[str, ...]) -> Any:
    """A `kind` from the same table of all layers, each value checked against its annotation."""
    hints = typing.get_type_hints(kind)
    hints = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}
    values: dict[str, Any] = {}
    source: dict[str, Layer] = {}
    for layer in reversed(layers):
        for key, value in (_find(layer.data, table) or {}).items():
            label = ".".join((*table, key))
            if key not in hints:
                allowed = f"allowed are {', '.join(hints)}" if hints else f"{table[-1]} has no options"
                raise ConfigError(f"{layer.place(*table, key)}: {label}: unknown key; {allowed}." + nearest(key, hints))
            values[key] = _coerce(value, hints[key], f"{layer.place(*table, key)}: {label}")
            source[key] = layer
    def place(key: str | None = None) -> str:
        """That of a key, else of the table in the strongest layer that has it."""
        owner = source[key] if key in source else next((layer for layer in layers if _find(layer.data, table)), Layer("defaults", {}))
        return owner.place(*table, *([key] if key in source else []))

    try:
        built = kind(**values)
        problems = dict(problems_of(built))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{place()}: {'.'.join(table)}: {kind.__name__} cannot be made of these values ({said(error)})") from error
    for key, problem in problems.items():
        raise ConfigError(f"{place(key)}: {'.'.join((*table, key))}: {problem}")
    return built


def _coerce(value: Any, hint: Any, label: str) -> Any:
    """`value` as the annotated type; an int is a float where one is wanted, a bool is never a number."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    literals: list[Any] = []
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            literals += typing.get_args(choice)
            if any(value == literal and type(value) is type(literal) for literal in typing.get_args(choice)):
                return value
        elif typing.get_origin(choice) is tuple:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, choice) and (choice is bool or not isinstance(value, bool)):
            return value
    named = [f'"{item}"' if isinstance(item, str) else str(item) for item in literals]
    named += [{tuple: "a list of strings"}.get(typing.get_origin(c), KINDS.get(c, str(c)))  # type: ignore[arg-type]
              for c in choices if typing.get_origin(c) is not Literal]
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    quoted = isinstance(value, str) and type(_scalar(value)) in (set(choices) | ({int} if float in choices else set()))
    raise ConfigError(f"{label}: {shown} is not {' or '.join(named)}" + (
        ": leave out the quotes." if quoted else "." + (nearest(value, map(str, literals)) if isinstance(value, str) else "")))


def _rules(layers: tuple[Layer, ...], option_types: Mapping[str, type], why_absent: Callable[[str], str | None]) -> tuple[Rule, ...]:
    layer = next((layer for layer in layers if layer.data.get("rules")), None)
    if layer is None:
        return ()
    rules = []
    for number, table in enumerate(layer.data["rules"]):
        def fail(key: str, problem: str, number: int = number) -> ConfigError:
            return ConfigError(f"{layer.place('rules', number, key)}: rules[{number}].{key}: {problem}")

        if not isinstance(table, dict):
            raise fail("when", "each of [[rules]] must be a table")
        for key in table:
            if key not in RULE_KEYS:
                raise fail(key, f"unknown key; allowed are {', '.join(RULE_KEYS)}." + nearest(key, RULE_KEYS))
        backend, quality = table.get("backend"), table.get("quality")
        if backend is not None and backend not in ("auto", *option_types):
            raise fail("backend", _not_one_of(str(backend), ["auto", *sorted(option_types)], why_absent(str(backend))))
        if quality is not None:
            checked = _coerce(quality, str | float, f"{layer.place('rules', number, 'quality')}: rules[{number}].quality")
            if problem := problems_of(Settings(quality=checked)).get("quality"):
                raise fail("quality", problem)
            quality = quality_value(checked)
        respect = table.get("respect")
        if respect is not None and respect not in RESPECT:
            raise fail("respect", f'"{respect}" is not one of {", ".join(RESPECT)}.' + nearest(str(respect), RESPECT))
        when = table.get("when", {})
        if not isinstance(when, dict):
            raise fail("when", f"must be a table of {', '.join(CONDITIONS)}")
        try:
            rules.append(Rule(parse_conditions(when), backend, quality, layer.place("rules", number, "when"), respect))
        except ValueError as error:
            raise fail("when", str(error)) from error
        if not table.keys() - {"when"}:
            raise fail("when", "the rule does nothing; give it a backend, a quality or respect")
    return tuple(rules)


def as_toml(config: Config) -> str:
    """The effective configuration as TOML text."""
    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, tuple):
            return "[" + ", ".join(value(x) for x in item) + "]"
        return '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"' if isinstance(item, str) else repr(item)

    tables: list[tuple[str, Any]] = [("taylor_patch", config.settings), ("plugins", config.plugins)]
    tables += [(f"backends.{name}", options) for name, options in sorted(config.options.items()) if dataclasses.fields(options)]
    lines = []
    for name, table in tables:
        lines += [f"[{name}]", *(f"{f.name} = {value(getattr(table, f.name))}" for f in dataclasses.fields(table)), ""]
    for rule in config.rules:
        when = ", ".join(f"{name} = {value(text)}" for name, text in rule.conditions.source)
        lines += ["[[rules]]", f"when = {{ {when} }}"]
        lines += [f'backend = "{rule.backend}"'] if rule.backend else []
        lines += [f"quality = {rule.quality}"] if rule.quality is not None else []
        lines += [f'respect = "{rule.respect}"'] if rule.respect else []
        lines.append("")
    return "\n".join(lines)


def plain(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, as nested dicts of plain values."""
    def changed(table: Any) -> dict[str, Any]:
        default = type(table)()
        return {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if getattr(table, f.name) != getattr(default, f.name)}

    backends = {name: values for name, options in config.options.items() if (values := changed(options))}
    rules = [{"when": dict(rule.conditions.source), "backend": rule.backend, "quality": rule.quality, "respect": rule.respect}
             for rule in config.rules]
    return {"taylor_patch": changed(config.settings), "backends": backends, "rules": rules}


def explain(config: Config, key: str) -> list[tuple[str, Any, bool]]:
    """Every layer that sets a dotted `key` as (place, value, wins), strongest first, the default last.

    Raises ConfigError when there is no such key.
    """
    path = tuple(key.split("."))
    if len(path) == 1:
        path = ("taylor_patch", *path)
    owners: dict[tuple[str, ...], Any] = {("taylor_patch",): Settings(), ("plugins",): PluginSettings()}
    owners |= {("backends", name): type(options)() for name, options in config.options.items()}
    owner = owners.get(path[:-1])
    if owner is None or path[-1] not in {f.name for f in dataclasses.fields(owner)}:
        known = [".".join((*table, f.name)) for table, o in owners.items() for f in dataclasses.fields(o)]
        elsewhere = [name for name in known if name.endswith(f".{path[-1]}")]
        raise ConfigError(f"{key}: unknown key." + (f" There is {', '.join(elsewhere)}." if elsewhere else nearest(".".join(path), known)))
    rows = [(layer.place(*path), found) for layer in config.layers if (found := _find(layer.data, path)) is not None]
    rows.append(("default", getattr(owner, path[-1])))
    return [(place, value, number == 0) for number, (place, value) in enumerate(rows)]


def schema(option_types: Mapping[str, type]) -> dict[str, Any]:
    """JSON Schema of the configuration file, for editors."""
    def table(kind: type) -> dict[str, Any]:
        hints = typing.get_type_hints(kind)
        return {"type": "object", "additionalProperties": False,
                "properties": {f.name: {**_schema_of(hints[f.name]), "default": _plain(f.default), **f.metadata}
                               for f in dataclasses.fields(kind)}}

    condition = {"type": "object", "additionalProperties": False, "properties": {name: {"type": ["string", "number"]} for name in CONDITIONS}}
    keys: dict[str, dict[str, Any]] = {
        "when": condition, "backend": {"type": "string"}, "quality": _schema_of(str | float), "respect": {"enum": list(RESPECT)}}
    rule = {"type": "object", "additionalProperties": False,
            "properties": {key: {**keys[key], "description": meaning} for key, meaning in RULE_KEYS.items()}}
    backends = {name: table(kind) for name, kind in sorted(option_types.items())}
    rules = {"type": "array", "items": rule}
    profile = table(Settings)
    profile["properties"]["rules"] = rules
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "taylor_patch configuration", "type": "object",
            "additionalProperties": False,
            "properties": {"taylor_patch": table(Settings), "plugins": table(PluginSettings),
                           "backends": {"type": "object", "additionalProperties": False, "properties": backends},
                           "rules": rules, "profiles": {"type": "object", "additionalProperties": profile}}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _schema_of(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(choice) for choice in typing.get_args(hint)]}
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": {"type": "string"}}
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[hint]}
