"""What importing costs, and which layer may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import taylor_patch

PACKAGE = Path(taylor_patch.__file__).parent


def fresh(code, switch=None, flags=()):
    """Standard output of `code` in a new interpreter without site packages' start-up lines in the way."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TAYLOR_PATCH")}
    environ["PYTHONPATH"] = str(PACKAGE.parent)
    if switch is not None:
        environ["TAYLOR_PATCH"] = switch
    done = subprocess.run([sys.executable, *flags, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_brings_nothing_heavy():
    loaded = fresh("import sys, taylor_patch; print(*sys.modules)")
    assert "taylor_patch" in loaded
    assert not {"torch", "wrapt", "pluggy", "numpy", "click", "rich"} & set(loaded)


@pytest.mark.parametrize("switch", [None, "", "0", " Off "], ids=["unset", "empty", "zero", "off"])
def test_startup_does_nothing_while_off(switch):
    loaded = fresh("import sys, taylor_patch; a = set(sys.modules); taylor_patch._startup(); print(*set(sys.modules) - a, '-')",
                   switch)
    assert loaded == ["-"]


@pytest.mark.parametrize("switch", ["1", "near_far", " On "])
def test_startup_brings_itself_only_while_on(switch):
    loaded = fresh("import os, sys, taylor_patch; a = set(sys.modules); taylor_patch._startup(); print(*set(sys.modules) - a)", switch,
                   ["-S"])
    assert set(loaded) == {"taylor_patch.startup", "__future__"}


@pytest.mark.parametrize("words", [["plugins"], ["backends"], ["backends", "--json"]], ids=" ".join)
def test_listing_brings_no_torch(words):
    code = (f"import sys; from taylor_patch.cli import main; main({words!r}, standalone_mode=False);"
            "print('torch' in sys.modules, 'taylor_patch.backends.base' in sys.modules)")
    printed = fresh(code)
    assert any("near_far" in word for word in printed) and printed[-2:] == ["False", "False"]


def test_public_names_resolve():
    assert all(getattr(taylor_patch, name) is not None for name in taylor_patch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        taylor_patch.nothing  # noqa: B018


def test_global_taylor_is_declared_without_triton():
    """The Triton forms say why they cannot run where Triton is not installed; only a call that they run imports it."""
    code = ("import sys; sys.modules['triton'] = None; from taylor_patch.backends.taylor import gpu;"
            "print(*gpu.TritonFull().unavailable(), 'taylor_patch.backends.taylor.launch' in sys.modules)")
    printed = " ".join(fresh(code))
    assert "Triton is not installed" in printed and printed.endswith("False")


def imports(text, module="x"):
    """Absolute names of all modules and names that `text` imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules(layer):
    paths = [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else sorted((PACKAGE / layer).rglob("*.py"))
    assert paths
    return paths


FORBIDDEN = [
    ("backends", ("engine", "router", "hooks", "api", "plugins", "startup")),
    ("features", ("backends", "engine", "router", "hooks", "call")),
    ("router", ("engine", "hooks")),
    ("engine", ("hooks", "api", "live")),
    ("live", ("hooks",)),
    ("run", ("engine", "router", "hooks", "backends")),
    ("grid", ("engine", "router", "hooks", "backends", "run")),
    ("options", ("engine", "router", "hooks", "backends", "plugins", "config", "call")),
    ("declaration", ("backends.near_far", "engine", "router", "plugins", "config", "call")),
    ("plugins", ("engine", "router", "hooks", "config", "call")),
    ("call", ("engine", "router", "hooks", "backends", "run", "config")),
    ("cache", ("engine", "router", "hooks", "backends", "run", "config")),
    ("telemetry", ("engine", "router", "hooks", "run", "config")),
    ("startup", ("engine", "router", "backends", "config")),
    ("config", ("engine", "router", "hooks", "backends", "plugins")),
]


@pytest.mark.parametrize(("layer", "forbidden"), FORBIDDEN, ids=[layer for layer, _ in FORBIDDEN])
def test_layering(layer, forbidden):
    for path in modules(layer):
        module = ".".join(["taylor_patch", *path.relative_to(PACKAGE).with_suffix("").parts])
        for name in imports(path.read_text(), module):
            bad = [f for f in forbidden if name == f"taylor_patch.{f}" or name.startswith(f"taylor_patch.{f}.")]
            assert not bad, f"{path.name} imports {name}"


def test_hooks_import_the_engine():
    """The check above sees real imports: the hooks, which may, do import the engine."""
    assert any("taylor_patch.engine" in imports(path.read_text()) for path in modules("hooks"))
    assert "a.b.c" in imports("from ..b import c", "a.x.y")
