"""SageAttention as backend "sage" of taylor_patch. Listing it imports neither torch nor SageAttention: those are backend.py's."""

from __future__ import annotations

import taylor_patch


class Plugin:
    """What the entry point names."""

    taylor_patch_api = 1

    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends() -> list[taylor_patch.LazyBackend]:
        """The backends of this package."""
        return [taylor_patch.LazyBackend("sage", "taylor_patch_sage.backend:Sage", summary="SageAttention: all keys, q and k in 8 bits",
                                         needs=("sageattention", "triton"))]
