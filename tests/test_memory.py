"""What the memory hook adds to ComfyUI's estimate."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taylor_patch import engine as engines
from taylor_patch.memory import Workspaces
from taylor_patch.out_of_memory import HeadGroups, run_in_groups
from tests.test_hooks import HEADS, SPARSE, TEXT, TOKENS, qkv

SHAPE = (1, 16, 64, 64)


class Flux:
    """Named as ComfyUI's; 32 x 32 = 1,024 image tokens at SHAPE."""

    def __init__(self, **attributes):
        self.diffusion_model = SimpleNamespace(patch_size=2, **attributes)


def estimate(comfy, model, shape=SHAPE, dynamic=False):
    patcher = SimpleNamespace(model=model, is_dynamic=lambda: dynamic, load_device=torch.device("cpu"))
    return comfy.modules["comfy.sampler_helpers"].estimate_memory(patcher, shape, {})


def test_prediction_from_the_latent(comfy, configure, caplog):
    configure(SPARSE)
    engines.engine()
    caplog.set_level("INFO")
    model = Flux(num_heads=4, hidden_size=512)
    required, minimum = estimate(comfy, model)
    assert required - 1000 == minimum - 500 > 2**20
    assert "MiB are kept free for the attention of Flux" in caplog.text
    assert estimate(comfy, model, (1, 16, 128, 128))[0] > 2 * required
    assert estimate(comfy, model, (1, 16, 1, 64, 64))[0] == required


@pytest.mark.parametrize(("text", "model", "dynamic"), [
    (SPARSE, Flux(num_heads=4, hidden_size=512), True),
    (SPARSE, Flux(), False),
    (SPARSE.replace("[backends", "memory_reserve = false\n[backends"), Flux(num_heads=4, hidden_size=512), False),
    ('[taylor_patch]\nbackend = "sdpa"\n', Flux(num_heads=4, hidden_size=512), False),
    ("", Flux(num_heads=4, hidden_size=512), False),
], ids=["dynamic", "heads-unknown", "switched-off", "exact", "auto-has-nothing"])
def test_nothing_is_added(comfy, configure, text, model, dynamic):
    configure(text)
    assert estimate(comfy, model, dynamic=dynamic) == (1000, 500)


def test_factor(comfy, configure):
    model = Flux(num_heads=4, hidden_size=512)
    added = []
    for factor in (1.0, 2.0):
        configure(SPARSE.replace("[backends", f"memory_reserve_factor = {factor}\n[backends"))
        added.append(estimate(comfy, model)[0] - 1000)
    assert added[1] == 2 * added[0]


@pytest.mark.parametrize("said", [True, False])
def test_memory_reserve_log(comfy, configure, caplog, said):
    configure(SPARSE.replace("[backends", f"memory_reserve_log = {str(said).lower()}\n[backends"))
    engines.engine()
    caplog.set_level("INFO")
    assert estimate(comfy, Flux(num_heads=4, hidden_size=512))[0] > 1000 and ("MiB are kept free" in caplog.text) is said


def test_a_run_that_was_seen_counts_more_than_the_prediction(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    latent = (1, 4, 32, 32)
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o), latent=latent)
    stated = engines.current().workspaces.of("Flux", latent)
    assert stated and estimate(comfy, Flux(num_heads=4, hidden_size=512), latent)[0] == 1000 + int(stated * 1.1)
    assert engines.current().workspaces.of("Flux", (1, 16, 8, 8)) is None


def test_a_hook_that_fails_leaves_the_estimate(comfy, configure, caplog):
    configure(SPARSE)
    assert comfy.modules["comfy.sampler_helpers"].estimate_memory(None, SHAPE, {}) == (1000, 500)
    assert "no memory is reserved (AttributeError" in caplog.text


def test_a_backend_that_does_not_state_its_workspace_still_answers(comfy, configure, monkeypatch):
    configure(SPARSE)

    def unknown(call):
        raise NotImplementedError("not stated")

    monkeypatch.setattr(engines.engine().router.backends["near_far"], "workspace_nbytes", unknown, raising=False)
    q, k, v = qkv()
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert engines.current().last_run.calls == {"near_far": 1}
    assert engines.current().workspaces.of("Flux", (1, 4, 32, 32)) is None


def test_records_are_bounded_and_keep_the_largest():
    peaks = Workspaces()
    for size in range(100):
        peaks.record("Flux", (1, 4, size, size), 10)
    assert peaks.of("Flux", (1, 4, 0, 0)) is None and peaks.of("Flux", (2, 4, 99, 99)) == 10
    peaks.record("Flux", (1, 4, 99, 99), 5)
    assert peaks.of("Flux", (1, 4, 99, 99)) == 10
    peaks.record("Flux", None, 5)


def sample_many(comfy, runs=1, heads=HEADS, steps=4):
    """The same call in each of `steps` steps; outputs of the last run, and q, k, v."""
    q, k, v = qkv(heads=heads)
    for _ in range(runs):
        outs = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, heads, transformer_options=o),
                            sigmas=tuple(float(x) for x in range(steps, -1, -1)))
    return outs, (q, k, v)


class AcceleratorError(RuntimeError):
    """Named as torch's; a stand-in where the machine has no accelerator."""

    def __init__(self, code):
        super().__init__("CUDA error")
        self.error_code = code


@pytest.mark.parametrize(("error", "judge"), [
    (torch.OutOfMemoryError("CUDA out of memory"), None), (AcceleratorError(2), None),
    (RuntimeError("hipErrorOutOfMemory"), lambda error: "OutOfMemory" in str(error)),
], ids=["torch", "accelerator-2", "comfyui-knows"])
def test_out_of_memory_means_fewer_heads_from_then_on(comfy, configure, monkeypatch, caplog, error, judge):
    """4 heads do not fit, 2 do: one exact call, then the same values as all heads at once would have given, also in the next run."""
    configure(SPARSE)
    if judge:
        monkeypatch.setitem(sys.modules, "comfy.model_management", SimpleNamespace(is_oom=judge))
    backend = engines.engine().router.backends["near_far"]
    run, seen, released = type(backend).run, [], []

    def scarce(call):
        seen.append(call.q.shape[1])
        if call.q.shape[1] > 2:
            raise error
        return run(backend, call)

    monkeypatch.setattr(backend, "run", scarce, raising=False)
    monkeypatch.setattr(backend, "release", lambda: released.append(1), raising=False)
    outs, (q, k, v) = sample_many(comfy, heads=4)
    assert seen == [4, 2, 2, 2, 2, 2, 2] and released == [1]
    assert engines.current().last_run.calls == {"exact": 1, "near_far": 3}
    assert engines.current().last_run.fallbacks == {"near_far: out of memory": 1}
    assert torch.equal(outs[0], comfy.original(q, k, v, 4))
    monkeypatch.setattr(backend, "run", lambda call: run(backend, call), raising=False)
    engines.current().head_groups = HeadGroups()
    (whole,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, 4, transformer_options=o))
    assert torch.equal(outs[1], whole) and torch.equal(outs[3], whole)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and "the backend works on 2 key heads at a time from here on" in warnings[0]


def test_what_never_fits_is_exact_for_the_rest_of_the_run(comfy, configure, monkeypatch, caplog):
    configure(SPARSE)
    seen = []

    def never(call):
        seen.append(call.q.shape[1])
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines.engine().router.backends["near_far"], "run", never, raising=False)
    outs, (q, k, v) = sample_many(comfy, heads=3, steps=5)
    assert seen == [3, 2, 1] and all(torch.equal(out, comfy.original(q, k, v, 3)) for out in outs)
    assert engines.current().last_run.fallbacks == {"near_far: out of memory": 3, "near_far: failed earlier in this run": 2}
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 3


def test_no_tensor_of_a_failed_call_is_kept(comfy, configure, monkeypatch):
    """What the backend had allocated is gone before exact attention runs on the same inputs."""
    configure(SPARSE)
    alive = []

    def run(call):
        scratch = torch.empty(1000)
        alive.append(weakref.ref(scratch))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines.engine().router.backends["near_far"], "run", run, raising=False)
    q, k, v = qkv()
    seen = []

    def override(func, *args, **kwargs):
        seen.append(alive[0]())
        return func(*args, **kwargs)

    text = SPARSE + '[[rules]]\nwhen = { model = "flux" }\nrespect = "rule"\n'
    configure(text)
    monkeypatch.setattr(engines.engine().router.backends["near_far"], "run", run, raising=False)
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o),
                 model_options={"transformer_options": {"optimized_attention_override": override}})
    assert seen == [None]


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_groups_of_heads_give_the_same(kv_heads, most):
    from taylor_patch.backends.taylor_torch import TaylorTorch
    from taylor_patch.call import from_heads_first

    q, k, v = torch.randn(2, 6, 70, 16), *(torch.randn(2, kv_heads, 70, 16) for _ in range(2))
    call = from_heads_first(q * 0.1, k, v, mask=torch.rand(2, 1, 1, 70) > 0.2)
    backend, sizes = TaylorTorch(), []
    run = backend.run
    backend.run = lambda part: sizes.append(part.k.shape[1]) or run(part)
    assert torch.equal(run_in_groups(backend, call, most), run(call))
    assert sum(sizes) == kv_heads and max(sizes) == min(most, kv_heads)


def test_what_a_backend_settles_for_a_head_stays_with_it():
    """near_far's probe, which is kept for the block: each group of heads has its own."""
    from taylor_patch.backends.near_far import NearFar
    from taylor_patch.call import TokenGrid, from_heads_first

    q, k, v = (torch.randn(1, 4, 1024, 16) * torch.tensor([0.1, 1.0, 2.0, 0.5]).view(1, 4, 1, 1) for _ in range(3))
    call = from_heads_first(q, k, v, grid=TokenGrid(1, 32, 32), target_error=0.1)
    call = dataclasses.replace(call, sigma=0.5, block=3)
    whole, split = NearFar(), NearFar()
    for _ in range(2):  # the second time by what the first settled
        assert torch.equal(run_in_groups(split, call, 1), whole.run(call))


def test_a_group_of_the_wrong_shape_is_found():
    from taylor_patch.call import from_heads_first
    from taylor_patch.engine import check_form

    call = from_heads_first(*(torch.randn(1, 4, 9, 16) for _ in range(3)))
    for answer in (lambda part: part.q[:, :, 1:], lambda part: part.q.double(), lambda part: None):
        assert check_form(run_in_groups(SimpleNamespace(run=answer), call, 2), call)


FREED = SPARSE.replace("[backends", 'memory_reserve = "free_memory"\n[backends')


def test_free_memory_is_asked_for_at_run_start_only(comfy, configure, monkeypatch):
    """Before ComfyUI places the weights, never in a forward pass, and not by a run inside another."""
    configure(FREED)
    events = []
    management = SimpleNamespace(free_memory=lambda nbytes, device: events.append((int(nbytes), device)))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    model = Flux(num_heads=4, hidden_size=512)
    patcher = SimpleNamespace(model=model, is_dynamic=lambda: False, load_device=torch.device("cpu"))
    guider = comfy.samplers.CFGGuider
    monkeypatch.setattr(guider, "model_patcher", patcher, raising=False)
    q, k, v = qkv()

    def body(o):
        if len(events) == 1:
            events.append("inside")
            comfy.sample(lambda o: events.append("forward"), latent=SHAPE)
        events.append("forward")
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    comfy.sample(body, latent=SHAPE, sigmas=(2.0, 1.0, 0.0))
    (nbytes, device), *rest = events
    assert nbytes > 2**20 and device == torch.device("cpu") and rest == ["inside", "forward", "forward", "forward"]
    assert estimate(comfy, model) == (1000, 500)


def test_tables_that_stay_are_made_outside_the_malloc_graph(monkeypatch):
    """comfy.model_prefetch.pause_malloc_graph, in the versions that have it."""
    from taylor_patch.features.symmetric import TableCache
    from taylor_patch.features.tiles import pair_table

    events = []

    @contextmanager
    def pause_malloc_graph(sync=False):
        events.append("pause")
        yield
        events.append("resume")

    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", SimpleNamespace(pause_malloc_graph=pause_malloc_graph))
    pair_table.cache_clear()
    cpu, cache = torch.device("cpu"), TableCache(limit_nbytes=16000)
    for _ in range(2):
        pair_table(16, 2, cpu)
        cache.get(8, 2, 0, 36, cpu)
    assert events == ["pause", "resume"] * 2
    cache.get(32, 3, 0, 5984, cpu)  # too large to be kept
    assert len(events) == 4 and cache.nbytes == 36 * 3 * 8
    cache.clear()
    assert cache.nbytes == 0


class Allocations(TorchDispatchMode):
    """(operator, shape, dtype) of every tensor that an operator made, in order."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.made += [(str(func), tuple(x.shape), x.dtype) for x in tree_leaves(out)
                      if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in before]
        return out


def made_by(name, options, tokens, record):
    """What the backend allocates in four calls of one shape with other values, a list for each; record(call) collects."""
    from taylor_patch.call import TokenGrid, from_heads_first

    kind = type(engines.engine().router.backends[name])
    backend, made = kind(kind.options_type(**options)), []
    for seed in range(4):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 2, tokens + TEXT, 16) * (seed if name == "near_far" else 0.1) for _ in range(3))
        made.append(record(backend, from_heads_first(q, k, v, grid=TokenGrid(1, tokens // 8, 8, start=TEXT))))
    return made


@pytest.mark.parametrize(("name", "options"), [("near_far", {}), ("taylor_torch", {"P": 3})])
def test_calls_of_a_shape_allocate_the_same(name, options):
    """Once the tables are there, whatever the values are: what ComfyUI's compiler asks for."""
    def record(backend, call):
        with Allocations() as seen:
            backend.run(call)
        return seen.made

    made = made_by(name, options, TOKENS, record)
    assert made[1] == made[2] == made[3] and len(made[1]) > 20


@pytest.mark.parametrize("name", ["triton_full", "triton_fused"])
def test_launchers_allocate_the_same(monkeypatch, name):
    """The Triton backends, whose launchers allocate everything by torch.empty; the kernels run in the interpreter."""
    pytest.importorskip("triton")
    empty, seen = torch.empty, []

    def record(backend, call):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *shape, **kwargs: seen.append((shape, kwargs)) or empty(*shape, **kwargs))
            backend.run(call)
        return list(seen)

    made = made_by(name, {"P": 3}, 64, record)
    assert made[1] == made[2] == made[3] and len(made[1]) > 5
