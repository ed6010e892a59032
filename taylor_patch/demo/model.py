"""A Flux-architecture transformer (names of Flux's state dict) that calls attention by ComfyUI's contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXES = (16, 56, 56)
"""Rotary dimensions of (unused, row, column)."""
WEIGHTS = Path(__file__).with_name("tinyflux-s.safetensors")

Attend = Callable[..., Tensor]


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal embedding [B, dim] of t in 0 to 1."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000.0 * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotary_table(ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D/2] for positions ids [N, 3]."""
    angles = []
    for axis, dim in enumerate(AXES):
        omega = 1.0 / (10000 ** (torch.arange(0, dim, 2, device=ids.device, dtype=torch.float64) / dim))
        angles.append(ids[:, axis].double()[:, None] * omega)
    table = torch.cat(angles, -1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, H, N, D]."""
    cos, sin = table
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class QKNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)


class Embedder(nn.Module):
    """Two-layer embedding."""

    def __init__(self, dim_in: int, hidden: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(dim_in, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shift, scale and gate vectors from the conditioning."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count, self.lin = count, nn.Linear(hidden, count * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, -1)


class SelfAttention(nn.Module):
    """Projections of one stream of a double block."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(hidden, 3 * hidden), QKNorm(hidden // heads), nn.Linear(hidden, hidden)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def split_qkv(x: Tensor, heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*hidden] -> normed q and k, and v, each [B, H, N, D]."""
    q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q).to(v.dtype), norm.key_norm(k).to(v.dtype), v


class DoubleBlock(nn.Module):
    """Text and image with their own weights, one joint attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(hidden, 6))
            setattr(self, f"{stream}_attn", SelfAttention(hidden, heads))
            setattr(self, f"{stream}_mlp", nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden)))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        mods, qkv = {}, {}
        for stream, x in (("txt", txt), ("img", img)):
            mod = mods[stream] = getattr(self, f"{stream}_mod")(vec)
            attention = getattr(self, f"{stream}_attn")
            qkv[stream] = split_qkv(attention.qkv((1 + mod[1]) * layer_norm(x) + mod[0]), self.heads, attention.norm)
        q, k, v = (torch.cat(pair, 2) for pair in zip(qkv["txt"], qkv["img"], strict=True))
        joint = attend(q, k, v)
        out = []
        for stream, x, a in (("img", img, joint[:, txt.shape[1] :]), ("txt", txt, joint[:, : txt.shape[1]])):
            mod = mods[stream]
            x = x + mod[2] * getattr(self, f"{stream}_attn").proj(a)
            out.append(x + mod[5] * getattr(self, f"{stream}_mlp")((1 + mod[4]) * layer_norm(x) + mod[3]))
        return out[0], out[1]


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.hidden, self.heads = hidden, heads
        self.linear1, self.linear2 = nn.Linear(hidden, 7 * hidden), nn.Linear(5 * hidden, hidden)
        self.norm, self.modulation = QKNorm(hidden // heads), Modulation(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, attend: Attend) -> Tensor:
        mod = self.modulation(vec)
        qkv, mlp = self.linear1((1 + mod[1]) * layer_norm(x) + mod[0]).split([3 * self.hidden, 4 * self.hidden], -1)
        a = attend(*split_qkv(qkv, self.heads, self.norm))
        return x + mod[2] * self.linear2(torch.cat([a, F.gelu(mlp, approximate="tanh")], -1))


class LastLayer(nn.Module):
    """Modulated projection to patches."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear((1 + scale) * layer_norm(x) + shift)


class TinyFlux(nn.Module):
    """Velocity v = noise - image of a rectified flow, in pixel space."""

    patch_size = 2

    def __init__(self, hidden: int, heads: int, double: int, single: int, channels: int = 3, context: int = 64) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        patch = channels * self.patch_size**2
        self.img_in, self.txt_in = nn.Linear(patch, hidden), nn.Linear(context, hidden)
        self.time_in, self.vector_in = Embedder(256, hidden), Embedder(context, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden, heads) for _ in range(single))
        self.final_layer = LastLayer(hidden, patch)

    def forward(self, x: Tensor, t: Tensor, txt: Tensor, y: Tensor, attention: Attend, options: dict[str, Any]) -> Tensor:
        """x [B, C, H, W], t [B], txt [B, T, context], y [B, context] -> velocity [B, C, H, W].

        attention: ComfyUI's optimized_attention or what stands in for it. options: transformer_options.
        """
        batch, channels, height, width = x.shape
        p = self.patch_size
        h, w = height // p, width // p
        image = x.view(batch, channels, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, channels * p * p)
        ids = torch.zeros(txt.shape[1] + h * w, 3, device=x.device)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids[txt.shape[1] :, 1:] = torch.stack([rows, columns], -1).reshape(-1, 2).to(ids)
        table = rotary_table(ids)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(rotate(q, table), rotate(k, table), v, self.heads, skip_reshape=True, mask=None, transformer_options=block)

        image, txt = self.img_in(image), self.txt_in(txt)
        vec = self.time_in(timestep_embedding(t)) + self.vector_in(y)
        for index, double in enumerate(self.double_blocks):
            block = {**options, "block_type": "double", "block_index": index}
            image, txt = double(image, txt, vec, attend)
        joint = torch.cat([txt, image], 1)
        for index, single in enumerate(self.single_blocks):
            block = {**options, "block_type": "single", "block_index": index, "img_slice": [txt.shape[1], joint.shape[1]]}
            joint = single(joint, vec, attend)
        out = self.final_layer(joint[:, txt.shape[1] :], vec)
        return out.view(batch, h, w, channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def load(device: torch.device, path: Path = WEIGHTS) -> tuple[TinyFlux, Tensor, Tensor]:
    """The trained model and the conditionings of its 21 pictures: text [21, 16, 64], vectors [21, 64].

    Large weights are float8 with a float32 scale per row beside them (NAME and NAME::scale).
    """
    from safetensors.torch import load_file

    raw = load_file(str(path))
    weights = {name: value.float() * raw[f"{name}::scale"] if f"{name}::scale" in raw else value.float()
               for name, value in raw.items() if not name.endswith("::scale")}
    text, vector = weights.pop("cond.txt").to(device), weights.pop("cond.y").to(device)
    hidden, head_dim = weights["txt_in.weight"].shape[0], weights["single_blocks.0.norm.query_norm.scale"].shape[0]
    counts = [len({name.split(".")[1] for name in weights if name.startswith(kind)}) for kind in ("double_blocks", "single_blocks")]
    model = TinyFlux(hidden, hidden // head_dim, *counts)
    model.load_state_dict(weights)
    return model.to(device).eval(), text, vector
