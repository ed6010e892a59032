"""Attention shapes of model families, by picture or video size."""

from __future__ import annotations

from dataclasses import dataclass

from taylor_patch.call import TokenGrid


@dataclass(frozen=True)
class Family:
    """heads x head_dim of the longest self-attention; pixels and frames of one token; text tokens in the same sequence."""

    heads: int
    head_dim: int
    pixels: int
    text: int
    frames: int = 1
    default_size: tuple[int, int] = (2048, 2048)
    default_frames: int = 1


# Read from ComfyUI's model classes: patch size times the VAE's down-sampling.
FAMILIES = {
    "flux": Family(24, 128, 16, 512),
    "wan": Family(40, 128, 16, 0, frames=4, default_size=(832, 480), default_frames=81),
    "hunyuan": Family(24, 128, 16, 256, frames=4, default_size=(1280, 720), default_frames=129),
    "sdxl": Family(10, 64, 16, 0),
}


def grid(family: Family, size: tuple[int, int], frames: int) -> TokenGrid:
    """The token grid of a picture of `size` (width, height) in pixels, or of a video of `frames` frames (1 + a multiple of 4)."""
    t = 1 + (frames - 1) // family.frames if frames > 1 else 1
    return TokenGrid(t, -(-size[1] // family.pixels), -(-size[0] // family.pixels), start=family.text)
