"""What a call leaves behind: in the caller's memory, in the backend, and in PyTorch."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from taylor_patch.backends.base import Backend
from taylor_patch.testing.cases import key_mask
from taylor_patch.testing.memory import peak_nbytes
from taylor_patch.testing.pytest_plugin import measured
from taylor_patch.testing.suite.attempt import RAISED, told
from taylor_patch.testing.suite.checks import Checks
from taylor_patch.testing.suite.subject import PLAINEST

WORKSPACE_SLACK_NBYTES = 1 << 16


class State(Checks):
    """A call changes nothing but its own result."""

    def test_result_is_its_own(self, backend: Backend) -> None:
        """The result shares no memory with the inputs, where they have one token either: its value is the answer then."""
        for what, call in ((PLAINEST, self.call(backend)), ("one token", self.call(backend, grid=(1, 1, 1), text=0))):
            if self.refusal(backend, call, what):
                continue
            memory = self.run(backend, call, what).untyped_storage().data_ptr()
            if shared := [name for name in "qkv" if getattr(call, name).untyped_storage().data_ptr() == memory]:
                self.finding(f"{what}: returns the memory of {shared[0]}")

    def test_result_stays(self, backend: Backend) -> None:
        """The next call does not write into an earlier result."""
        out = self.run(backend, self.call(backend), PLAINEST)
        kept = out.clone()
        self.run(backend, self.call(backend, seed=1), "other values of the same shape")
        if not torch.equal(out, kept):
            self.finding("the next call of the same shape writes into the result of the last one; return new memory from every call")

    @pytest.mark.parametrize("masked", (False, True), ids=("without a mask", "with a key mask"))
    def test_nothing_stale(self, backend: Backend, masked: bool) -> None:
        """Other values of the same shape, and other values in the same memory, give their own results."""
        if masked and not backend.key_masks:
            pytest.skip("key_masks is False")
        first, second = self.call(backend), self.call(backend, seed=1)
        if masked:
            first = dataclasses.replace(first, key_mask=key_mask(first))
            second = dataclasses.replace(second, key_mask=key_mask(second).roll(1, 1))
        self.check(backend, first, "values of seed 0")
        self.check(backend, second, "values of seed 1 after those of seed 0, of the same shape")
        again: dict[str, Any] = {}
        for name in ("q", "k", "v", "key_mask") if masked else "qkv":
            memory: Tensor = getattr(first, name).data  # a new tensor there, as the allocator gives memory away again
            again[name] = memory.copy_(getattr(second, name))
        self.check(backend, dataclasses.replace(first, **again), "other values in the memory of an earlier call")

    def test_nothing_is_kept_alive(self, backend: Backend) -> None:
        """Neither the inputs nor the result are held after the call."""
        call = self.call(backend)
        out = self.run(backend, call, PLAINEST)
        storages = {name: StorageWeakRef(x.untyped_storage()) for name, x in (("q", call.q), ("k", call.k), ("v", call.v), ("the result", out))}
        del call, out
        gc.collect()
        if alive := [name for name, storage in storages.items() if not storage.expired()]:
            self.finding(f"keeps {', '.join(alive)} in memory after the call")

    def test_random_state_is_unchanged(self, backend: Backend) -> None:
        """PyTorch's own random generators, from which samplers take their noise, stand where they stood."""
        def states() -> list[Tensor]:
            return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.subject.device)] if self.subject.device.startswith("cuda") else [])]

        call, kept = self.call(backend), torch.get_rng_state()
        torch.manual_seed(0x5EED)  # a seed that a backend is not likely to set
        before = states()
        self.run(backend, call, PLAINEST)
        after = states()
        torch.set_rng_state(kept)
        if not all(map(torch.equal, before, after)):
            self.finding("draws from or seeds PyTorch's own random generator, which changes the picture; take a torch.Generator")

    def test_workspace(self, backend: Backend) -> None:
        """workspace_nbytes is a whole number from the shapes, and not below what is used."""
        call = self.call(backend)
        try:
            stated = backend.workspace_nbytes(call)
        except RAISED as error:
            self.finding(f"workspace_nbytes raised {told(error)}")
        if not isinstance(stated, int) or isinstance(stated, bool) or stated < 0:
            self.finding(f"workspace_nbytes returned {stated!r}, not a number of bytes")
        self.run(backend, call, PLAINEST)  # what is kept from call to call is there now
        out_nbytes = call.q.numel() * call.q.element_size()
        used = max(0, peak_nbytes(lambda: backend.run(call), [call.q, call.k, call.v]) - out_nbytes)
        measured.setdefault(backend.name, {})["workspace"] = f"{used / 1024:.0f} KiB of {stated / 1024:.0f} stated"
        if used > stated + WORKSPACE_SLACK_NBYTES:
            self.finding(f"uses {used} bytes of temporary memory, workspace_nbytes says {stated}")
