"""hook = "override", and others beside us: the same answers and counts by both routes, under every contract of ComfyUI's."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import fake_comfy
import pytest
import torch
import wrapt
from fake_comfy import AttentionTensorContainer

import taylor_patch
from taylor_patch.hooks import chain
from taylor_patch.hooks.chain import strangers
from taylor_patch.hooks.contract import SLOT
from taylor_patch.hooks.override import attention_override
from tests.test_hooks import FORMS, HEADS, SPARSE, TEXT, TOKENS, handled, last, qkv

OVERRIDDEN = "a node's attention override"


@pytest.fixture(params=fake_comfy.CONTRACTS)
def comfy(request):
    """The stand-in for ComfyUI with each contract, patched."""
    host = fake_comfy.Host(request.param)
    host.contract = request.param
    try:
        taylor_patch.install()
        yield host
    finally:
        taylor_patch.uninstall()
        host.remove()


def by(route, text=SPARSE):
    return text.replace("[backends", f'hook = "{route}"\n[backends')


def node_override(result=None):
    """A node's override that answers by the function it is given, or with `result`; .seen counts."""
    def override(func, *args, **kwargs):
        override.seen += 1
        return func(*args, **kwargs) if result is None else result

    override.seen = 0
    return override


def options_with(override):
    return {"transformer_options": {SLOT: override}}


def as_core_node_does(function):
    """model_options of a model that ComfyUI's ModelAttentionBackend was given `function` for."""
    def optimized_attention_override(_, *args, **kwargs):
        return function(*args, **kwargs)

    if getattr(function, "container_function", None) is not None:
        optimized_attention_override.container_function = function.container_function
    return options_with(optimized_attention_override)


CALLS = {
    **FORMS,
    "row-mask": lambda f, q, k, v, o: f(q, k, v, HEADS, torch.zeros(TOKENS + TEXT, TOKENS + TEXT), transformer_options=o),
    "cross": lambda f, q, k, v, o: f(q, k[:, :77], v[:, :77], HEADS, transformer_options=o),
    "full-precision": lambda f, q, k, v, o: f(q, k, v, HEADS, transformer_options=o, low_precision_attention=False),
    "unknown": lambda f, q, k, v, o: f(q, k, v, HEADS, transformer_options=o, novelty=1),
}


@pytest.mark.parametrize("form", CALLS)
def test_both_routes_give_the_same(comfy, configure, form):
    q, k, v = qkv()
    results = []
    for route in ("module", "override"):
        configure(by(route))
        outs = comfy.sample(lambda o: CALLS[form](comfy.consumer.optimized_attention, q, k, v, o), sigmas=(2.0, 1.0, 0.0))
        results.append((outs, last().calls, last().fallbacks))
    (first, *counts), (second, *others) = results
    assert counts == others and sum(counts[0].values()) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert handled() == (2 if form in FORMS else 0)


@pytest.mark.parametrize(("patterns", "there"), [('["wan*", "flu*"]', True), ('["wan*"]', False), ("[]", False)], ids=str)
def test_the_slot_for_named_families(comfy, configure, monkeypatch, patterns, there):
    configure(SPARSE.replace("[backends", f"override_models = {patterns}\n[backends"))
    monkeypatch.setattr(comfy.samplers.CFGGuider, "model_patcher", SimpleNamespace(model=comfy.model_base.Flux(None)), raising=False)
    q, k, v = qkv()
    seen = []

    def body(o):
        seen.append(SLOT in o)
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    comfy.sample(body)
    assert seen == [there] and last().calls == {"near_far": 1}


def test_gates_hold_by_the_override_too(comfy, configure):
    q, k, v = qkv()

    def body(o):
        return [comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o) for _ in range(3)]

    seen = []
    for route in ("module", "override"):
        configure(by(route, SPARSE.replace("[backends", "start_percent = 0.5\n[backends"))
                  + '[[rules]]\nwhen = { layers = "1" }\nbackend = "sdpa"\n')
        comfy.sample(body, sigmas=(4.0, 3.0, 2.0, 1.0, 0.0))
        seen.append((last().calls, last().fallbacks))
    assert seen[0] == seen[1] == ({"exact": 8, "near_far": 4}, {"before start_percent": 6, 'backend = "sdpa"': 2})


def test_it_is_in_place_for_the_run_only(comfy, configure):
    configure(by("override"))
    q, k, v = qkv()
    model_options = {"transformer_options": {"patches": {}}}
    seen = []

    def body(o):
        seen.append(copy.deepcopy(o)[SLOT] is attention_override)
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=copy.deepcopy(o))

    comfy.sample(body, model_options=model_options)
    assert seen == [True] and handled() == 1 and model_options == {"transformer_options": {"patches": {}}}
    assert torch.equal(comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options={
        SLOT: attention_override, "sigmas": torch.ones(1)}), comfy.original(q, k, v, HEADS))


@pytest.mark.parametrize("text", ["enabled = false", 'backend = "sdpa"'])
def test_off_puts_nothing_there(comfy, configure, text):
    configure(f'[taylor_patch]\nhook = "override"\n{text}\n')
    q, k, v = qkv()
    found = []
    comfy.sample(lambda o: (found.append(SLOT in o), comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)))
    assert found == [False] and last().fallbacks == {text: 1}


def test_it_sees_calls_that_go_round_the_module_names(comfy, configure):
    """A node pack that holds another of ComfyUI's functions: only the override reaches it."""
    other = comfy.attention.wrap_attn(fake_comfy.attention_pytorch)
    q, k, v = qkv()
    for route, count in (("module", 0), ("override", 1)):
        configure(by(route))
        comfy.sample(lambda o: other(q, k, v, HEADS, transformer_options=o))
        assert handled() == count


@pytest.mark.parametrize("route", ["module", "override"])
def test_a_nodes_override_wins_and_leaves_again(comfy, configure, route):
    configure(by(route))
    q, k, v = qkv()
    mark = torch.zeros(1)
    node = node_override(mark)
    options = options_with(node)

    def body(o):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    (out,) = comfy.sample(body, model_options=options)
    assert out is mark and node.seen == 1 and last().fallbacks == {OVERRIDDEN: 1} and last().calls == {"exact": 1}
    assert options == options_with(node)
    comfy.sample(body)
    assert last().calls == {"near_far": 1}


@pytest.mark.parametrize("route", ["module", "override"])
@pytest.mark.parametrize("chains", [True, False], ids=["chains", "replaces"])
def test_an_override_set_during_the_run(comfy, configure, route, chains):
    """As a node's callback before each model evaluation may do; one that chains asks us where it has nothing to say."""
    configure(by(route))
    q, k, v = qkv()
    mark = torch.zeros(1)

    def body(o):
        previous = o.get(SLOT)

        def override(func, *args, **kwargs):
            if args[1].shape[1] == 77 or not chains:
                return mark
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

        options = {**o, SLOT: override}
        return [comfy.attention.optimized_attention(q, k[:, :n], v[:, :n], HEADS, transformer_options=options) for n in (TOKENS + TEXT, 77)]

    ((own, theirs),) = comfy.sample(body)
    asked = chains and route == "override"
    assert theirs is mark and (own is mark) != chains
    assert last().calls == ({"near_far": 1, "exact": 1} if asked else {"exact": 2})
    assert last().fallbacks == {OVERRIDDEN: 1 if asked else 2}


@pytest.mark.parametrize("route", ["module", "override"])
def test_a_rule_can_turn_it_round(comfy, configure, route):
    """respect = "rule": ours where it can, the node's override where it cannot."""
    configure(by(route) + '[[rules]]\nwhen = { model = "flux" }\nrespect = "rule"\n')
    q, k, v = qkv()
    node = node_override()
    (outs,) = comfy.sample(lambda o: [comfy.attention.optimized_attention(q, k[:, :n], v[:, :n], HEADS, transformer_options=o)
                                      for n in (TOKENS + TEXT, 77)], model_options=options_with(node))
    assert node.seen == 1 and not torch.equal(outs[0], comfy.original(q, k, v, HEADS))
    assert last().calls == {"near_far": 1, "exact": 1}
    assert last().fallbacks == {"near_far: cross-attention with fewer keys than min_keys = 2048": 1}


def test_a_rule_that_does_not_match_respects(comfy, configure):
    configure(SPARSE + '[[rules]]\nwhen = { model = "wan*" }\nrespect = "rule"\n')
    q, k, v = qkv()
    node = node_override()
    comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o), model_options=options_with(node))
    assert node.seen == 1 and last().fallbacks == {OVERRIDDEN: 1}


@pytest.mark.parametrize("route", ["module", "override"])
@pytest.mark.parametrize("rule", ["override", "rule"])
def test_preferred_attention(comfy, configure, route, rule):
    """The checkpoint's own attention wins over both routes, although ComfyUI lets an override win over it."""
    if comfy.contract != "0.34":
        pytest.skip("preferred_attention came with 0.34")
    configure(by(route) + f'[[rules]]\nwhen = {{ model = "flux" }}\nrespect = "{rule}"\n')
    q, k, v = qkv()
    mark = torch.zeros(1)
    preferred = SimpleNamespace(function=lambda *args, **kwargs: mark)
    ((out, cross),) = comfy.sample(lambda o: [comfy.attention.optimized_attention(
        q, k[:, :n], v[:, :n], HEADS, transformer_options=o, preferred_attention=preferred) for n in (TOKENS + TEXT, 77)])
    assert (out is mark) == (rule == "override") and cross is mark
    few = "near_far: cross-attention with fewer keys than min_keys = 2048"
    assert last().fallbacks == ({"the checkpoint's preferred attention": 2} if rule == "override" else {few: 1})


@pytest.mark.parametrize("route", ["module", "override"])
@pytest.mark.parametrize("tokens", [TOKENS + TEXT, 77], ids=["answered", "exact"])
@pytest.mark.parametrize("earlier", ["none", "plain", "containers"])
def test_containers(comfy, configure, route, tokens, earlier):
    """Taken once, by whoever answers; an earlier override gets them in the form that it knows."""
    if comfy.contract == "0.3.64":
        pytest.skip("containers came with 0.33.0")
    configure(by(route) + '[[rules]]\nwhen = { model = "flux" }\nrespect = "rule"\n')
    q, k, v = qkv()
    boxes = [AttentionTensorContainer(x) for x in (q, k[:, :tokens], v[:, :tokens])]
    node, forms = node_override(), []
    if earlier == "containers":
        def container_function(*args, **kwargs):
            forms.append(all(isinstance(x, AttentionTensorContainer) for x in args[:3]))
            return comfy.original(*args, **kwargs)

        node.container_function = container_function
    options = None if earlier == "none" else options_with(node)
    (out,) = comfy.sample(lambda o: comfy.attention.optimized_attention(*boxes, HEADS, transformer_options=o), model_options=options)
    exact = comfy.original(q, k[:, :tokens], v[:, :tokens], HEADS)
    assert all(box.value is None for box in boxes) and torch.equal(out, exact) == (tokens == 77)
    assert handled() == (tokens != 77)
    assert (node.seen, forms) == ((0, [True]) if earlier == "containers" and tokens == 77 else (int(earlier == "plain" and tokens == 77), []))


def test_runs_nest(comfy, configure):
    """A node that samples in a callback, with options copied from the run that it is in."""
    configure(by("override"))
    q, k, v = qkv()
    node = node_override()
    inner = []

    def call(o):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)

    def body(o):
        if not inner:
            inner.append(1)
            options = {"transformer_options": {key: value for key, value in o.items() if key != "sigmas"}}
            comfy.sample(call, model_options=options)
            assert last().fallbacks == {OVERRIDDEN: 1} and options["transformer_options"][SLOT] is attention_override
        return call(o)

    comfy.sample(body, model_options=options_with(node))
    assert node.seen == 2 and last().fallbacks == {OVERRIDDEN: 1}


@pytest.mark.parametrize("route", ["module", "override"])
@pytest.mark.parametrize("boxed", [False, True], ids=["tensors", "containers"])
def test_a_backend_chosen_in_the_registry(comfy, configure, route, boxed):
    """By a node, as ComfyUI's own does it: it wins over the configuration, and is counted once."""
    if boxed and comfy.contract == "0.3.64":
        pytest.skip("containers came with 0.33.0")
    configure(f'[taylor_patch]\nbackend = "near_far"\nquality_limit = 0\nhook = "{route}"\nmin_tokens = 100\n')
    function = comfy.attention.REGISTERED_ATTENTION_FUNCTIONS["taylor_torch"]
    q, k, v = qkv()

    def body(o):
        def args(n):
            found = q, k[:, :n], v[:, :n]
            return [AttentionTensorContainer(x) for x in found] if boxed else found

        return [comfy.attention.optimized_attention(*args(n), HEADS, transformer_options=o) for n in (TOKENS + TEXT, 77)]

    ((out, cross),) = comfy.sample(body, model_options=as_core_node_does(function))
    assert last().calls == {"taylor_torch": 1, "exact": 1} and not torch.equal(out, comfy.original(q, k, v, HEADS))
    assert last().fallbacks == {"taylor_torch: fewer tokens than min_tokens = 100": 1}
    assert torch.equal(cross, comfy.original(q, k[:, :77], v[:, :77], HEADS))
    assert torch.equal(function(q, k, v, HEADS), comfy.original(q, k, v, HEADS))


def test_the_registry_is_as_before_afterwards(comfy):
    known = comfy.attention.REGISTERED_ATTENTION_FUNCTIONS
    assert {"pytorch", "near_far", "taylor_torch", "triton_full", "triton_fused"} <= set(known) and "sdpa" not in known
    assert known["pytorch"] is comfy.original
    taylor_patch.uninstall()
    assert set(known) == {"pytorch"}


@pytest.mark.parametrize("change", [
    lambda m: delattr(m, "register_attention_function"), lambda m: setattr(m, "register_attention_function", lambda function: None),
    lambda m: m.REGISTERED_ATTENTION_FUNCTIONS.update(near_far=len),
], ids=["none", "other-arguments", "name-taken"])
def test_a_registry_that_is_not_as_expected_costs_nothing_else(configure, change):
    configure(SPARSE)
    host = fake_comfy.Host()
    change(host.attention)
    q, k, v = qkv()
    try:
        taylor_patch.install()
        host.sample(lambda o: host.attention.optimized_attention(q, k, v, HEADS, transformer_options=o))
        assert handled() == 1 and taylor_patch.status()["hooks"]["comfy.ldm.modules.attention"] == "ok"
        assert host.attention.REGISTERED_ATTENTION_FUNCTIONS.get("near_far") in (None, len)
    finally:
        taylor_patch.uninstall()
        host.remove()


def other_plugin(function):
    @functools.wraps(function)
    def theirs(*args, **kwargs):
        return function(*args, **kwargs)

    return theirs


def test_who_else_patched_and_in_which_order(comfy, configure, caplog, monkeypatch):
    configure(SPARSE)
    monkeypatch.setattr(chain, "COMFYUI", ("comfy", "fake_comfy"))
    monkeypatch.setattr(chain, "_reported", set())
    caplog.set_level("INFO")
    assert strangers() == [] and taylor_patch.status()["chains"]["optimized_attention"] == ["taylor_patch", "ComfyUI"]
    comfy.attention.optimized_attention = other_plugin(comfy.attention.optimized_attention)
    comfy.consumer.optimized_attention = other_plugin(comfy.original)
    wrapt.wrap_function_wrapper(comfy.samplers, "CFGGuider.outer_sample", lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs))
    name = "tests.test_override"
    expected = [f"optimized_attention: {name}.theirs over taylor_patch over ComfyUI",
                f"CFGGuider.outer_sample: {name}.<lambda> over taylor_patch over ComfyUI",
                f"optimized_attention in fake_consumer: {name}.theirs over ComfyUI"]
    assert strangers() == expected
    for _ in range(2):
        comfy.sample(lambda o: None)
    lines = [r.getMessage() for r in caplog.records if "others patched" in r.getMessage()]
    assert lines == [f"taylor_patch: others patched this too: {sentence}" for sentence in expected]
