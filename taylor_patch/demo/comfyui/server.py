"""A headless ComfyUI on the CPU, started in a folder of its own and driven through its HTTP interface."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from taylor_patch.errors import TaylorPatchError

READY = "To see the GUI go to"
"""What ComfyUI prints once it answers requests."""


class Server:
    """`with Server(...) as server: server.run(workflow)`.

    comfyui: a checkout; nothing is written there. folder: holds models, outputs and server.log. python: the interpreter that ComfyUI
    runs in. launcher: words between the interpreter and main.py. env: variables for the server. nodes: folders of custom nodes.
    Raises TaylorPatchError where ComfyUI does not start or a workflow fails, with the end of its log.
    """

    def __init__(self, comfyui: Path, folder: Path, python: str, *, launcher: Sequence[str] = (), env: Mapping[str, str] | None = None,
                 nodes: Iterable[Path] = (), flags: Sequence[str] = ("--cpu",)) -> None:
        main = comfyui.resolve() / "main.py"
        if not main.is_file():
            raise TaylorPatchError(f"{comfyui} is not a ComfyUI checkout: it has no main.py")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder.resolve()
        for name in ("custom_nodes", "models", "input", "output", "user", "temp", "web"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for number, node in enumerate(nodes):
            shutil.copytree(node, self.folder / "custom_nodes" / f"nodes_{number}", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("__pycache__"))
        # --cache-none: an unchanged workflow would be answered from ComfyUI's cache.
        self.command = [python, *launcher, str(main), *flags, "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch",
                        "--disable-metadata", "--disable-api-nodes", "--cache-none", "--base-directory", str(self.folder),
                        "--front-end-root", str(self.folder / "web"), "--database-url", f"sqlite:///{self.folder}/user/comfyui.db"]
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
        self.directory = main.parent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return (self.folder / "server.log").read_text(errors="replace")

    def __enter__(self) -> Server:
        with open(self.folder / "server.log", "w") as log:
            self._process = subprocess.Popen(self.command, cwd=self.directory, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready(180)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the server to end; kill it where it does not."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_until_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check_alive()
            if READY in self.log:
                try:
                    self._get("/system_stats")
                    return
                except urllib.error.URLError:
                    pass
            time.sleep(0.1)
        raise TaylorPatchError(f"ComfyUI was not ready after {seconds:.0f} s:\n{self.log[-3000:]}")

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = None if self._process is None else self._process.returncode
            raise TaylorPatchError(f"ComfyUI ended with status {code}:\n{self.log[-3000:]}")

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
            data: bytes = reply.read()
        return data

    def run(self, workflow: Mapping[str, Any], timeout: float = 900) -> bytes:
        """Queue `workflow` (API format), wait for it, and return the saved latent as safetensors bytes."""
        body = json.dumps({"prompt": workflow, "client_id": uuid.uuid4().hex}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                prompt = json.loads(reply.read())["prompt_id"]
        except urllib.error.HTTPError as error:
            raise TaylorPatchError(f"ComfyUI refused the workflow: {error.read().decode()[:2000]}") from None
        end = time.monotonic() + timeout
        while prompt not in (history := json.loads(self._get(f"/history/{prompt}"))):
            self._check_alive()
            if time.monotonic() > end:
                raise TaylorPatchError(f"the workflow was not finished after {timeout:.0f} s")
            time.sleep(0.05)
        entry = history[prompt]
        if entry["status"]["status_str"] != "success":
            raise TaylorPatchError(f"the workflow failed: {entry['status']['messages'][-1]}")
        saved = next(item for output in entry["outputs"].values() for items in output.values() for item in items
                     if str(item.get("filename", "")).endswith(".latent"))
        return self._get("/view?" + urllib.parse.urlencode({key: saved[key] for key in ("filename", "subfolder", "type")}))
