"""docs/backend-reference.md says what Backend, AttentionCall and TokenGrid are."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch

import taylor_patch
from taylor_patch.backends.base import Backend
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.declaration import NoOptions
from taylor_patch.testing.cases import make_call
from taylor_patch.testing.suite.subject import DECLARED
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "backend-reference.md").read_text(encoding="utf-8")


def rows(section):
    """The cells of each row of the first table of a section, without backticks."""
    table = re.search(rf"^## `?{section}`?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


ATTRIBUTES = {cells[0]: cells[1:] for cells in rows("Attributes")}


def test_all_attributes_are_there():
    assert set(ATTRIBUTES) == set(Backend.__annotations__) == set(DECLARED)


@pytest.mark.parametrize("name", Backend.__annotations__)
def test_an_attribute(name):
    kind, default, example = ATTRIBUTES[name]
    space = {"torch": torch, "NoOptions": NoOptions, "Options": dataclasses.make_dataclass("Options", (), frozen=True)}
    assert Backend.__annotations__[name] == f"ClassVar[{kind}]"
    if name != "name":
        assert eval(default, space) == getattr(Backend, name)
    _, fits = DECLARED[name]
    assert fits(eval(example, space)) and example != default


def named_in(cells):
    return [name for cell in cells for name in re.findall(r"\w+", cell)]


@pytest.mark.parametrize("kind", [AttentionCall, TokenGrid], ids=lambda kind: kind.__name__)
def test_fields(kind):
    properties = [name for name, value in vars(kind).items() if isinstance(value, property)]
    named = named_in(cells[0] for cells in rows(kind.__name__))
    assert sorted(named) == sorted([field.name for field in dataclasses.fields(kind)] + properties)


def test_methods():
    methods = [name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")]
    named = [name for cells in rows("Methods") for name in re.findall(r"(\w+)\(", cells[0])]
    assert sorted(named) == sorted(methods)


def example(name):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {name}" in block)
    space = {}
    exec(code, space)
    return space[name]()


def test_the_example_of_reasons_keeps_those_of_the_base_class():
    even, call = example("Even"), make_call(64, torch.float32, "cpu", heads=4, kv_heads=2)
    assert even.reasons_against(call) == ("grouped-query attention", "151 tokens, not a multiple of 64")
    assert even.reasons_against(make_call(64, torch.float32, "cpu", text=48)) == ()


def test_the_example_of_row_masks_drops_that_reason_only():
    call = make_call(512, torch.float32, "cpu")
    call = dataclasses.replace(call, row_mask=torch.ones(1, 1, 151, 151, dtype=torch.bool))
    assert example("WithRowMasks").reasons_against(call) == ("head_dim 512 outside 1 to 256",)
    assert "mask depends on the query row" in taylor_patch.Backend().reasons_against(call)
