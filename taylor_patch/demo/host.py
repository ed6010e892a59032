"""The demo: one picture by exact attention, near_far and plain global Taylor, through the real dispatcher."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import taylor_patch
from taylor_patch import engine as engines
from taylor_patch.demo import model as demo_model
from taylor_patch.hooks.attention import replace
from taylor_patch.hooks.evaluation import apply_model
from taylor_patch.run import RunSummary

# Name -> settings of the row. quality_limit would make the blurred row exact.
# Global Taylor of degree 2 (P = 3): degree 3 has 366,145 features at head_dim 128.
ROWS: dict[str, dict[str, Any]] = {
    "sdpa": {"taylor_patch": {"backend": "sdpa"}},
    "near_far": {"taylor_patch": {"backend": "near_far"}},
    "taylor_torch": {"taylor_patch": {"backend": "taylor_torch", "quality_limit": 0.0}, "backends": {"taylor_torch": {"P": 3}}},
}
SAMPLED_ROWS = 64
"""Query rows of each sampled call that are compared with exact attention."""


class Flux:
    """Stands where ComfyUI's model_base.Flux stands: its class name is the family."""

    def __init__(self, diffusion_model: demo_model.TinyFlux) -> None:
        self.diffusion_model = diffusion_model


def exact_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    """The host's own attention, with the arguments of ComfyUI's: [B, H, N, D] in, [B, N, H*D] out."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass
class Sampled:
    """Relative L2 errors of attention calls on sampled query rows, one a head."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def watch(self, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`attention` with its output compared on sampled rows; the time of comparing is kept apart."""

        def watched(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
            out = attention(q, k, v, heads, **kwargs)
            start = clock(q.device)
            rows = torch.randperm(q.shape[2], generator=self.generator)[:SAMPLED_ROWS].to(q.device)
            exact = torch.softmax(q[:, :, rows].double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v.double()
            ours = out[:, rows].unflatten(-1, (heads, -1)).transpose(1, 2).double()
            self.errors += ((ours - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))).flatten().tolist()
            self.seconds += clock(q.device) - start
            return out

        return watched

    def quantile(self, fraction: float) -> float:
        """Quantile of the errors."""
        return float(torch.tensor(self.errors, dtype=torch.float64).quantile(fraction))


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def sample(host: Flux, text: Tensor, vector: Tensor, size: int, steps: int, seed: int, engine: engines.Engine,
           attention: Callable[..., Tensor], progress: Callable[[], None]) -> tuple[Tensor, RunSummary]:
    """Euler from t = 1 to 0 -> picture [3, size, size] in -1 to 1, and what the run did."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(text.device)
    schedule = torch.linspace(1, 0, steps + 1).tolist()
    with engine.run(schedule):
        for t, t_next in itertools.pairwise(schedule):
            sigmas = torch.full((1,), t, device=x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
                velocity = apply_model(host.diffusion_model, host, (x, sigmas, text, vector, attention, {"sigmas": sigmas}), {})
            x = x + (t_next - t) * velocity.float()
            progress()
    assert engine.last_run is not None
    return x[0], engine.last_run


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1 to 1; inf for equal ones."""
    error = float((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()) / 4
    return float("inf") if error == 0 else -10 * float(torch.tensor(error).log10())


def run_demo(size: int = 128, steps: int = 16, picture: int = 17, seed: int = 0, out: Path | str = "taylor-demo",
             device: str = "auto", progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Make the pictures; write comparison.png and demo.json into `out`; return what demo.json holds."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    network, texts, vectors = demo_model.load(where)
    host, text, vector = Flux(network), texts[picture : picture + 1], vectors[picture : picture + 1]
    pictures: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    previous = engines.current()
    try:
        for name, overrides in ROWS.items():
            engine = engines.Engine(overrides)
            engines.use(engine)
            sampled, done = Sampled(), Counter[str]()

            def step(name: str = name, done: Counter[str] = done) -> None:
                done["steps"] += 1
                if progress:
                    progress(name, done["steps"], steps)

            start = clock(where)
            image, summary = sample(host, text, vector, size, steps, seed, engine, sampled.watch(replace(exact_attention)), step)
            seconds = clock(where) - start - sampled.seconds
            pictures[name] = image.cpu()
            rows.append({
                "backend": name,
                "seconds_per_step": seconds / steps,
                "speed_ratio": rows[0]["seconds_per_step"] * steps / seconds if rows else 1.0,
                "psnr_db": None if name == "sdpa" else psnr(pictures["sdpa"], pictures[name]),
                "rel_l2_median": sampled.quantile(0.5),
                "rel_l2_p90": sampled.quantile(0.9),
                "calls": dict(summary.calls),
                "fallbacks": dict(summary.fallbacks),
            })
    finally:
        engines.use(previous)
    tokens = (size // network.patch_size) ** 2 + text.shape[1]
    return write(out, pictures, rows, {
        "size": size, "steps": steps, "picture": picture, "seed": seed, "tokens": tokens, "device": device_name(where),
        "taylor_patch": taylor_patch.__version__, "torch": torch.__version__, "python": platform.python_version()})


def write(out: Path | str, pictures: dict[str, Tensor], rows: list[dict[str, Any]], environment: dict[str, Any]) -> dict[str, Any]:
    """Write demo.json and comparison.png into the folder `out`; return what demo.json holds."""
    result = {"rows": rows, "environment": environment}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(pictures, rows, folder / "comparison.png")
    return result


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def draw(pictures: dict[str, Tensor], rows: list[dict[str, Any]], path: Path) -> None:
    """The pictures side by side, each with its name, PSNR and time below."""
    from PIL import Image, ImageDraw, ImageFont

    side, pad, caption = 384, 12, 64
    sheet = Image.new("RGB", (len(rows) * (side + pad) + pad, side + caption + 2 * pad), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, row in enumerate(rows):
        pixels = ((pictures[row["backend"]].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        image = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))
        left = pad + column * (side + pad)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, pad))
        quality = "exact" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB to exact"
        pen.text((left, pad + side + 8), f"{row['backend']}: {quality}", fill="black", font=font)
        pen.text((left, pad + side + 32), f"{row['seconds_per_step']:.2f} s a step, {row['speed_ratio']:.2f}x", fill="black", font=font)
    sheet.save(path)
