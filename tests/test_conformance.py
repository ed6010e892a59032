"""Our own backends pass the suite that we ask plugins to pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from types import SimpleNamespace

import pytest
import torch

import taylor_patch
from taylor_patch.backends.near_far import NearFar
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.testing import conformance
from taylor_patch.testing.suite import Conformance

OURS = "taylor_patch.plugins:BuiltinBackends"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TestSdpa = conformance(OURS, "sdpa", device=DEVICE)
# Above 0.02: a Taylor series of three terms is not accurate for large logits, and says so.
TestTaylorTorch = conformance(OURS, "taylor_torch", device=DEVICE, options={"min_tokens": 1, "P": 3}, max_error=0.03)
TestNearFar = conformance(OURS, "near_far", device=DEVICE, options={"min_tokens": 1, "min_keys": 1}, max_error=0.1)
# On a CPU: the declaration, and that the refusal says what is missing. The kernels are tested below.
TestTritonFull = conformance(OURS, "triton_full", device=DEVICE, options={"min_tokens": 1, "P": 3}, max_error=0.03)
TestTritonFused = conformance(OURS, "triton_fused", device=DEVICE, options={"min_tokens": 1, "P": 3}, max_error=0.03)


def interpreted(kind: type[taylor_patch.Backend], left_out: Collection[str] = (), max_error: float = 0.02, **options: object) -> type:
    """The suite for kernels in Triton's interpreter on the CPU, as tests/conftest.py sets it up: one head_dim, one batch entry, and without
    the tests `left_out`. The interpreter multiplies bfloat16 wrongly, so that it is not declared."""
    declared = {"devices": frozenset({"cpu"}), "dtypes": frozenset({torch.float16, torch.float32}), "unavailable": lambda self: ()}
    plugin = SimpleNamespace(taylor_patch_register_backends=taylor_patch.hookimpl(lambda: [type(kind.__name__, (kind,), declared)]))
    suite = conformance(plugin, kind.name, options={"min_tokens": 1, **options}, max_error=max_error)

    def call(self, backend, **changes):
        return suite.call(self, backend, **{"batch": 1, **changes})

    reason = "on a GPU the kernels themselves are tested above" if DEVICE == "cuda" else "Triton is not installed"
    skipped = pytest.mark.skipif(DEVICE == "cuda" or importlib.util.find_spec("triton") is None, reason=reason)
    return skipped(type(suite.__name__, (suite,), {"call": call, **dict.fromkeys(left_out)}))


class SmallTritonFull(TritonFull):
    head_dims = range(16, 17)


class SmallTritonFused(TritonFused):
    head_dims = range(32, 33)


class NearFarKernels(NearFar):
    head_dims = range(16, 17)

    def run(self, call):
        """As on a GPU."""
        from taylor_patch.backends.near_far import op

        return op.attend(call, self.options.density, self.options.tail)

    def workspace_nbytes(self, call):
        """As on a GPU."""
        from taylor_patch.backends.near_far import plan

        return plan.of_call(call).workspace_nbytes


ALL = {name for name in dir(Conformance) if name.startswith("test_")}
# What runs is chosen for time: a call takes the interpreter about a second. triton_fused differs from triton_full only in that features come
# in chunks. Of the five that near_far leaves out, tests/test_near_far_triton.py poisons workspaces too; the other four run on a GPU alone.
CHUNKS = {"test_plainest_call", "test_key_mask", "test_gqa", "test_every_output_is_written"}
LEFT_TO_THE_GPU = {"test_compiles", "test_deterministic", "test_every_output_is_written", "test_hidden_keys_do_not_matter",
                   "test_result_is_its_own"}
TestTritonFullInterpreted = interpreted(SmallTritonFull, max_error=0.03, P=3)
TestTritonFusedInterpreted = interpreted(SmallTritonFused, ALL - CHUNKS, max_error=0.03, P=3, fused_feature_chunk_size=512)
# All blocks exact, so that cross-attention, whose keys are noise, stays within a limit that a mask left out exceeds; the far field is held
# against its formula in tests/test_near_far_triton.py.
TestNearFarInterpreted = interpreted(NearFarKernels, LEFT_TO_THE_GPU, max_error=0.05, min_keys=1, density=1.0)
