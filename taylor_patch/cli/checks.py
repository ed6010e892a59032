"""What `taylor-patch doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taylor_patch.plugins import Plugin

Finding = tuple[str, str]
"""(state, text): "ok", "note", or "problem" where it stops taylor_patch from working."""


def checks(comfyui: Path) -> list[Finding]:
    """All findings, in the order in which start-up meets them. comfyui: ComfyUI's folder, if it is one."""
    return [_switch(), *_startup_files(), *_versions(), *_comfyui(comfyui), *_configuration()]


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


def _switch() -> Finding:
    value = os.environ.get("TAYLOR_PATCH", "")
    if value in ("", "0"):
        return "note", f'TAYLOR_PATCH is {value or "not set"}: off. Set TAYLOR_PATCH=1 to turn it on.'
    return "ok", f"TAYLOR_PATCH={value}: on"


def _startup_files() -> list[Finding]:
    folder = Path(sysconfig.get_paths()["purelib"])
    missing = [name for name in ("taylor_patch_startup.pth", "taylor_patch_startup.start") if not (folder / name).is_file()]
    found: list[Finding] = [("ok", f"Python {platform.python_version()} at {sys.executable}")]
    if missing:
        found.append(("problem", f"{', '.join(missing)} missing in {folder}. Install taylor-patch with this interpreter's pip, "
                                 "or start ComfyUI by `taylor-patch run -- python main.py`."))
    elif sys.flags.no_site:
        found.append(("problem", "this interpreter runs with -S and reads no start-up files. Use `taylor-patch run`."))
    else:
        found.append(("ok", f"start-up files in {folder}"))
    return found


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
    environment = {**os.environ, "TAYLOR_PATCH": os.environ.get("TAYLOR_PATCH", "") or "1"}
    done = subprocess.run([sys.executable, "-m", "taylor_patch.cli.probe"], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        problem = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return [*found, ("problem", f"this interpreter cannot import ComfyUI ({problem[0]}); run doctor with ComfyUI's interpreter")]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    if environment["TAYLOR_PATCH"] != "0":
        found.append(("ok", "the start-up files ran") if seen["at_start"] else
                     ("problem", "the start-up files did not run in this interpreter"))
    if seen["failure"]:
        found.append(("problem", f"start-up failed: {seen['failure']}"))
    found += [("ok", f"{target} is patched") if state == "ok" else ("problem", f"{target} is not patched: {state}")
              for target, state in seen["hooks"].items()]
    found += [("ok" if "taylor_patch" in sentence else "problem", f"others patched this too, outermost first: {sentence}")
              for sentence in seen["others"]]
    return found


def _configuration() -> list[Finding]:
    from taylor_patch.engine import Engine

    try:
        engine = Engine()
    except Exception as error:
        return [("problem", f"{type(error).__name__}: {error}")]
    state: Finding = ("problem", engine.problem) if engine.problem else ("ok", f"configuration: {engine.describe()}")
    return [state, *(("note", sentence) for sentence in engine.config.ignored), *map(_plugin, engine.registry.plugins),
            *(("problem", note) for note in dict.fromkeys(note for p in engine.registry.plugins for note in p.notes))]


def _plugin(plugin: Plugin) -> Finding:
    if plugin.error:
        return "note" if plugin.disallowed else "problem", f"plugin {plugin.name}: {plugin.error}"
    return "ok", f"plugin {plugin.name}: {', '.join(plugin.backends)}"
