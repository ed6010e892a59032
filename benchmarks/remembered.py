"""What near_far with `remember = true` makes of the values that another picture has left on disk:
`python -m benchmarks.remembered [--size 128] [--write]`.

The demo's model draws picture 17, seed 0, with an empty cache folder. Then it draws that picture again, one with another seed, other
pictures, and the same one after a rank-4 change of all qkv weights (a LoRA: the fingerprint stays), each once with an empty folder and
once with a copy of the first one's. A row has the probes and the errors of all heads on sampled rows (exact heads left out) for both, and
how far the disk is off: the share of heads that need more than 4/3 of the density on disk, in blocks whose first sigma bin agrees.
--write puts the rows into benchmarks/results/remembered.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_patch import engine as engines
from taylor_patch import tensor_cache
from taylor_patch.backends.near_far import reference
from taylor_patch.backends.near_far.remembered import STRAY_HEADS, TOLERANCE
from taylor_patch.demo import host as demo
from taylor_patch.demo import model as demo_model
from taylor_patch.hooks.attention import replace

RESULTS = Path("benchmarks/results/remembered.jsonl")
RANK = 4
ROUNDING = 1e-5
"""Errors below are those of exact heads."""


@dataclass(frozen=True)
class Picture:
    """What is drawn: a conditioning, a seed, and how large the change of the qkv weights is, relative to them."""

    number: int = 17
    seed: int = 0
    change: float = 0.0


PICTURES = (Picture(), Picture(seed=1), Picture(3), Picture(9), Picture(0), Picture(change=0.1), Picture(change=0.4))


def changed(network: demo_model.TinyFlux, strength: float) -> demo_model.TinyFlux:
    """The network with a random change of low rank added to the weights that make q, k and v."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in network.named_parameters():
        if ("qkv" in name or "linear1" in name) and name.endswith("weight"):
            low = torch.randn(parameter.shape[0], RANK, generator=generator) @ torch.randn(RANK, parameter.shape[1], generator=generator)
            parameter.data += strength * parameter.data.norm() / low.norm() * low
    return network


def draw(picture: Picture, folder: Path, size: int, steps: int) -> dict[str, Any]:
    """Draw with `folder` as the cache folder: probes, calls and errors."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    network, texts, vectors = demo_model.load(torch.device("cpu"))
    engine = engines.Engine({"taylor_patch": {"backend": "near_far", "quality_limit": 0.0, "quality_check": False},
                             "backends": {"near_far": {"remember": True}}}, environ={})
    engines.use(engine)
    probes, original, sampled = 0, reference.attend_aimed, demo.Sampled()

    def attend_aimed(call: Any, settled: Any) -> Any:
        nonlocal probes
        probes += settled is None
        return original(call, settled)

    reference.attend_aimed = attend_aimed
    try:
        at = slice(picture.number, picture.number + 1)
        _, summary = demo.sample(demo.Flux(changed(network, picture.change)), texts[at], vectors[at], size, steps, picture.seed, engine,
                                 sampled.watch(replace(demo.exact_attention)), lambda: None)
    finally:
        reference.attend_aimed = original
        engines.reset()
    errors = torch.tensor([error for error in sampled.errors if error > ROUNDING])
    return {"probes": probes, "calls": summary.calls["near_far"], "error_median": float(errors.median()),
            "error_p90": float(errors.quantile(0.9)), "error_max": float(errors.max())}


def settled(folder: Path) -> dict[tuple[int, int], Tensor]:
    """(block, sigma bin) -> densities of the heads, from the one file in a cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    (file,) = tensor_cache.folder().iterdir()
    tensors = torch.load(file, weights_only=True)["tensors"]
    return {(block, number): setting[:, 0] for (block, number), setting in zip(tensors["where"].tolist(), tensors["setting"], strict=True)}


def astray(disk: dict[tuple[int, int], Tensor], run: dict[tuple[int, int], Tensor]) -> float:
    """Share of heads, in blocks whose first sigma bin agrees, that need more than 4/3 of the disk's density in a later one."""
    first = max(number for _, number in run)
    agreeing = {block for block, number in run if number == first and (block, first) in disk and
                float((run[block, first] > TOLERANCE * disk[block, first]).float().mean()) <= STRAY_HEADS}
    pairs = [(run[place], disk[place]) for place in run if place in disk and place[0] in agreeing and place[1] != first]
    needed, kept = (torch.cat(x) for x in zip(*pairs, strict=True))
    return float((needed > 4 / 3 * kept).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name) / "disk"
        for number, picture in enumerate(PICTURES):
            own, copy = (Path(name) / f"{kind}-{number}" for kind in ("own", "copy"))
            alone = draw(picture, own, options.size, options.steps)
            if number == 0:
                shutil.copytree(own, kept)
            shutil.copytree(kept, copy)
            rows.append({"disk": vars(PICTURES[0]), "picture": vars(picture), "size": options.size, "steps": options.steps,
                         "alone": alone, "remembered": draw(picture, copy, options.size, options.steps),
                         "astray_after_first": astray(settled(kept), settled(own)), "torch": torch.__version__,
                         "python": platform.python_version()})
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
