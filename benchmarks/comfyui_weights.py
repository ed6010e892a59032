"""Checkpoints with seeded random weights for benchmarks/comfyui.py, laid out by ComfyUI's own classes:

    python -m benchmarks.comfyui_weights --comfyui PATH --out FOLDER [--tiny]

FOLDER/random_flux.safetensors: Flux of true width (3072, 24 heads of 128), 2 double and 4 single blocks. random_wan.safetensors: Wan 2.1
text to video of true width (5120, 40 heads of 128), 4 blocks. --tiny: fewer blocks, and a narrow Wan. All weights bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def flux(tiny: bool) -> nn.Module:
    """ComfyUI's Flux on the meta device."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    values = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
              "num_heads": 24, "depth": 1 if tiny else 2, "depth_single_blocks": 1 if tiny else 4, "axes_dim": [16, 56, 56], "theta": 10000,
              "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": []}
    names = {field.name for field in dataclasses.fields(FluxParams)}  # newer versions have more of them
    known = {name: value for name, value in values.items() if name in names}
    return Flux(**known, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)


def wan(tiny: bool) -> nn.Module:
    """ComfyUI's Wan on the meta device."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    size = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2} if tiny else \
        {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 4}
    return WanModel(model_type="t2v", in_dim=16, out_dim=16, text_dim=4096, **size, device="meta", dtype=torch.bfloat16,
                    operations=comfy.ops.disable_weight_init)


MODELS = {"flux": flux, "wan": wan}


def weight(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """N(0, 1/fan_in) for matrices, 1 for norm gains, small numbers for the rest; seeded by the name."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    if len(shape) < 2 and name.endswith((".weight", ".scale")):
        return torch.ones(shape, dtype=torch.bfloat16)
    spread = 0.02 if len(shape) < 2 else 1 / math.sqrt(math.prod(shape[1:]))
    return (torch.randn(shape, generator=generator, device=device) * spread).to(torch.bfloat16).cpu()


def published(name: str) -> str:
    """The name of a weight in published files: every ComfyUI reads that one."""
    return name[: -len("weight")] + "scale" if name.endswith(("query_norm.weight", "key_norm.weight")) else name


def main() -> None:
    """Write both checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(options.comfyui.resolve()))
    from comfy.cli_args import args

    args.cpu = True  # nothing but shapes is asked of ComfyUI
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    for family, make in MODELS.items():
        layout = make(options.tiny).state_dict()
        save_file({published(name): weight(name, value.shape, device) for name, value in layout.items()},
                  options.out / f"random_{family}.safetensors")


if __name__ == "__main__":
    main()
