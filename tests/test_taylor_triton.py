"""triton_full and triton_fused against the float64 polynomial. Without a GPU the kernels run in Triton's interpreter, which
multiplies bfloat16 wrongly, so that bfloat16 features are float32 there."""

import gc
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from taylor_oracle import dense, relative

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="Triton is not installed")

# ruff: noqa: E402
from taylor_patch.backends.base import Fallback
from taylor_patch.backends.taylor import launch, plan, tuned
from taylor_patch.backends.taylor.gpu import MIB, TritonFull, TritonFused
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall
from taylor_patch.testing.memory import peak_nbytes

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ALLOWANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Rounding beyond that of PyTorch in the same dtype: features are rounded twice more, S and the result once."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory from torch.empty holds NaN, so that whatever is not written shows."""
    empty = torch.empty

    def poisoned_empty(*shape, **about):
        x = empty(*shape, **about)
        if x.is_floating_point():
            x.detach().fill_(math.nan)  # torch.compile's own passes ask for tensors that require gradients
        return x

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def make(n=37, m=51, d=16, batch=1, heads=2, heads_kv=None, dtype=torch.float32, seed=0, scale=None, shift=0.3, mask=None, **fields):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=gen).to(dtype).to(DEVICE)

    heads_kv = heads_kv or heads
    q, k, v = draw(batch, heads, n, d), draw(batch, heads_kv, m, d) + shift, draw(batch, heads_kv, m, d)
    if mask is not None:
        mask = mask(m, gen).to(DEVICE)
    return AttentionCall(q, k, v, scale or 0.7 * d**-0.5, key_mask=mask, **fields)


def check(kind, call, **options):
    options = TaylorOptions(**{"fallback_on_negative": False, **options})
    before = [x.clone() for x in (call.q, call.k, call.v)]
    out = kind(options).run(call)
    assert all(torch.equal(a, b) for a, b in zip(before, (call.q, call.k, call.v), strict=True))
    assert out.shape == call.q.shape and out.dtype == call.q.dtype
    expected = dense(call, options)
    eager = relative(TaylorTorch(options).run(call), expected)
    error = relative(out, expected)
    assert error <= eager + ALLOWANCE[call.q.dtype], f"error {error:.2e}, PyTorch in the same dtype {eager:.2e}"
    return out


@pytest.mark.parametrize("coefficients", ["taylor", "hermite"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_triton_full_is_the_series_for_every_p(terms, coefficients):
    check(TritonFull, make(heads=1, n=30, m=30), P=terms, coefficients=coefficients)


@pytest.mark.parametrize("coefficients", ["taylor", "hermite"])
def test_triton_fused_streams_features_in_chunks(coefficients):
    call = make(d=24, heads=1, n=30, m=30)
    check(TritonFused, call, P=4, coefficients=coefficients, fused_feature_chunk_size=256)
    assert len(TritonFused(TaylorOptions(P=4, fused_feature_chunk_size=256)).plan(call).chunks) > 2


def test_five_terms():
    check(TritonFused, make(n=12, m=12, d=12, heads=1), P=5, coefficients="hermite", fused_feature_chunk_size=2048)


def test_six_terms():
    check(TritonFused, make(n=3, m=5, d=8, heads=1), P=6, fused_feature_chunk_size=8192)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("terms", [3, 4])
def test_half_types(dtype, terms):
    check(TritonFull, make(dtype=dtype), P=terms)


@pytest.mark.parametrize("d", [20, 64, 80, 128])
def test_head_dims(d):
    check(TritonFull, make(d=d, n=33, m=29, heads=1), P=3)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 100), (100, 1), (64, 64), (63, 130)])
def test_lengths(n, m):
    check(TritonFull, make(n=n, m=m, heads=1), P=3)


def test_grouped_queries_batch_and_sub_heads():
    check(TritonFused, make(n=19, m=23, batch=2, heads=2, heads_kv=1, d=32), P=4, sub_head_blocks=2, fused_feature_chunk_size=512)


@pytest.mark.parametrize("form", ["bool", "additive", "per batch"])
def test_key_masks(form):
    def mask(m, gen):
        hidden = torch.rand(2 if form == "per batch" else 1, m, generator=gen) < 0.3
        bias = torch.randn(hidden.shape, generator=gen) if form != "bool" else torch.zeros(hidden.shape)
        return bias.masked_fill(hidden, -math.inf)

    call = make(n=20, m=30, batch=2, heads=1, mask=mask)
    out = check(TritonFull, call, P=4)
    hidden = (call.key_mask == -math.inf)[:, None, :, None].expand(call.k.shape)
    poisoned = AttentionCall(call.q, call.k.masked_fill(hidden, 1e4), call.v, call.scale, key_mask=call.key_mask)
    assert relative(TritonFull(TaylorOptions(fallback_on_negative=False)).run(poisoned), out.double()) < 1e-5


def test_strided_inputs_and_output_layout():
    call = make(d=32, heads=2, n=40, m=40)
    packed = torch.stack([call.q, call.k, call.v], 3).transpose(1, 2).contiguous().transpose(1, 2)  # [B, H, N, 3, D] of [B, N, H, 3, D]
    q, k, v = packed.unbind(3)
    out = check(TritonFull, AttentionCall(q, k, v, call.scale), P=3)
    assert out.transpose(1, 2).is_contiguous()
    wide = torch.randn(1, 2, 16, 40).to(DEVICE).transpose(2, 3)  # coordinates are not neighbours in memory
    check(TritonFull, AttentionCall(wide, wide, wide, 0.2), P=3)


def test_negative_scale_and_keys_not_centred():
    check(TritonFull, make(scale=-0.15, heads=1, n=20, m=30), P=4, center_keys=False)


@pytest.mark.parametrize("norm", [{"qk_normalize": True}, {"qk_norm_clip": 3.5}, {"qk_norm_power": 0.4},
                                  {"qk_norm_clip": 5.0, "qk_norm_power": 0.2, "scale_mul": 0.8}], ids=["l2", "clip", "power", "all"])
def test_normalisation(norm):
    check(TritonFull, make(heads=1, n=20, m=30), P=4, **norm)


def test_qk_norm_sigma_max_gates_normalisation_by_sigma():
    call = make(heads=1, sigma=0.9)
    plain = check(TritonFull, call, P=3)
    gated = check(TritonFull, call, P=3, qk_normalize=True, qk_norm_sigma_max=0.5)
    assert torch.equal(plain, gated)
    assert not torch.equal(plain, check(TritonFull, call, P=3, qk_normalize=True, qk_norm_sigma_max=0.95))


@pytest.mark.parametrize("option", [{"s_store_bf16": True}, {"denom_fp32": False}], ids=["s_bf16", "z_16_bit"])
def test_s_store_bf16_and_denom_fp32_off_stay_within_their_rounding(option):
    call = make(dtype=torch.float16)
    options = TaylorOptions(P=3, fallback_on_negative=False, **option)
    assert relative(TritonFull(options).run(call), dense(call, options)) < 2**-8


def test_fused_value_chunk_size_and_force_fp32():
    call, options = make(d=32, heads=1, dtype=torch.float16), {"fused_value_chunk_size": 24, "force_fp32": True}
    check(TritonFused, call, P=3, **options)
    assert TritonFused(TaylorOptions(P=3, **options)).plan(call).value_columns == ((0, 24), (24, 32))


def test_split_over_the_sequence(monkeypatch):
    monkeypatch.setattr(plan, "KEYS_A_SPLIT", 16)
    call = make(n=20, m=70, heads=1)
    out = check(TritonFull, call, P=4)
    assert torch.equal(out, check(TritonFull, call, P=4))


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_a_program(monkeypatch, blocks):
    monkeypatch.setattr(tuned, "choose", lambda *_: tuned.Tile(32, 4, 2, blocks))
    check(TritonFused, make(d=20, heads=1, n=30, m=40), P=4, fused_feature_chunk_size=64 * 9)


def tiles_of(monkeypatch):
    """Kernel -> rows of the tiles that are chosen from here on."""
    found, choose = {}, tuned.choose

    def record(kernel, *about):
        tile = choose(kernel, *about)
        found.setdefault(kernel, set()).add(tile.rows)
        return tile

    monkeypatch.setattr(tuned, "choose", record)
    return found


@pytest.mark.parametrize(("rows_q", "rows_k"), [(16, 128), (128, 16)])
def test_block_sizes(monkeypatch, rows_q, rows_k):
    tiles = tiles_of(monkeypatch)
    check(TritonFull, make(heads=1, n=40, m=150), P=3, block_size_q=rows_q, block_size_k=rows_k)
    assert tiles == {"evaluate": {rows_q}, "accumulate": {rows_k}}


def test_preset_seed(monkeypatch):
    call, tiles = make(d=32, heads=1, n=20, m=30), tiles_of(monkeypatch)
    out = check(TritonFull, call, preset="seed")
    assert tiles == {"evaluate": {32}, "accumulate": {16}}
    assert torch.equal(out, check(TritonFull, call, P=4, sub_head_blocks=4, block_size_q=32, block_size_k=16))
    assert relative(out, dense(call, TaylorOptions(P=4))) > 0.01


def test_probe_samples():
    backend = TritonFull(TaylorOptions(P=2, probe_samples=7))
    backend.run(make(n=30, m=30))
    assert backend.last_probe.count == 2 * 7
    backend = TritonFull(TaylorOptions(P=2, probe_samples=50))
    backend.run(make(n=30, m=30))
    assert backend.last_probe.count == 2 * 30


def test_heads_in_chunks(monkeypatch):
    call = make(heads=2, batch=2, n=20, m=20)
    whole = check(TritonFull, call, P=3)
    monkeypatch.setattr(TritonFull, "workspace_limit", 1)
    assert TritonFull(TaylorOptions(P=3)).plan(call).states_at_once == 1
    assert torch.equal(whole, check(TritonFull, call, P=3))


def test_probe_and_denominators_agree():
    call = make(n=48, m=60)
    for options in (TaylorOptions(P=4), TaylorOptions(P=4, coefficients="hermite", qk_norm_clip=3.5)):
        backend, oracle = TritonFull(options), TaylorTorch(options)
        backend.run(call)
        oracle.run(call)
        for ours, theirs in ((backend.last_probe, oracle.last_probe), (backend.last_denominators, oracle.last_denominators)):
            assert ours.count == theirs.count and ours.bad_fraction == theirs.bad_fraction == 0
            assert [ours.least, ours.greatest, ours.mean] == pytest.approx([theirs.least, theirs.greatest, theirs.mean], rel=1e-4)
        assert backend.last_probe.count == 2 * 16 and backend.last_denominators.count == 2 * 48


@pytest.mark.parametrize("probe", [True, False])
def test_negative_denominators_fall_back(probe):
    x = make(n=40, m=40).q * 6
    call = AttentionCall(x, -x, x, 1.0)
    with pytest.raises(Fallback, match=("probe: " if probe else "") + r"fraction .* of denominators not above eps, limit 0"):
        TritonFull(TaylorOptions(P=4, early_probe=probe)).run(call)
    TritonFull(TaylorOptions(P=4, early_probe=probe, denom_fallback_frac_limit=1.0)).run(call)


def test_nothing_to_attend_to_falls_back():
    call = make(mask=lambda m, gen: torch.full((1, m), -math.inf))
    with pytest.raises(Fallback, match="denominators"):
        TritonFull(TaylorOptions(P=3)).run(call)


@pytest.mark.parametrize("limit", [0.0, 0.07, 0.1, 0.29, 0.5, 1.0])
def test_device_and_host_agree_on_the_limit(limit):
    """The device leaves the work out exactly where the host then raises: no result that was not computed can be taken for one."""
    backend = TritonFull(TaylorOptions(denom_fallback_frac_limit=limit))
    for count in (1, 7, 16, 30, 100, 1536):
        most = backend.most_bad(count)
        assert most / count <= limit < (most + 1) / count


@pytest.mark.parametrize("most_bad", [16, -1])
def test_a_failed_probe_leaves_the_rest_undone(monkeypatch, most_bad):
    call = make(heads=1)
    monkeypatch.setattr(launch, "_output", lambda q: torch.full_like(q, math.nan))
    out, summary = launch.attend(call.q, call.k, call.v, None, None, None, call.scale, 4, False, True, 1, 0, 0, False,
                                        False, True, 0, 0, 16, most_bad, 1e-6, 128 * MIB)
    assert summary[0].isfinite().all()
    assert bool(out.isfinite().all() if most_bad > 0 else out.isnan().all())


def test_kernels_are_launched_with_the_device_of_q_current(monkeypatch):
    seen, current = [], []

    @contextmanager
    def launching_on(device):
        current.append(device)
        yield
        current.pop()

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append((self.name, list(current)))
            return self.kernel[grid]

    kernels = {name: kernel for name, kernel in vars(launch).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(launch, name, Recorded(name, kernel))
    monkeypatch.setattr(launch, "launching_on", launching_on)
    call = make(n=20, m=20, heads=1)
    for options in (TaylorOptions(P=3), TaylorOptions(P=2)):  # the probe goes after the first chunk, or before everything
        TritonFull(options).run(call)
    assert {name for name, _ in seen} == set(kernels) and len(kernels) == 7
    assert all(devices == [call.q.device] for _, devices in seen), seen


def test_operators_are_well_formed():
    call = make(heads=1)
    arguments = (call.q, call.k, call.v, None, None, None, call.scale, 3, False, True, 1, 0, 0, False, False, True, 0, 0)
    for samples in (0, 16):
        torch.library.opcheck(launch.taylor_attention, (*arguments, samples, 0, 1e-6, 128 * MIB),
                              test_utils=("test_schema", "test_faketensor"))


def test_full_refuses_what_exceeds_its_workspace():
    x = torch.empty(1, 1, 200, 128, dtype=torch.bfloat16, device="meta")
    options = TaylorOptions(P=5, max_feature_dim_R=10**9)
    backend = TritonFull(options)
    backend.devices = frozenset({"meta"})
    assert any("triton_fused streams it" in reason for reason in backend.reasons_against(AttentionCall(x, x, x, 1.0)))


def test_no_product_has_its_registers_overwritten():
    """Built for sm_90 in a process of its own, since this one may have the interpreter in the compiler's place."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton brings no disassembler")
    script = Path(__file__).parent / "sass_hazards.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[1])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.skipif(ON_GPU, reason="test_workspace_is_what_torch_allocates asks the same on a GPU")
@pytest.mark.parametrize(("kind", "options"), [(TritonFull, dict(P=3, qk_norm_clip=9.0)), (TritonFused, dict(fused_feature_chunk_size=1024))],
                         ids=lambda value: str(getattr(value, "name", value)))
def test_workspace_holds_with_probe_and_fallback(monkeypatch, kind, options):
    accumulate = launch._accumulate

    def after_collection(*arguments):
        gc.collect()  # Triton's interpreter leaves the arguments of a launch in reference cycles
        return accumulate(*arguments)

    monkeypatch.setattr(launch, "_accumulate", after_collection)
    call = make(n=20, m=20, heads=1, shift=0.0)
    backend = kind(TaylorOptions(**options))
    backend.run(call)
    assert backend.last_probe is not None and backend.last_denominators is not None
    used = peak_nbytes(lambda: backend.run(call), [call.q, call.k, call.v]) - call.q.numel() * call.q.element_size()
    assert used == pytest.approx(backend.workspace_nbytes(call), rel=0.05), used


@pytest.mark.parametrize("kind", [TritonFull, TritonFused], ids=lambda kind: kind.name)
def test_error_aimed_takes_the_series_that_meets_the_error(kind):
    call = make(n=40, m=200, d=16, scale=0.08, target_error=0.02)
    backend = kind(TaylorOptions(error_aimed=True, P=4, min_tokens=1))
    out = backend.run(call)
    exact = torch.softmax(call.scale * call.q.double() @ call.k.double().transpose(-1, -2), -1) @ call.v.double()
    assert backend.last_R in (17, 153) and relative(out, exact) < 0.02


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [dict(d=128, P=3), dict(d=64, P=3, coefficients="hermite"), dict(d=64, P=4), dict(d=96, P=3),
                                  dict(d=256, P=3, max_head_dim=256), dict(d=128, P=4, sub_head_blocks=4), dict(d=32, P=5),
                                  dict(d=16, P=6)], ids=str)
def test_on_the_gpu(case, dtype):
    case = dict(case)
    call = make(n=1500, m=2500, d=case.pop("d"), heads=4, heads_kv=2, dtype=dtype)
    check(TritonFull, call, **case)
    check(TritonFused, call, **case)


@gpu
@needs_gpu
def test_full_heads_of_degree_three_on_the_gpu():
    check(TritonFused, make(n=300, m=2000, d=128, heads=1, dtype=torch.bfloat16), P=4)


@gpu
@needs_gpu
@pytest.mark.parametrize("checked", [{}, {"early_probe": False, "fallback_on_negative": False}], ids=["default", "no checks"])
@pytest.mark.parametrize(("kind", "options", "n"), [
    (TritonFull, dict(P=3), 16_896), (TritonFused, dict(P=4), 4_096), (TritonFull, dict(P=4, sub_head_blocks=4), 4_096),
    (TritonFull, dict(P=3, qk_norm_clip=9.0), 16_896)], ids=lambda value: str(getattr(value, "name", value)))
def test_workspace_is_what_torch_allocates(kind, options, n, checked):
    call = make(n=n, m=n, d=128, heads=24, dtype=torch.bfloat16, shift=0.0)
    backend = kind(TaylorOptions(**checked, **options))
    backend.run(call)  # what is kept from call to call is there now
    used = peak_nbytes(lambda: backend.run(call), [call.q, call.k, call.v]) - call.q.numel() * call.q.element_size()
    assert used == pytest.approx(backend.workspace_nbytes(call), rel=0.05), used


@gpu
@needs_gpu
def test_compiles_without_graph_breaks():
    call = make(n=300, m=300, d=64, heads=2, dtype=torch.bfloat16)
    backend = TritonFull(TaylorOptions(P=3, fallback_on_negative=False, log_shapes=False))

    def attend(q, k, v):
        return backend.attend(AttentionCall(q, k, v, call.scale))

    compiled = torch.compile(attend, fullgraph=True)
    assert torch.equal(compiled(call.q, call.k, call.v), attend(call.q, call.k, call.v))


@gpu
@needs_gpu
def test_offsets_beyond_32_bits():
    rows = torch.empty(1, 1, 70_000, 128, dtype=torch.bfloat16, device=DEVICE).normal_()
    strided = torch.empty(70_000 * 32_000, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 1, 70_000, 128), (0, 0, 32_000, 1))
    strided.copy_(rows)
    options = TaylorOptions(P=3, fallback_on_negative=False)
    near = TritonFull(options).run(AttentionCall(rows, rows, rows, 0.05))
    assert torch.equal(near, TritonFull(options).run(AttentionCall(strided, strided, strided, 0.05)))
