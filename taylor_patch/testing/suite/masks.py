"""Masks, alone and with the forms that calls have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from taylor_patch.backends.base import Backend
from taylor_patch.testing.cases import KEY_MASKS, key_mask, relative_error
from taylor_patch.testing.suite.attempt import ROUNDING
from taylor_patch.testing.suite.checks import Checks
from taylor_patch.testing.suite.forms import FEW_KEYS

MASKED: dict[str, tuple[str | torch.dtype, dict[str, Any]]] = {
    "grouped-query attention": ("gqa", {"heads": 4, "kv_heads": 2}),
    "cross-attention": ("cross_attention", {"n_kv": FEW_KEYS}),
    "float16": (torch.float16, {"dtype": torch.float16}),
    "bfloat16": (torch.bfloat16, {"dtype": torch.bfloat16}),
}
"""What it is -> (the attribute or dtype that has to be declared, changes to the call)."""


class Masks(Checks):
    """A mask counts wherever it comes."""

    @pytest.fixture
    def masking(self, backend: Backend) -> Backend:
        """The backend, where it takes key masks."""
        if not backend.key_masks:
            pytest.skip("key_masks is False")
        return backend

    def test_key_mask(self, backend: Backend) -> None:
        """Key masks, unlike for each batch entry, are done right, or refused where key_masks is False."""
        call = self.call(backend)
        self.both_ways(backend, dataclasses.replace(call, key_mask=key_mask(call)), backend.key_masks, "a key mask")

    @pytest.mark.parametrize("kind", KEY_MASKS)
    def test_other_key_masks(self, masking: Backend, kind: str) -> None:
        """Other shapes and values."""
        call = self.call(masking)
        self.both_ways(masking, dataclasses.replace(call, key_mask=KEY_MASKS[kind](call)), True, f"a key mask: {kind}")

    @pytest.mark.parametrize("form", MASKED)
    def test_key_mask_with(self, masking: Backend, form: str) -> None:
        """A key mask in a call of another form that is declared."""
        needed, changes = MASKED[form]
        if not (getattr(masking, needed) if isinstance(needed, str) else needed in masking.dtypes):
            pytest.skip(f"{form} is not declared")
        if "n_kv" in changes:
            changes = {**changes, "n_kv": self.subject.keys(changes["n_kv"])}
        call = self.call(masking, **changes)
        self.both_ways(masking, dataclasses.replace(call, key_mask=key_mask(call)), True, f"a key mask with {form}")

    def test_hidden_keys_do_not_matter(self, masking: Backend) -> None:
        """What stands at keys that the mask hides changes nothing."""
        call = self.call(masking)
        mask = key_mask(call)
        hidden = torch.isinf(mask)[:, None, :, None]
        other = dataclasses.replace(call, k=call.k.masked_fill(hidden, 3.0), v=call.v.masked_fill(hidden, -3.0), key_mask=mask)
        first = self.run(masking, dataclasses.replace(call, key_mask=mask), "a key mask")
        second = self.run(masking, other, "a key mask")
        if (difference := relative_error(second, first.double())) > 1e-3 + ROUNDING[call.q.dtype]:
            self.finding(f"keys that the mask hides change the result by {difference:.3g}")

    def test_row_mask(self, backend: Backend) -> None:
        """A mask that depends on the query row is done right or refused with a reason."""
        call = self.call(backend)
        rows = torch.ones(1, 1, call.q.shape[2], call.k.shape[2], dtype=torch.bool, device=call.q.device).tril()
        self.right_or_refused(backend, dataclasses.replace(call, row_mask=rows), "a mask by query row")
