"""comfy-kitchen's attention as backends of taylor_patch. Listing them imports neither torch nor comfy-kitchen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import taylor_patch


@dataclass(frozen=True)
class SolOptions:
    """The table [backends.kitchen_sol]; tau, topk_ratio and token_aug are the library's own words."""

    min_tokens: int = taylor_patch.option(12288, "calls with fewer query tokens are exact", at_least=1)
    topk_ratio: float = taylor_patch.option(0.2, "share of key blocks that are exact, below 1; `0`: tau decides", at_least=0)
    tau: float = taylor_patch.option(1.0, "threshold in standard deviations; higher is cheaper and less accurate")
    token_aug: Literal[0, 64, 128, 192, 256] = taylor_patch.option(0, "single tokens added to each query block")

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value besides bounds; empty when all is well."""
        return {"topk_ratio": f"{self.topk_ratio} is not below 1"} if self.topk_ratio >= 1 else {}


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
