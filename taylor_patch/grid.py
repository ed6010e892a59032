"""Where the image tokens lie in a sequence: what the call says, else inferred from the latent's shape and the family's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from taylor_patch.call import TokenGrid
from taylor_patch.families import Layout

UNET_STRIDES = (1, 2, 4, 8, 16)


def patch_sizes(diffusion_model: Any) -> tuple[tuple[int, int, int], ...]:
    """Possible (t, h, w) patch sizes of a model: what it states, or the down-sampling steps of a UNet."""
    spatial, temporal = getattr(diffusion_model, "patch_spatial", None), getattr(diffusion_model, "patch_temporal", None)
    if isinstance(spatial, int) and isinstance(temporal, int):  # Cosmos
        return ((temporal, spatial, spatial),)
    for owner, name in ((diffusion_model, "patch_size"), (getattr(diffusion_model, "patchifier", None), "patch_size"),
                        (diffusion_model, "patch")):
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return ((1, size, size),)
        if isinstance(size, Sequence) and len(size) in (2, 3) and all(isinstance(part, int) for part in size):
            return ((1, *size),) if len(size) == 2 else (tuple(size),)  # type: ignore[return-value]
    return tuple((1, stride, stride) for stride in UNET_STRIDES)


def infer_all(tokens: int, latent_shape: Sequence[int] | None, patches: Sequence[tuple[int, int, int]], layout: Layout,
              has_reference: bool, options: Mapping[str, Any]) -> TokenGrid | None:
    """The grid of one side of cross-attention, where all its tokens are the image's; None where that does not follow from their number."""
    found, _ = infer(tokens, latent_shape, patches, layout, has_reference, options)
    return found if found is not None and found.tokens == tokens else None


def infer(tokens: int, latent_shape: Sequence[int] | None, patches: Sequence[tuple[int, int, int]], layout: Layout,
          has_reference: bool, options: Mapping[str, Any]) -> tuple[TokenGrid | None, str]:
    """(grid, "") or (None, why there is none) for a self-attention call over `tokens` tokens.

    latent_shape: [B, C, H, W] or [B, C, T, H, W] of the model evaluation. options: transformer_options.
    """
    unknown = "" if layout.listed else "token grid unknown: "
    if latent_shape is None or len(latent_shape) not in (4, 5):
        return None, unknown + "no image or video latent"
    shape: Any = options.get("activations_shape")
    if "block" in options and shape is not None and len(shape) == 4:  # a UNet says what it is at
        h, w = int(shape[2]), int(shape[3])
        return (TokenGrid(1, h, w), "") if h * w == tokens else (None, unknown + "tokens merged or tiled by a node")
    size: Any = options.get("grid_sizes")
    if size is not None and len(size) == 3 and math.prod(size) == tokens:
        return TokenGrid(*map(int, size)), ""
    t, h, w = (1, *latent_shape[2:]) if len(latent_shape) == 4 else latent_shape[2:]
    grids = [(-(-t // pt), -(-h // ph), -(-w // pw)) for pt, ph, pw in patches]
    image = options.get("img_slice")
    for grid in grids:
        count = math.prod(grid)
        if image is not None and int(image[1]) - int(image[0]) == count and int(image[1]) <= tokens:
            return TokenGrid(*grid, start=int(image[0])), ""
        if count == tokens:
            return TokenGrid(*grid), ""
    if has_reference or options.get("reference_image_num_tokens"):
        return None, unknown + "reference image tokens"
    if image is not None or len(grids) != 1 or layout.text is None:
        return None, unknown + "token count does not follow from the latent"
    extra = tokens - -(-math.prod(grids[0]) // layout.multiple) * layout.multiple
    if extra < 0:
        return None, "fewer tokens than the image has"
    if extra and layout.text == "apart":
        return None, "tokens of something else beside the image's"
    return TokenGrid(*grids[0], start=extra if layout.text == "before" else 0), ""
