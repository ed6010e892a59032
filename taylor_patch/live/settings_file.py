"""Changing settings in the configuration file from inside ComfyUI; comments and everything else in it stay as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from taylor_patch import config as configuration
from taylor_patch.config import Config, Layer
from taylor_patch.engine import Engine, comfyui_user
from taylor_patch.errors import ConfigError

TABLE = "taylor_patch"


def path_of(engine: Engine) -> Path:
    """The strongest configuration file that there is; otherwise where ComfyUI's user folder, or the folder it runs in, gets one.

    Raises ConfigError where TAYLOR_PATCH_CONFIG names none.
    """
    found = configuration.files(engine.environ, comfyui_user())
    return found[0] if found else (comfyui_user() or Path.cwd()) / configuration.FILE_NAME


def set_elsewhere(config: Config, path: Path, key: str) -> str | None:
    """What sets [taylor_patch] `key` and goes before that table of the file `path`, or None where the file decides."""
    for layer in config.layers:
        if layer.origin == str(path) and not layer.profile:
            return None
        if key in layer.data.get(TABLE, {}):
            variable = layer.variables.get((TABLE, key))
            return f'the profile "{layer.profile}"' if layer.profile else f"the variable {variable}" if variable else f"the {layer.origin}"
    return None


def change(engine: Engine, settings: Mapping[str, Any]) -> None:
    """Write `settings`, keys of [taylor_patch], into the file. The next sampling run has them.

    Raises ConfigError, and writes nothing, where the file would not be valid, where something that goes before it (a variable, a profile)
    sets one of them, or where it cannot be written.
    """
    path = path_of(engine)
    layers = engine.layers()
    at = next((n for n, layer in enumerate(layers) if layer.origin == str(path)), len(layers))
    old = layers[at] if at < len(layers) else Layer(str(path), {})
    new = configuration.text_layer(path, _edited(old, settings))
    config = configuration.merge([*layers[:at], new, *layers[at + 1 :]], engine.registry.option_types,
                                 engine.registry.why_absent)
    for key in settings:
        if place := set_elsewhere(config, path, key):
            raise ConfigError(f"{TABLE}.{key}: it is set by {place}, which goes before [{TABLE}] of {path}. Change it there, or remove it.")
    _write(path, new.text)


def _edited(layer: Layer, settings: Mapping[str, Any]) -> str:
    import tomlkit

    document = tomlkit.parse(layer.text)
    table = document.setdefault(TABLE, tomlkit.table())
    if isinstance(table, MutableMapping):  # otherwise the check of the whole says where it is wrong
        table.update(settings)
    return tomlkit.dumps(document)


def _write(path: Path, text: str) -> None:
    """Replace the file at once, so that a sampling run never reads half of it."""
    path = path.resolve()
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Nothing was changed.") from error
