"""The documents name everything that a user can name, and their examples run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys

import pytest

import taylor_patch
from taylor_patch import config, hookspecs, plugins, rules
from taylor_patch.testing.suite import Conformance
from tests.conftest import ROOT
from tools import reference_pages


def text(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", text(name), re.DOTALL)


@pytest.mark.parametrize("name", taylor_patch.__all__)
def test_public_names(name):
    assert re.search(rf"`{name}\b", text("api.md"))


HOOKS = [name for name in dir(hookspecs) if name.startswith("taylor_patch_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook):
    """The hook is in the guide, and its page has the exact arguments and an example that pluggy accepts."""
    signature = f"`{hook}({', '.join(inspect.signature(getattr(hookspecs, hook)).parameters)})`"
    assert signature in text("writing-a-backend.md") and signature in text(f"hooks/{hook}.md")
    (code,) = python_blocks(f"hooks/{hook}.md")
    space = {}
    exec(code, space)
    plugins.declared(space["Plugin"])
    assert hasattr(space["Plugin"], hook)


def test_hook_pages_have_hooks():
    assert {path.stem for path in (ROOT / "docs" / "hooks").glob("*.md")} == set(HOOKS)


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_generated_pages_are_current(name):
    assert text(f"reference/{name}") == reference_pages.PAGES[name](), "run python -m tools.reference_pages"


@pytest.mark.parametrize("test", [name for name in dir(Conformance) if name.startswith("test_")])
def test_conformance_tests(test):
    assert f"`{test}`" in text("conformance.md")


def test_the_site_builds_without_warnings(tmp_path):
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    words = ["-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path]
    done = subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in said and "Documentation built" in said, said
    assert (tmp_path / "writing-a-backend" / "index.html").is_file()


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(config.Settings)])
def test_settings_and_their_defaults(key):
    default = getattr(config.Settings(), key)
    default = list(default) if isinstance(default, tuple) else default
    shown = str(default).lower() if isinstance(default, bool) else f'"{default}"' if isinstance(default, str) else str(default)
    assert f"| `{key}` | `{shown}` |" in text("configuration.md")


@pytest.mark.parametrize("name", [*rules.CONDITIONS, *config.QUALITIES, *config.RULE_KEYS])
def test_conditions_qualities_and_keys_of_rules(name):
    assert re.search(rf'`"?{name}\b', text("configuration.md"))


@pytest.mark.parametrize("name", ["TAYLOR_PATCH", *config.RESERVED_VARIABLES])
def test_variables(name):
    assert f"| `{name}` |" in text("environment.md")


def test_the_example_backend_works(monkeypatch):
    import torch

    (code,) = (block for block in python_blocks("writing-a-backend.md") if "class Plugin" in block)
    space = {}
    exec(code, space)

    class Entry:
        name, value = "my_attention", "my_attention:Plugin"

        @staticmethod
        def load():
            return space["Plugin"]

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry])
    q, k, v = (torch.randn(1, 2, 1100, 16) for _ in range(3))
    out = taylor_patch.attention(q, k, v, backend="chunked")
    torch.testing.assert_close(out, taylor_patch.attention(q, k, v, backend="sdpa"))


def test_the_options_of_the_guide_are_understood():
    (code,) = (block for block in python_blocks("writing-a-backend.md") if "class Options" in block)
    space = {}
    exec(compile(code, "writing-a-backend.md", "exec", dont_inherit=True), space)
    for wrong in ({"rows_at_once": 0}, {"kept": 0.0}, {"order": "tiles", "rows_at_once": 1}):
        with pytest.raises(taylor_patch.TaylorPatchError):
            config.merge([config.Layer("file", {"backends": {"mine": wrong}})], {"mine": space["Options"]})
    (table,) = config.schema({"mine": space["Options"]})["properties"]["backends"]["properties"].values()
    assert [key["description"] for key in table["properties"].values()] == re.findall(r'option\([^,]+, "([^"]+)"', code)


def test_the_api_example_runs():
    (code,) = python_blocks("api.md")
    space = {}
    exec(code, space)
    assert space["out"].shape == space["q"].shape


def learnings():
    """(learning, tests) of each row of the table."""
    return [(cells[1].strip(), re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[3]))
            for line in text("seed-learnings.md").splitlines() if len(cells := line.split("|")) == 5 and "`" in cells[3]]


@pytest.mark.parametrize(("learning", "tests"), learnings(), ids=[learning[:40] for learning, _ in learnings()])
def test_every_learning_has_its_test(learning, tests):
    assert learning and tests
    for file, name in tests:
        functions = {node.name: node for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
                     if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"
        assert asserts(functions[name], functions), f"{file}::{name} asserts nothing"


def asserts(function, helpers):
    """Whether a function can fail: by an assert, pytest.raises or assert_close of its own, or of a helper beside it that it calls."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if name in ("raises", "assert_close") or (name in helpers and asserts(helpers[name], {k: v for k, v in helpers.items() if k != name})):
            return True
    return False


@pytest.mark.parametrize(("code", "can_fail"), [
    ("x = 1", False), ("print(raises)", False), ("assert x", True), ("helper()", True), ("other()", False),
    ("with pytest.raises(E):\n  f()", True)])
def test_a_test_that_asserts_nothing_is_found_out(code, can_fail):
    helpers = {"helper": ast.parse("assert y"), "other": ast.parse("y")}
    assert asserts(ast.parse(code), helpers) is can_fail


def test_the_table_has_all_learnings():
    rows = [line for line in text("seed-learnings.md").splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(learnings()) == 27


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs" / "adr").glob("*.md")))
def test_every_decision_is_in_the_list(name):
    decisions = text("architecture.md").split("## Decisions")[1]
    assert f"(adr/{name})" in decisions and f"- [{int(name[:4])} " in decisions


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
