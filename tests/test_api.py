"""taylor_patch.attention and explain: the public functions outside ComfyUI."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import taylor_patch
from taylor_patch import engine as engines
from taylor_patch.backends.base import Backend, Fallback
from taylor_patch.declaration import LazyBackend
from taylor_patch.errors import BackendRefused, ConfigError, TaylorPatchError


def qkv(n=260, m=None, heads=4, kv_heads=None, dim=16):
    return torch.randn(2, heads, n, dim), *(torch.randn(2, kv_heads or heads, m or n, dim) for _ in "kv")


MASKS = {
    "none": lambda n: None,
    "bool-2d": lambda n: torch.arange(n)[None] % 3 > 0,
    "rows-2d": lambda n: torch.ones(n, n).tril().bool(),
    "rows-3d": lambda n: torch.randn(2, n, n),
    "heads-4d": lambda n: torch.randn(1, 4, 1, n),
    "batch-4d": lambda n: torch.randn(2, 1, 1, n),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_auto_and_sdpa_are_exact_on_the_cpu(backend, mask):
    q, k, v = qkv(40)
    given = MASKS[mask](40)
    shown = given if given is None else given[None, None] if given.dim() == 2 else given[:, None] if given.dim() == 3 else given
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, scale=0.3)
    torch.testing.assert_close(taylor_patch.attention(q, k, v, backend=backend, mask=given, scale=0.3), expected)


@pytest.mark.parametrize("text", [(0, 4), (256, 260)], ids=["before", "after"])
def test_near_far_with_text_is_exact_at_density_one(text):
    q, k, v = qkv(kv_heads=2)
    mask = torch.arange(260)[None] % 5 > 0
    out = taylor_patch.attention(q, k, v, backend="near_far", grid=(1, 16, 16), text=text, mask=mask, options={"density": 1.0})
    expected = taylor_patch.attention(q, k, v, backend="sdpa", mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_quality_is_the_error():
    gen = torch.Generator().manual_seed(0)

    def smooth():
        field = F.interpolate(torch.randn(2, 64, 4, 4, generator=gen), (32, 32), mode="bilinear").flatten(2).transpose(1, 2)
        return (1.5 * field + 0.3 * torch.randn(2, 1024, 64, generator=gen))[None]

    q, k, v = smooth(), smooth(), smooth()
    exact = taylor_patch.attention(q, k, v, backend="sdpa")
    errors = [float((taylor_patch.attention(q, k, v, backend="near_far", grid=(1, 32, 32), quality=quality) - exact).norm() / exact.norm())
              for quality in ("fast", "balanced", "lossless", 0.01)]
    assert 0.1 > errors[0] > 0.03 > errors[1] > 0.02 > errors[2] > 0.01 > errors[3]


def test_options_replace_those_of_the_configuration(configure):
    configure("[backends.taylor_torch]\nP = 2\n")
    q, k, v = qkv(120)
    two, three = (taylor_patch.attention(q * 0.1, k, v, backend="taylor_torch", options=o) for o in (None, {"P": 3}))
    exact = taylor_patch.attention(q * 0.1, k, v, backend="sdpa")
    assert (two - exact).norm() > 3 * (three - exact).norm()


def test_explain_gives_reasons_and_runs_nothing(monkeypatch):
    from taylor_patch.backends.near_far import NearFar

    monkeypatch.setattr(NearFar, "run", lambda *_: pytest.fail("ran"))
    q, k, v = qkv(50)
    choice = taylor_patch.explain(q, k, v, backend="near_far", mask=torch.ones(50, 50).bool())
    assert choice.backend is None
    assert {"mask depends on the query row", "the token grid is not known", "fewer tokens than min_tokens = 100"} <= set(choice.reasons)
    q, k, v = qkv(256)
    assert taylor_patch.explain(q, k, v, backend="near_far", grid=(1, 16, 16)).backend.name == "near_far"
    automatic = taylor_patch.explain(q, k, v, grid=(1, 16, 16))
    assert automatic.backend is None and any("near_far: not measured" in reason for reason in automatic.reasons)


def call(**kwargs):
    q, k, v = qkv(260)
    return taylor_patch.attention(q, k, v, **kwargs)


@pytest.mark.parametrize(("kwargs", "error", "text"), [
    ({"backend": "near_fra"}, BackendRefused, 'Did you mean "near_far"?'),
    ({"backend": "near_far"}, BackendRefused, "cannot run q [2, 4, 260, 16] float32"),
    ({"backend": "near_far", "grid": (1, 16, 16)}, TaylorPatchError, "do not make up the 260 tokens"),
    ({"backend": "near_far", "grid": (1, 16, 16), "text": (2, 6)}, TaylorPatchError, "before or after the grid"),
    ({"backend": "near_far", "options": {"densty": 1.0}}, ConfigError, 'Did you mean "density"?'),
    ({"backend": "near_far", "options": {"density": 7.0}}, ConfigError, "density"),
    ({"options": {"density": 1.0}}, TaylorPatchError, "name it instead"),
    ({"quality": "balancd"}, ConfigError, 'Did you mean "balanced"?'),
    ({"quality": 3.0}, ConfigError, "outside 0 to 1"),
    ({"quality": [1]}, TaylorPatchError, "quality is [1]; it has to be one of lossless, balanced, fast or a number"),
    ({"grid": (10, 26)}, TaylorPatchError, "grid is (10, 26); it has to be (t, h, w)"),
    ({"grid": 260}, TaylorPatchError, "grid is 260; it has to be (t, h, w)"),
    ({"grid": (1, 16, 16), "text": 4}, TaylorPatchError, "text is 4; it has to be (start, stop)"),
    ({"backend": None}, TaylorPatchError, "backend is None; it has to be one of auto, near_far,"),
    ({"backend": "near_far", "options": [1]}, TaylorPatchError, "options is [1]; it has to be a mapping"),
    ({"backend": "sdpa", "options": {"x": 1}}, ConfigError, "backends.sdpa.x: unknown key; sdpa has no options."),
    ({"backend": "sage"}, BackendRefused, "taylor-patch-sage offers it, which is not installed"),
], ids=["unknown", "no-grid", "grid", "text", "option", "option-range", "options-of-auto", "quality", "quality-range", "quality-type",
        "grid-pair", "grid-number", "text-number", "no-backend", "options-list", "no-options", "not-installed"])
def test_refusals_say_what_to_do(kwargs, error, text):
    with pytest.raises(error) as raised:
        call(**kwargs)
    assert text in str(raised.value)


def test_tensors_that_do_not_fit():
    q, k, v = qkv(20)
    with pytest.raises(TaylorPatchError, match="do not fit together"):
        taylor_patch.attention(q, k[..., :8], v)
    with pytest.raises(TaylorPatchError, match=r"have 3, 3 and 3 dimensions; each needs 4, \[B, H, N, D\]"):
        taylor_patch.attention(q[0], k[0], v[0])
    with pytest.raises(TaylorPatchError, match=r"mask \[1, 1, 1, 19\] does not fit 20 queries and 20 keys"):
        taylor_patch.attention(q, k, v, mask=torch.ones(1, 1, 1, 19).bool())
    with pytest.raises(BackendRefused, match="k is float16, q is float32; v is float16, q is float32"):
        taylor_patch.attention(q, k.half(), v.half(), backend="taylor_torch")
    with pytest.raises(TaylorPatchError, match=r"k is numpy.ndarray; it has to be a torch.Tensor"):
        taylor_patch.attention(q, k.numpy(), v)


@pytest.mark.parametrize(("result", "text"), [
    (lambda q: q[:, :, 1:], 'backend "mine" returned [2, 4, 259, 16] torch.float32 on cpu for q [2, 4, 260, 16]'),
    (lambda q: q.double(), 'backend "mine" returned [2, 4, 260, 16] torch.float64'),
    (lambda q: None, 'backend "mine" returned NoneType instead of a tensor'),
], ids=["shape", "dtype", "none"])
def test_a_result_of_another_form_is_refused(result, text, monkeypatch):
    mine = type("Mine", (Backend,), {"name": "mine", "run": lambda self, call: result(call.q)})
    engines.engine().registry.backends["mine"] = LazyBackend.of(mine)
    with pytest.raises(BackendRefused) as refused:
        call(backend="mine")
    assert text in str(refused.value)


def test_a_backend_that_hands_a_call_back():
    def run(self, call):
        raise Fallback("not today")

    mine = type("Mine", (Backend,), {"name": "mine", "priority": 500, "run": run, "crossover_tokens": lambda self, device: 1})
    engines.engine().registry.backends["mine"] = LazyBackend.of(mine)
    with pytest.raises(BackendRefused, match="not today"):
        call(backend="mine")
    q = torch.randn(2, 24, 60, 16)
    assert taylor_patch.explain(q, q, q).backend.name == "mine"
    torch.testing.assert_close(taylor_patch.attention(q, q, q), taylor_patch.attention(q, q, q, backend="sdpa"))


def test_options_that_a_backend_cannot_be_made_with():
    def init(self, options=None):
        if options is not None and self.made:
            raise ValueError("inside")
        type(self).made = True

    mine = type("Mine", (Backend,), {"name": "mine", "made": False, "__init__": init})
    engines.engine().registry.backends["mine"] = LazyBackend.of(mine)
    with pytest.raises(BackendRefused, match=r'backend "mine" cannot be asked whether it can run: ValueError: inside'):
        call(backend="mine", options={})
