"""What a command needs of this machine, looked at before it works."""

from __future__ import annotations

import importlib.util

import click
import torch


def packages(command: str, extra: str, *modules: str) -> None:
    """Raises ClickException where one of `modules`, which the extra brings, is not installed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise click.ClickException(f"{command} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
                                   f'pip install "taylor-patch[{extra}]"')


def device(name: str) -> torch.device:
    """The device of --device. Raises ClickException for "cuda" where there is no GPU that PyTorch can use."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise click.ClickException(f"--device cuda: torch {torch.__version__} sees no CUDA GPU. Use --device cpu, or a PyTorch for your GPU.")
    return torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
