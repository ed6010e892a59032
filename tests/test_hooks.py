"""The attention contract of ComfyUI, against the stand-in of tests/fake_comfy.py."""

import copy
import logging
import types

import pytest
import torch

import taylor_patch
from taylor_patch import engine, hookimpl
from taylor_patch.backends.base import Backend
from taylor_patch.run import current_run
from tests import fake_comfy

SIZE = 16
TEXT = 7
TOKENS = TEXT + SIZE * SIZE


class Doubled(Backend):
    """Returns twice the exact result: easy to tell from it."""

    name = "doubled"

    def run(self, call):
        bias = None if call.key_mask is None else call.key_mask[:, None, None].to(call.q.dtype)
        gqa = call.q.shape[1] != call.k.shape[1]
        return 2 * torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=bias, scale=call.scale, enable_gqa=gqa)


class Raises(Doubled):
    name = "raises"

    def run(self, call):
        raise RuntimeError("broken on purpose")


class Nan(Doubled):
    name = "nan"

    def run(self, call):
        return torch.full_like(call.q, torch.nan)


class WrongShape(Doubled):
    name = "wrong_shape"

    def run(self, call):
        return call.q[:, :, 1:]


class OutOfMemory(Doubled):
    name = "oom"

    def run(self, call):
        raise torch.OutOfMemoryError("CUDA out of memory")


class Plugin:
    @staticmethod
    @hookimpl
    def taylor_patch_register_backends():
        return (Doubled, Raises, Nan, WrongShape, OutOfMemory)


@pytest.fixture
def comfy(monkeypatch):
    monkeypatch.setattr("taylor_patch.plugins.BuiltinBackends", Plugin)
    taylor_patch.uninstall()
    modules = fake_comfy.build()
    use("doubled")
    taylor_patch.install()
    yield types.SimpleNamespace(attention=modules[0], samplers=modules[1], model_base=modules[2], consumer=modules[3])
    taylor_patch.uninstall()
    fake_comfy.remove()


def use(backend, **settings):
    engine.use(engine.Engine({"taylor_patch": {"backend": backend, **settings}}, environ={}))


def qkv(batch=1, heads=2, tokens=TOKENS, dim=16):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, tokens, dim, generator=gen) for _ in range(3)]


def sample(comfy, call, options=None):
    """call(transformer_options) within a run and an evaluation -> (result, run summary)."""
    def evaluate(sigmas):
        def work(x, t, transformer_options):
            return call(transformer_options)

        model = comfy.model_base.Flux(work, types.SimpleNamespace(patch_size=2, double_blocks=[1]))
        x = torch.zeros(1, 4, 2 * SIZE, 2 * SIZE)
        return model.apply_model(x, sigmas[:1], transformer_options={"sigmas": sigmas[:1], **(options or {})})

    result = comfy.samplers.CFGGuider(evaluate).outer_sample(None, None, None, torch.tensor([1.0, 0.5, 0.0]))
    return result, engine.engine().last_run


def test_names_become_one_plain_function(comfy):
    function = comfy.attention.optimized_attention
    assert type(function) is types.FunctionType
    assert comfy.attention.optimized_attention_masked is function and comfy.consumer.optimized_attention is function
    assert function.__wrapped__ is fake_comfy.attention_pytorch and function.__name__ == "attention_pytorch"
    assert comfy.attention.attention_pytorch is fake_comfy.attention_pytorch
    assert copy.deepcopy({"f": function})["f"] is function


def test_uninstall_restores_identity(comfy):
    taylor_patch.install()
    taylor_patch.uninstall()
    assert comfy.attention.optimized_attention is comfy.consumer.optimized_attention is fake_comfy.attention_pytorch
    assert comfy.attention.optimized_attention_masked is fake_comfy.attention_pytorch
    assert not hasattr(comfy.samplers.CFGGuider.outer_sample, "__wrapped__")
    assert not hasattr(comfy.model_base.BaseModel.apply_model, "__wrapped__")


def test_outside_sampling_is_the_original(comfy):
    q, k, v = qkv()
    for keywords in ({}, {"transformer_options": {}}, {"transformer_options": {"sigmas": 1}}, {"_inside_attn_wrapper": True}):
        out = comfy.attention.optimized_attention(q, k, v, 2, skip_reshape=True, **keywords)
        assert torch.equal(out, fake_comfy.attention_pytorch(q, k, v, 2, skip_reshape=True))


FORMS = {
    "skip_reshape": lambda f, q, k, v, **o: f(q, k, v, 2, None, skip_reshape=True, **o),
    "skip_output_reshape": lambda f, q, k, v, **o: f(q, k, v, 2, skip_reshape=True, skip_output_reshape=True, **o),
    "flat, heads by keyword": lambda f, q, k, v, **o: f(*(x.transpose(1, 2).flatten(2) for x in (q, k, v)), heads=2, **o),
    "all positional": lambda f, q, k, v, **o: f(q, k, v, 2, None, None, True, False, **o),
    "flat q, 4-D k and v": lambda f, q, k, v, **o: f(q.transpose(1, 2).flatten(2), k.transpose(1, 2), v.transpose(1, 2), 2, **o),
    "strided v": lambda f, q, k, v, **o: f(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), 2, skip_reshape=True, **o),
    "scale": lambda f, q, k, v, **o: f(q, k, v, 2, skip_reshape=True, scale=0.5, **o),
    "grouped": lambda f, q, k, v, **o: f(q, k[:, :1], v[:, :1], 2, skip_reshape=True, enable_gqa=True, **o),
    "key mask": lambda f, q, k, v, **o: f(q, k, v, 2, mask=torch.arange(TOKENS).gt(9)[None, None, None], skip_reshape=True, **o),
    "cross": lambda f, q, k, v, **o: f(q, k[:, :, :50], v[:, :, :50], 2, skip_reshape=True, **o),
    "preferred_attention": lambda f, q, k, v, **o: f(
        q, k, v, 2, skip_reshape=True, preferred_attention=types.SimpleNamespace(function=None), **o),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_answered_in_its_layout(comfy, form):
    q, k, v = qkv()
    out, run = sample(comfy, lambda options: form(comfy.attention.optimized_attention, q, k, v, transformer_options=options))
    exact = form(fake_comfy.attention_pytorch, q, k, v)
    assert run.calls == {"doubled": 1}
    assert out.shape == exact.shape
    torch.testing.assert_close(out, 2 * exact)


EXACT = {
    "attention override": {"options": {"optimized_attention_override": lambda f, *a, **k: f(*a, **k)}},
    "full precision": {"low_precision_attention": False},
    "preferred attention": {"preferred_attention": types.SimpleNamespace(function=print)},
    "unknown keyword": {"something_new": 1},
    "row": {"mask": torch.zeros(1, TOKENS, TOKENS)},
}


@pytest.mark.parametrize(("reason", "case"), EXACT.items(), ids=EXACT.keys())
def test_what_must_be_exact_is_the_original_and_counted(comfy, reason, case):
    q, k, v = qkv()
    keywords = {name: value for name, value in case.items() if name != "options"}
    out, run = sample(comfy, lambda options: comfy.attention.optimized_attention(
        q, k, v, 2, skip_reshape=True, transformer_options=options, **keywords), case.get("options"))
    assert torch.equal(out, fake_comfy.attention_pytorch(q, k, v, 2, skip_reshape=True, mask=keywords.get("mask")))
    assert run.calls == {"exact": 1} and reason in next(iter(run.fallbacks))


def test_containers_are_taken_only_when_handled(comfy):
    for backend, left in (("doubled", None), ("raises", None)):
        use(backend)
        boxes = [fake_comfy.AttentionTensorContainer(x) for x in qkv()]
        out, _ = sample(comfy, lambda options, boxes=boxes: comfy.attention.optimized_attention(
            *boxes, 2, skip_reshape=True, transformer_options=options))
        exact = fake_comfy.attention_pytorch(*qkv(), 2, skip_reshape=True)
        torch.testing.assert_close(out, 2 * exact if backend == "doubled" else exact)
        assert [box.tensor for box in boxes] == [left] * 3


@pytest.mark.parametrize(("backend", "reason"), [("raises", "broken on purpose"), ("nan", "not finite"), ("wrong_shape", "returned"),
                                                  ("oom", "out of memory")])
def test_a_failing_backend_costs_speed_only(comfy, backend, reason, caplog):
    use(backend)
    q, k, v = qkv()

    def twice(options):
        call = dict(skip_reshape=True, transformer_options=options)
        return [comfy.attention.optimized_attention(q, k, v, 2, **call) for _ in range(2)]

    with caplog.at_level(logging.WARNING):
        out, run = sample(comfy, twice)
    exact = fake_comfy.attention_pytorch(q, k, v, 2, skip_reshape=True)
    assert all(torch.equal(x, exact) for x in out)
    assert run.calls == {"exact": 2} and len(caplog.records) == 1 and reason in caplog.text


def test_the_run_is_closed_after_an_interrupt(comfy):
    class InterruptProcessingException(Exception):
        pass

    def interrupt(options):
        raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        sample(comfy, interrupt)
    assert current_run() is None
    assert engine.engine().last_run.outcome == "ended by InterruptProcessingException"


def test_few_tokens_are_bit_identical(comfy):
    use("doubled", min_tokens=10_000)
    q, k, v = qkv()
    out, run = sample(comfy, lambda options: comfy.consumer.optimized_attention(q, k, v, 2, skip_reshape=True, transformer_options=options))
    assert torch.equal(out, fake_comfy.attention_pytorch(q, k, v, 2, skip_reshape=True))
    assert run.fallbacks == {"fewer tokens than min_tokens = 10000": 1}


@pytest.mark.parametrize("backend", ["doubled", "sdpa"])
def test_torch_compile_equals_eager(comfy, backend):
    use("doubled", enabled=backend == "doubled")
    q, k, v = qkv()

    def model(q, k, v, options):
        return comfy.attention.optimized_attention(q + 1, k, v, 2, skip_reshape=True, transformer_options=options) * 3

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    eager, _ = sample(comfy, lambda options: model(q, k, v, options))
    out, run = sample(comfy, lambda options: compiled(q, k, v, options))
    assert torch.equal(out, eager)
    assert run.calls == ({"doubled": 1} if backend == "doubled" else {"exact": 1})
