"""A broken plugin costs one line; the others work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import taylor_patch
from taylor_patch import plugins
from taylor_patch.backends.base import Backend
from taylor_patch.errors import PluginError

BUILT_IN = {"near_far", "triton_full", "triton_fused", "taylor_torch", "sdpa"}


class Good(Backend):
    name = "good"


class Taken(Backend):
    name = "near_far"


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
    "not-a-class": (plugin(42), "not a subclass"),
    "other-class": (plugin(dict), "not a subclass"),
    "instance": (plugin(Good()), "not a subclass"),
    "no-name": (plugin(Nameless), "not a lower_snake identifier"),
    "auto": (plugin(Reserved), "not a lower_snake identifier"),
    "taken": (plugin(Taken), '"near_far" is taken'),
    "good-then-rubbish": (plugin(Good, 1), "not a subclass"),
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
    assert registry.backends["near_far"].__module__ == "taylor_patch.backends.near_far"


@pytest.mark.parametrize("kind", BROKEN)
def test_strict_raises(kind):
    target, text = BROKEN[kind]
    with pytest.raises(PluginError, match="plugin bad") as error:
        plugins.load(found=[Entry("bad", target)], environ={"TAYLOR_PATCH_STRICT": "1"})
    assert text in str(error.value)


def test_duplicate_between_plugins_keeps_the_first():
    class Second(Backend):
        name = "good"

    registry = plugins.load(found=[Entry("b", plugin(Second)), Entry("a", plugin(Good))], environ={})
    assert registry.backends["good"] is Good and '"good" is taken' in registry.plugins[-1].error


def test_duplicate_within_one_plugin():
    class Second(Backend):
        name = "good"

    registry = plugins.load(found=[Entry("a", plugin(Good, Second))], environ={})
    assert "good" not in registry.backends and registry.plugins[-1].error


def test_duplicate_entry_name():
    registry = plugins.load(found=[Entry("a", plugin(Good)), Entry("a", plugin())], environ={})
    assert registry.backends["good"] is Good and registry.plugins[-1].error


@pytest.mark.parametrize(("allow", "environ", "loaded"), [
    (("*",), {}, True), (("go*",), {}, True), ((), {}, False), (("other",), {}, False),
    (("other",), {"TAYLOR_PATCH_PLUGINS": "x,goodies"}, True), (("*",), {"TAYLOR_PATCH_PLUGINS": ""}, False),
], ids=["all", "pattern", "none", "other", "variable", "empty-variable"])
def test_allow_list(allow, environ, loaded):
    target = plugin(Good) if loaded else AssertionError("must not be imported")
    registry = plugins.load(allow, [Entry("goodies", target)], environ)
    assert ("good" in registry.backends) is loaded
    assert registry.plugins[-1].error == (None if loaded else "not allowed by plugins.allow")


def test_allow_list_of_the_file_reaches_the_loader(configure, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry("goodies", plugin(Good))])
    from taylor_patch import engine as engines

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
