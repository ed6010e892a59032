"""What an installed plugin gets wrong costs that backend, never a run, and never another backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import pytest
import torch

import taylor_patch
from taylor_patch import config, plugins
from taylor_patch import engine as engines
from taylor_patch.backends.base import Backend
from taylor_patch.bench import measure
from taylor_patch.call import AttentionCall
from taylor_patch.declaration import LazyBackend
from taylor_patch.errors import BackendRefused, ConfigError, PluginError
from tests.test_plugins import BUILT_IN, Entry, named, plugin

SHAPE = (1, 24, 128, 16)


class Fast(Backend):
    """Exact attention that `auto` chooses for every call, after those of higher priority."""

    name = "fast"
    summary = "works"

    def crossover_tokens(self, device):
        return 1

    def run(self, call):
        return torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)


class Faulty(Fast):
    name = "faulty"
    priority = 200


@pytest.fixture
def installed(monkeypatch):
    """installed(one=kinds, ...): plugins that are found from here on, with the backends that each registers."""
    def make(**entries):
        found = [Entry(name, target if isinstance(target, type | Exception) else plugin(*target))
                 for name, target in entries.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: found)
        engines.reset()
        return engines.engine()

    return make


def call(shape=SHAPE):
    q = torch.randn(shape)
    return AttentionCall(q, q, q, scale=0.25)


def attend(host):
    """One sampling run with one attention call in the stand-in for ComfyUI; what the run did."""
    q = torch.randn(1, 128, 24 * 16)
    host.sample(lambda options: host.attention.optimized_attention(q, q, q, 24, transformer_options=options), sigmas=(1.0, 0.0))
    return engines.engine().last_run


class Bad:
    """Classes of options that no configuration can be made with."""

    @dataclass(frozen=True)
    class Required:
        size: int

    @dataclass(frozen=True)
    class Unresolved:
        size: NoSuchName = 4  # noqa: F821

    @dataclass(frozen=True)
    class Abstract:
        names: Sequence[str] = ("a",)

    @dataclass(frozen=True)
    class Listed:
        names: list = None

    @dataclass(frozen=True)
    class Mapped:
        names: dict[str, int] = None

    @dataclass(frozen=True)
    class Numbers:
        sizes: tuple[int, ...] = (1,)

    @dataclass(frozen=True)
    class Nothing:
        size: Optional[int] = None  # noqa: UP045

    @dataclass(frozen=True)
    class Default:
        size: int = "large"

    @dataclass(frozen=True)
    class RaisingProblems:
        size: int = 4

        def problems(self):
            raise RuntimeError("inside problems")

    @dataclass(frozen=True)
    class NoProblems:
        size: int = 4

        def problems(self):
            return None

    @dataclass(frozen=True)
    class ListOfProblems:
        size: int = 4

        def problems(self):
            return ["too large"]

    @dataclass(frozen=True)
    class RefusedDefault:
        size: int = 4

        def problems(self):
            return {"size": "4 is too large"}

    @dataclass(frozen=True)
    class RaisingInit:
        size: int = 4

        def __post_init__(self):
            raise ValueError("inside __post_init__")

    class Plain:
        size: int = 4


FINDINGS = {
    Bad.Required: "Required.size has no default",
    Bad.Unresolved: "Unresolved.size: its annotation cannot be resolved (NameError: name 'NoSuchName' is not defined)",
    Bad.Abstract: "Abstract.names is annotated Sequence[str]; allowed are bool, int, float, str",
    Bad.Listed: "Listed.names is annotated list; allowed are",
    Bad.Mapped: "Mapped.names is annotated dict[str, int]; allowed are",
    Bad.Numbers: "Numbers.sizes is annotated tuple[int, ...]; allowed are",
    Bad.Nothing: "Nothing.size is annotated Optional[int]; allowed are",
    Bad.Default: "Default.size has the default 'large', which is not int",
    Bad.RaisingProblems: "RaisingProblems: its defaults cannot be used (RuntimeError: inside problems)",
    Bad.NoProblems: "NoProblems.problems() returned None, not a dict",
    Bad.ListOfProblems: "ListOfProblems.problems() returned ['too large'], not a dict",
    Bad.RefusedDefault: "RefusedDefault.size: its default is refused (4 is too large)",
    Bad.RaisingInit: "RaisingInit: its defaults cannot be used (ValueError: inside __post_init__)",
    Bad.Plain: "which is not a dataclass",
}


@pytest.mark.parametrize("how", ["class", "lazy"])
@pytest.mark.parametrize("options", FINDINGS, ids=lambda kind: kind.__name__)
def test_bad_options_leave_their_backend_out(options, how, installed, comfy, caplog):
    kind = type("Optioned", (Faulty,), {"options_type": options})
    wrong = kind if how == "class" else LazyBackend("faulty", "nowhere:At", options=f"{__name__}:Bad_{options.__name__}")
    globals()[f"Bad_{options.__name__}"] = options
    engine = installed(one=[wrong, Fast])
    assert engine.problem is None and set(engine.registry.option_types) == BUILT_IN | {"fast"} == set(engine.config.options)
    (line,) = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert line.startswith('taylor_patch: backend "faulty" (plugin one) is left out: ') and FINDINGS[options] in line
    (row,) = [p for p in engine.registry.plugins if p.name == "one"]
    assert row.backends == ("fast",) and FINDINGS[options] in row.notes[0]
    assert attend(comfy).calls == {"fast": 1}


def test_bad_options_are_an_error_when_strict():
    bad = type("Optioned", (Faulty,), {"options_type": Bad.Required})
    with pytest.raises(PluginError, match=r'backend "faulty" \(plugin one\): Required.size has no default'):
        plugins.load(found=[Entry("one", plugin(bad))], environ={"TAYLOR_PATCH_STRICT": "true"})


def test_a_backend_that_is_left_out_gives_its_name_back():
    mine = type("Mine", (Backend,), {"name": "near_far", "priority": 200, "options_type": Bad.Required})
    registry = plugins.load(found=[Entry("one", plugin(mine))], environ={})
    assert set(registry.option_types) == BUILT_IN and registry.kind("near_far").__module__ == "taylor_patch.backends.near_far"
    assert "near_far" in registry.plugins[0].backends and registry.plugins[1].backends == ()


@dataclass(frozen=True)
class Moody:
    """Options that are fine until one is set to a certain value."""

    size: int = 4
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size == 5:
            raise ValueError("5 is\nunlucky")

    def problems(self):
        if self.size == 6:
            raise RuntimeError("inside problems")
        return {7: None, 8: ["bad"], 9: {"size": "9 is odd"}, 10: {"mode": "not with 10"}, 11: {"nothing": "no such option"}}.get(self.size, {})


@pytest.mark.parametrize(("size", "text"), [
    (5, ":2:2: backends.faulty: Moody cannot be made of these values (ValueError: 5 is unlucky)"),
    (6, ":2:2: backends.faulty: Moody cannot be made of these values (RuntimeError: inside problems)"),
    (7, ":2:2: backends.faulty: Moody cannot be made of these values (Moody.problems() returned None"),
    (8, ":2:2: backends.faulty: Moody cannot be made of these values (Moody.problems() returned ['bad']"),
    (9, ":3:1: backends.faulty.size: 9 is odd"),
    (10, ":2:2: backends.faulty.mode: not with 10"),
    (11, ":2:2: backends.faulty.nothing: no such option"),
], ids=["post-init", "raises", "none", "list", "problem", "problem-of-a-default", "unknown-name"])
def test_what_building_options_raises_has_its_place(size, text, installed, configure, comfy, caplog):
    path = configure(f"\n[backends.faulty]\nsize = {size}\n")
    engine = installed(one=[type("Optioned", (Faulty,), {"options_type": Moody})])
    assert engine.problem.startswith(f"{path}{text}")
    assert attend(comfy).fallbacks == {f"invalid configuration ({engine.problem.partition(': ')[0]})": 1}
    with pytest.raises(ConfigError):
        engine.load()


def test_the_engine_survives_whatever_the_configuration_raises(comfy, configure, monkeypatch, caplog):
    def raises(*_):
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(config, "merge", raises)
        engines.reset()
        assert engines.engine().problem == "the configuration cannot be made: RuntimeError: unforeseen"
        assert attend(comfy).fallbacks == {"invalid configuration (RuntimeError)": 1}
    out = taylor_patch.attention(*[torch.randn(1, 1, 128, 16)] * 3, backend="taylor_torch")
    assert out.shape == (1, 1, 128, 16) and "exact until the configuration is corrected" in caplog.text


def test_the_engine_survives_whatever_a_changed_file_raises(installed, comfy, configure, monkeypatch, caplog):
    path = configure("")
    installed(one=[Fast])
    assert attend(comfy).calls == {"fast": 1}
    monkeypatch.setattr(config, "merge", lambda *_: exit(3))
    path.write_text("# changed\n")
    assert attend(comfy).calls == {"fast": 1}
    assert "the last good configuration stays in force: the configuration cannot be made: SystemExit: 3" in caplog.text


def raising(text):
    def method(self, *_, **__):
        raise ValueError(text)

    return method


FAULTS = {
    "init": ({"__init__": raising("inside init")}, "ValueError: inside init"),
    "exits": ({"__init__": lambda self, options=None: exit(3)}, "SystemExit: 3"),
    "unavailable": ({"unavailable": raising("inside")}, "ValueError: inside"),
    "unavailable-none": ({"unavailable": lambda self: None}, "TypeError: unavailable() returned None, not a tuple of reasons"),
    "crossover": ({"crossover_tokens": raising("inside")}, "ValueError: inside"),
    "crossover-text": ({"crossover_tokens": lambda self, device: "many"}, "TypeError: crossover_tokens() returned 'many'"),
    "reasons": ({"reasons_against": raising("inside\n  two lines")}, "ValueError: inside two lines"),
    "reasons-true": ({"reasons_against": lambda self, call: True}, "TypeError: reasons_against() returned True"),
    "head-dims-tuple": ({"head_dims": (64, 128)}, "Wrong.head_dims = (64, 128): it has to be a range"),
    "head-dims-number": ({"head_dims": 64}, "Wrong.head_dims = 64: it has to be a range"),
    "devices-text": ({"devices": "cuda"}, "Wrong.devices = 'cuda': it has to be a set of device types"),
    "dtypes-text": ({"dtypes": {"float16"}}, "Wrong.dtypes = {'float16'}: it has to be a set of torch dtypes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_backend_is_left_out_and_auto_takes_the_next(fault, installed, comfy, caplog):
    attributes, text = FAULTS[fault]
    engine = installed(wrong=[type("Wrong", (Faulty,), attributes)], zz=[Fast])
    assert attend(comfy).calls == {"fast": 1} == attend(comfy).calls
    (line,) = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert line.startswith('taylor_patch: backend "faulty" (plugin wrong) is left out: ') and text in line
    assert any(reason.startswith("faulty: ") and text in reason for reason in engine.router.automatic(call()).reasons)
    with pytest.raises(BackendRefused) as refused:
        taylor_patch.attention(*[call().q] * 3, backend="faulty")
    assert text in str(refused.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_commands_show_a_note_for_a_broken_backend(fault, installed):
    from taylor_patch.cli.checks import backend_rows

    attributes, text = FAULTS[fault]
    engine = installed(wrong=[type("Wrong", (Faulty,), attributes)])
    if not fault.startswith("reasons"):
        row = next(row for row in backend_rows() if row["name"] == "faulty")
        assert text in "; ".join(row["reasons_against"]) and row["auto_from_tokens"] is None
    if not fault.startswith("crossover"):
        engines.reset()
        (row,) = measure.compare([engines.engine().router.backends["faulty"]], call(), 0, with_errors=False)[1:]
        assert text in row.note and row.milliseconds is None
    assert engine.problem is None


@pytest.mark.parametrize("method", ["unavailable", "reasons_against"])
def test_one_text_is_one_reason(method, installed):
    installed(one=[type("Wrong", (Faulty,), {method: lambda self, *_: "no GPU here"})])
    assert taylor_patch.explain(*[call().q] * 3, backend="faulty").reasons == ("no GPU here",)
    assert "faulty: no GPU here" in taylor_patch.explain(*[call().q] * 3).reasons


def test_a_backend_that_fails_at_the_end_of_a_run_does_not_keep_the_others_from_hearing(installed, comfy, caplog):
    heard = []
    last = type("Last", (Fast,), {"name": "last", "keep": lambda self, memo: heard.append(self.name)})
    installed(one=[type("Wrong", (Faulty,), {"keep": raising("inside")}), last])
    engines.engine().router.by_priority  # noqa: B018
    assert attend(comfy).calls == {"faulty": 1} and heard == ["last"]
    assert "faulty could not keep what the run has settled (ValueError: inside)" in caplog.text


def test_a_workspace_that_is_no_number_counts_as_none():
    assert engines.stated_workspace(type("Wrong", (Faulty,), {"workspace_nbytes": lambda self, call: None})(), call()) == 0


TABLE = "[taylor_patch]\nbackend = 'near_far'\n\n[backends.{}]\nsize = 2\n"


@pytest.mark.parametrize(("name", "entries", "why"), [
    ("theirs", {"theirs": ImportError("no CUDA")}, 'plugin "theirs" offers it and is left out: ImportError: no CUDA'),
    ("theirs", {"package": ImportError("no CUDA")}, "it may be of a plugin that is left out: package (ImportError: no CUDA)"),
    ("sage", {}, "taylor-patch-sage offers it, which is not installed"),
    ("kitchen_sol", {}, "taylor-patch-kitchen offers it, which is not installed"),
    ("chunked", {"example": ImportError("no CUDA")}, 'plugin "example" offers it and is left out: ImportError: no CUDA'),
    ("faulty", {"one": [type("Optioned", (Faulty,), {"options_type": Bad.Required})]}, "it is left out: Required.size has no default"),
    ("near_fra", {"package": ImportError("no CUDA")}, 'package (ImportError: no CUDA). Did you mean "near_far"?'),
])
def test_the_table_of_a_backend_that_is_left_out_is_ignored(name, entries, why, installed, configure, caplog):
    path = configure(TABLE.format(name))
    engine = installed(**entries)
    assert engine.problem is None and engine.config.settings.backend == "near_far"
    (line,) = [r.getMessage() for r in caplog.records if "is ignored" in r.getMessage()]
    assert line.startswith(f"taylor_patch: {path}:4:2: backends.{name} is ignored: ") and why in line


def test_a_misspelt_backend_is_an_error_where_no_plugin_is_left_out(installed, configure):
    configure(TABLE.format("near_fra"))
    assert 'backends.near_fra: unknown backend; known are' in installed().problem
    assert 'Did you mean "near_far"?' in engines.engine().problem


@pytest.mark.parametrize("text", ['[taylor_patch]\nbackend = "theirs"\n', '[[rules]]\nbackend = "theirs"\n'], ids=["settings", "rule"])
def test_a_chosen_backend_that_is_not_allowed_says_so(text, installed, configure):
    configure(text + '[plugins]\nallow = ["other*"]\n')
    why = 'plugin "theirs" offers it and is left out: not allowed by plugins.allow = ["other*"]'
    assert f'"theirs" is not one of auto, near_far, sdpa, taylor_torch, triton_full, triton_fused: {why}.' in \
        installed(theirs=[named("theirs", 0)]).problem
    with pytest.raises(BackendRefused) as refused:
        taylor_patch.attention(*[call().q] * 3, backend="theirs")
    assert why in str(refused.value)


def test_a_pattern_that_allows_nothing_is_said(installed, configure, caplog):
    configure('[plugins]\nallow = ["demo-backend", "*"]\n')
    installed(demo_backend=[Fast])
    assert '"demo-backend" is the name of no installed plugin; there are demo_backend. Did you mean "demo_backend"?' in caplog.text
    assert '"*"' not in caplog.text.split("is the name")[1]


def test_doctor_takes_what_the_user_left_out_for_no_problem(installed, configure):
    from taylor_patch.cli.checks import _configuration
    from taylor_patch.cli.place import place

    configure('[plugins]\nallow = ["two"]\n[backends.one]\nsize = 1\n')
    installed(one=[Fast], two=ImportError("no CUDA"))
    states = {text: state for state, text in _configuration(place(None, None))}
    assert states['plugin one: not allowed by plugins.allow = ["two"]'] == "note"
    assert states["plugin two: ImportError: no CUDA"] == "problem"
    assert any(state == "note" and "backends.one is ignored" in text for text, state in states.items())


class Unmarked:
    @staticmethod
    def taylor_patch_register_backends():
        return [Fast]


class Misspelt:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backend():
        return [Fast]


def returning(value):
    class Returning:
        @staticmethod
        @taylor_patch.hookimpl
        def taylor_patch_register_backends():
            return value

    return Returning


@pytest.mark.parametrize(("target", "text"), [
    (Unmarked, "taylor_patch_register_backends is not marked as a hook. Put @taylor_patch.hookimpl above it"),
    (Misspelt, 'Did you mean "taylor_patch_register_backends"?'),
    (type("Empty", (), {}), "Empty implements no hook; there are taylor_patch_register_backends"),
    (returning(None), "taylor_patch_register_backends returned None. Return a list of backends"),
    (returning("module:Class"), "returned 'module:Class'. Return a list"),
    (returning({"fast": Fast}), "Return a list"),
    (returning([LazyBackend("fast", "m:C", priority="high")]), "priority = 'high', which is not a whole number"),
    (returning([LazyBackend("fast", "m:C", needs="triton")]), "needs = 'triton', which is not a tuple"),
], ids=["no-hookimpl", "misspelt", "no-hook", "none", "text", "dict", "priority", "needs"])
def test_a_plugin_that_is_left_out_is_told_what_to_do(target, text):
    (_, row) = plugins.load(found=[Entry("one", target)], environ={}).plugins
    assert text in row.error and row.backends == () and "\n" not in row.error


def test_one_backend_stands_for_a_list_of_it():
    assert "fast" in plugins.load(found=[Entry("one", returning(Fast))], environ={}).backends


@pytest.mark.parametrize(("name", "priority", "advice"), [
    ("near_far", 0, "Rename yours or raise its priority."), ("near_far", 200, "Rename yours if that is not wanted."),
    ("sdpa", 200, "Rename yours."),
], ids=["lower", "higher", "reserved"])
def test_advice_about_the_name_of_a_built_in_backend(name, priority, advice, caplog):
    plugins.load(found=[Entry("one", plugin(named(name, priority)))], environ={})
    assert caplog.records[-1].getMessage().endswith(f"is used. {advice}")


def test_a_module_inside_one_that_is_not_installed_is_missing():
    assert LazyBackend("fast", "m:C", needs=("no_such.module",)).missing() == ("no_such.module is not installed",)


def test_the_listing_counts_the_troubled(installed, capsys):
    from tests.test_cli import run

    installed(one=[Fast], two=ImportError("no CUDA"))
    assert run("plugins").splitlines()[-1].startswith("1 of 3 have a problem. With TAYLOR_PATCH_STRICT=1")
