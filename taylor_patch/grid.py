"""Where the image tokens lie in a sequence: inferred from the latent's shape and what the model family is known to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taylor_patch.call import TokenGrid

# Families whose joint sequence is text tokens first, image tokens after, in every ComfyUI from 0.3.64 to 0.33.0 (class names
# of comfy.model_base). HunyuanVideo changed its order and Z-Image pads its image tokens: they need img_slice.
TEXT_FIRST = frozenset({"Flux", "Flux2", "Chroma", "QwenImage"})

UNET_STRIDES = (1, 2, 4, 8, 16)


def patch_sizes(diffusion_model: Any) -> tuple[tuple[int, int, int], ...]:
    """Possible (t, h, w) patch sizes of a model: what it states, or the down-sampling steps of a UNet."""
    size = getattr(diffusion_model, "patch_size", None)
    if isinstance(size, int):
        return ((1, size, size),)
    if isinstance(size, Sequence) and len(size) in (2, 3) and all(isinstance(part, int) for part in size):
        return ((1, *size),) if len(size) == 2 else (tuple(size),)  # type: ignore[return-value]
    return tuple((1, stride, stride) for stride in UNET_STRIDES)


def infer(tokens: int, latent_shape: Sequence[int] | None, patches: Sequence[tuple[int, int, int]], family: str | None,
          has_reference: bool, options: Mapping[str, Any]) -> tuple[TokenGrid | None, str]:
    """(grid, "") or (None, why it is not known) for a self-attention call over `tokens` tokens.

    latent_shape: [B, C, H, W] or [B, C, T, H, W] of the model evaluation. options: transformer_options.
    """
    if latent_shape is None or len(latent_shape) not in (4, 5):
        return None, "token grid unknown: no image or video latent"
    t, h, w = (1, *latent_shape[2:]) if len(latent_shape) == 4 else latent_shape[2:]
    grids = [(-(-t // pt), -(-h // ph), -(-w // pw)) for pt, ph, pw in patches]
    image = options.get("img_slice")
    for grid in grids:
        count = grid[0] * grid[1] * grid[2]
        if image is not None and int(image[1]) - int(image[0]) == count and int(image[1]) <= tokens:
            return TokenGrid(*grid, start=int(image[0])), ""
        if count == tokens:
            return TokenGrid(*grid), ""
    if has_reference or options.get("reference_image_num_tokens"):
        return None, "token grid unknown: reference image tokens"
    if image is None and len(grids) == 1 and family in TEXT_FIRST and (extra := tokens - grids[0][0] * grids[0][1] * grids[0][2]) > 0:
        return TokenGrid(*grids[0], start=extra), ""
    return None, "token grid unknown: token count does not follow from the latent"
