"""A broken plugin costs one line; the others work."""

from __future__ import annotations

import itertools
import sys
import time
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

import taylor_patch
from taylor_patch import config, hookspecs, plugins
from taylor_patch import engine as engines
from taylor_patch.backends.base import Backend
from taylor_patch.errors import BackendRefused, PluginError
from taylor_patch.router import Router

BUILT_IN = {"near_far", "triton_full", "triton_fused", "taylor_torch", "sdpa"}


class Good(Backend):
    name = "good"


class Upper(Backend):
    name = "Good"


class Reserved(Backend):
    name = "auto"


class Nameless(Backend):
    pass


def plugin(*kinds):
    class Plugin:
        @staticmethod
        @taylor_patch.hookimpl
        def taylor_patch_register_backends():
            return kinds

    return Plugin


def api(version, *kinds):
    made = plugin(*kinds)
    made.taylor_patch_api = version
    return made


class Entry:
    """An entry point; `load` returns the plugin or raises it."""

    def __init__(self, name, target):
        self.name, self.value, self.target = name, f"{name}_package:plugin", target

    def load(self):
        if isinstance(self.target, BaseException):
            raise self.target
        return self.target


class RaisingHook:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        raise RuntimeError("inside the hook")


class MisspeltHook:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backend():
        return ()


BROKEN = {
    "import-error": (ImportError("no module named x"), "no module named x"),
    "system-exit": (SystemExit(3), "SystemExit"),
    "not-a-class": (plugin(42), "neither a subclass"),
    "other-class": (plugin(dict), "neither a subclass"),
    "instance": (plugin(Good()), "neither a subclass"),
    "no-name": (plugin(Nameless), 'Nameless has no name. Give it one: name = "..."'),
    "auto": (plugin(Reserved), 'backend name "auto" is reserved'),
    "upper-case": (plugin(Upper), "not a lower_snake identifier"),
    "twice": (plugin(Good, Good), 'registers backend "good" twice'),
    "newer-api": (api(2, Good), "written for plugin API 2, and this taylor_patch has 1. Upgrade taylor-patch"),
    "rubbish-api": (api("1", Good), "'1' is not a whole number"),
    "good-then-rubbish": (plugin(Good, 1), "neither a subclass"),
    "hook-raises": (RaisingHook, "inside the hook"),
    "misspelt-hook": (MisspeltHook, "taylor_patch_register_backend"),
}


def test_a_good_plugin():
    registry = plugins.load(found=[Entry("one", plugin(Good))], environ={})
    assert set(registry.backends) == BUILT_IN | {"good"}
    assert registry.plugins[-1] == plugins.Plugin("one", "one_package:plugin", ("good",))


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_is_left_out_and_others_load(kind, caplog):
    target, text = BROKEN[kind]
    class After(Backend):
        name = "after"

    registry = plugins.load(found=[Entry("b_after", plugin(After)), Entry("a_broken", target)], environ={})
    assert set(registry.backends) == BUILT_IN | {"after"}
    errors = {p.name: p.error for p in registry.plugins}
    assert text in errors["a_broken"] and errors["b_after"] is None
    assert len([r for r in caplog.records if "a_broken is left out" in r.getMessage()]) == 1
    assert registry.manager.get_plugin("a_broken") is None
    assert registry.kind("near_far").__module__ == "taylor_patch.backends.near_far"


@pytest.mark.parametrize("kind", BROKEN)
def test_strict_raises(kind):
    target, text = BROKEN[kind]
    with pytest.raises(PluginError, match="plugin bad") as error:
        plugins.load(found=[Entry("bad", target)], environ={"TAYLOR_PATCH_STRICT": "1"})
    assert text in str(error.value)


def named(wanted, level):
    class Other(Backend):
        name = wanted
        priority = level

    return Other


@pytest.mark.parametrize(("priority", "winner"), [(-1, "a"), (0, "a"), (1, "b")], ids=["lower", "equal", "higher"])
def test_conflict_between_plugins_is_named(priority, winner, caplog):
    other, more = named("good", priority), named("more", 0)
    registry = plugins.load(found=[Entry("b", plugin(other, more)), Entry("a", plugin(Good))], environ={})
    assert registry.kind("good") is (Good if winner == "a" else other)
    rows = {p.name: p for p in registry.plugins}
    assert {name: row.backends for name, row in rows.items() if name in "ab"} == (
        {"a": ("good",), "b": ("more",)} if winner == "a" else {"a": (), "b": ("good", "more")})
    note = f'backend "good" is offered by a (priority 0) and b (priority {priority}): that of {winner} is used'
    assert rows["b"].notes == (note,) and len([r for r in caplog.records if note in r.getMessage()]) == 1
    assert rows["a"].notes == ((note,) if winner == "b" else ())


def test_conflict_is_an_error_when_strict():
    found = [Entry("b", plugin(named("good", 5))), Entry("a", plugin(Good))]
    with pytest.raises(PluginError, match='"good" is offered by a'):
        plugins.load(found=found, environ={"TAYLOR_PATCH_STRICT": "1"})


def test_exact_attention_cannot_be_replaced():
    registry = plugins.load(found=[Entry("a", plugin(named("sdpa", 1000)))], environ={})
    assert registry.kind("sdpa").__module__ == "taylor_patch.backends.sdpa" and "that of taylor_patch is used" in registry.plugins[-1].notes[0]


def test_api_version_of_today_loads():
    registry = plugins.load(found=[Entry("a", api(hookspecs.API_VERSION, Good))], environ={})
    assert "good" in registry.backends


HANGING = {"busy": "import sys\nwhile not hasattr(sys, 'let_go'): pass\n", "asleep": "import time\ntime.sleep(60)\n"}


@pytest.mark.parametrize("kind", HANGING)
def test_a_plugin_that_hangs_is_left_out(kind, tmp_path, monkeypatch, caplog):
    (tmp_path / f"hanging_{kind}.py").write_text(HANGING[kind])
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("hanging", f"hanging_{kind}", "taylor_patch")
    began = time.monotonic()
    registry = plugins.load(found=[entry, Entry("other", plugin(Good))], environ={"TAYLOR_PATCH_PLUGIN_SECONDS": "0.5"})
    monkeypatch.setattr(sys, "let_go", True, raising=False)
    assert time.monotonic() - began < 10 and "good" in registry.backends
    (error,) = [p.error for p in registry.plugins if p.name == "hanging"]
    assert error.startswith("still loading after 0.5 s") and f"hanging_{kind}.py:2." in error and error in caplog.text


def test_a_limit_that_is_no_number_is_said(caplog):
    assert plugins.load(found=(), environ={"TAYLOR_PATCH_PLUGIN_SECONDS": "soon"}).seconds == plugins.LOAD_SECONDS
    assert '"soon" is not a number above 0' in caplog.text


LAZY = """
from dataclasses import dataclass
import taylor_patch

@dataclass(frozen=True)
class LaterOptions:
    size: int = 4

class Plugin:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        return [taylor_patch.LazyBackend("later", "{kernel}:Later", priority={priority}, options=LaterOptions,
                                         needs=("torch", "no_such_module"))]
"""
NUMBERS = itertools.count()
KERNEL = """
import taylor_patch
from lazy_plugin import LaterOptions
class Later(taylor_patch.Backend):
    name = "later"
    priority = 7
    options_type = LaterOptions
"""


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """lazy(kernel, priority): the registry with a plugin whose backend is in a module of its own, which holds `kernel`."""
    def make(kernel=KERNEL, priority=7, environ=None):
        # A name of its own for each test: a module that hangs keeps the lock of its name.
        make.module = f"lazy_kernel_{next(NUMBERS)}"
        (tmp_path / "lazy_plugin.py").write_text(LAZY.replace("{priority}", str(priority)).replace("{kernel}", make.module))
        (tmp_path / f"{make.module}.py").write_text(kernel)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "lazy_plugin", raising=False)
        return plugins.load(found=[EntryPoint("lazy", "lazy_plugin:Plugin", "taylor_patch")], environ=environ or {})

    return make


def test_lazy_backend_is_imported_at_first_use(lazy):
    registry = lazy()
    assert registry.backends["later"].missing() == ("no_such_module is not installed",)
    assert registry.option_types["later"]().size == 4
    assert lazy.module not in sys.modules
    assert registry.kind("later").__module__ == lazy.module


LAZY_BROKEN = {
    "raises": ("raise ImportError('no CUDA library')", 7, "no CUDA library"),
    "exits": ("raise SystemExit(1)", 7, "SystemExit"),
    "no-class": ("", 7, "has no Later"),
    "other-class": ("Later = dict", 7, "not a subclass of taylor_patch.Backend"),
    "other-priority": (KERNEL, 8, "has priority = 7, its declaration says 8"),
    "other-options": (KERNEL.replace("options_type = LaterOptions", ""), 7, "has options_type"),
    "hangs": ("import time; time.sleep(60)", 7, "still loading after 0.5 s"),
}


@pytest.mark.parametrize("kind", LAZY_BROKEN)
def test_lazy_backend_that_cannot_be_imported_refuses(lazy, kind, caplog):
    kernel, priority, text = LAZY_BROKEN[kind]
    registry = lazy(kernel, priority, {"TAYLOR_PATCH_PLUGIN_SECONDS": "0.5"})
    router = Router(config.merge([], registry.option_types), registry)
    (reason,) = router.backends["later"].unavailable()
    assert "it cannot be imported" in reason and text in reason
    assert len([r for r in caplog.records if text in r.getMessage()]) == 1
    assert "near_far" in [backend.name for backend in router.by_priority]


def test_lazy_backend_that_cannot_be_imported_is_an_error_when_strict(lazy):
    registry = lazy("raise ImportError('no CUDA library')", environ={"TAYLOR_PATCH_STRICT": "1"})
    with pytest.raises(PluginError, match="no CUDA library"):
        registry.kind("later")


@pytest.mark.parametrize("options", ["lazy_nowhere:Options", "lazy_plugin:", "json:loads"], ids=["no-module", "no-name", "no-class"])
def test_options_that_cannot_be_imported_leave_the_backend_out(options, caplog):
    later = plugins.LazyBackend("later", "anything:At", options=options)
    registry = plugins.load(found=[Entry("a", plugin(later))], environ={})
    assert set(registry.option_types) == BUILT_IN == set(registry.backends) and 'backend "later" (plugin a) is left out: ' in caplog.text


def test_a_named_lazy_backend_says_why_it_cannot_run(lazy, monkeypatch, configure):
    lazy("raise ImportError('no CUDA library')")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("lazy", "lazy_plugin:Plugin", "taylor_patch")])
    configure("[backends.later]\nsize = 2\n")
    q = torch.zeros(1, 1, 4, 4)
    with pytest.raises(BackendRefused, match="no CUDA library"):
        taylor_patch.attention(q, q, q, backend="later")


def test_options_of_a_lazy_backend_are_checked_without_importing_it(lazy, monkeypatch, configure):
    lazy("raise ImportError('no CUDA library')")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("lazy", "lazy_plugin:Plugin", "taylor_patch")])
    path = configure("[backends.later]\nsizes = 2\n")
    problem = engines.engine().problem
    assert problem == f'{path}:2:1: backends.later.sizes: unknown key; allowed are size. Did you mean "size"?'
    assert lazy.module not in sys.modules


def test_duplicate_entry_name():
    registry = plugins.load(found=[Entry("a", plugin(Good)), Entry("a", plugin())], environ={})
    assert registry.kind("good") is Good and registry.plugins[-1].error


@pytest.mark.parametrize(("allow", "environ", "loaded"), [
    (("*",), {}, True), (("go*",), {}, True), ((), {}, False), (("other",), {}, False),
    (("other",), {"TAYLOR_PATCH_PLUGINS": "x,goodies"}, True), (("*",), {"TAYLOR_PATCH_PLUGINS": ""}, False),
], ids=["all", "pattern", "none", "other", "variable", "empty-variable"])
def test_allow_list(allow, environ, loaded):
    target = plugin(Good) if loaded else AssertionError("must not be imported")
    registry = plugins.load(allow, [Entry("goodies", target)], environ)
    assert ("good" in registry.backends) is loaded
    variable = environ.get("TAYLOR_PATCH_PLUGINS")
    source = f"plugins.allow = {list(allow)}".replace("'", '"') if variable is None else f"TAYLOR_PATCH_PLUGINS={variable}"
    assert registry.plugins[-1].error == (None if loaded else f"not allowed by {source}")
    assert registry.plugins[-1].disallowed is not loaded


def test_allow_list_of_the_file_reaches_the_loader(configure, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry("goodies", plugin(Good))])
    configure("")
    assert "good" in engines.engine().router.backends
    configure("[plugins]\nallow = []\n")
    assert "good" not in engines.engine().router.backends


def test_a_plugin_that_fails_in_notify_does_not_silence_the_others(caplog):
    heard = []

    class Bad:
        @staticmethod
        @taylor_patch.hookimpl
        def taylor_patch_run_finished(summary):
            raise RuntimeError("bad listener")

    class Listener:
        @staticmethod
        @taylor_patch.hookimpl
        def taylor_patch_run_finished(summary):
            heard.append(summary)

    registry = plugins.load(found=[Entry("a", Listener), Entry("b", Bad), Entry("c", plugin())], environ={})
    summary = SimpleNamespace()
    registry.notify("taylor_patch_run_finished", summary=summary)
    assert heard == [summary] and "plugin b" in caplog.text
