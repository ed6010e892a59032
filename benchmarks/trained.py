"""Trained attention: q, k, v of the demo's model, and pictures made with any attention in its place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_patch.demo import model as demo_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def network() -> tuple[demo_model.TinyFlux, Tensor, Tensor]:
    """The model and the conditionings of its pictures."""
    return demo_model.load(DEVICE)


@torch.no_grad()
def sample(picture: int, size: int, steps: int, attend: Callable[[int], Attend], seed: int = 0) -> Tensor:
    """Euler from noise to a picture [3, size, size]; attend(step) gives the attention of a step, [B, H, N, D] in and out."""
    model, text, vector = network()
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    for step, (t, t_next) in enumerate(itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist())):
        current = attend(step)

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, current: Attend = current, **kwargs: Any) -> Tensor:
            return current(q, k, v).transpose(1, 2).flatten(2)

        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            velocity = model(x, torch.full((1,), t, device=DEVICE), text[picture : picture + 1], vector[picture : picture + 1], attention, {})
        x = x + (t_next - t) * velocity.float()
    return x[0]


@lru_cache(maxsize=2)
def captured(picture: int, size: int, steps: int, at: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of every attention call of the steps `at`, from a run with exact attention."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(step: int) -> Attend:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if step in at:
                calls.append((q.clone(), k.clone(), v.clone()))
            return F.scaled_dot_product_attention(q, k, v)

        return run

    sample(picture, size, steps, attend)
    return calls


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1 to 1."""
    return float(-10 * ((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4).log10())
