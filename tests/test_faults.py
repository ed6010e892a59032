"""Whatever goes wrong: the run finishes, the final latent is the exact one, an interrupt interrupts, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import tempfile
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import taylor_patch
from taylor_patch import engine as engines
from taylor_patch import guard, telemetry
from taylor_patch.backends.base import Fallback
from taylor_patch.backends.near_far import NearFar
from taylor_patch.run import Evaluation, SamplingRun, current_evaluation, current_run
from tests.test_hooks import HEADS, SPARSE, InterruptProcessingException, last

SIGMAS = (4.0, 3.0, 2.0, 1.0, 0.0)
CALLS = 3
"""Attention calls of a model evaluation."""
EXACT = '[taylor_patch]\nbackend = "sdpa"\n'


class Net:
    """A small transformer: an evaluation depends on all of its attention calls, so that a fault in one would show in the latent."""

    patch_size = 2
    double_blocks = (None,) * CALLS

    def __init__(self, comfy, inputs=lambda q, k, v: (q, k, v), options=None, mask=None):
        g = torch.Generator().manual_seed(1)
        self.comfy, self.inputs, self.options, self.mask = comfy, inputs, options or {}, mask
        self.into, self.out = torch.randn(16, 96, generator=g) * 0.2, torch.randn(32, 16, generator=g) * 0.2
        self.before = lambda: None

    def named_parameters(self):
        return [("into", self.into), ("out", self.out)]

    def __call__(self, x, t, options):
        tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        for _ in range(CALLS):
            self.before()
            q, k, v = self.inputs(*(tokens @ self.into).chunk(3, -1))
            tokens = tokens + self.comfy.attention.optimized_attention(q, k, v, HEADS, self.mask,
                                                                       transformer_options={**options, **self.options}) @ self.out
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (16, 16)), 2)


def sample(comfy, net=None, sigmas=SIGMAS, t=lambda sigma: sigma, grad=True):
    """The final latent of a run."""
    model = comfy.model_base.Flux(net or Net(comfy))

    def sampler(model, x, sigma, options):
        return x - 0.2 * model.apply_model(x, t(sigma), transformer_options=options)

    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(not grad):
        return comfy.samplers.CFGGuider(model).outer_sample(noise, None, sampler, torch.tensor(sigmas))


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact(comfy, configure):
    """The final latent with exact attention everywhere; then near_far is configured."""
    configure(EXACT)
    latent = sample(comfy)
    configure(SPARSE)
    return latent


def right(call):
    """What ComfyUI's own attention gives, to the bit."""
    return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)


def raises(kind, *words):
    """A new exception each time: one that is kept would keep the frames that it has passed."""
    def fault(call):
        raise kind(*words)

    return fault


class Unspeakable(Exception):
    """Its text cannot be made."""

    def __str__(self):
        raise RuntimeError("no text")


class AcceleratorError(Exception):
    """Named as torch's."""

    error_code = 2


def with_value(index, value):
    def fault(call):
        out = right(call).clone()
        out.view(-1)[index] = value
        return out

    return fault


def after(damage, then):
    """Writes into the inputs, then answers or raises."""
    def fault(call):
        damage(call)
        return then(call)

    return fault


def generator(call):
    yield right(call)


def recursion(call):
    return recursion(call)


KEPT = []

BACKEND_FAULTS = {
    "all nan": lambda call: torch.full_like(call.q, torch.nan),
    "one nan": with_value(0, torch.nan),
    "last value inf": with_value(-1, torch.inf),
    "-inf": with_value(77, -torch.inf),
    "huge norms": lambda call: torch.full_like(call.q, 3e38),
    "nan in all but one head": lambda call: right(call).index_fill(1, torch.tensor([0]), torch.nan),
    "too few tokens": lambda call: right(call)[:, :, :-1],
    "too many tokens": lambda call: torch.cat([right(call)] * 2, 2),
    "merged heads": lambda call: right(call).transpose(1, 2).flatten(2),
    "heads behind tokens": lambda call: right(call).transpose(1, 2),
    "no batch": lambda call: right(call)[0],
    "scalar": lambda call: right(call).sum(),
    "float64": lambda call: right(call).double(),
    "float16": lambda call: right(call).half(),
    "integers": lambda call: right(call).int(),
    "complex": lambda call: right(call).cfloat(),
    "another device": lambda call: right(call).to("meta"),
    "none": lambda call: None,
    "a tuple": lambda call: (right(call), None),
    "a numpy array": lambda call: np.asarray(right(call)),
    "a generator": generator,
    "a string": lambda call: "out",
    "value error": raises(ValueError, "broken"),
    "device-side assert": raises(RuntimeError, "CUDA error: device-side assert triggered"),
    "out of memory": raises(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "out of memory of the accelerator": raises(AcceleratorError, "out of memory"),
    "out of host memory": raises(MemoryError),
    "assertion": raises(AssertionError),
    "recursion": recursion,
    "stop iteration": raises(StopIteration),
    "generator exit": raises(GeneratorExit),
    "system exit": raises(SystemExit, 1),
    "not implemented": raises(NotImplementedError, "later"),
    "time-out": raises(TimeoutError, "took too long"),
    "no text": raises(Unspeakable),
    "percent signs": raises(ValueError, "%s %d %(x)s"),
    "fallback": raises(Fallback, "not this one"),
    "fallback without text": raises(Fallback),
    "zeroes q": after(lambda call: call.q.zero_(), right),
    "scales k": after(lambda call: call.k.mul_(3), right),
    "fills v with nan": after(lambda call: call.v.fill_(torch.nan), right),
    "writes, then raises": after(lambda call: call.q.add_(1), raises(ValueError, "late")),
    "writes, then falls back": after(lambda call: call.q.add_(1), raises(Fallback, "late")),
    "returns q written over": lambda call: call.q.copy_(right(call)),
    "keeps its inputs": after(lambda call: KEPT.append(call), right),
}


class Faulty:
    """The right answer, but for call number `at` (or all from there on, where `once` is false)."""

    def __init__(self, fault, at=0, once=True):
        self.fault, self.at, self.once, self.calls = fault, at, once, 0

    def __call__(self, backend, call):
        number, self.calls = self.calls, self.calls + 1
        bad = number == self.at if self.once else number >= self.at
        return self.fault(call) if bad else right(call)


@pytest.fixture
def put(monkeypatch):
    """Put a function (backend, call) -> result in the place of near_far's run."""
    def replace(run):
        monkeypatch.setattr(NearFar, "run", lambda self, call: run(self, call))
        monkeypatch.setattr(NearFar, "reasons_against", lambda self, call: ())
        KEPT.clear()

    return replace


def written(fault):
    return fault in ("zeroes q", "scales k", "fills v with nan", "writes, then raises", "writes, then falls back", "returns q written over")


@pytest.mark.parametrize(("at", "later"), [(0, False), (0, True), (4, True), (len(SIGMAS[1:]) * CALLS - 1, True)],
                         ids=["first", "first, as on a gpu", "middle, as on a gpu", "last, as on a gpu"])
@pytest.mark.parametrize("fault", BACKEND_FAULTS)
def test_a_backend_fault_leaves_the_exact_latent(comfy, exact, put, monkeypatch, caplog, fault, at, later):
    """Inputs that are written into are found at a backend's first call of a form; a backend that writes does so there."""
    if written(fault) and at:
        pytest.skip("only a form's first call is checked for written inputs")
    monkeypatch.setattr(engines, "checks_later", lambda device: later)
    faulty = Faulty(BACKEND_FAULTS[fault], at)
    put(faulty)
    caplog.set_level(logging.INFO)
    assert torch.equal(sample(comfy), exact), last()
    assert last().outcome == "finished" and faulty.calls > at and current_run() is None
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) <= 2
    if fault not in ("keeps its inputs", "fallback", "fallback without text"):
        assert warnings and last().calls["exact"] > 0


@pytest.mark.parametrize("fault", [fault for fault in BACKEND_FAULTS if written(fault)])
def test_written_inputs_are_found_in_inference_mode_too(comfy, exact, put, caplog, fault):
    """There torch keeps no version numbers of tensors."""
    put(Faulty(BACKEND_FAULTS[fault], once=False))
    assert torch.equal(sample(comfy, grad=False), exact)
    assert any("near_far: wrote into q, k or v; this step is computed again" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("fault", BACKEND_FAULTS)
def test_a_backend_that_always_fails_costs_a_line_a_run(comfy, exact, put, caplog, fault):
    put(Faulty(BACKEND_FAULTS[fault], once=False))
    for _ in range(2):
        assert torch.equal(sample(comfy), exact)
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) <= 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptProcessingException, asyncio.CancelledError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("at", [0, 7])
def test_an_interrupt_interrupts(comfy, exact, put, error, at):
    put(Faulty(raises(error, "stop"), at))
    with pytest.raises(error):
        sample(comfy)
    assert last().outcome == f"ended by {error.__name__}" and current_run() is None and current_evaluation() is None
    put(Faulty(right))
    assert torch.equal(sample(comfy), exact) and last().outcome == "finished"


def fails(*_, **__):
    raise RuntimeError("broken")


PARTS = {
    "a backend that raises about a call": (NearFar, "reasons_against", fails),
    "a backend that cannot state its workspace": (NearFar, "workspace_nbytes", fails),
    "a backend without its denominators": (NearFar, "denominators", fails),
    "a backend that cannot say its q and k": (NearFar, "effective", fails),
    "the guard": (guard, "figures", fails),
    "the read at a step's end": ("taylor_patch.hooks.evaluation", "read", fails),
    "the record of a step": (engines.Engine, "record", fails),
    "the summary of a run": (SamplingRun, "summary", fails),
    "the time of exact attention": (telemetry.ExactTime, "milliseconds", fails),
    "the choice": (engines.Engine, "choose", fails),
    "the token grid": ("taylor_patch.grid", "infer", fails),
    "the block index": (Evaluation, "block_index", fails),
    "the step": (SamplingRun, "step_of", fails),
    "the fingerprint's place": ("taylor_patch.cache", "place", fails),
    "the look at the configuration": (engines.Engine, "reload", fails),
}


@pytest.mark.parametrize("part", ["the record of a step", "the summary of a run"])
def test_a_step_is_repaired_where_its_record_fails(comfy, exact, put, monkeypatch, part):
    owner, name, fault = PARTS[part]
    monkeypatch.setattr(engines, "checks_later", lambda device: True)
    monkeypatch.setattr(owner, name, fault)
    put(Faulty(BACKEND_FAULTS["one nan"], 4))
    assert torch.equal(sample(comfy), exact)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_ours_that_fails_leaves_the_exact_latent(comfy, exact, put, monkeypatch, part):
    owner, name, fault = PARTS[part]
    put(Faulty(right, at=-1))
    engines.engine()
    if isinstance(owner, str):
        import importlib

        owner = importlib.import_module(owner)
    monkeypatch.setattr(owner, name, fault)
    assert torch.equal(sample(comfy), exact)


def backwards():
    """A clock that goes back with every look."""
    now = [1e9]

    def look():
        now[0] -= 5.0
        return now[0]

    return look


def full(*_, **__):
    raise OSError(28, "No space left on device")


def read_only(*_, **__):
    raise OSError(30, "Read-only file system")


def on_disk(name):
    """Faults of files, each done at the start of the second evaluation."""
    path = Path("taylor_patch.toml")
    return {
        "config deleted": path.unlink,
        "config invalid": lambda: path.write_text("[taylor_patch\n"),
        "config unknown key": lambda: path.write_text("[taylor_patch]\nbakend = 1\n"),
        "config not text": lambda: path.write_bytes(b"\xff\xfe\x00"),
        "config a folder": lambda: (path.unlink(), path.mkdir()),
        "log file's folder gone": lambda: shutil.rmtree("logs"),
        "working folder gone": lambda: os.chdir(tempfile.mkdtemp()),
    }[name]


@pytest.mark.parametrize("fault", ["config deleted", "config invalid", "config unknown key", "config not text", "config a folder",
                                   "log file's folder gone", "working folder gone"])
def test_files_that_go_bad_in_mid_run(comfy, exact, configure, put, fault, tmp_path):
    """This run goes on as it was configured; the next one finishes too."""
    os.mkdir("logs")
    configure(SPARSE.replace("[backends", 'log_file = "logs/log.jsonl"\n[backends'))
    faulty = Faulty(right, at=-1)
    put(faulty)
    net, calls = Net(comfy), []

    def before():
        calls.append(None)
        if len(calls) == CALLS + 1:
            on_disk(fault)()

    net.before = before
    assert torch.equal(sample(comfy, net), exact) and last().calls == {"near_far": 12}
    net.before = lambda: None
    assert torch.equal(sample(comfy, net), exact) and last().outcome == "finished"
    os.chdir(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_file_on_a_full_disk(comfy, exact, configure, put, caplog):
    configure(SPARSE.replace("[backends", 'log_file = "/dev/full"\n[backends'))
    put(Faulty(right, at=-1))
    assert torch.equal(sample(comfy), exact)
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


@pytest.mark.parametrize("disk", [full, read_only], ids=["full", "read-only"])
@pytest.mark.parametrize("step", ["mkstemp", "replace"])
def test_a_cache_on_a_bad_disk(comfy, exact, put, monkeypatch, caplog, disk, step):
    put(Faulty(right, at=-1))
    monkeypatch.setattr(*((tempfile, "mkstemp") if step == "mkstemp" else (os, "replace")), disk)
    for _ in range(2):
        assert torch.equal(sample(comfy), exact)
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


@pytest.mark.parametrize("clock", ["monotonic", "perf_counter", "time"])
def test_a_clock_that_goes_back(comfy, exact, configure, put, monkeypatch, clock):
    configure(SPARSE.replace("[backends", 'log_file = "log.jsonl"\n[backends'))
    put(Faulty(right, at=-1))
    with monkeypatch.context() as patch:
        patch.setattr(time, clock, backwards())
        latent = sample(comfy)
    assert torch.equal(latent, exact)
    assert all(json.loads(line) for line in Path("log.jsonl").read_text().splitlines())


def nothing(sigma):
    return None


HOST = {
    "no sigma": {"t": nothing},
    "an empty sigma": {"t": lambda sigma: sigma[:0]},
    "a sigma that is text": {"t": lambda sigma: "1.0"},
    "a sigma that is nan": {"t": lambda sigma: sigma * torch.nan},
    "a sigma for each picture": {"t": lambda sigma: sigma.repeat(3)},
    "a sigma outside the schedule": {"t": lambda sigma: sigma * 1000},
    "a schedule that rises": {"sigmas": (1.0, 2.0, 3.0, 4.0, 5.0)},
}
OPTIONS = {
    "a block index that is text": {"block_index": "three", "block_type": "double"},
    "an image slice that is none": {"img_slice": 3},
    "an image slice past the end": {"img_slice": [5000, 9000]},
    "a sigma that is none": {"sigmas": None},
    "options of others": {"patches": {"attn1": [None]}, "cond_or_uncond": None, "total_blocks": -1},
}


@pytest.mark.parametrize("case", [*HOST, *OPTIONS])
def test_what_the_host_says_wrongly(comfy, exact, put, case):
    put(Faulty(right, at=-1))
    latent = sample(comfy, Net(comfy, options=OPTIONS.get(case)), **HOST.get(case, {}))
    assert torch.equal(latent, exact) and last().outcome == "finished"


def zero(x):
    return torch.zeros_like(x)


def one(x, value):
    return torch.cat([torch.full_like(x[:, :1], value), x[:, 1:]], 1)


INPUTS = {
    "zero keys": (lambda q, k, v: (q, zero(k), v), None),
    "zero queries": (lambda q, k, v: (zero(q), k, v), None),
    "zero values": (lambda q, k, v: (q, k, zero(v)), None),
    "huge norms": (lambda q, k, v: (q * 1e4, k * 1e4, v), None),
    "norms beyond float32": (lambda q, k, v: (q * 1e25, k * 1e25, v), None),
    "tiny norms": (lambda q, k, v: (q * 1e-30, k * 1e-30, v), None),
    "nan in q": (lambda q, k, v: (one(q, torch.nan), k, v), None),
    "nan in v": (lambda q, k, v: (q, k, one(v, torch.nan)), None),
    "inf in k": (lambda q, k, v: (q, one(k, torch.inf), v), None),
    "equal keys": (lambda q, k, v: (q, k[:, :1].expand_as(k), v), None),
    "one key that takes all": (lambda q, k, v: (q, one(k, 300.0), v), None),
    "all keys masked": (None, torch.full((1, 1, 256), -torch.inf)),
    "all keys but one masked": (None, torch.arange(256)[None, None] == 100),
    "rows fully masked": (None, (torch.arange(256) % 2 == 0)[:, None].expand(256, 256).clone()),
    "a mask of nan": (None, torch.full((1, 1, 256), torch.nan)),
    "a mask of the largest numbers": (None, torch.where(torch.arange(256) % 2 == 0, 0.0, torch.finfo(torch.float32).min)[None, None]),
}


@pytest.mark.parametrize("backend", ["near_far", "taylor_torch"])
@pytest.mark.parametrize("case", INPUTS)
def test_inputs_at_the_edge(comfy, configure, case, backend):
    """The real backends. What is not finite in exact attention is not finite with us; the rest is close, or exact."""
    inputs, mask = INPUTS[case]
    net = Net(comfy, inputs or (lambda q, k, v: (q, k, v)), mask=mask)
    configure(EXACT)
    expected = sample(comfy, net)
    configure(f'[taylor_patch]\nbackend = "{backend}"\nquality = 0.02\n[backends.near_far]\ndensity = 1.0\n[backends.taylor_torch]\nP = 5\n')
    found = sample(comfy, net)
    assert last().outcome == "finished" and last().evaluations >= len(SIGMAS) - 1
    assert torch.equal(found.isfinite(), expected.isfinite()), last()
    whole = expected.isfinite()
    assert (found - expected)[whole].norm() <= 0.02 * expected[whole].norm(), last()


@pytest.mark.parametrize("bad", ["heads", "keys", "dtype", "none"])
def test_calls_that_fail_without_us_fail_with_us(comfy, exact, put, bad):
    """The error is ComfyUI's own."""
    put(Faulty(right, at=-1))
    broken = {"heads": lambda q, k, v: (q[..., :-1], k, v), "keys": lambda q, k, v: (q, k[..., :-HEADS], v),
              "dtype": lambda q, k, v: (q, k.double(), v), "none": lambda q, k, v: (q, k, None)}[bad]
    errors = []
    for text in ("on", "off"):
        if text == "off":
            taylor_patch.uninstall()
        with pytest.raises(Exception) as caught:
            sample(comfy, Net(comfy, broken))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1] and current_run() is None


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_two_hundred_runs_leave_nothing(comfy, exact, configure, put, monkeypatch):
    """Runs of every fault in turn, interrupts too, in both ways of checking."""
    logging.disable(logging.CRITICAL)
    configure(SPARSE.replace("[backends", 'log_file = "log.jsonl"\n[backends'))
    faults = [fault for name, fault in BACKEND_FAULTS.items() if name != "keeps its inputs"]
    faults += [raises(KeyboardInterrupt), raises(InterruptProcessingException)]
    opened = []
    original = SamplingRun.__init__

    def noticed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        opened.append(weakref.ref(self))

    monkeypatch.setattr(SamplingRun, "__init__", noticed)
    counts, now = [], {}
    put(lambda backend, call: now["run"](backend, call))
    monkeypatch.setattr(engines, "checks_later", lambda device: now["later"])
    try:
        for number in range(200):
            now = {"run": Faulty(faults[number % len(faults)], number % 5), "later": bool(number % 2)}
            with contextlib.suppress(KeyboardInterrupt, InterruptProcessingException):
                sample(comfy)
            if number in (99, 199):
                now.clear()
                gc.collect()
                every = gc.get_objects()
                counts.append((sum(issubclass(type(x), torch.Tensor | types.FrameType) for x in every), len(every), resident()))
    finally:
        logging.disable(logging.NOTSET)
    assert len(opened) == 200 and not any(ref() for ref in opened)
    (tensors, objects, memory), (tensors_after, objects_after, memory_after) = counts
    assert tensors_after <= tensors + 2
    assert objects_after - objects < 200, "the hundred weak references of this test among them; one object a run would be a hundred more"
    assert memory_after - memory < 8 << 20


def test_blocks_that_are_too_far_off_one_after_the_other(comfy, exact, configure, put, caplog):
    """Each repetition shows another one: in the end the step is exact, and so is the latent."""
    configure(SPARSE.replace("quality_limit = 0", "quality_limit = 2"))
    put(lambda backend, call: -right(call) if call.block == current_run().evaluations - 1 else right(call))
    assert torch.equal(sample(comfy), exact)
    # Three times near_far with one more block exact each time, then wholly exact, then three steps with all three blocks exact.
    assert last().evaluations == 7 and last().calls["near_far"] == 3 + 2 + 1
    assert any("error above quality_limit in other blocks; this step is computed again by exact attention." in m for m in caplog.messages)
