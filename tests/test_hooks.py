"""The contract of the patched attention function and of the two cold hooks."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
import timeit
import types
import weakref
from unittest import mock

import pytest
import torch
from fake_comfy import AttentionTensorContainer

import taylor_patch
from taylor_patch import engine as engines
from taylor_patch.call import TokenGrid
from taylor_patch.hooks import attention as attention_hook
from taylor_patch.run import current_evaluation, current_run

HEADS, DIM, TOKENS, TEXT = 2, 16, 256, 8
DENSE = '[taylor_patch]\nbackend = "near_far"\n[backends.near_far]\ndensity = 1.0\n'
# Random q, k, v are far off at any density: quality_limit would make them exact after the first step.
SPARSE = '[taylor_patch]\nbackend = "near_far"\nquality_limit = 0\n[backends.near_far]\ndensity = 0.1\n'


def qkv(tokens=TOKENS + TEXT, heads=HEADS, kv_heads=None, kv_tokens=None):
    shapes = [(tokens, heads), *[(kv_tokens or tokens, kv_heads or heads)] * 2]
    return [torch.randn(1, n, h * DIM) for n, h in shapes]


def heads_first(x):
    return x.unflatten(-1, (-1, DIM)).transpose(1, 2)


def last():
    return engines.current().last_run


def handled():
    return last().calls.get("near_far", 0)


def broken_backend(monkeypatch, run):
    monkeypatch.setattr(engines.engine().router.backends["near_far"], "run", run, raising=False)


def test_both_names_are_one_plain_function(comfy):
    new = comfy.attention.optimized_attention
    assert type(new) is types.FunctionType and new is not comfy.original
    assert comfy.attention.optimized_attention_masked is new
    assert new.__wrapped__ is comfy.original and new.__name__ == comfy.original.__name__
    assert new.container_function is comfy.original.container_function


def test_consumer_is_rebound(comfy):
    assert comfy.consumer.optimized_attention is comfy.attention.optimized_attention


def test_uninstall_restores_identity(comfy):
    assert comfy.samplers.CFGGuider.__dict__["outer_sample"] is not comfy.outer_sample
    taylor_patch.uninstall()
    assert comfy.attention.optimized_attention is comfy.original
    assert comfy.attention.optimized_attention_masked is comfy.original
    assert comfy.consumer.optimized_attention is comfy.original
    assert comfy.samplers.CFGGuider.__dict__["outer_sample"] is comfy.outer_sample
    assert comfy.model_base.BaseModel.__dict__["apply_model"] is comfy.apply_model


def test_install_twice_wraps_once(comfy):
    first = comfy.attention.optimized_attention
    taylor_patch.install()
    assert comfy.attention.optimized_attention is first and first.__wrapped__ is comfy.original
    assert comfy.samplers.CFGGuider.__dict__["outer_sample"].__wrapped__ is comfy.outer_sample


def test_install_again_after_uninstall(comfy):
    taylor_patch.uninstall()
    taylor_patch.install()
    assert comfy.consumer.optimized_attention.__wrapped__ is comfy.original
    status = taylor_patch.status()
    assert set(status["hooks"].values()) == {"ok"} and len(status["hooks"]) == 4
    assert set(status["patched"]) == {"optimized_attention", "optimized_attention_masked"}


@pytest.mark.parametrize("opaque", [True, False], ids=["opaque", "wraps"])
def test_uninstall_leaves_anothers_wrapper(comfy, configure, monkeypatch, opaque):
    """Ours beneath it then calls the original and nothing else; installed again, a call is counted once."""
    ours, calls = comfy.attention.optimized_attention, []

    def wrapper(*args, **kwargs):
        calls.append(kwargs)
        return ours(*args, **kwargs)

    wrapper = wrapper if opaque else functools.update_wrapper(wrapper, ours)
    comfy.attention.optimized_attention = wrapper
    comfy.consumer.fast = ours
    q, k, v = qkv()
    taylor_patch.install()
    assert comfy.attention.optimized_attention is wrapper
    taylor_patch.uninstall()
    assert comfy.attention.optimized_attention is wrapper and comfy.attention.optimized_attention_masked is comfy.original
    assert comfy.consumer.optimized_attention is comfy.consumer.fast is comfy.original
    with monkeypatch.context() as patch:
        patch.setattr(attention_hook, "answer", None)  # which a call would not survive
        options = {"sigmas": torch.ones(1)}
        assert torch.equal(wrapper(q, k, v, HEADS, transformer_options=options), comfy.original(q, k, v, HEADS))
    taylor_patch.install()
    configure('[taylor_patch]\nbackend = "near_far"\nmin_tokens = 1000\n')
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert len(calls) == 2 and last().calls == {"exact": 1}


def test_functions_that_were_put_back_are_patched_again(comfy):
    comfy.attention.optimized_attention = comfy.original
    taylor_patch.install()
    assert comfy.attention.optimized_attention.__wrapped__ is comfy.original
    assert comfy.attention.optimized_attention is comfy.attention.optimized_attention_masked is comfy.consumer.optimized_attention


def test_pitfall_37_a_reloaded_module_is_patched_again(configure, tmp_path):
    """importlib.reload puts fresh originals into comfy.ldm.modules.attention; modules that imported the old ones keep those."""
    import fake_comfy

    configure(SPARSE)
    (tmp_path / "attention.py").write_text("from fake_comfy import attention_pytorch, make_wrap_attn\n"
                                           "optimized_attention = optimized_attention_masked = make_wrap_attn()(attention_pytorch)\n")
    host = fake_comfy.Host()
    host.modules["comfy.ldm.modules"].__path__ = [str(tmp_path)]
    del sys.modules["comfy.ldm.modules.attention"]
    host.attention = importlib.import_module("comfy.ldm.modules.attention")
    host.consumer.optimized_attention = host.attention.optimized_attention
    q, k, v = qkv()
    try:
        taylor_patch.install()
        first = host.attention.optimized_attention
        importlib.reload(host.attention)
        fresh = host.attention.optimized_attention
        taylor_patch.install()
        assert fresh is not first and host.attention.optimized_attention.__wrapped__ is fresh
        for function in (host.attention.optimized_attention, host.attention.optimized_attention_masked, host.consumer.optimized_attention):
            host.sample(lambda o, function=function: function(q, k, v, HEADS, transformer_options=o))
            assert last().calls == {"near_far": 1}
        second = host.attention.optimized_attention
        taylor_patch.install()
        assert host.attention.optimized_attention is second
        taylor_patch.uninstall()
        assert host.attention.optimized_attention is host.attention.optimized_attention_masked is host.consumer.optimized_attention is fresh
    finally:
        taylor_patch.uninstall()
        host.remove()


def test_missing_attention_is_reported_not_raised(capsys):
    import fake_comfy

    host = fake_comfy.Host()
    del host.attention.optimized_attention
    try:
        taylor_patch.install()
        assert "UnknownContract" in taylor_patch.status()["hooks"]["comfy.ldm.modules.attention"]
        assert "is not patched" in capsys.readouterr().err
    finally:
        taylor_patch.uninstall()
        host.remove()


@pytest.mark.parametrize("options", [None, {}, {"sigmas": torch.ones(1)}], ids=["none", "no-sigmas", "no-run"])
def test_outside_sampling_is_bit_identical(comfy, configure, options):
    configure(SPARSE)
    q, k, v = qkv()
    kwargs = {} if options is None else {"transformer_options": options}
    assert torch.equal(comfy.attention.optimized_attention(q, k, v, HEADS, **kwargs), comfy.original(q, k, v, HEADS))


def test_under_min_tokens_is_bit_identical(comfy, configure):
    configure('[taylor_patch]\nbackend = "near_far"\nmin_tokens = 1000\n')
    q, k, v = qkv()
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert torch.equal(out, comfy.original(q, k, v, HEADS))
    assert last().fallbacks == {"fewer tokens than min_tokens = 1000": 1}


def test_sparse_differs_and_is_counted(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    (out,) = comfy.sample(lambda o: comfy.consumer.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert handled() == 1 and out.shape == q.shape and not torch.equal(out, comfy.original(q, k, v, HEADS))


@pytest.mark.parametrize(("text", "line", "reason"), [
    ("[taylor_patch]\nbackend = 3\n", "patched, but exact until the configuration is corrected: {path}:2:1: "
     "taylor_patch.backend: 3 is not text.", "invalid configuration ({path}:2:1)"),
    ("[taylor_patch]\nenabled = false\n", "off by enabled = false.", "enabled = false"),
    ('[taylor_patch]\nbackend = "sdpa"', 'on: backend = "sdpa", quality = balanced, min_tokens = auto. TAYLOR_PATCH=0 turns it off.',
     'backend = "sdpa"'),
], ids=["wrong", "off", "on"])
def test_line_at_start_and_reason_of_the_run(comfy, configure, caplog, text, line, reason):
    taylor_patch.uninstall()
    path = configure(text)
    caplog.set_level("INFO", "taylor_patch")
    taylor_patch.install()
    assert [message for message in caplog.messages if "memory" not in message] == ["taylor_patch: " + line.format(path=path)]
    q, k, v = qkv()
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert last().fallbacks == {reason.format(path=path): 1}


def test_cpu_auto_is_exact_with_reason(comfy):
    q, k, v = qkv()
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert torch.equal(out, comfy.original(q, k, v, HEADS))
    assert last().fallbacks == {"no backend is known to be faster on cpu: run `taylor-patch bench --calibrate`, or name near_far": 1}


FORMS = {
    "positional": lambda f, q, k, v, o: f(q, k, v, HEADS, None, None, False, False, transformer_options=o),
    "heads-keyword": lambda f, q, k, v, o: f(q, k, v, heads=HEADS, transformer_options=o),
    "all-keywords": lambda f, q, k, v, o: f(v=v, k=k, q=q, heads=HEADS, mask=None, transformer_options=o),
    "skip_reshape": lambda f, q, k, v, o: f(*map(heads_first, (q, k, v)), HEADS, skip_reshape=True, transformer_options=o),
    "skip_reshape-positional": lambda f, q, k, v, o: f(*map(heads_first, (q, k, v)), HEADS, None, None, True,
                                                       transformer_options=o),
    "skip_output": lambda f, q, k, v, o: f(q, k, v, HEADS, skip_output_reshape=True, transformer_options=o),
    "skip_both": lambda f, q, k, v, o: f(*map(heads_first, (q, k, v)), HEADS, skip_reshape=True,
                                         skip_output_reshape=True, transformer_options=o),
    "sd3": lambda f, q, k, v, o: f(q, k.unflatten(-1, (HEADS, DIM)), v.unflatten(-1, (HEADS, DIM)), HEADS,
                                   transformer_options=o),
    "scale": lambda f, q, k, v, o: f(q, k, v, HEADS, scale=0.5, transformer_options=o),
    "strided-v": lambda f, q, k, v, o: f(q, k, torch.stack((v, v + 1), -1)[..., 0], HEADS, transformer_options=o),
    "key-mask": lambda f, q, k, v, o: f(q, k, v, HEADS, torch.arange(q.shape[1])[None, None] % 5 > 0, transformer_options=o),
}


@pytest.mark.parametrize("form", FORMS)
def test_skip_reshape_and_all_other_layouts_match_the_original(comfy, configure, form):
    configure(DENSE)
    q, k, v = qkv()
    copies = [x.clone() for x in (q, k, v)]
    (out,) = comfy.sample(lambda o: FORMS[form](comfy.attention.optimized_attention, q, k, v, o))
    expected = FORMS[form](comfy.original, q, k, v, None)
    assert handled() == 1, last()
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("skip", [False, True], ids=["flat", "heads-first"])
def test_gqa(comfy, configure, skip):
    configure(DENSE)
    q, k, v = qkv(heads=4, kv_heads=2)
    if skip:
        q, k, v = map(heads_first, (q, k, v))
    kwargs = {"enable_gqa": True, "skip_reshape": skip}
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, 4, transformer_options=o, **kwargs))
    assert handled() == 1
    torch.testing.assert_close(out, comfy.original(q, k, v, 4, **kwargs), atol=2e-5, rtol=1e-4)


def test_nested_call_goes_to_the_original(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o,
                                                                        _inside_attn_wrapper=True))
    assert torch.equal(out, comfy.original(q, k, v, HEADS)) and last().calls == {}


def test_a_nodes_optimized_attention_override_wins_and_is_counted(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    mark, seen = torch.zeros(1), []

    def override(func, *args, **kwargs):
        seen.append(func)
        return mark

    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(
        q, k, v, HEADS, transformer_options={**o, "optimized_attention_override": override}))
    assert out is mark and len(seen) == 1
    assert last().fallbacks == {"a node's attention override": 1} and last().calls == {"exact": 1}


@pytest.mark.parametrize(("kwargs", "reason"), [
    ({"low_precision_attention": False}, "the model asked for full precision"),
    ({"low_precision_attention": True}, None),
    ({"preferred_attention": types.SimpleNamespace(function=None)}, None),
    ({"preferred_attention": types.SimpleNamespace(function=len)}, "the checkpoint's preferred attention"),
    ({"novelty": 1}, "unknown keyword novelty"),
    ({"mask": torch.zeros(TOKENS + TEXT, TOKENS + TEXT)}, "near_far: mask depends on the query row"),
], ids=["full-precision", "low-precision", "preferred-none", "preferred", "unknown", "row-mask"])
def test_demands_for_exact(comfy, configure, kwargs, reason):
    configure(SPARSE)
    q, k, v = qkv()
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o, **kwargs))
    if reason is None:
        assert last().calls == {"near_far": 1}
    else:
        assert last().fallbacks == {reason: 1}
        assert torch.equal(out, comfy.original(q, k, v, HEADS, **kwargs))


def test_gradients_are_exact(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    q.requires_grad_()
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert last().fallbacks == {"gradients are wanted": 1}


@pytest.mark.parametrize("accepted", [True, False], ids=["handled", "exact"])
def test_container_is_consumed_only_when_handled(comfy, configure, monkeypatch, accepted):
    configure(DENSE)
    q, k, v = qkv()
    boxes = [AttentionTensorContainer(x) for x in (q, k, v)]
    full_on_entry = []
    engines.engine()
    original_attempt = engines.Engine.attempt

    def attempt(self, backend, call, run, evaluation, exact):
        full_on_entry.append(all(box.value is not None for box in boxes))
        return original_attempt(self, backend, call, run, evaluation, exact) if accepted else None

    monkeypatch.setattr(engines.Engine, "attempt", attempt)
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(*boxes, HEADS, transformer_options=o))
    # In the exact case the stand-in's own take() would fail if ours had come before it.
    assert full_on_entry == [True] and all(box.value is None for box in boxes)
    assert handled() == int(accepted)
    torch.testing.assert_close(out, comfy.original(q, k, v, HEADS), atol=2e-5, rtol=1e-4)


def test_deepcopy_is_the_same_function(comfy):
    new = comfy.attention.optimized_attention
    assert copy.deepcopy({"f": new})["f"] is new


class InterruptProcessingException(Exception):
    """Named as ComfyUI's."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InterruptProcessingException],
                         ids=lambda e: e.__name__)
def test_run_is_closed_after_an_exception(comfy, configure, error):
    configure(SPARSE)
    inside = []

    def body(options):
        inside.append((current_run() is not None, current_evaluation() is not None))
        raise error("stop")

    with pytest.raises(error, match="stop"):
        comfy.sample(body)
    assert inside == [(True, True)]
    assert current_run() is None and current_evaluation() is None
    assert last().outcome == f"ended by {error.__name__}"


def test_interrupt_inside_a_backend_propagates(comfy, configure, monkeypatch, caplog):
    configure(SPARSE)
    q, k, v = qkv()

    def run(call):
        raise InterruptProcessingException("cancel")

    broken_backend(monkeypatch, run)
    with pytest.raises(InterruptProcessingException):
        comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert current_run() is None and not [r for r in caplog.records if r.levelname == "WARNING"]


def failing(error):
    def run(call):
        raise error

    return run


FAILURES = {
    "raises": (failing(ValueError("broken")), "ValueError: broken"),
    "nan": (lambda call: torch.full_like(call.q, torch.nan), "not finite"),
    "one-inf": (lambda call: call.q.clone().index_fill_(2, torch.tensor([3]), torch.inf), "not finite"),
    "shape": (lambda call: call.q[:, :, :-1], "returned [1, 2, 263, 16]"),
    "dtype": (lambda call: call.q.double(), "returned [1, 2, 264, 16] torch.float64"),
    "none": (lambda call: None, "returned NoneType"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_bad_backend_is_exact_with_one_warning(comfy, configure, monkeypatch, caplog, failure):
    configure(SPARSE)
    run, text = FAILURES[failure]
    calls = []

    def counted(call):
        calls.append(call)
        return run(call)

    broken_backend(monkeypatch, counted)
    q, k, v = qkv()
    outs = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o),
                        sigmas=(3.0, 2.0, 1.0, 0.0))
    assert len(outs) == 3 and all(torch.equal(out, comfy.original(q, k, v, HEADS)) for out in outs)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and text in warnings[0] and len(calls) == 1
    assert last().calls == {"exact": 3} and last().fallbacks["near_far: failed earlier in this run"] == 2


@pytest.mark.parametrize("bad_at", [0, 2], ids=["first-call", "last-call"])
def test_a_step_that_is_not_finite_is_computed_again(comfy, configure, monkeypatch, caplog, bad_at):
    """As on a GPU, where the finite check is read once a model evaluation."""
    configure(SPARSE)
    monkeypatch.setattr(engines, "checks_later", lambda device: True)
    calls = []

    def run(call):
        calls.append(call)
        return call.q * (torch.nan if len(calls) == bad_at + 1 else 1)

    broken_backend(monkeypatch, run)
    q, k, v = qkv()

    def body(o):
        return torch.stack([comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o) for _ in range(3)])

    outs = comfy.sample(body, sigmas=(3.0, 2.0, 1.0, 0.0))
    exact = comfy.original(q, k, v, HEADS)
    assert len(calls) == 3 and all(torch.equal(row, exact) for out in outs for row in out)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "near_far: returned values that are not finite; this step is computed again" in warning
    assert last().evaluations == 4 and last().fallbacks == {"near_far: returned values that are not finite": 3,
                                                            "near_far: failed earlier in this run": 6}


def test_a_backend_that_failed_is_tried_again_in_the_next_run(comfy, configure, monkeypatch):
    configure(SPARSE)
    q, k, v = qkv()

    def body(o):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    with monkeypatch.context() as patch:
        broken_backend(patch, failing(ValueError("once")))
        comfy.sample(body)
    comfy.sample(body)
    assert last().calls == {"near_far": 1}


def test_start_percent(comfy, configure):
    configure(SPARSE.replace("[backends", "start_percent = 0.5\n[backends"))
    q, k, v = qkv()
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o),
                 sigmas=(4.0, 3.0, 2.0, 1.0, 0.0))
    assert last().calls == {"exact": 2, "near_far": 2} and last().fallbacks == {"before start_percent": 2}


def test_an_evaluation_that_is_not_understood_is_exact(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()

    class Odd:
        def __init__(self, body):
            self.body, self.double_blocks = body, 3  # len() of a number fails

        def __call__(self, x, t, options):
            return self.body(options)

    def sampler(model, x, sigma, options):
        return model.apply_model(x, sigma, transformer_options=options)

    guider = comfy.samplers.CFGGuider(comfy.model_base.Flux(Odd(lambda o: comfy.attention.optimized_attention(
        q, k, v, HEADS, transformer_options=o))))
    out = guider.outer_sample(torch.zeros(1, 4, 32, 32), None, sampler, torch.tensor([1.0, 0.0]))
    assert torch.equal(out, comfy.original(q, k, v, HEADS))
    (reason,) = last().fallbacks
    assert reason.startswith("model evaluation not understood (TypeError")


@pytest.mark.parametrize(("level", "lines"), [("off", 0), ("run", 1), ("step", 3), ("call", 7)])
def test_log_levels(comfy, configure, caplog, level, lines):
    configure(SPARSE.replace("[backends", f'log = "{level}"\n[backends'))
    q, k, v = qkv()
    engines.engine()
    caplog.set_level("INFO")

    def body(o):
        return [comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o, low_precision_attention=low)
                for low in (True, False)]

    comfy.sample(body, sigmas=(2.0, 1.0, 0.0))
    assert len(caplog.records) == lines, caplog.text
    if level in ("step", "call"):
        assert "Flux: step 1, sigma 1: exact 1, near_far 1 (exact because: the model asked for full precision: 1)" in caplog.text


def test_every_call_counts_for_the_block_index(comfy, configure):
    """Where the model gives no block index, rules on layers go by the number of the call; exact calls count too."""
    configure(SPARSE + '[[rules]]\nwhen = { layers = "2" }\nbackend = "sdpa"\n')
    q, k, v = qkv()

    def body(o):
        comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o, low_precision_attention=False)
        return [comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o) for _ in range(3)]

    (outs,) = comfy.sample(body)
    exact = comfy.original(q, k, v, HEADS)
    assert [torch.equal(out, exact) for out in outs] == [False, True, False]


def test_a_choice_for_exact_is_remembered_in_the_run_only(comfy, configure, monkeypatch):
    path = configure(SPARSE)
    q, k, v = qkv()
    asked = []
    choose = engines.Engine.choose
    monkeypatch.setattr(engines.Engine, "choose", lambda self, *rest: asked.append(rest) or choose(self, *rest))
    mask = torch.zeros(TOKENS + TEXT, TOKENS + TEXT)

    def body(o):
        return [comfy.attention.optimized_attention(q, k, v, HEADS, m, transformer_options=o) for m in (mask, mask, None)]

    comfy.sample(body, sigmas=(2.0, 1.0, 0.0))
    assert len(asked) == 3 and last().calls == {"exact": 4, "near_far": 2}
    path.write_text(SPARSE + "# changed\n")
    comfy.sample(body)
    assert len(asked) == 5


REFUSED_AND_NOT = {  # arguments of two calls with tensors of the same shapes: the first is refused, the second is not
    "heads": ({"heads": 1}, {"heads": 4}),  # one head of 512 is too large
    "dtype": ({"dtype": torch.float64}, {}),
    "scale": ({"scale": 2.0}, {"scale": 0.1}),
    "block of a UNet": ({"block": ("input", 4), "activations_shape": [2, 640, 64, 64]},
                        {"block": ("input", 7), "activations_shape": [2, 640, 16, 16]}),
}


@pytest.mark.parametrize("case", REFUSED_AND_NOT)
def test_a_refusal_is_not_inherited_by_another_call(comfy, configure, monkeypatch, case):
    configure(SPARSE)
    kind = type(engines.engine().router.backends["near_far"])
    against = kind.reasons_against
    monkeypatch.setattr(kind, "reasons_against", lambda self, call: (*against(self, call), *(["scale"] if call.scale > 1 else [])))
    x = torch.randn(1, TOKENS, 512)

    def call(options, heads=4, dtype=torch.float32, scale=None, **more):
        return comfy.attention.optimized_attention(*[x.to(dtype)] * 3, heads, scale=scale, transformer_options={**options, **more})

    comfy.sample(lambda o: [call(o, **kwargs) for kwargs in REFUSED_AND_NOT[case]], sigmas=(2.0, 1.0, 0.0))
    assert last().calls == {"exact": 2, "near_far": 2}, last().fallbacks


@pytest.mark.parametrize("state", ["on", "disabled", "uninstalled"])
def test_compiled_equals_eager(comfy, configure, state):
    configure(SPARSE if state == "on" else "[taylor_patch]\nenabled = false\n")
    if state == "uninstalled":
        taylor_patch.uninstall()
    q, k, v = qkv()
    attention = comfy.attention

    def block(q, k, v, options):
        return attention.optimized_attention(q * 1.5, k, v, HEADS, transformer_options=options) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager")
    eager = comfy.sample(lambda o: block(q, k, v, o), sigmas=(2.0, 1.0, 0.0))
    outs = comfy.sample(lambda o: compiled(q, k, v, o), sigmas=(2.0, 1.0, 0.0))
    if state != "uninstalled":
        assert last().calls == {"near_far" if state == "on" else "exact": 2}
    assert len(outs) == 2 and all(torch.equal(a, b) for a, b in zip(outs, eager, strict=True))
    outside = compiled(q, k, v, {})
    assert torch.equal(outside, comfy.original(q * 1.5, k, v, HEADS) + 1)


UNKNOWN = {
    "order": ("comfy.ldm.modules.attention", lambda m: setattr(m, "optimized_attention", lambda q, v, k, heads, **kwargs: None)),
    "fewer": ("comfy.ldm.modules.attention", lambda m: setattr(m, "optimized_attention_masked", lambda q, k, v, heads, **kwargs: None)),
    "containers": ("comfy.ldm.modules.attention", lambda m: setattr(m, "AttentionTensorContainer", type("Other", (), {"get": None}))),
    "sampler": ("comfy.samplers", lambda m: setattr(m.CFGGuider, "outer_sample", lambda self, plan: plan.run())),
    "model": ("comfy.model_base", lambda m: setattr(m.BaseModel, "apply_model", lambda self, request: self.diffusion_model(request))),
    "estimate": ("comfy.sampler_helpers", lambda m: setattr(m, "estimate_memory", lambda noise_shape, model: (1, 1))),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_contract_is_one_line(capsys, kind):
    """The function stays ComfyUI's own, whatever it is called with."""
    import fake_comfy

    target, change = UNKNOWN[kind]
    host = fake_comfy.Host()
    change(host.modules[target])
    functions = {name: getattr(host.attention, name) for name in ("optimized_attention", "optimized_attention_masked")}
    try:
        taylor_patch.install()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"taylor_patch: {target} is not patched (UnknownContract") and "not known to taylor_patch" in line
        for name, function in functions.items():
            assert (getattr(host.attention, name) is function) == (target == "comfy.ldm.modules.attention")
    finally:
        taylor_patch.uninstall()
        host.remove()


def test_another_plugins_wrapper_is_no_unknown_contract(capsys):
    import fake_comfy

    host = fake_comfy.Host()
    host.attention.optimized_attention = lambda *args, **kwargs: host.original(*args, **kwargs)
    try:
        taylor_patch.install()
        assert taylor_patch.status()["hooks"]["comfy.ldm.modules.attention"] == "ok" and capsys.readouterr().err == ""
    finally:
        taylor_patch.uninstall()
        host.remove()


@pytest.mark.parametrize(("n_q", "n_kv", "grids"), [
    (TOKENS, 2100, (TokenGrid(1, 16, 16), None)),  # the image to keys of unknown arrangement
    (500, TOKENS, (None, TokenGrid(1, 16, 16))),  # other tokens to the image
    (TOKENS + TEXT, 300, (None, None)),  # only where the image's tokens are all
], ids=["image to others", "others to the image", "with a text"])
def test_cross_attention_knows_the_grid_of_the_side_that_is_the_image(comfy, configure, monkeypatch, n_q, n_kv, grids):
    configure(DENSE + "min_keys = 200\n")
    seen, original = [], engines.engine().router.backends["near_far"].run
    broken_backend(monkeypatch, lambda call: (seen.append((call.grid, call.key_grid)), original(call))[1])
    q, k, v = qkv(n_q, kv_tokens=n_kv)
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
    assert seen == [grids] and last().calls == {"near_far": 1}
    assert torch.allclose(out, comfy.original(q, k, v, HEADS), atol=1e-5)


def test_pitfall_41_an_evaluation_in_training_is_exact(comfy, configure, monkeypatch):
    """ComfyUI's own trainer says so; that wanted gradients are exact is test_gradients_are_exact."""
    configure(SPARSE)
    management = types.SimpleNamespace(in_training=True)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    q, k, v = qkv()

    def body(o):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    (out,) = comfy.sample(body)
    assert last().fallbacks == {"training": 1} and torch.equal(out, comfy.original(q, k, v, HEADS))
    management.in_training = False
    comfy.sample(body)
    assert last().calls == {"near_far": 1}


def test_pitfalls_33_and_45_model_management_stays_as_it_is(comfy, configure, monkeypatch):
    """WaveSpeed puts a mock where load_models_gpu is, and ComfyUI's hook_breaker puts cast_to back after custom nodes: no function in
    comfy.model_management is ours, whatever memory_reserve is, and none but free_memory is called."""
    configure(SPARSE.replace("[backends", 'memory_reserve = "free_memory"\n[backends'))
    functions = {name: mock.Mock(name=name) for name in ("cast_to", "load_models_gpu", "load_model_gpu", "unload_all_models", "free_memory",
                                                         "soft_empty_cache", "get_free_memory")}
    management = types.SimpleNamespace(in_training=False, **functions)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    taylor_patch.uninstall()
    taylor_patch.install()
    model = types.SimpleNamespace(diffusion_model=types.SimpleNamespace(num_heads=HEADS, hidden_size=HEADS * DIM, patch_size=2))
    patcher = types.SimpleNamespace(model=model, load_device=torch.device("cpu"))
    monkeypatch.setattr(comfy.samplers.CFGGuider, "model_patcher", patcher, raising=False)
    q, k, v = qkv()
    with mock.patch.object(management, "load_models_gpu") as waves:
        comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
        assert management.load_models_gpu is waves and not waves.called
    assert last().calls == {"near_far": 1}
    assert all(getattr(management, name) is function for name, function in functions.items())
    assert [name for name, function in functions.items() if function.called] == ["free_memory"]


def test_pitfall_46_what_another_plugin_puts_in_place_for_a_while_is_let_be(comfy, configure):
    """mock.patch in mid-run, across further evaluations and a run inside: its function answers, and afterwards ours is back."""
    configure(SPARSE)
    ours = comfy.attention.optimized_attention
    q, k, v = qkv()
    seen = []

    def attend(o):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    def body(o):
        with mock.patch.object(comfy.attention, "optimized_attention", return_value=q) as theirs:
            seen.append(attend(o) is q)
            seen.extend(out is q for out in comfy.sample(attend, sigmas=(2.0, 1.0, 0.0)))
            seen.append(comfy.attention.optimized_attention is theirs)
        return attend(o)

    (out,) = comfy.sample(body)
    assert seen == [True] * 4 and comfy.attention.optimized_attention is ours
    assert last().calls == {"near_far": 1} and out is not q


@pytest.mark.parametrize("backend", ["near_far", "taylor_torch"])
@pytest.mark.parametrize("kind", ["logits", "values", "keys"])
def test_pitfall_17_float16_at_its_limits_never_reaches_the_picture(comfy, configure, backend, kind):
    """q, k and v are finite, their products, sums and differences beyond 65,504: the result is finite, by whomever."""
    configure(f'[taylor_patch]\nbackend = "{backend}"\nquality_limit = 0\n[backends.taylor_torch]\nP = 3\n')
    q, k, v = qkv()
    if kind == "logits":
        q, k = q * 200, k * 200
    elif kind == "values":
        v = v.sign() * 60_000
    else:
        q, k = q * 1e-5, k.sign() * 60_000
    q, k, v = (x.half() for x in (q, k, v))
    outs = comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o), sigmas=(2.0, 1.0, 0.0))
    assert all(out.dtype == torch.float16 and bool(out.isfinite().all()) for out in outs)
    assert backend in " ".join((*last().calls, *last().fallbacks))


@pytest.mark.parametrize("settings", [{"backend": "near_far"}, {"backend": "near_far", "min_tokens": 1024}, {"enabled": False}],
                         ids=["refused", "under min_tokens", "disabled"])
def test_pitfall_28_what_is_not_ours_is_sent_on_in_microseconds(comfy, settings):
    """The best of many calls, less the original's time: 20 microseconds are ten times what it takes on an idle machine."""
    engines.use(engines.Engine({"taylor_patch": {**settings, "log": "off"}}, environ={}))
    x = torch.zeros(1, 512, 512)
    patched = attention_hook.replace(lambda q, k, v, heads, **kwargs: q)

    def body(o):  # one head of 512 is more than near_far takes
        spent = min(timeit.repeat(lambda: patched(x, x, x, 1, transformer_options=o), number=20, repeat=200)) / 20
        return spent - min(timeit.repeat(lambda: patched.__wrapped__(x, x, x, 1, transformer_options=o), number=20, repeat=200)) / 20

    (added,) = comfy.sample(body)
    assert last().calls == {"exact": 4000}
    assert 0 < added < 20e-6


def test_nothing_of_a_call_stays_in_memory(comfy, configure):
    """Not in the run and not after it: q, k, v and the results of all calls are gone once the model lets go of them."""
    configure(SPARSE.replace("density = 0.1", ""))
    alive, most = [], []

    def body(o):
        for block in range(4):
            inputs = [0.1 * x for x in qkv()]
            out = comfy.attention.optimized_attention(*inputs, HEADS, transformer_options={**o, "block_index": block})
            alive.extend(weakref.ref(x) for x in (*inputs, out))
            del inputs, out
            most.append(sum(x() is not None for x in alive))

    comfy.sample(body, sigmas=(4.0, 3.0, 2.0, 1.0, 0.0))
    assert last().calls == {"near_far": 16} and len(alive) == 64
    assert max(most) == 0 and not any(x() is not None for x in alive)


def test_pitfall_21_block_keys_that_say_too_little(comfy, configure, monkeypatch):
    """Absent, the same for self- and cross-attention, or stale in a call after the blocks: what a call is answered by, and what is settled
    for it, never comes from another call of the same index."""
    configure(SPARSE.replace("density = 0.1", "min_keys = 16"))
    selfs, others, late = ([0.1 * x for x in made] for made in (qkv(), qkv(kv_tokens=40), qkv(TOKENS + 2 * TEXT)))

    def body(o):
        keys = {**o, "block_index": 1, "block_type": "double"}
        calls = [(selfs, keys), (others, keys), (late, keys), (selfs, o), (others, o)]
        return [comfy.attention.optimized_attention(*inputs, HEADS, transformer_options=options) for inputs, options in calls]

    blocks = []
    choose = engines.Engine.choose
    monkeypatch.setattr(engines.Engine, "choose", lambda self, call, *rest: blocks.append(call.block) or choose(self, call, *rest))
    first, second = comfy.sample(body, sigmas=(2.0, 1.9, 0.0))
    assert blocks[:5] == [1, 1, 1, 3, 4] and last().calls == {"near_far": 10}
    alone = [comfy.sample(lambda o, inputs=inputs: comfy.attention.optimized_attention(
        *inputs, HEADS, transformer_options={**o, "block_index": 1}), sigmas=(2.0, 1.9, 0.0)) for inputs in (selfs, others, late)]
    for index, outs in enumerate(alone):
        assert torch.equal(first[index], outs[0]) and torch.equal(second[index], outs[1]), index
