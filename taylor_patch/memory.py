"""How much memory the backends of a coming run will want beside the model: known from runs of this kind, or worked out from the latent."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch

from taylor_patch.backends.base import Backend
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.grid import patch_sizes
from taylor_patch.router import Router

TEXT_TOKENS = 512
"""Text tokens beside the image's that a prediction allows for."""


class Workspaces:
    """Largest workspace in bytes of the runs so far, by model family and latent shape (without the batch)."""

    LIMIT = 64

    def __init__(self) -> None:
        self._peaks: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self._lock = threading.Lock()

    def record(self, family: str | None, latent_shape: Sequence[int] | None, nbytes: int) -> None:
        """Keep the peak of a run."""
        if latent_shape is None or not nbytes:
            return
        key = (family, tuple(latent_shape[1:]))
        with self._lock:
            self._peaks[key] = max(nbytes, self._peaks.pop(key, 0))
            if len(self._peaks) > self.LIMIT:
                self._peaks.pop(next(iter(self._peaks)))

    def of(self, family: str | None, latent_shape: Sequence[int]) -> int | None:
        """The recorded peak, or None where no such run was seen."""
        return self._peaks.get((family, tuple(latent_shape[1:])))


def predict(router: Router, model: Any, latent_shape: Sequence[int], device: torch.device) -> int:
    """Bytes that the backends would want for self-attention over the whole latent; 0 where the model does not tell its heads.

    model: ComfyUI's BaseModel. latent_shape: [B, C, H, W] or [B, C, T, H, W]. Nothing of that size is allocated.
    """
    diffusion_model = getattr(model, "diffusion_model", None)
    heads = _number(diffusion_model, "num_heads", "n_heads", "heads")
    width = _number(diffusion_model, "hidden_size", "dim", "inner_dim")
    if router.off or not heads or not width or len(latent_shape) not in (4, 5):
        return 0
    t, h, w = (1, *latent_shape[2:]) if len(latent_shape) == 4 else latent_shape[2:]
    pt, ph, pw = patch_sizes(diffusion_model)[0]
    grid = TokenGrid(-(-t // pt), -(-h // ph), -(-w // pw), start=TEXT_TOKENS)
    # cond and uncond may be evaluated together
    shape = (2 * latent_shape[0], heads, grid.tokens + TEXT_TOKENS, width // heads)
    q = torch.empty(1, dtype=torch.bfloat16, device=device).expand(shape)
    call = AttentionCall(q, q, q, scale=1 / math.sqrt(shape[-1]), grid=grid)
    return max((backend.workspace_nbytes(call) for backend in _candidates(router, call)), default=0)


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
