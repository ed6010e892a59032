"""The wheel and the editable install in fresh virtual environments, seen from fresh interpreters.

The environments hold wrapt but not torch: what start-up must not import is not there to be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.packaging
FILES = ("taylor_patch_startup.pth", "taylor_patch_startup.start")


def pip(python, *words):
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True, capture_output=True)


def make(folder, *packages):
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    for package in packages:
        pip(python, "install", "--no-deps", "--constraint", ROOT / "constraints.txt", *package)
    return python


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(request, tmp_path_factory, wheel):
    install = [wheel] if request.param == "wheel" else ["--editable", ROOT]
    return make(tmp_path_factory.mktemp(request.param), ["wrapt"], install)


def start(python, code, switch=None, flags=(), **env):
    """(standard output, standard error) of `code` in a new interpreter; its exit status must be 0."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TAYLOR_PATCH", "PYTHON"))}
    if switch is not None:
        environ["TAYLOR_PATCH"] = switch
    done = subprocess.run([python, *flags, "-c", code], env={**environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


MODULES = "import sys, json; print(json.dumps(sorted(sys.modules)))"


def loaded(python, switch, flags=()):
    out, err = start(python, MODULES, switch, flags)
    assert err == ""
    return set(json.loads(out))


def test_files_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {*FILES, "taylor_patch/py.typed", "taylor_patch/demo/tinyflux-s.safetensors",
            "taylor_patch/demo/comfyui/nodes/__init__.py"} <= names
    assert not any(name.startswith(("tests", "docs")) for name in names)


@pytest.mark.parametrize("flags", [(), ("-I",), ("-s",)], ids=["plain", "-I", "-s"])
@pytest.mark.parametrize("switch", [None, "", "0"], ids=["unset", "empty", "0"])
def test_off_loads_the_guard_only(python, switch, flags):
    modules = loaded(python, switch, flags)
    assert [name for name in modules if name.startswith("taylor_patch")] == ["taylor_patch"]
    assert not {"torch", "wrapt", "pluggy", "importlib.metadata"} & modules


@pytest.mark.parametrize("flags", [(), ("-I",), ("-s",)], ids=["plain", "-I", "-s"])
@pytest.mark.parametrize("switch", ["1", "near_far"])
def test_on_registers_and_nothing_else(python, switch, flags):
    modules = loaded(python, switch, flags)
    assert {name for name in modules if name.startswith("taylor_patch")} == {"taylor_patch", "taylor_patch.startup"}
    assert not {"torch", "wrapt", "pluggy"} & modules


def test_without_site_nothing_runs(python):
    assert not any(name.startswith("taylor_patch") for name in loaded(python, "1", ("-S",)))


IMPORTS_COMFY = "import importlib.util, sys, taylor_patch.startup as s; importlib.util.find_spec('comfy'); "


def test_running_twice_registers_once(python):
    code = ("import taylor_patch; taylor_patch._startup(); taylor_patch._startup();" + IMPORTS_COMFY +
            "from wrapt import importer; print(sys.meta_path.count(s.Waiting),"
            "[len(importer._post_import_hooks[n]) for n in sorted(importer._post_import_hooks) if n.startswith('comfy')])")
    assert start(python, code, "1")[0].split() == ["1", "[1,", "1,", "1,", "1]"]


def test_spawned_children_are_patched_too(python, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text("import multiprocessing, sys\n"
                      "def child(queue): queue.put('taylor_patch.startup' in sys.modules)\n"
                      "if __name__ == '__main__':\n"
                      "    context = multiprocessing.get_context('spawn')\n"
                      "    queue = context.Queue()\n"
                      "    process = context.Process(target=child, args=(queue,))\n"
                      "    process.start(); print(queue.get(timeout=30)); process.join()\n")
    assert start(python, f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", "1")[0].strip() == "True"


def test_a_hook_that_fails_does_not_break_the_import(python, tmp_path):
    """There is no torch here, so the hook cannot work: one line, and ComfyUI's module is imported as if nothing were."""
    folder = tmp_path / "comfy" / "ldm" / "modules"
    folder.mkdir(parents=True)
    (folder / "attention.py").write_text("def optimized_attention(): return 'original'\n")
    out, err = start(python, "import comfy.ldm.modules.attention as a; print(a.optimized_attention())", "1", PYTHONPATH=str(tmp_path))
    assert out.strip() == "original"
    assert len(err.splitlines()) == 1 and "comfy.ldm.modules.attention is not patched (ModuleNotFoundError" in err


@pytest.fixture(scope="module")
def without_wrapt(tmp_path_factory, wheel):
    return make(tmp_path_factory.mktemp("without_wrapt"), [wheel])


def test_missing_wrapt_is_one_line(without_wrapt):
    for switch in (None, "0", "1"):
        assert start(without_wrapt, "print(1)", switch) == ("1\n", "")
    out, err = start(without_wrapt, IMPORTS_COMFY * 2 + "print(s.registered, s.failure)", "1")
    assert out == "False ModuleNotFoundError: No module named 'wrapt'\n" and len(err.splitlines()) == 1
    assert err.startswith("taylor_patch: off: start-up failed (ModuleNotFoundError: No module named 'wrapt')")


def test_wrapt_in_a_folder_that_comes_later(without_wrapt, tmp_path):
    """As with a virtual environment on top of the system's packages, or a package of the user's."""
    site = next(without_wrapt.parents[1].glob("lib/python*/site-packages"))
    pip(without_wrapt, "install", "--no-deps", "--target", tmp_path / "late", "--constraint", ROOT / "constraints.txt", "wrapt")
    package = tmp_path / "comfy" / "ldm" / "modules"
    package.mkdir(parents=True)
    (package / "attention.py").write_text("")
    late = site / "zz_late.pth"
    late.write_text(f"import sys; assert 'taylor_patch.startup' in sys.modules and 'wrapt' not in sys.modules\n{tmp_path / 'late'}\n")
    try:
        out, err = start(without_wrapt, "import comfy.ldm.modules.attention, taylor_patch.startup as s; print(s.registered, *s.fired)", "1",
                         PYTHONPATH=str(tmp_path))
    finally:
        late.unlink()
    assert out.split() == ["True", "comfy.ldm.modules.attention"] and "start-up failed" not in err, err


def test_uninstalling_leaves_nothing(tmp_path, wheel):
    python = make(tmp_path / "venv", [wheel])
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert all((site / name).is_file() for name in FILES)
    pip(python, "uninstall", "--yes", "taylor-patch")
    assert not list(site.glob("taylor_patch*"))
    assert start(python, "print(1)", "1") == ("1\n", "")
