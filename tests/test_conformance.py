"""Our own backends pass the suite that we ask plugins to pass."""

from __future__ import annotations

import torch

from taylor_patch.testing import conformance

OURS = "taylor_patch.plugins:BuiltinBackends"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TestSdpa = conformance(OURS, "sdpa", device=DEVICE)
TestTaylorTorch = conformance(OURS, "taylor_torch", device=DEVICE, options={"min_tokens": 1, "P": 3})
TestNearFar = conformance(OURS, "near_far", device=DEVICE, options={"min_tokens": 1, "min_keys": 1}, max_error=0.1)
# On a CPU: the declaration, and that the refusal says what is missing.
TestTritonFull = conformance(OURS, "triton_full", device=DEVICE, options={"min_tokens": 1, "P": 3})
TestTritonFused = conformance(OURS, "triton_fused", device=DEVICE, options={"min_tokens": 1, "P": 3})
