"""A real ComfyUI server as a child process, and prompts run on it over HTTP and its websocket.

with ComfyServer(comfyui, base) as server:
    outputs = server.run(prompt)
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

Event = Callable[[str, dict[str, Any]], None]

PREVIEW = 1  # a binary message: this, the format, a picture


class PromptError(RuntimeError):
    """ComfyUI refused a prompt, or a node of it failed.

    `node_errors` holds what the server said of each node at validation; `node_type` and `kind`
    name the node that raised and the type of its exception at execution.
    """

    def __init__(
        self,
        message: str,
        *,
        node_type: str | None = None,
        kind: str | None = None,
        node_errors: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.node_type = node_type
        self.kind = kind
        self.node_errors = dict(node_errors or {})


class ServerError(RuntimeError):
    """The server process ended, or never answered. The message ends with its log."""


class ComfyServer:
    """One server process on a free port of this machine, with a base directory of its own.

    comfyui: the folder with main.py. base: see `comfyui_install.prepare_base`.
    arguments: further command-line arguments, such as `--cpu`. threads: OMP_NUM_THREADS.
    environment: variables to add to those of this process.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        arguments: Sequence[str] = (),
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.comfyui = Path(comfyui)
        self.base = Path(base).resolve()
        self.arguments = list(arguments)
        self.environment = {"OMP_NUM_THREADS": str(threads), **(environment or {})}
        self.log_path = self.base / "server.log"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def input(self) -> Path:
        return self.base / "input"

    def start(self, timeout: float = 600.0) -> None:
        """Start the process and wait until it answers. Raises ServerError."""
        self.port = free_port()
        command = [
            sys.executable, "main.py",
            "--port", str(self.port),
            "--base-directory", str(self.base),
            "--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}",
            "--disable-auto-launch", "--disable-api-nodes",
            *self.arguments,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self.alive:
                raise ServerError(f"ComfyUI ended while starting:\n{self.log()[-4000:]}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer in {timeout:.0f} s:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        """End the process; more than once is fine."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerError("The server is not running.")
        return self._process.pid

    def log(self) -> str:
        """All that the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """The JSON answer to GET `path`."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to POST `path`, None where it is empty. Raises PromptError on 400."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise refusal(json.load(error)) from None

    def object_info(self) -> dict[str, Any]:
        """The schema of every node the server knows, by class type."""
        return self.get("/object_info")

    def run(
        self, prompt: Mapping[str, Any], timeout: float = 300.0, on_event: Event | None = None
    ) -> dict[str, Any]:
        """Run an API-format prompt to its end and return its outputs by node id.

        on_event: called with (type, data) of each websocket message of this prompt, for example
        ("progress", {"value": 3, "max": 20, "node": "7", ...}), and with ("preview", {"image": …})
        for each picture that a node shows while it runs, the bytes of its file.
        Raises PromptError if it is refused, fails or is cancelled; ServerError; TimeoutError.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_event), timeout))

    async def _run(self, prompt: Mapping[str, Any], on_event: Event | None) -> dict[str, Any]:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_,
        ):
            body = {"prompt": prompt, "client_id": client}
            queued = await asyncio.to_thread(self.post, "/prompt", body)
            identity = queued["prompt_id"]
            async for message in socket_:
                if message.type is aiohttp.WSMsgType.BINARY and on_event is not None:
                    kind, _ = struct.unpack(">II", message.data[:8])
                    if kind == PREVIEW:
                        on_event("preview", {"image": message.data[8:]})
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                data = event.get("data") or {}
                if data.get("prompt_id") != identity:
                    continue
                if on_event is not None:
                    on_event(event["type"], data)
                if event["type"] in ("execution_error", "execution_interrupted"):
                    raise failure(event["type"], data)
                if event["type"] == "execution_success":
                    return await asyncio.to_thread(self._outputs, identity)
        raise ServerError(f"The connection to ComfyUI broke:\n{self.log()[-4000:]}")

    def _outputs(self, identity: str) -> dict[str, Any]:
        # The history is written a moment after the success message.
        for _ in range(100):
            history = self.get(f"/history/{identity}")
            if identity in history:
                return history[identity]["outputs"]
            time.sleep(0.05)
        raise ServerError(f"ComfyUI has no history of the finished prompt {identity}.")

    def files(self, outputs: Mapping[str, Any]) -> list[Path]:
        """The files that a run wrote, in the order of its outputs."""
        return [
            self.base / item["type"] / item.get("subfolder", "") / item["filename"]
            for output in outputs.values()
            for items in output.values()
            if isinstance(items, list)
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(answer: Mapping[str, Any]) -> PromptError:
    """The error for a prompt that did not pass ComfyUI's validation."""
    problem = answer.get("error", {})
    lines = [problem["message"] if isinstance(problem, dict) else str(problem)]
    node_errors = answer.get("node_errors") or {}
    for node, report in node_errors.items():
        for error in report["errors"]:
            lines.append(f"{report['class_type']} ({node}): {error['message']} {error['details']}")
    return PromptError("\n".join(lines), node_errors=node_errors)


def failure(kind: str, data: Mapping[str, Any]) -> PromptError:
    """The error for a prompt that failed or was cancelled while running."""
    if kind == "execution_interrupted":
        return PromptError("interrupted", node_type=data.get("node_type"), kind="interrupted")
    message = f"{data['node_type']}: {data['exception_message'].strip()}"
    return PromptError(message, node_type=data["node_type"], kind=data["exception_type"])
