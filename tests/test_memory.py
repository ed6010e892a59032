"""What the memory hook adds to ComfyUI's estimate."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fake_comfy import Diffusion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taylor_patch import engine as engines
from taylor_patch.backends import near_far
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.families import FAMILIES, family
from taylor_patch.memory import Workspaces, predict
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
    assert engines.current().workspaces.of("Flux", (4, *latent[1:])) is None


def test_a_run_is_remembered_by_what_was_asked_for(comfy, configure):
    """Its evaluations may be of cond and uncond at once, or of windows and tiles of the latent."""
    configure(SPARSE)
    q, k, v = qkv()

    def sampler(model, x, sigma, options):
        model.apply_model(torch.cat((x, x))[..., :16, :], sigma, transformer_options=options)
        return x

    guider = comfy.samplers.CFGGuider(comfy.model_base.Flux(Diffusion(
        lambda o: comfy.attention.optimized_attention(q[:, :128], k[:, :128], v[:, :128], HEADS, transformer_options=o))))
    guider.outer_sample(torch.zeros(1, 4, 32, 32), None, sampler, torch.tensor([1.0, 0.0]))
    assert engines.current().last_run.calls == {"near_far": 1}
    assert engines.current().workspaces.of("Flux", (1, 4, 32, 32))


def test_picture_and_sound_packed_into_one_latent(comfy, configure):
    """estimate_memory then gets [B, 1, all values]; the picture's own shape is in outer_sample's arguments."""
    configure(SPARSE)
    model, reserved = Flux(num_heads=4, hidden_size=512), []

    def sampler(unused, x, sigma, options):
        reserved.append(estimate(comfy, model, x.shape))
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.outer_sample(torch.zeros(1, 1, 90000), None, sampler, torch.tensor([1.0, 0.0]), latent_shapes=[SHAPE, (1, 8, 3058)])
    assert reserved == [estimate(comfy, model, SHAPE)] and reserved[0][0] > 1000


def module(**attributes):
    made = torch.nn.Module()
    for name, value in attributes.items():
        setattr(made, name, torch.nn.ModuleList(value) if isinstance(value, list) else value)
    return made


class Downsample(torch.nn.Module):
    """Named as ComfyUI's."""


def unet(**attributes):
    """SDXL's: attention from the second level on."""
    level = module(transformer_blocks=[module(attn1=module(heads=10, dim_head=64), attn2=module(heads=10, dim_head=64))])
    deeper = module(transformer_blocks=[module(attn1=module(heads=20, dim_head=64))])
    blocks = [[module()], [module()], [Downsample()], [module(), level], [Downsample()], [module(), deeper]]
    return module(input_blocks=[torch.nn.ModuleList(block) for block in blocks], **attributes)


SQUARE, VIDEO = (1, 16, 128, 128), (1, 16, 21, 90, 160)  # 1024x1024; 81 frames of 1280x720
# Of people's models: family, what its class has in ComfyUI 0.33 or 0.3.64, latent, heads, tokens, head_dim, grid.
MODELS = {
    "flux": ("Flux", module(num_heads=24, hidden_size=3072, patch_size=2), SQUARE, 24, 4608, 128, TokenGrid(1, 64, 64, 512)),
    "flux2": ("Flux2", module(num_heads=48, hidden_size=6144, patch_size=1), (1, 128, 64, 64), 48, 4608, 128, TokenGrid(1, 64, 64, 512)),
    "chroma": ("Chroma", module(num_heads=24, hidden_size=3072, patch_size=2), SQUARE, 24, 4608, 128, TokenGrid(1, 64, 64, 512)),
    "sd3": ("SD3", module(num_heads=38, hidden_size=2432, patch_size=2), SQUARE, 38, 4608, 64, TokenGrid(1, 64, 64, 512)),
    "sdxl": ("SDXL", unet(model_channels=320, num_heads=-1, num_head_channels=64), (1, 4, 128, 128), 10, 4096, 64, TokenGrid(1, 64, 64)),
    "wan": ("WAN21", module(num_heads=40, dim=5120, patch_size=(1, 2, 2)), VIDEO, 40, 75600, 128, TokenGrid(21, 45, 80)),
    "hunyuan-video": ("HunyuanVideo", module(num_heads=24, hidden_size=3072, patch_size=(1, 2, 2)), VIDEO, 24, 76112, 128,
                      TokenGrid(21, 45, 80, 512)),
    "qwen-image": ("QwenImage", module(inner_dim=3072, patch_size=2, transformer_blocks=[
        module(dim=3072, num_attention_heads=24, attention_head_dim=128, attn=module(heads=24, dim_head=128, inner_dim=3072))]),
        (1, 16, 1, 128, 128), 24, 4608, 128, TokenGrid(1, 64, 64, 512)),
    "z-image": ("Lumina2", module(dim=3840, n_heads=30, patch_size=2, pad_tokens_multiple=32), (1, 16, 104, 150), 30, 3904 + 512, 128,
                TokenGrid(1, 52, 75, 512)),
    "ltxv": ("LTXV", module(num_attention_heads=32, attention_head_dim=128, inner_dim=4096, patchifier=SimpleNamespace(patch_size=(1, 1, 1))),
             (1, 128, 20, 22, 32), 32, 14080, 128, TokenGrid(20, 22, 32)),
    "ltxv-0.3.64": ("LTXV", module(inner_dim=2048, patchifier=SimpleNamespace(patch_size=(1, 1, 1)), transformer_blocks=[
        module(attn1=module(heads=32, dim_head=64))]), (1, 128, 20, 22, 32), 32, 14080, 64, TokenGrid(20, 22, 32)),
    "cosmos-predict2": ("CosmosPredict2", module(num_heads=16, model_channels=2048, patch_spatial=2, patch_temporal=1),
                        (1, 16, 1, 128, 128), 16, 4096, 128, TokenGrid(1, 64, 64)),
    "auraflow": ("AuraFlow", module(patch_size=2, double_layers=[module(attn=module(n_heads=12, head_dim=256))]), SQUARE, 12, 4608, 256,
                 TokenGrid(1, 64, 64, 512)),
    "hidream": ("HiDream", module(num_attention_heads=20, attention_head_dim=128, inner_dim=2560, patch_size=2), SQUARE, 20, 4608, 128,
                TokenGrid(1, 64, 64)),
    "krea2": ("Krea2", module(heads=48, patch=2, blocks=[module(attn=module(heads=48, kvheads=12, headdim=128))]), SQUARE, 48, 4608, 128,
              TokenGrid(1, 64, 64, 512)),
    "kandinsky5": ("Kandinsky5", module(model_dim=1792, patch_size=(1, 2, 2), visual_transformer_blocks=[
        module(self_attention=module(num_heads=28, head_dim=64))]), (1, 16, 31, 64, 64), 28, 31744, 64, TokenGrid(31, 32, 32)),
    "minimax-h3": ("MiniMaxH3", module(hidden_size=5376, patch_size=(1, 2, 2), blocks=[module(attn=module(heads=56, head_dim=128))]),
                   (1, 24, 21, 48, 84), 56, 21680, 128, TokenGrid(21, 24, 42, 512)),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_prediction_is_of_the_call_that_the_model_makes(configure, monkeypatch, case, batch):
    """With 512 text tokens where those are joined to the image's, cond and uncond at once."""
    configure(SPARSE)
    name, diffusion_model, (_, *latent), heads, tokens, head_dim, grid = MODELS[case]
    router, asked = engines.engine().router, []
    states = router.backends["near_far"].workspace_nbytes
    monkeypatch.setattr(router.backends["near_far"], "workspace_nbytes", lambda call: (asked.append(call), states(call))[1], raising=False)
    model, device = type(name, (), {"diffusion_model": diffusion_model})(), torch.device("cpu")
    predicted = predict(router, model, (batch, *latent), device)
    x = torch.empty(1, dtype=torch.bfloat16).expand(2 * batch, heads, tokens, head_dim)
    assert predicted == states(AttentionCall(x, x, x, head_dim**-0.5, grid=grid)) > 0
    assert [(call.q.shape, call.k.shape, call.grid) for call in asked] == [(x.shape, x.shape, grid)]


def test_every_listed_family_has_a_prediction():
    assert {family(name) for name, *_ in MODELS.values()} == set(FAMILIES)


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
    assert peaks.of("Flux", (1, 4, 0, 0)) is None and peaks.of("Flux", (1, 4, 99, 99)) == 10
    assert peaks.of("Flux", (2, 4, 99, 99)) is None
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
    from taylor_patch.backends.taylor.plain import TaylorTorch
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
    pytest.importorskip("triton")
    from taylor_patch.backends.near_far.op import _constants
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
    _constants.cache_clear()
    cpu, cache = torch.device("cpu"), TableCache(limit_nbytes=16000)
    for _ in range(2):
        pair_table(16, 2, cpu)
        cache.get(8, 2, 0, 36, cpu)
        _constants(cpu)
    assert events == ["pause", "resume"] * 3
    cache.get(32, 3, 0, 5984, cpu)  # too large to be kept
    assert len(events) == 6 and cache.nbytes == 36 * 3 * 8
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


@pytest.mark.parametrize("options", [{}, {"density": 0.3}], ids=["probed, then settled", "density given"])
def test_the_launcher_of_near_far_allocates_the_same(monkeypatch, options):
    """A call that is probed may differ from one that is not, but not from other calls that are. The kernels run in the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(near_far, "runs_kernels", lambda device: True)
    seen = []

    def noted(make):
        return lambda *shape, **kwargs: seen.append((shape, kwargs)) or make(*shape, **kwargs)

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))

    def record(backend, call):
        call, calls = dataclasses.replace(call, memo={}, sigma=1.0, block=0), []
        for _ in range(2):
            seen.clear()
            backend.run(call)
            calls.append(list(seen))
        return calls

    made = made_by("near_far", options, 64, record)
    assert made[0] == made[1] == made[2] == made[3] and all(len(call) > 20 for call in made[0])
    assert (made[0][0] == made[0][1]) is ("density" in options)


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
