"""`taylor-patch plugins new`: a plugin to start from. The files that end in .in are its templates."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from string import Template

from taylor_patch.errors import TaylorPatchError
from taylor_patch.plugins import BuiltinBackends

TEMPLATES = Path(__file__).parent
# Template -> file of the plugin; $package and $name are filled in both.
FILES = {
    "package.py.in": "$package/__init__.py",
    "backend.py.in": "$package/backend.py",
    "test.py.in": "tests/test_$name.py",
    "README.md.in": "README.md",
    "pyproject.toml.in": "pyproject.toml",
}


def write(name: str, folder: Path | None = None) -> Path:
    """Write the plugin `name` into `folder` (taylor-patch-NAME unless given) and return it.

    Raises TaylorPatchError where the name cannot be a package's, or the folder holds something already.
    """
    short = re.sub("^taylor[-_]patch[-_]", "", name).replace("-", "_")
    taken = ("auto", *(backend.name for backend in BuiltinBackends.taylor_patch_register_backends()))
    if short in taken:
        raise TaylorPatchError(f'"{name}" is a backend of taylor_patch itself ({", ".join(taken)} are taken). Choose another name')
    if not re.fullmatch("[a-z][a-z0-9_]*", short):
        raise TaylorPatchError(f'"{name}" cannot be a plugin\'s name: use lower-case letters, digits and "-", a letter first, '
                               'for example "my-attention"')
    distribution = f"taylor-patch-{short.replace('_', '-')}"
    made = Path(distribution) if folder is None else folder
    if made.exists() and any(made.iterdir()):
        raise TaylorPatchError(f"{made} is there already and is not empty. Give another name, or another place with --folder.")
    words = {"name": short, "package": f"taylor_patch_{short}", "distribution": distribution, "host": version("taylor-patch"),
             "backend": "".join(part.capitalize() for part in short.split("_"))}
    for source, target in FILES.items():
        path = made / Template(target).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((TEMPLATES / source).read_text(encoding="utf-8")).substitute(words), encoding="utf-8")
    return made
