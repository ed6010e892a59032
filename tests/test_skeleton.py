"""`taylor-patch plugins new` writes a plugin that passes its own tests."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner

from taylor_patch.cli import main, skeleton
from tests.broken_skeleton import BREAKS, write_broken
from tests.conftest import ROOT


def new(*words):
    return CliRunner().invoke(main, ["plugins", "new", *words])


def test_what_a_new_plugin_has(tmp_path):
    assert "python -m pytest" in new("demo-backend").output
    made = tmp_path / "taylor-patch-demo-backend"
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == {
        "README.md", "pyproject.toml", "tests/test_demo_backend.py", "taylor_patch_demo_backend/__init__.py",
        "taylor_patch_demo_backend/backend.py"}
    rules = ["--line-length", "144", "--select", "E,F,I,B,UP,SIM"]
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", *rules, made], capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


def blocks(page, kind):
    return "".join(re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL))


def transcript():
    """(command, lines of its output that are shown) of the record of a first plugin."""
    parts = re.split(r"^\$ ", blocks("first-plugin.md", "console"), flags=re.MULTILINE)[1:]
    return [(lines[0], [line for line in lines[1:] if line != "..."]) for lines in map(str.splitlines, parts)]


def test_the_transcript_has_the_commands_of_the_guide_in_their_order():
    commands = iter([command for command, _ in transcript()])
    next(commands)
    assert all(command in commands for command in blocks("writing-a-backend.md", "shell").splitlines()[1:])


def test_the_transcript_is_what_the_commands_say(tmp_path):
    """As they stand there; installing goes to a folder, and without the network."""
    site, here = tmp_path / "site", tmp_path / "attention"
    offline = f"--no-index --no-deps --no-build-isolation --upgrade --target {shlex.quote(str(site))}"
    instead = {"python -m pip install --editable": f"python -m pip install {offline}",
               "python -m pip install --force-reinstall --no-deps": f"python -m pip install {offline}",
               "python -m build": "python -m build --no-isolation", "taylor-patch ": "python -m taylor_patch "}
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT))), "PYTEST_ADDOPTS": "-W error -p no:cacheprovider"}
    here.mkdir()
    for command, shown in transcript()[1:]:
        if command.startswith("cd "):
            here = here / command.removeprefix("cd ")
            continue
        for words, others in instead.items():
            command = re.sub(rf"(?<!\S){re.escape(words)}", lambda _, others=others: others, command)
        command = re.sub(r"(?<!\S)python(?= )", lambda _: shlex.quote(sys.executable), command)
        done = subprocess.run(command, shell=True, cwd=here, env=environ, capture_output=True, text=True)
        said = without_numbers(done.stdout + done.stderr)
        assert all(without_numbers(line) in said for line in shown), f"{command}\n{done.stdout}{done.stderr}"
        assert (done.returncode == 0) is not any("failed" in line or line.startswith("Error") for line in shown), command


def without_numbers(text):
    return re.sub(r"\d[\d.e+-]*", "#", text)


@pytest.mark.parametrize("kind", BREAKS)
def test_breaking_it_gives_a_finding(tmp_path, kind):
    made, how = write_broken(kind, tmp_path / "demo"), BREAKS[kind]
    test = made / "tests" / "test_demo_backend.py"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", f"{test}::TestConformance::{how.test}"]
    if kind == "hangs on load":
        test.write_text(test.read_text().replace('"demo_backend", ', '"demo_backend", load_seconds=3, '))
    done = subprocess.run([sys.executable, *words], cwd=made, env={**os.environ, "COLUMNS": "300"}, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout + done.stderr
    assert any('backend "demo_backend": ' in line and how.finding in line for line in done.stdout.splitlines()), done.stdout


LOOP = """        for start in range(0, call.q.shape[2], self.options.rows_at_once):
            rows = slice(start, start + self.options.rows_at_once)
"""


def test_a_skeleton_without_its_loop_gives_a_finding(tmp_path):
    made = skeleton.write("demo-backend", tmp_path / "demo")
    backend = made / "taylor_patch_demo_backend" / "backend.py"
    text = backend.read_text()
    assert LOOP in text
    backend.write_text(text.replace(LOOP, "        if True:\n            rows = slice(0, self.options.rows_at_once)\n"))
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "plainest_call"]
    done = subprocess.run([sys.executable, *words], cwd=made, capture_output=True, text=True)
    assert done.returncode == 1 and 'backend "demo_backend": the plainest call: ' in done.stdout, done.stdout + done.stderr


def test_the_findings_differ():
    assert len({how.finding for how in BREAKS.values()}) == len(BREAKS) == 6


@pytest.mark.parametrize("name", ["Demo", "1st", "a.b", "taylor-patch-"])
def test_names_that_cannot_be(name, tmp_path):
    result = new(name)
    assert result.exit_code == 1 and "cannot be a plugin's name" in result.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["auto", "sdpa", "near-far", "triton_full", "taylor-patch-taylor-torch"])
def test_names_of_built_in_backends_are_taken(name, tmp_path):
    result = new(name)
    assert result.exit_code == 1 and f'"{name}" is a backend of taylor_patch itself' in result.output and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    result = new("demo", "--folder", "mine")
    assert result.exit_code == 1 and "is not empty" in result.output and [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]


def test_the_prefix_may_be_given(tmp_path):
    assert "Wrote taylor-patch-demo." in new("taylor-patch-demo").output
    assert (tmp_path / "taylor-patch-demo" / "taylor_patch_demo").is_dir()
