"""What `taylor-patch doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import site
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taylor_patch import asked_for
from taylor_patch.cli.place import Place
from taylor_patch.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from taylor_patch.plugins import Plugin
    from taylor_patch.router import Router

Finding = tuple[str, str]
"""(state, text): "ok", "note", or "problem" where it stops taylor_patch from working."""


def checks(place: Place) -> list[Finding]:
    """All findings, in the order in which start-up meets them. place: where ComfyUI is, if it is there."""
    return [_switch(), *_startup_files(), *_versions(), *_comfyui(place.folder), *_configuration(place)]


def backend_rows() -> list[dict[str, Any]]:
    """What `taylor-patch backends --check` lists: each backend, imported, and what it says of this machine."""
    import torch

    from taylor_patch.engine import engine

    router = engine().router
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for backend in router.by_priority:
        crossover = router.crossover(backend, device)
        problems = [*router.unavailable(backend.name), *([] if device.type in backend.devices else [f"not for {device.type}"])]
        rows.append({"name": backend.name, "summary": backend.summary, "priority": backend.priority, "reasons_against": problems,
                     "auto_from_tokens": None if problems else crossover})
    return rows


def without_crossover() -> str | None:
    """Why `auto` never uses a backend on this machine's device, with what to do; None where it does, or where calls do not go by it."""
    import torch

    from taylor_patch.engine import engine

    return _never(engine().router, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _never(router: Router, device: torch.device) -> str | None:
    least, reason = router.least_tokens(device)
    return reason if math.isinf(least) else None


def _switch() -> Finding:
    value = os.environ.get("TAYLOR_PATCH", "")
    if not asked_for(value):
        return "note", (f'TAYLOR_PATCH is {value or "not set"}: off, unless ComfyUI is started where it is set. '
                        "Set TAYLOR_PATCH=1 to turn it on.")
    return "ok", f"TAYLOR_PATCH={value}: on"


def _startup_files() -> list[Finding]:
    """Whether they run in this interpreter: a new one is started and asked, as no list of folders is right everywhere."""
    found: list[Finding] = [("ok", f"Python {platform.python_version()} at {sys.executable}")]
    if sys.flags.no_site:
        return [*found, ("problem", "this interpreter runs with -S and reads no start-up files. Use `taylor-patch run`.")]
    code = "import sys; print(getattr(sys.modules.get('taylor_patch'), '_started', False))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TAYLOR_PATCH": "1"}, capture_output=True, text=True)
    if done.stdout.strip() == "True":
        return [*found, ("ok", "its start-up files run")]
    wanted = ("taylor_patch_startup.pth", "taylor_patch_startup.start")
    folders = [folder for folder in (*site.getsitepackages(), site.getusersitepackages()) if Path(folder).is_dir()]
    there = [folder for folder in folders if all((Path(folder) / name).is_file() for name in wanted)]
    where = f"are in {', '.join(there)} and do not run" if there else f"are in none of {', '.join(folders)}"
    said = done.stderr.strip().splitlines()[-1:]
    return [*found, ("problem", f"{' and '.join(wanted)} {where}{f' ({said[0]})' if said else ''}. Install taylor-patch with this "
                                "interpreter's pip, or start ComfyUI by `taylor-patch run -- python main.py`.")]


def _versions() -> list[Finding]:
    found: list[Finding] = []
    for package in ("torch", "wrapt", "pluggy", "triton"):
        try:
            found.append(("ok", f"{package} {importlib.metadata.version(package)}"))
        except importlib.metadata.PackageNotFoundError:
            found.append(("note", "triton is not installed: backends that need it do not run") if package == "triton"
                         else ("problem", f"{package} is not installed in this interpreter"))
    try:
        import torch

        found.append(("ok", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("note", "no CUDA GPU"))
    except Exception as error:
        found.append(("problem", f"torch cannot be imported ({error})"))
    return found


def _comfyui(folder: Path) -> list[Finding]:
    """ComfyUI's version, and whether its modules are patched when they are imported."""
    version = folder / "comfyui_version.py"
    if not version.is_file():
        return [("note", f"no ComfyUI in {folder}; run doctor in ComfyUI's folder, or name it with --comfyui, to see whether it is patched")]
    found: list[Finding] = [("ok", f"ComfyUI: {version.read_text().strip().splitlines()[-1]}")]
    environment = {**os.environ, "TAYLOR_PATCH": asked_for(os.environ.get("TAYLOR_PATCH", "")) or "1"}
    done = subprocess.run([sys.executable, "-m", "taylor_patch.cli.probe"], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        problem = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return [*found, ("problem", f"this interpreter cannot import ComfyUI ({problem[0]}); run doctor with ComfyUI's interpreter")]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    if seen["failure"]:
        found.append(("problem", f"start-up failed: {seen['failure']}"))
    patched = "is patched" if asked_for(os.environ.get("TAYLOR_PATCH", "")) else "would be patched"
    found += [("ok", f"{target} {patched}") if state == "ok" else ("problem", f"{target} is not patched: {state}")
              for target, state in seen["hooks"].items()]
    found += [("ok" if "taylor_patch" in sentence else "problem", f"others patched this too, outermost first: {sentence}")
              for sentence in seen["others"]]
    return found


def _configuration(place: Place) -> list[Finding]:
    """The files that are read, what they say, and the plugins."""
    try:
        import torch

        from taylor_patch import config as configuration
        from taylor_patch import plugins
        from taylor_patch.router import Router

        registry = plugins.load(place.allowed_plugins())
    except Exception as error:
        return [("problem", f"{type(error).__name__}: {error}")]
    found: list[Finding] = []
    try:
        found += [("ok", f"configuration: {line}") for line in place.described()]
        config = configuration.check(place.layers(), registry.option_types, registry.why_absent)
        if config.settings.enabled:
            found.append(("ok", f"configuration: {config.describe()}"))
            if reason := _never(Router(config, registry), torch.device("cuda" if torch.cuda.is_available() else "cpu")):
                found.append(("note", f"every call is exact: {reason}"))
        else:
            origin = next(row[0] for row in configuration.explain(config, "enabled"))
            found.append(("note", f"configuration: off by enabled = false ({origin})"))
        found += [("note", sentence) for sentence in config.ignored]
    except ConfigError as error:
        found.append(("problem", f"every call is exact until the configuration is corrected: {error}"))
    notes = dict.fromkeys(note for plugin in registry.plugins for note in plugin.notes)
    return [*found, *map(_plugin, registry.plugins), *(("problem", note) for note in notes)]


def _plugin(plugin: Plugin) -> Finding:
    if plugin.error:
        return "note" if plugin.disallowed else "problem", f"plugin {plugin.name}: {plugin.error}"
    return "ok", f"plugin {plugin.name}: {', '.join(plugin.backends)}"
