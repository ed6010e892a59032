"""The taylor-patch command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from taylor_patch import engine as engines
from taylor_patch.cli import main
from tests.conftest import ROOT


def run(*words, status=0):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == status, result.output + str(result.exception)
    return result.output if status else result.stdout


COMMANDS = [["demo"], ["bench"], ["report"], ["watch"], ["compare"], ["doctor"], ["run"], ["backends"], ["plugins"], ["config"],
            *(["config", name] for name in ("init", "show", "explain", "check", "schema"))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help(words):
    assert f"Usage: main {' '.join(words)}" in run(*words, "--help")


def test_demo_makes_picture_and_figures(tmp_path):
    result = json.loads(run("demo", "--size", "32", "--steps", "2", "--device", "cpu", "--out", "made", "--json"))
    assert result == json.loads((tmp_path / "made" / "demo.json").read_text())
    rows = {row["backend"]: row for row in result["rows"]}
    assert list(rows) == ["sdpa", "near_far", "taylor_torch"]
    assert rows["sdpa"]["psnr_db"] is None and rows["sdpa"]["rel_l2_p90"] < 1e-5
    assert rows["near_far"]["calls"]["near_far"] >= 5 and sum(rows["near_far"]["calls"].values()) == 10
    assert rows["taylor_torch"]["calls"] == {"taylor_torch": 10} and rows["near_far"]["psnr_db"] > rows["taylor_torch"]["psnr_db"] + 5
    assert rows["taylor_torch"]["rel_l2_median"] > rows["near_far"]["rel_l2_median"] > rows["sdpa"]["rel_l2_median"]
    picture = Image.open(tmp_path / "made" / "comparison.png")
    assert picture.size[0] > 3 * 384 and len(picture.getcolors(1 << 24)) > 100


def test_demo_needs_a_comfyui(tmp_path):
    assert "is not a ComfyUI checkout" in run("demo", "--comfyui", str(tmp_path), status=1)


def test_backends():
    for words in (["backends"], ["backends", "--check"]):
        rows = {row["name"]: row for row in json.loads(run(*words, "--json"))}
        assert {"near_far", "taylor_torch", "sdpa"} <= set(rows) and rows["near_far"]["reasons_against"] == []
        text = run(*words)
        assert all(name in text for name in rows) and ("can run here. " in text) == (len(words) == 2)


def test_plugins():
    (built_in, *_) = json.loads(run("plugins", "--json"))
    assert built_in["name"] == "taylor_patch" and "near_far" in built_in["backends"] and built_in["error"] is None
    assert "built in" in run("plugins")


def test_config_init_check_show(tmp_path):
    assert "Wrote" in run("config", "init")
    assert "is there already" in run("config", "init", status=1)
    run("config", "init", "--force")
    assert "valid" in run("config", "check")
    assert 'backend = "auto"' in run("config", "show")


def test_config_check_names_the_place(configure, tmp_path):
    path = configure('[taylor_patch]\nbackend = "near_fra"\n')
    for words in (["config", "check"], ["config", "check", str(path)], ["config", "show"]):
        output = run(*words, status=1)
        assert f"{path}:2:1: taylor_patch.backend" in output and 'Did you mean "near_far"?' in output


def test_config_explain(configure, monkeypatch):
    path = configure('[taylor_patch]\nbackend = "near_far"\n')
    monkeypatch.setenv("TAYLOR_PATCH", "sdpa")
    rows = json.loads(run("config", "explain", "backend", "--json"))
    assert [(row["place"], row["value"], row["wins"]) for row in rows] == [
        ("TAYLOR_PATCH=sdpa", "sdpa", True), (f"{path}:2:1", "near_far", False), ("default", "auto", False)]
    assert "wins" in run("config", "explain", "backend")
    assert "Did you mean" in run("config", "explain", "bakend", status=1)


def test_config_schema():
    assert json.loads(run("config", "schema"))["properties"]["taylor_patch"]


@pytest.fixture
def comfyui(tmp_path):
    """A folder that looks like ComfyUI's, with a file in it and one in its user folder."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "user").mkdir()
    (folder / "taylor_patch.toml").write_text("[taylor_patch]\nmin_tokens = 2000\n")
    (folder / "user" / "taylor_patch.toml").write_text("[taylor_patch]\nmin_tokens = 3000\nquality = 0.07\n")
    return folder


@pytest.mark.parametrize("inside", [False, True], ids=["named", "inside"])
def test_config_commands_read_what_comfyui_reads(configure, comfyui, monkeypatch, inside):
    here = configure("[taylor_patch]\nmin_tokens = 1000\n")
    assert "min_tokens = 1000\n" in run("config", "show")
    if inside:
        monkeypatch.chdir(comfyui)
    words = [] if inside else ["--comfyui", str(comfyui)]
    own, user = comfyui / "taylor_patch.toml", comfyui / "user" / "taylor_patch.toml"
    shown = run("config", "show", *words)
    assert f"# read: {own}\n# read: {user}\n" in shown and str(here) not in shown
    assert "min_tokens = 2000\n" in shown and "quality = 0.07\n" in shown
    explained = run("config", "explain", "min_tokens", *words)
    assert f"read: {user}\n" in explained and f"{own}:2:1" in explained and f"{user}:2:1" in explained
    assert f"read: {own}\n" in run("config", "check", *words)
    user.write_text("[taylor_patch]\nqualty = 1\n")
    assert f"{user}:2:1: taylor_patch.qualty" in run("config", "check", *words, status=1)
    other = comfyui.parent / "other"
    other.mkdir()
    (other / "taylor_patch.toml").write_text("[taylor_patch]\nquality = 0.08\n")
    assert "quality = 0.08\n" in run("config", "show", *words, "--user-directory", str(other))


def test_a_folder_that_is_not_comfyui(tmp_path):
    for words in (["config", "show"], ["doctor"]):
        assert "has no main.py and comfy/" in run(*words, "--comfyui", str(tmp_path), status=1)


def findings(*words, status=0):
    return [(row["state"], row["text"]) for row in json.loads(run("doctor", "--json", *words, status=status))]


def test_doctor_reads_comfyuis_files(configure, comfyui):
    here = configure("[taylor_patch]\nquality = 7\n")
    found = findings("--comfyui", str(comfyui))
    assert ("ok", f"configuration: read: {comfyui / 'user' / 'taylor_patch.toml'}") in found
    assert ("ok", 'configuration: backend = "auto", quality = 0.07, min_tokens = 2000') in found
    assert not any(str(here) in text for _, text in found)


def test_doctor_says_why_auto_is_exact_and_what_is_off_on_purpose(configure, monkeypatch):
    from taylor_patch import calibration

    def has(text):
        return any(state == "note" and text in found for state, found in findings())

    hint = "run `taylor-patch bench --calibrate`, or name near_far"
    assert has(hint) and hint in run("backends", "--check")
    monkeypatch.setenv("TAYLOR_PATCH", "near_far")
    engines.reset()
    assert not has(hint) and hint not in run("backends", "--check")
    monkeypatch.delenv("TAYLOR_PATCH")
    calibration.store(torch.device("cpu"), {"near_far": 8192})
    engines.reset()
    output = run("backends", "--check")
    assert "can run here, auto from 8,192 tokens" in output and hint not in output and not has(hint)
    calibration.store(torch.device("cpu"), {"near_far": None})
    assert has("no backend was measured to be faster on cpu") and not has(hint)
    path = configure("[taylor_patch]\nenabled = false\n")
    assert has(f"off by enabled = false ({path}:2:1)")


@pytest.mark.parametrize("runs", [True, False])
def test_doctor_asks_a_new_interpreter_about_start_up_files(tmp_path, monkeypatch, runs):
    """An interpreter whose start-up files run wherever they are (a package of the user's), and one that reads none."""
    from taylor_patch.cli import checks

    started = tmp_path / "started.py"
    started.write_text("import sys, types\nsys.modules['taylor_patch'] = types.SimpleNamespace(_started=True)\nexec(sys.argv[2])\n")
    script = tmp_path / "python"
    words = f'{started} "$@"' if runs else '"$@"'
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -S {words}\n")
    script.chmod(0o755)
    monkeypatch.setattr(checks.sys, "executable", str(script))
    state, text = checks._startup_files()[1]
    assert state == ("ok" if runs else "problem") and ("Install taylor-patch" in text) is not runs


@pytest.mark.parametrize(("words", "message"), [
    (["demo", "--picture", "21"], "21 is not in the range"), (["demo", "--steps", "0"], "0 is not in the range"),
    (["demo", "--size", "33"], "Take 32 or 34"), (["demo", "--device", "cuda"], "sees no CUDA GPU"),
    (["bench", "--device", "cuda"], "sees no CUDA GPU"), (["config", "init", "no/where.toml"], "no/where.toml: No such file"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_ordinary_mistakes_are_one_line(words, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = run(*words, status=2 if "range" in message or "Take" in message else 1)
    assert message in output.splitlines()[-1] and "Traceback" not in output


def test_demo_without_its_extra(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else find(name, *rest))
    assert 'demo needs PIL, which is not installed: pip install "taylor-patch[demo]"' in run("demo", status=1)


def test_watch_says_what_it_waits_for(monkeypatch):
    from taylor_patch.report import watch

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    assert CliRunner().invoke(main, ["watch", "nothing.jsonl"]).stderr.startswith("waiting for nothing.jsonl\n")


def test_doctor_says_what_stops_it(configure):
    configure("[taylor_patch]\nquality = 7\n")
    found = json.loads(run("doctor", "--json", status=1))
    problems = [row["text"] for row in found if row["state"] == "problem"]
    assert any("taylor_patch.quality" in text for text in problems)
    assert any("TAYLOR_PATCH is not set: off" in row["text"] for row in found)


def launched(*words):
    return subprocess.run([sys.executable, "-m", "taylor_patch", "run", "--", *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [
    ["script.py"], [sys.executable, "script.py"], [sys.executable, "-B", "script.py"],
    [sys.executable, "-X", "utf8", "-W", "ignore", "script.py"],
    [sys.executable, "-X", "utf8", "-m", "script"], ["-m", "script"]], ids=["script", "python", "flags", "options", "python-m", "m"])
def test_run_switches_on_and_passes_arguments(tmp_path, words):
    """`taylor_patch` is found by its start-up being in place; the first import of ComfyUI's registers the hooks."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "script.py").write_text("import sys, os, beside, importlib.util, taylor_patch.startup as s\n"
                                        "importlib.util.find_spec('comfy')\n"
                                        "print(sys.argv[1:], os.environ['TAYLOR_PATCH'], s.registered, __name__, sys.flags.utf8_mode)\n"
                                        "sys.exit(7)\n")
    done = launched(*words, "--listen", "x")
    assert (done.returncode, done.stdout) == (7, f"['--listen', 'x'] 1 True __main__ {int('utf8' in words)}\n"), done.stderr


@pytest.mark.parametrize("interpreter", [[], [sys.executable]], ids=["script", "python"])
def test_run_leaves_it_off_where_the_variable_says_so(tmp_path, monkeypatch, interpreter):
    monkeypatch.setenv("TAYLOR_PATCH", "0")
    (tmp_path / "script.py").write_text("import os, taylor_patch.startup as s\nprint(os.environ['TAYLOR_PATCH'], s.registered)\n")
    done = launched(*interpreter, str(tmp_path / "script.py"))
    assert (done.returncode, done.stdout) == (0, "0 False\n"), done.stderr


def test_run_lends_another_interpreter_ours_and_nothing_else(tmp_path):
    """An interpreter without packages: ours can be imported, others of this environment cannot, and its own library is not shadowed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    python = tmp_path / "other" / "bin" / "python"
    (tmp_path / "script.py").write_text("import importlib.util as u, sys, taylor_patch.startup as s\n"
                                        "print(u.find_spec('torch'), u.find_spec('comfy'), s.registered, sys.path[1:])\n")
    bare = subprocess.run([python, "-c", "import sys; print(sys.path[1:])"], capture_output=True, text=True, env={}).stdout.strip()
    (tmp_path / "without_path.py").write_text(
        "import os, sys\nfrom taylor_patch.cli.launch import prepared\ndel os.environ['PYTHONPATH']\nprepared(sys.argv[1:])()\n")
    done = subprocess.run([sys.executable, tmp_path / "without_path.py", python, "script.py"], capture_output=True, text=True,
                          cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == f"None None True {bare}", done.stdout + done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["nofile.py"], "there is no file nofile.py here"), (["uv", "run", "main.py"], "there is no file uv here"),
    (["python9.9", "main.py"], "there is no interpreter python9.9 here"), (["py", "-3.12", "main.py"], "there is no interpreter py here"),
    ([sys.executable], "names no script"), ([sys.executable, "nofile.py"], "there is no file nofile.py"),
    ([sys.executable, "-c", "1"], "Put it into a file"), (["-m", "no_such_module"], "there is no module no_such_module"),
    (["."], "without __main__.py"), (["/usr/bin/env"], "is a program and not a Python script"),
], ids=lambda words: " ".join(words)[-20:] if isinstance(words, list) else "")
def test_run_mistakes_are_one_line(words, message):
    done = launched(*words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def test_run_leaves_the_errors_of_a_script_alone(tmp_path):
    (tmp_path / "script.py").write_text("from taylor_patch import TaylorPatchError\nopen('nowhere')\n")
    assert "Traceback" in launched("script.py").stderr
    (tmp_path / "script.py").write_text("from taylor_patch import TaylorPatchError\nraise TaylorPatchError('mine')\n")
    assert "Traceback" in launched("script.py").stderr
