"""`taylor-patch run`: the second door, for interpreters without start-up files."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from taylor_patch import _startup
from taylor_patch.errors import TaylorPatchError

INTERPRETER = re.compile(r"(python|pythonw|pypy|py|pyw)[\d.]*t?(\.exe)?", re.IGNORECASE)
WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")
"""Options of Python whose value is the next word."""

BORROWED = ("taylor_patch", "wrapt", "pluggy", "platformdirs", "tomlkit", "tomli", "click")
"""What another interpreter takes from this one where it has none of its own."""

OTHER = """
import sys
from importlib.machinery import PathFinder
class Borrowed:
    folders = {folders!r}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return PathFinder.find_spec(name, [cls.folders[name]]) if name in cls.folders else None
sys.meta_path.append(Borrowed)
from taylor_patch.cli import main
main(["run", "--", *sys.argv[1:]])
"""
"""What another interpreter runs. Its own packages go first, and of ours it sees BORROWED only: one made for another version would break it."""


def prepared(command: Sequence[str]) -> Callable[[], None]:
    """What runs `python [options] script args` in that interpreter, or `script args` or `-m module args` in this one.

    Raises TaylorPatchError where there is nothing that could be run.
    """
    if INTERPRETER.fullmatch(Path(command[0]).name):
        words = _words_of_other(command)
        return lambda: _elsewhere(words)
    first = command[0]
    arguments = list(command[1:] if first == "-m" else command)
    if not arguments:
        raise TaylorPatchError("-m is followed by no module. Write `taylor-patch run -- -m MODULE`.")
    if first != "-m":
        _check_script(first)
    elif importlib.util.find_spec(arguments[0].partition(".")[0]) is None:
        raise TaylorPatchError(f"there is no module {arguments[0]} in {sys.executable}")
    return lambda: _here(first, arguments)


def _switch_on() -> None:
    if not os.environ.get("TAYLOR_PATCH", "").strip():  # 0 or off stays off, as the log's line says
        os.environ["TAYLOR_PATCH"] = "1"


def _here(first: str, arguments: list[str]) -> None:
    _switch_on()
    _startup()
    sys.argv = arguments
    if not getattr(sys.flags, "safe_path", False):  # then there is no entry for the script
        sys.path[0] = str(Path.cwd() if first == "-m" else Path(first).resolve().parent)
    if first == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def _words_of_other(command: Sequence[str]) -> list[str]:
    """The command that runs what follows the interpreter and its options in `command` by that interpreter."""
    at = 1
    while at < len(command) and command[at].startswith("-") and command[at] != "-m":
        if command[at] == "-c":
            raise TaylorPatchError("code after -c cannot be run with taylor_patch. Put it into a file.")
        at += 2 if command[at] in WITH_VALUE else 1
    if at >= len(command):
        raise TaylorPatchError(f"{' '.join(command)} names no script. Write `taylor-patch run -- {command[0]} main.py`.")
    program = shutil.which(command[0])
    if program is None:
        raise TaylorPatchError(f"there is no interpreter {command[0]} here. Name the one that starts ComfyUI, with its path.")
    if command[at] != "-m":
        _check_script(command[at])
    found = {name: importlib.util.find_spec(name) for name in BORROWED}
    folders = {name: str(Path(spec.origin).resolve().parents[1]) for name, spec in found.items() if spec is not None and spec.origin}
    return [program, *command[1:at], "-c", OTHER.format(folders=folders), *command[at:]]


def _elsewhere(words: list[str]) -> None:
    _switch_on()
    if os.name == "nt":  # where exec ends this process while the other still uses its console
        raise SystemExit(subprocess.call(words))
    os.execv(words[0], words)


def _check_script(name: str) -> None:
    path = Path(name)
    if not path.exists():
        raise TaylorPatchError(f"there is no file {name} here. Name a Python script, or the interpreter before it: "
                               "`taylor-patch run -- python main.py`.")
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise TaylorPatchError(f"{name} is a folder without __main__.py. Name a Python script in it.")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(1024)
        if b"\0" in start and not start.startswith(b"PK"):  # a zip may be run
            raise TaylorPatchError(f"{name} is a program and not a Python script. Name the interpreter and the script: "
                                   "`taylor-patch run -- python main.py`.")
