"""The demo's picture inside a real headless ComfyUI: with taylor_patch off, then on."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

import taylor_patch
from taylor_patch.demo import host
from taylor_patch.demo.comfyui.server import Server
from taylor_patch.demo.model import WEIGHTS
from taylor_patch.errors import TaylorPatchError

NODES = Path(__file__).with_name("nodes")
PACKAGE = Path(taylor_patch.__file__).parents[1]


def workflow(size: int, steps: int, picture: int, seed: int) -> dict[str, Any]:
    """Load, sample with Euler, save the latent (which is the picture: the model works on pixels)."""
    sampler = {"model": ["1", 0], "positive": ["1", 1], "negative": ["1", 1], "latent_image": ["1", 2], "seed": seed, "steps": steps,
               "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {"1": {"class_type": "TaylorPatchDemoModel", "inputs": {"weights": str(WEIGHTS), "picture": picture, "size": size}},
            "2": {"class_type": "KSampler", "inputs": sampler},
            "3": {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "latents/demo"}}}


def variables(name: str) -> dict[str, str]:
    """Variables that switch on the row `name` of the demo with its options."""
    options, settings = host.ROWS[name].get("backends", {}).get(name, {}), host.ROWS[name]["taylor_patch"]
    return {"TAYLOR_PATCH": name, **{f"TAYLOR_PATCH_{key.upper()}": str(value) for key, value in settings.items() if key != "backend"},
            **{f"TAYLOR_PATCH_BACKENDS__{name}__{key}".upper(): str(value) for key, value in options.items()}}


def run_in_comfyui(comfyui: Path, python: str, size: int, steps: int, picture: int, seed: int, out: Path | str,
                   progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Make the pictures in ComfyUI at `comfyui` under the interpreter `python`; write and return what host.run_demo does.

    Errors of single calls are not sampled (rel_l2_* are None); "log" holds the line that ComfyUI's log has of the run.
    Raises TaylorPatchError where ComfyUI or the interpreter does not work.
    """
    _check_interpreter(python)
    pictures: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name in host.ROWS:
        on = name != "sdpa"
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))} if on else {}
        environment |= variables(name) if on else {"TAYLOR_PATCH": "0"}
        with tempfile.TemporaryDirectory(prefix="taylor-demo-") as folder, \
                Server(comfyui, Path(folder), python, launcher=("-m", "taylor_patch", "run") if on else (), env=environment,
                       nodes=[NODES]) as server:
            server.run(workflow(size, 1, picture, seed))  # loads the model
            start = time.perf_counter()
            pictures[name] = load(server.run(workflow(size, steps, picture, seed)))["latent_tensor"][0]
            seconds = time.perf_counter() - start
            lines = [line for line in server.log.splitlines() if "taylor_patch: Flux:" in line]
        progress(name, steps, steps)
        rows.append({
            "backend": name, "seconds_per_step": seconds / steps,
            "speed_ratio": rows[0]["seconds_per_step"] * steps / seconds if rows else 1.0,
            "psnr_db": host.psnr(pictures["sdpa"], pictures[name]) if on else None,
            "rel_l2_median": None, "rel_l2_p90": None, "calls": {}, "fallbacks": {},
            "log": lines[-1] if lines else f"{name}: taylor_patch is off"})
    version = next((line for line in (comfyui / "comfyui_version.py").read_text().splitlines() if "__version__" in line), "")
    return host.write(out, pictures, rows, {
        "size": size, "steps": steps, "picture": picture, "seed": seed, "tokens": (size // 2) ** 2 + 16, "device": "ComfyUI on the CPU",
        "comfyui": version.partition("=")[2].strip(" \"'"), "taylor_patch": taylor_patch.__version__, "python": platform.python_version()})


def _check_interpreter(python: str) -> None:
    needed = "import torch, safetensors, wrapt, pluggy, click, platformdirs"
    done = subprocess.run([python, "-c", needed], capture_output=True, text=True)
    if done.returncode:
        problem = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
        raise TaylorPatchError(f"{python} cannot run ComfyUI with taylor_patch ({problem}). Name ComfyUI's own interpreter with "
                               "--comfyui-python and install taylor-patch into it.")
