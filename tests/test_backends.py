"""Backends against dense float64 oracles that are written here from the formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taylor_patch
from taylor_patch.backends import near_far
from taylor_patch.backends.base import Fallback, aligned, launching_on
from taylor_patch.backends.near_far import reference
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.backends.tiles import tile_index
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.errors import BackendRefused
from taylor_patch.guard import exact_rows
from taylor_patch.testing import cases

GRIDS = [(1, 8, 8), (1, 13, 9), (3, 5, 7), (5, 6, 7)]


def tiles(t, h, w):
    """Token numbers of each tile, in tile order, by plain loops."""
    a, b, c = (1, 8, 8) if t == 1 else (4, 4, 4) if t >= 4 else (2, 4, 8)
    return [[(z * h + y) * w + x
             for z in range(tz, min(tz + a, t)) for y in range(ty, min(ty + b, h)) for x in range(tx, min(tx + c, w))]
            for tz in range(0, t, a) for ty in range(0, h, b) for tx in range(0, w, c)]


def near_of(q, k, v, grid, density, bias):
    """Routing of the package on its own blocks; q times scale, all float64."""
    return reference.route(reference.Head(q, k, v, grid, bias), density)


def near_far_oracle(q, k, v, grid, near, tail, bias):
    """One head, row by row. weight_b = n_b exp(q.k_b + 1/2 t_b q'Sq), value_b = v_b + C'q."""
    blocks = [[grid.start + i for i in tile] for tile in tiles(grid.t, grid.h, grid.w)]
    inside = {i for block in blocks for i in block}
    text = [i for i in range(len(q)) if i not in inside]
    w = bias.exp()
    mass = [w[b].sum() for b in blocks]
    total = sum(mass)
    mean_k, mean_v, covs, cross = [], [], [], []
    for b, m in zip(blocks, mass, strict=True):
        p = w[b] / m if m > 0 else w[b]
        mean_k.append(p @ k[b])
        mean_v.append(p @ v[b])
        dk, dv = k[b] - mean_k[-1], v[b] - mean_v[-1]
        covs.append(sum((p[i] * torch.outer(dk[i], dk[i]) for i in range(len(b))), torch.zeros(k.shape[1], k.shape[1]).double()))
        cross.append(sum((p[i] * torch.outer(dk[i], dv[i]) for i in range(len(b))), torch.zeros(k.shape[1], k.shape[1]).double()))
    s_w = sum(m * c for m, c in zip(mass, covs, strict=True)) / total
    c_w = sum(m * c for m, c in zip(mass, cross, strict=True)) / total
    mean_trace = torch.trace(s_w)
    out = torch.empty_like(q)
    for i in text:
        out[i] = torch.softmax(k @ q[i] + bias, 0) @ v
    for g, rows in enumerate(blocks):
        exact = text + [j for b, block in enumerate(blocks) if near[g, b] for j in block]
        for i in rows:
            weights, values = [(k[exact] @ q[i] + bias[exact]).exp()], [v[exact]]
            if tail != "none":
                for b in range(len(blocks)):
                    if near[g, b] or mass[b] == 0:
                        continue
                    logit, value = mean_k[b] @ q[i], mean_v[b]
                    if tail == "cumulant":
                        logit = logit + 0.5 * torch.trace(covs[b]) / mean_trace * (q[i] @ s_w @ q[i])
                        value = value + c_w.T @ q[i]
                    weights.append((mass[b] * logit.exp()).reshape(1))
                    values.append(value[None])
            weight = torch.cat(weights)
            out[i] = weight @ torch.cat(values) / weight.sum()
    return out


def backend(**options):
    return near_far.NearFar(near_far.NearFarOptions(min_tokens=1, **options))


def exact(call):
    """Attention in float64."""
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (call.k, call.v))
    logits = call.q.double() @ k.transpose(-1, -2) * call.scale
    if call.key_mask is not None:
        logits = logits + call.key_mask.double()[:, None, None]
    return torch.softmax(logits, -1) @ v


def make(tokens, dim, heads=1, kv_heads=None, batch=1, dtype=torch.float64, n_kv=None, size=1.0, **fields):
    g = torch.Generator().manual_seed(tokens * 1000 + dim)
    q = torch.randn(batch, heads, tokens, dim, generator=g, dtype=dtype) * size
    k, v = (torch.randn(batch, kv_heads or heads, n_kv or tokens, dim, generator=g, dtype=dtype) for _ in "kv")
    return AttentionCall(q, k + 0.3, v, scale=dim**-0.5, **fields)


def check_near_far(call, density, tail="cumulant", min_far=1):
    out = backend(density=density, tail=tail).run(call)
    for b in range(call.q.shape[0]):
        n = call.k.shape[2]
        bias = torch.zeros(n).double() if call.key_mask is None else call.key_mask[b % len(call.key_mask)].double()
        for h in range(call.q.shape[1]):
            hk = h * call.k.shape[1] // call.q.shape[1]
            q, k, v = call.q[b, h] * call.scale, call.k[b, hk], call.v[b, hk]
            near = near_of(q, k, v, call.grid, density, bias)
            assert int((~near).sum()) >= min_far
            torch.testing.assert_close(out[b, h], near_far_oracle(q, k, v, call.grid, near, tail, bias),
                                       atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_are_in_tile_order(grid):
    index, filled = tile_index(TokenGrid(*grid))
    assert [sorted(row[keep].tolist()) for row, keep in zip(index, filled, strict=True)] == [sorted(x) for x in tiles(*grid)]


@pytest.mark.parametrize("tail", ["cumulant", "zeroth", "none"])
@pytest.mark.parametrize("where", ["alone", "before", "after", "both"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_near_far_matches_the_oracle(grid, where, tail):
    start = 5 if where in ("before", "both") else 0
    after = 7 if where in ("after", "both") else 0
    token_grid = TokenGrid(*grid, start=start)
    call = make(start + token_grid.tokens + after, 16, grid=token_grid)
    check_near_far(call, 0.15, tail, min_far=0 if grid == (1, 8, 8) else 1)


@pytest.mark.parametrize("dim", [40, 96])
def test_near_far_head_dims(dim):
    check_near_far(make(117 + 4, dim, grid=TokenGrid(1, 13, 9, start=4)), 0.3)


def test_near_far_gqa():
    check_near_far(make(117, 16, heads=4, kv_heads=2, batch=2, grid=TokenGrid(1, 13, 9)), 0.3)


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "by-batch"])
def test_near_far_key_mask(rows):
    mask = torch.zeros(rows, 210 + 6)
    mask[:, ::3] = -math.inf
    mask[:, 1::7] = -0.5
    mask[-1, :80] = -math.inf
    check_near_far(make(216, 16, batch=2, grid=TokenGrid(5, 6, 7, start=6), key_mask=mask), 0.3)


def test_near_far_key_mask_that_hides_a_whole_block():
    mask = torch.zeros(1, 256)
    mask[0, tiles(1, 16, 16)[2]] = -math.inf
    call = make(256, 16, grid=TokenGrid(1, 16, 16), key_mask=mask)
    check_near_far(call, 0.2)
    torch.testing.assert_close(backend(density=1.0).run(call), exact(call), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("dim", [16, 40, 96])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_near_far_density_one_is_exact(grid, dim, dtype):
    token_grid = TokenGrid(*grid, start=3)
    mask = torch.zeros(1, token_grid.tokens + 8)
    mask[:, ::4] = -math.inf
    call = make(token_grid.tokens + 8, dim, heads=2, kv_heads=1, dtype=dtype, grid=token_grid, key_mask=mask)
    out = backend(density=1.0).run(call)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact(call), atol=1e-5, rtol=1e-5)


def strided(call):
    """The same values with other strides: heads inside tokens, and every second column of a wider tensor."""
    def view(x):
        wide = torch.stack((x, x + 9), -1).transpose(1, 2).contiguous()
        return wide.transpose(1, 2)[..., 0]

    return dataclasses.replace(call, q=view(call.q), k=view(call.k), v=view(call.v))


def test_the_current_device_is_set_for_launches_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"current: {device}")
    assert launching_on(torch.device("cuda:1")) == "current: cuda:1"
    with launching_on(torch.device("cpu")) as nothing:
        assert nothing is None


@pytest.mark.parametrize("kind", ["near_far", "taylor_torch"])
def test_strided_inputs_and_inputs_unchanged(kind):
    call = make(117, 16, heads=2, dtype=torch.float32, grid=TokenGrid(1, 13, 9), key_mask=torch.zeros(1, 117), size=0.2)
    other = strided(call)
    assert not other.v.is_contiguous() and other.v.stride(-1) == 2
    before = [x.clone() for x in (other.q, other.k, other.v, other.key_mask)]
    run = (backend(density=0.2) if kind == "near_far" else TaylorTorch(TaylorOptions(P=3))).run
    torch.testing.assert_close(run(other), run(call), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip((other.q, other.k, other.v, other.key_mask), before, strict=True))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(t=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9), start=st.integers(0, 4), after=st.integers(0, 4),
       density=st.sampled_from([0.05, 0.4]))
def test_near_far_any_grid(t, h, w, start, after, density):
    grid = TokenGrid(t, h, w, start=start)
    check_near_far(make(start + grid.tokens + after, 16, grid=grid), density, min_far=0)


def hermite_series(x, sigma, terms):
    """sum sigma^p/p! He_p(x/sigma) by the three-term recurrence."""
    z = x / sigma
    previous, current, total = torch.zeros_like(z), torch.ones_like(z), torch.zeros_like(z)
    for p in range(terms):
        total = total + sigma**p / math.factorial(p) * current
        previous, current = current, z * current - p * previous
    return total


def taylor_oracle(call, terms, kind, blocks):
    """Direct polynomial of the centred logits in float64, for each column block by itself."""
    group = call.q.shape[1] // call.k.shape[1]
    out = torch.empty(call.q.shape, dtype=torch.float64)
    size = call.q.shape[-1] // blocks
    for b in range(call.q.shape[0]):
        w = torch.ones(call.k.shape[2]).double()
        if call.key_mask is not None:
            w = call.key_mask[b % len(call.key_mask)].double().exp()
        w = w / w.sum()
        for h in range(call.q.shape[1]):
            for c in range(0, call.q.shape[-1], size):
                q, k, v = (x[..., c : c + size].double() for x in (call.q[b, h], call.k[b, h // group], call.v[b, h // group]))
                s = call.scale * q @ (k - w @ k).T
                if kind == "taylor":
                    f = sum(s**p / math.factorial(p) for p in range(terms))
                else:
                    f = hermite_series(s, (s.square() @ w).sqrt()[:, None], terms)
                f = f * w
                out[b, h, :, c : c + size] = f @ v / f.sum(1, keepdim=True)
    return out


def key_mask(batch, n):
    mask = torch.zeros(batch, n)
    mask[:, ::3], mask[-1, 1::4] = -math.inf, -0.7
    return mask


TAYLOR_CASES = {
    "self": {},
    "mask": {"key_mask": key_mask(2, 70), "batch": 2},
    "cross": {"n_kv": 31},
    "cross-mask": {"n_kv": 31, "key_mask": key_mask(1, 31)},
    "gqa": {"heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("case", TAYLOR_CASES)
@pytest.mark.parametrize("kind", ["taylor", "hermite"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
def test_taylor_torch_matches_the_polynomial(terms, kind, case):
    call = make(70, 6, size=0.3, **TAYLOR_CASES[case])
    options = TaylorOptions(P=terms, coefficients=kind, min_tokens=1, block_size_q=32, block_size_k=16,
                            fused_feature_chunk_size=10)
    torch.testing.assert_close(TaylorTorch(options).run(call), taylor_oracle(call, terms, kind, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["taylor", "hermite"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_sub_head_blocks_attend_each_on_its_own(blocks, kind):
    call = make(70, 8, heads=2, size=0.3)
    options = TaylorOptions(P=4, coefficients=kind, sub_head_blocks=blocks)
    out = TaylorTorch(options).run(call)
    torch.testing.assert_close(out, taylor_oracle(call, 4, kind, blocks), atol=1e-9, rtol=1e-7)
    assert not torch.allclose(out, taylor_oracle(call, 4, kind, 1), atol=1e-4)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(n_q=st.integers(1, 40), n_kv=st.integers(1, 40), dim=st.integers(1, 9), terms=st.integers(1, 5))
def test_taylor_torch_any_shape(n_q, n_kv, dim, terms):
    call = make(n_q, dim, n_kv=n_kv, size=0.2)
    out = TaylorTorch(TaylorOptions(P=terms, block_size_q=7, block_size_k=5)).run(call)
    torch.testing.assert_close(out, taylor_oracle(call, terms, "taylor", 1), atol=1e-9, rtol=1e-7)


def test_taylor_torch_converges_to_exact():
    call = make(70, 4, size=0.2)
    errors = [(TaylorTorch(TaylorOptions(P=p)).run(call) - exact(call)).norm() for p in (1, 3, 5)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_taylor_torch_falls_back_on_negative_denominators():
    # 1 + x with a mean x of -50: centring is off, so nothing brings the mean back to 0.
    k = torch.ones(1, 1, 70, 4)
    call = AttentionCall(-50 * k, k, k, scale=0.25)
    with pytest.raises(Fallback, match="denominators"):
        TaylorTorch(TaylorOptions(P=2, center_keys=False)).run(call)
    allowed = TaylorOptions(P=2, center_keys=False, denom_fallback_frac_limit=1.0)
    torch.testing.assert_close(TaylorTorch(allowed).run(call), k)


def test_the_refusal_of_too_many_features_states_r_and_the_limit(configure):
    configure("[backends.taylor_torch]\nP = 5\n")
    q = torch.zeros(1, 1, 128, 128)
    with pytest.raises(BackendRefused) as error:
        taylor_patch.attention(q, q, q, backend="taylor_torch")
    assert f"R = {math.comb(132, 4)} features above max_feature_dim_R = 370000" in str(error.value)
    assert "(head_dim 128, block_dim 128, P 5)" in str(error.value)


@pytest.mark.parametrize(("name", "text"), [("near_fra", 'Did you mean "near_far"?'), ("near_far", "grid is not known")],
                         ids=["unknown", "no-grid"])
def test_attention_refuses_by_name(name, text):
    q = torch.zeros(1, 1, 128, 16)
    with pytest.raises(BackendRefused) as error:
        taylor_patch.attention(q, q, q, backend=name)
    assert text in str(error.value)


def test_public_sdpa_is_exact():
    call = make(50, 16, heads=4, kv_heads=2, dtype=torch.float32, key_mask=key_mask(1, 50))
    out = taylor_patch.attention(call.q, call.k, call.v, backend="sdpa", mask=call.key_mask)
    torch.testing.assert_close(out.double(), exact(call), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("x", "copied"), [
    (torch.zeros(2, 3, 5, 64), False),
    (torch.zeros(2, 5, 3, 64).transpose(1, 2), False),
    (torch.zeros(1, 3, 5, 64).expand(2, -1, -1, -1), False),
    (torch.zeros(2, 3, 5, 3), False),  # a copy would be no better
    (torch.zeros(2 * 3 * 5 * 64 + 1)[1:].view(2, 3, 5, 64), True),
    (torch.zeros(2, 3, 5, 66)[..., :64], True),
    (torch.zeros(2, 3, 5, 64, 2)[..., 0], True),
], ids=["heads first", "tokens first", "expanded", "3 values in a row", "offset", "rows of 66 values", "every second value"])
def test_aligned_copies_what_kernels_cannot_load(x, copied):
    out = aligned(x)
    assert (out is not x) == copied and torch.equal(out, x) and out.data_ptr() % 16 == 0


@pytest.mark.parametrize("layout", ["data that is not aligned", "last dimension with stride 2"])
def test_pytorch_s_attention_gets_aligned_rows(layout, monkeypatch):
    """Its CUDA kernels end in "misaligned address" otherwise, and with them all that the process still does on the GPU."""
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def checked(q, k, v, **kwargs):
        seen.append(all(x.data_ptr() % 16 == 0 and x.stride(-1) == 1 for x in (q, k, v)))
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", checked)
    call = cases.changed(cases.make_call(64, torch.float32, "cpu"), cases.LAYOUTS[layout])
    assert cases.relative_error(taylor_patch.attention(call.q, call.k, call.v, backend="sdpa"), cases.exact(call)) < 1e-5
    assert cases.relative_error(exact_rows(call, torch.arange(9)), cases.exact(call)[:, :, :9]) < 1e-5
    assert seen == [True, True]
