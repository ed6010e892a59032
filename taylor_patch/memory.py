"""How much memory the backends of a coming run will want beside the model: known from runs of this kind, or worked out from the latent."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from taylor_patch.backends.base import Backend
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.families import family, layout
from taylor_patch.grid import patch_sizes
from taylor_patch.router import Router
from taylor_patch.run import family_of

TEXT_TOKENS = 512
"""Text tokens beside the image's that a prediction allows for where text is joined to the image."""
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
HEAD_DIM = ("attention_head_dim", "head_dim", "dim_head", "headdim")
WIDTH = ("hidden_size", "dim", "inner_dim", "model_channels")
"""Names that ComfyUI's models have for the number of heads, for the size of one, and for that of all."""


class Workspaces:
    """Largest workspace in bytes of the runs so far, by model family and latent shape, batch included."""

    LIMIT = 64

    def __init__(self) -> None:
        self._peaks: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self._lock = threading.Lock()

    def record(self, family: str | None, latent_shape: Sequence[int] | None, nbytes: int) -> None:
        """Keep the peak of a run."""
        if latent_shape is None or not nbytes:
            return
        key = (family, tuple(latent_shape))
        with self._lock:
            self._peaks[key] = max(nbytes, self._peaks.pop(key, 0))
            if len(self._peaks) > self.LIMIT:
                self._peaks.pop(next(iter(self._peaks)))

    def of(self, family: str | None, latent_shape: Sequence[int]) -> int | None:
        """The recorded peak, or None where no such run was seen."""
        return self._peaks.get((family, tuple(latent_shape)))


def predict(router: Router, model: Any, latent_shape: Sequence[int], device: torch.device) -> int:
    """Bytes that the backends would want for self-attention over the whole latent; 0 where the model does not tell its heads.

    model: ComfyUI's BaseModel. latent_shape: [B, C, H, W] or [B, C, T, H, W]. Nothing of that size is allocated.
    """
    diffusion_model, name = getattr(model, "diffusion_model", None), family_of(model)
    found = None if router.off or len(latent_shape) not in (4, 5) else heads_of(name, diffusion_model)
    if found is None:
        return 0
    heads, head_dim, stride = found
    t, h, w = (1, *latent_shape[2:]) if len(latent_shape) == 4 else latent_shape[2:]
    pt, ph, pw = patch_sizes(diffusion_model)[0]
    of_model = layout(name, diffusion_model)
    text = 0 if of_model.text == "apart" else TEXT_TOKENS
    grid = TokenGrid(-(-t // pt), -(-h // (ph * stride)), -(-w // (pw * stride)), start=0 if of_model.text == "after" else text)
    # cond and uncond may be evaluated together
    shape = (2 * latent_shape[0], heads, -(-grid.tokens // of_model.multiple) * of_model.multiple + text, head_dim)
    q = torch.empty(1, dtype=torch.bfloat16, device=device).expand(shape)
    call = AttentionCall(q, q, q, scale=1 / math.sqrt(head_dim), grid=grid)
    return max((backend.workspace_nbytes(call) for backend in _candidates(router, call)), default=0)


def heads_of(name: str | None, diffusion_model: Any) -> tuple[int, int, int] | None:
    """(heads, head_dim, down-sampling before it) of the first self-attention over the image; None where nothing in the model tells.

    name: what run.family_of says. A family's `blocks` come first: a UNet's own attributes do not say at which level attention begins.
    """
    row = family(name)
    blocks = getattr(diffusion_model, row.blocks, None) if row is not None and row.blocks else None
    stride = 1
    for owner in (*(blocks.modules() if blocks is not None else ()), diffusion_model):
        if type(owner).__name__ == "Downsample":
            stride *= 2
        heads, head_dim, width = _number(owner, *HEADS), _number(owner, *HEAD_DIM), _number(owner, *WIDTH)
        if heads and (head_dim or width):
            return heads, head_dim or width // heads, stride  # type: ignore[operator]
    return None


def _number(owner: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int) and value > 0), None)


def _candidates(router: Router, call: AttentionCall) -> list[Backend]:
    """Backends that the configuration may send this call to."""
    names = {router.config.settings.backend, *(rule.backend for rule in router.config.rules if rule.backend)}
    named = [router.backends[name] for name in router.backends if name in names and name != "sdpa"]
    found = [backend for backend in named if not router.reasons_against(backend, call)]
    if "auto" in names and (chosen := router.automatic(call).backend) is not None:
        found.append(chosen)
    return found
