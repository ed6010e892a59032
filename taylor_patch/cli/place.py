"""Which configuration files a command reads: those of the ComfyUI that it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from taylor_patch import config as configuration
from taylor_patch.errors import TaylorPatchError

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Place:
    """The folder that ComfyUI is started in, and its user folder where it is known."""

    folder: Path
    user: Path | None

    def files(self) -> list[Path]:
        """Configuration files that exist, strongest first. Raises ConfigError where TAYLOR_PATCH_CONFIG names none."""
        return configuration.files(comfyui_user=self.user, folder=self.folder)

    def layers(self) -> list[configuration.Layer]:
        """All sources of settings, strongest first. Raises ConfigError for one that cannot be read."""
        return configuration.layers_of(comfyui_user=self.user, folder=self.folder)

    def allowed_plugins(self) -> tuple[str, ...]:
        """plugins.allow of the strongest source that has it."""
        return configuration.allowed_plugins(comfyui_user=self.user, folder=self.folder)

    def described(self) -> list[str]:
        """A sentence for each file that is read, strongest first."""
        searched = [str(self.folder), *([str(self.user)] if self.user else []), "the user's configuration folder"]
        return [f"read: {file}" for file in self.files()] or [f"no {configuration.FILE_NAME} in {' or '.join(searched)}"]


def is_comfyui(folder: Path) -> bool:
    """Whether it looks like ComfyUI's folder."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def place(comfyui: Path | None, user_directory: Path | None) -> Place:
    """That of ComfyUI in `comfyui`, else of the one in this folder, else this folder. Raises TaylorPatchError where `comfyui` is none."""
    if comfyui is not None and not is_comfyui(comfyui):
        raise TaylorPatchError(f"{comfyui} has no main.py and comfy/. Name ComfyUI's own folder.")
    folder = (comfyui or Path.cwd()).resolve()
    return Place(folder, user_directory or (folder / "user" if is_comfyui(folder) else None))


def options(command: Command) -> Command:
    """--comfyui and --user-directory for `command`."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    user = click.option("--user-directory", type=folder, help="ComfyUI's user folder, where it is not `user` in ComfyUI's folder.")
    return click.option("--comfyui", type=folder, help="Read what this ComfyUI reads when it is started in its folder. [default: the one in "
                        "this folder, if there is one]")(user(command))
