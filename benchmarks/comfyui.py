"""Sampling in a real ComfyUI with and without taylor_patch, on models of true width with few blocks and random weights:

    python -m benchmarks.comfyui --comfyui PATH [--comfyui PATH ...] [--tiny] [--only SETTING ...] [--seconds N]

flux: 2048x2048 (16,384 image and 512 text tokens, 24 heads of 128). wan-480p, wan-720p: 81 frames (32,760 and 75,600 tokens, 40 heads of
128). Off is a server that does not load taylor_patch (TAYLOR_PATCH=0); `near_far` is switched on and its density set in the file that
TAYLOR_PATCH_CONFIG names. quality_limit is off, so that the time is that of near_far in every block whatever random weights do.

Settings: dynamic and static VRAM (ComfyUI's default and --disable-dynamic-vram where the version has that), TorchCompileModel, --lowvram,
--novram, and budgets: --reserve-vram of all but what the run needs beside half of the weights; with static VRAM the process is
refused more than that, too. "sparse" is core's own sparse attention node with its default inputs, where the version has it.

A server runs the cases of one setting. One JSON line per case is appended to FILE: median seconds of the steps after the first, peaks, what
answered the calls, and the relative L2 distance of the latent to that of the first "off" run of that version and model (latent_to_off) and
to the same variant's first run (latent_to_first), which other memory settings must not change. A case that failed, ran past its
time or was not started is a line with "error".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from taylor_patch.demo.comfyui.server import Server
from taylor_patch.errors import TaylorPatchError

ROOT = Path(__file__).parents[1]
NODES = Path(__file__).with_name("comfyui_nodes")
DENSITIES = (0.05, 0.10)
CONTEXT_GIB = 0.8
"""What the driver and CUDA's context take of the device."""
CASE_SECONDS = 150
"""A case is given this long (compiling included) once its server answers."""


@dataclass(frozen=True)
class Model:
    """latent: [T,] H, W of the picture or video in pixels. weights_gib, activation_gib: as ComfyUI counts them."""

    name: str
    weights: str
    latent: tuple[int, ...]
    text_tokens: int
    pooled: int
    tokens: int
    weights_gib: float
    activation_gib: float

    def empty_latent(self) -> dict[str, Any]:
        """ComfyUI's node."""
        *frames, height, width = self.latent
        size = {"width": width, "height": height, "batch_size": 1}
        return {"class_type": "EmptyHunyuanLatentVideo", "inputs": {**size, "length": frames[0]}} if frames else \
            {"class_type": "EmptySD3LatentImage", "inputs": size}


MODELS = (Model("flux", "random_flux", (2048, 2048), 512, 768, 16_384, 2.4, 4.0),
          Model("wan-480p", "random_wan", (81, 480, 832), 512, 0, 32_760, 2.7, 5.9),
          Model("wan-720p", "random_wan", (81, 720, 1280), 512, 0, 75_600, 2.7, 13.6))
TINY = (Model("flux", "random_flux", (256, 256), 32, 768, 256, 0.9, 0.1), Model("wan-480p", "random_wan", (9, 128, 128), 16, 0, 192, 0.1, 0.1))


@dataclass(frozen=True)
class Setting:
    """How ComfyUI is started, and what is run in it. Variants are run in servers without (off) and with taylor_patch."""

    name: str
    flags: tuple[str, ...] = ()
    models: tuple[str, ...] = tuple(model.name for model in MODELS)
    node: str | None = None
    """A core node that takes the model and gives it back, with its default inputs."""
    servers: tuple[bool, ...] = (False, True)
    """Without and with taylor_patch; a setting with the latter only has its "off" there (enabled = false)."""
    limit_gib: float = 0.0


def settings(checkout: Path, models: Sequence[Model], total_gib: float) -> Iterator[Setting]:
    """Those that the version offers, the most important ones first."""
    known = (checkout / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    static = ("--disable-dynamic-vram",) if "--disable-dynamic-vram" in known else ()
    small = ("flux", "wan-480p")
    yield Setting("static", static)
    if static:
        yield Setting("dynamic")
    yield Setting("lowvram", (*static, "--lowvram"), small, servers=(True,))
    for model in models:
        if model.name in small and total_gib:
            kept = CONTEXT_GIB + model.activation_gib + model.weights_gib / 2
            yield Setting(f"budget-{model.name}", (*static, "--reserve-vram", f"{total_gib - kept:.2f}"), (model.name,), servers=(True,),
                          limit_gib=kept - CONTEXT_GIB)
            if static:
                yield Setting(f"budget-{model.name}-dynamic", ("--reserve-vram", f"{total_gib - kept:.2f}"), (model.name,), servers=(True,))
    yield Setting("compile", static, small, node="TorchCompileModel")
    yield Setting("novram", (*static, "--novram"), ("flux",), servers=(True,))
    yield Setting("sparse", (), small, node="BlockSparseAttention", servers=(False,))


def on(density: float, least: int | str) -> str:
    """Configuration file: near_far at `density`."""
    return (f'[taylor_patch]\nbackend = "near_far"\nmin_tokens = {json.dumps(least)}\nquality_limit = 0.0\n\n'
            f"[backends.near_far]\ndensity = {density}\n")


OFF = "[taylor_patch]\nenabled = false\n"


class Bench:
    """All cases of one checkout."""

    def __init__(self, checkout: Path, options: argparse.Namespace, folder: Path, environment: Mapping[str, Any], end: float) -> None:
        self.checkout, self.options, self.folder, self.environment, self.end = checkout.resolve(), options, folder, environment, end
        self.version = (checkout / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]
        self.models = {model.name: model for model in (TINY if options.tiny else MODELS)}
        self.off: dict[str, Tensor] = {}
        self.first: dict[tuple[str, str], Tensor] = {}
        self.servers = 0
        total = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
        self.settings = [setting for setting in settings(checkout, tuple(self.models.values()), total)
                         if not options.only or setting.name in options.only]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Run everything."""
        subprocess.run([self.options.python, "-m", "benchmarks.comfyui_weights", "--comfyui", self.checkout, "--out", self.folder / "weights",
                        *(["--tiny"] if self.options.tiny else [])], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": self.path()})
        for setting in self.settings:
            for patched in setting.servers:
                waiting = [model for name, model in self.models.items() if name in setting.models]
                while waiting:
                    yield from self.serve(setting, patched, waiting)

    def path(self) -> str:
        return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    def variants(self, setting: Setting, patched: bool) -> dict[str, str]:
        """Name -> configuration file."""
        off = {"off": OFF} if not patched or len(setting.servers) == 1 else {}
        least = 64 if self.options.tiny else "auto"
        return {**off, **({f"near_far {density}": on(density, least) for density in DENSITIES} if patched else {})}

    def serve(self, setting: Setting, patched: bool, waiting: list[Model]) -> Iterator[dict[str, Any]]:
        """One server; takes from `waiting` what it has run, and ends with the first case that failed as a whole."""
        self.servers += 1
        folder = self.folder / f"server-{self.servers}"
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "diffusion_models").symlink_to(self.folder / "weights", target_is_directory=True)
        config = folder / "taylor_patch.toml"
        config.write_text(OFF)
        environment = {"PYTHONPATH": self.path(), "TAYLOR_PATCH": "1" if patched else "0", "TAYLOR_PATCH_CONFIG": str(config)}
        cpu = ("--cpu",) if not torch.cuda.is_available() else ()
        flags = tuple(flag for flag in setting.flags if not (cpu and flag in ("--lowvram", "--novram"))) + cpu
        server = Server(self.checkout, folder, self.options.python, env=environment, nodes=[NODES], flags=flags,
                        launcher=("-m", "taylor_patch", "run") if patched else ())
        what: dict[str, Any] = {"comfyui": self.version, "setting": setting.name, "flags": list(flags), "node": setting.node,
                                "taylor_patch": patched}
        if time.monotonic() > self.end:
            for model in waiting:
                yield from self.failed(what, model, self.variants(setting, patched), f"not started: --seconds {self.options.seconds} were over")
            waiting.clear()
            return
        started = time.monotonic()
        try:
            with server:
                what["server_seconds"] = round(time.monotonic() - started, 1)
                while waiting:
                    model = waiting.pop(0)
                    done = yield from self.case(server, setting, patched, model, what)
                    if not done:
                        return
        except TaylorPatchError as error:
            for model in waiting:
                yield from self.failed(what, model, self.variants(setting, patched), str(error)[-2000:])
            waiting.clear()

    def case(self, server: Server, setting: Setting, patched: bool, model: Model,
             what: Mapping[str, Any]) -> Generator[dict[str, Any], None, bool]:
        """One model in a running server; gives back whether the server is fit for more."""
        variants = self.variants(setting, patched)
        figures = server.folder / f"figures-{model.name}.json"
        problem = None
        try:
            server.run(self.workflow(server, setting, model, variants, figures), timeout=CASE_SECONDS)
        except (TaylorPatchError, OSError, LookupError) as error:
            problem = f"{type(error).__name__}: {error}"[-2000:]
        found = json.loads(figures.read_text()) if figures.is_file() else {}
        latents = torch.load(f"{figures}.pt") if Path(f"{figures}.pt").is_file() else {}
        for variant in variants:
            if variant not in found:
                yield from self.failed(what, model, [variant], problem or "no figures were written")
                continue
            yield {**self.case_of(what, model, variant), **found[variant], **self.distances(model, variant, latents.get(variant), patched),
                   **self.environment}
        return problem is None and not any("error" in row for row in found.values())

    def workflow(self, server: Server, setting: Setting, model: Model, variants: Mapping[str, str], figures: Path) -> dict[str, Any]:
        """API format."""
        source: list[Any] = ["1", 0]
        flow: dict[str, Any] = {
            "1": {"class_type": "UNETLoader", "inputs": {"unet_name": f"{model.weights}.safetensors", "weight_dtype": "default"}},
            "2": {"class_type": "BenchmarkConditioning", "inputs": {"tokens": model.text_tokens, "width": 4096, "pooled": model.pooled}},
            "3": model.empty_latent()}
        if setting.node:
            flow["4"] = {"class_type": setting.node, "inputs": {**defaults(server, setting.node), "model": source}}
            source = ["4", 0]
        flow["5"] = {"class_type": "BenchmarkSampling", "inputs": {
            "model": source, "positive": ["2", 0], "latent": ["3", 0], "steps": self.options.steps, "limit_gib": setting.limit_gib,
            "variants": json.dumps(variants), "config": server.environment["TAYLOR_PATCH_CONFIG"], "figures": str(figures)}}
        flow["6"] = {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "latents/benchmark"}}
        return flow

    def case_of(self, what: Mapping[str, Any], model: Model, variant: str) -> dict[str, Any]:
        return {**what, "model": model.name, "tokens": model.tokens, "text_tokens": model.text_tokens, "variant": variant,
                "steps": self.options.steps}

    def failed(self, what: Mapping[str, Any], model: Model, variants: Any, problem: str) -> Iterator[dict[str, Any]]:
        """Rows with the error's text."""
        for variant in variants:
            yield {**self.case_of(what, model, variant), "error": problem, **self.environment}

    def distances(self, model: Model, variant: str, latent: Tensor | None, patched: bool) -> dict[str, float | None]:
        """Relative L2 to what was made first."""
        if latent is None:
            return {}
        if variant == "off" and not patched:
            self.off.setdefault(model.name, latent)
        first = self.first.setdefault((model.name, variant), latent)
        off = self.off.get(model.name)
        return {"latent_to_off": None if off is None else distance(latent, off), "latent_to_first": distance(latent, first)}


def distance(x: Tensor, reference: Tensor) -> float:
    """Relative L2, to 3 significant digits."""
    return float(f"{float((x - reference).norm() / reference.norm()):.3g}")


def defaults(server: Server, node: str) -> dict[str, Any]:
    """Required inputs of a node, at their defaults (a list's first entry). Raises LookupError where this ComfyUI has no such node."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/object_info/{node}", timeout=60) as reply:
        found = json.loads(reply.read())
    if node not in found:
        raise LookupError(f"this ComfyUI has no node {node}")
    made = {}
    for name, (kind, *rest) in found[node]["input"].get("required", {}).items():
        extra = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else extra.get("options")
        if "default" in extra or choices:
            made[name] = extra.get("default", choices[0] if choices else None)
    return made


def main() -> None:
    """Run every case and append the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, action="append", required=True, help="a checkout; repeatable")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that ComfyUI runs in")
    parser.add_argument("--tiny", action="store_true", help="a minute on a CPU: few tokens, fewer blocks, a narrow Wan")
    parser.add_argument("--only", nargs="+", metavar="SETTING")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no server later than this")
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "comfyui.jsonl")
    options = parser.parse_args()
    environment, end = record.environment(options.commit), time.monotonic() + options.seconds
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="taylor-patch-comfyui-"))
    try:
        with options.out.open("a", encoding="utf-8") as file:
            for number, checkout in enumerate(options.comfyui):
                for row in Bench(checkout, options, folder / str(number), environment, end).rows():
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(*(f"{key}={row[key]}" for key in row if key not in environment), flush=True)
                shutil.rmtree(folder / str(number))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
