"""The documents name everything that a user can name, and their examples run."""

from __future__ import annotations

import dataclasses
import re

import pytest

import taylor_patch
from taylor_patch import config, hookspecs, rules
from tests.conftest import ROOT


def text(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", text(name), re.DOTALL)


@pytest.mark.parametrize("name", taylor_patch.__all__)
def test_public_names(name):
    assert re.search(rf"`{name}\b", text("api.md"))


@pytest.mark.parametrize("hook", [name for name in dir(hookspecs) if name.startswith("taylor_patch_")])
def test_hooks(hook):
    assert f"`{hook}(" in text("writing-a-backend.md")


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(config.Settings)])
def test_settings_and_their_defaults(key):
    default = getattr(config.Settings(), key)
    shown = str(default).lower() if isinstance(default, bool) else f'"{default}"' if isinstance(default, str) else str(default)
    assert f"| `{key}` | `{shown}` |" in text("configuration.md")


@pytest.mark.parametrize("name", [*rules.CONDITIONS, *config.RESERVED_VARIABLES, *config.QUALITIES])
def test_conditions_variables_and_qualities(name):
    assert name in text("configuration.md")


def test_the_example_backend_works(monkeypatch):
    import torch

    from taylor_patch import plugins

    (code,) = python_blocks("writing-a-backend.md")
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


def test_the_api_example_runs():
    (code,) = python_blocks("api.md")
    space = {}
    exec(code, space)
    assert space["out"].shape == space["q"].shape


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
