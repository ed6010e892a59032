"""comfy-kitchen's attention as backends of taylor_patch. Listing them imports neither torch nor comfy-kitchen."""

from __future__ import annotations

from dataclasses import dataclass

import taylor_patch


@dataclass(frozen=True)
class SolOptions:
    """The table [backends.kitchen_sol]; tau, topk_ratio and token_aug are the library's own words."""

    min_tokens: int = 12288
    topk_ratio: float = 0.2
    tau: float = 1.0
    token_aug: int = 0

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value; empty when all is well."""
        found = {}
        if self.min_tokens < 1:
            found["min_tokens"] = f"{self.min_tokens} is below 1"
        if not 0 <= self.topk_ratio < 1:
            found["topk_ratio"] = f"{self.topk_ratio} is not from 0 (tau decides) to below 1"
        if self.token_aug not in (0, 64, 128, 192, 256):
            found["token_aug"] = f"{self.token_aug} is not 0, 64, 128, 192 or 256"
        return found


class Plugin:
    """What the entry point names."""

    taylor_patch_api = 1

    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends() -> list[taylor_patch.LazyBackend]:
        """The backends of this package."""
        return [
            taylor_patch.LazyBackend("kitchen_int8", "taylor_patch_kitchen.int8:Int8", summary="comfy-kitchen: all keys, in 8 bits",
                                     needs=("comfy_kitchen",)),
            taylor_patch.LazyBackend("kitchen_sol", "taylor_patch_kitchen.sol:Sol", options=SolOptions,
                                     summary="comfy-kitchen Sol-Attn: routed key blocks exactly, block means for the rest",
                                     needs=("comfy_kitchen",)),
        ]
