"""Our own backends pass the suite that we ask plugins to pass."""

from __future__ import annotations

from taylor_patch.testing import conformance

OURS = "taylor_patch.plugins:BuiltinBackends"

TestSdpa = conformance(OURS, "sdpa")
TestTaylorTorch = conformance(OURS, "taylor_torch", options={"min_tokens": 1, "P": 3})
TestNearFar = conformance(OURS, "near_far", options={"min_tokens": 1}, max_error=0.1)
