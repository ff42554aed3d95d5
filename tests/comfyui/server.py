"""A real ComfyUI server with this checkout as its pack, and a client that speaks to it as the page does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .websocket import WebSocket

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = Path(__file__).with_name("launch.py")
START = 240.0  # seconds a server may take to come up; on an idle machine it takes 5 to 8
RUN = 300.0  # and one prompt; the demo takes seconds


@dataclass(frozen=True)
class Environment:
    """What `prepare.py` made."""

    python: Path
    comfyui: Path
    frontends: dict[str, Path]

    @staticmethod
    def found() -> Environment:
        """COGLOOM_SERVER names the prepared folder; COMFYUI_PATH, when set, another checkout of ComfyUI.

        Raises:
            FileNotFoundError: nothing is prepared.
        """
        folder = Path(os.environ.get("COGLOOM_SERVER") or ROOT / ".cache" / "comfyui")
        if not (folder / "server.json").is_file():
            raise FileNotFoundError(
                f"No ComfyUI is prepared in {folder}. `python tests/comfyui/prepare.py {folder}` does it (a few "
                f"minutes, 2 GB); COGLOOM_SERVER names another folder."
            )
        told = json.loads((folder / "server.json").read_text(encoding="utf-8"))
        comfyui = Path(os.environ.get("COMFYUI_PATH") or told["comfyui"])
        return Environment(
            Path(told["python"]), comfyui, {name: Path(path) for name, path in told["frontends"].items()}
        )

    def process_environment(self, **more: str) -> dict[str, str]:
        """One thread, for the server and for whatever is compared with it: sums in another order are other bits."""
        return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **more}


@dataclass
class Run:
    """What became of a prompt. `messages` are the server's, in order, as (type, data)."""

    id: str
    messages: list[tuple[str, Any]] = field(default_factory=list)
    previews: int = 0
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, Any] | None:
        """The data of `execution_error`: node_id, node_type, exception_message, exception_type, …"""
        return next((data for kind, data in self.messages if kind == "execution_error"), None)

    @property
    def interrupted(self) -> bool:
        return any(kind == "execution_interrupted" for kind, _ in self.messages)

    @property
    def executed(self) -> list[str]:
        """Nodes that ran, in order; not those whose outputs were kept from before."""
        return [data["node"] for kind, data in self.messages if kind == "executing" and data["node"] is not None]

    def steps(self, node: str) -> list[tuple[int, int]]:
        """(done, total) of every progress message of a node."""
        return [
            (data["value"], data["max"]) for kind, data in self.messages if kind == "progress" and data["node"] == node
        ]

    def ok(self) -> Run:
        assert self.error is None, f"{self.error['node_type']} {self.error['node_id']}: {self.error}"
        assert not self.interrupted
        return self


class Rejected(Exception):
    """`/prompt` said no. `node_errors`: node id -> {"errors": [{"type", "message", "details", …}], …}."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer)[:2000])
        self.error: dict[str, Any] = answer.get("error", {})
        self.node_errors: dict[str, dict[str, Any]] = answer.get("node_errors") or {}

    def said(self, node: str) -> str:
        """Everything that was said of a node, in one text."""
        told = self.node_errors.get(node, {"errors": []})["errors"]
        return " ".join(f"{error['message']} {error['details']}" for error in told)


class Server:
    """A running server. `base` is its base directory: models/, input/, output/, custom_nodes/."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base: Path, log: Path) -> None:
        self.process, self.port, self.base, self.log_file = process, port, base, log
        self.url = f"http://127.0.0.1:{port}"
        self.client = uuid.uuid4().hex
        self._info: dict[str, Any] = {}
        self._heard = threading.Condition()
        self._messages: list[tuple[str, Any]] = []  # since the start; "" with None for a binary one
        self._socket: WebSocket | None = None

    # --- HTTP

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of a GET. urllib.error.HTTPError for 4xx and 5xx."""
        return json.loads(self.read(path, **query))

    def read(self, path: str, **query: Any) -> bytes:
        url = self.url + path + ("?" + urllib.parse.urlencode(query) if query else "")
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    def status_of(self, path: str, **query: Any) -> tuple[int, Any]:
        """(status, JSON) of a GET, whatever the status is."""
        try:
            return 200, self.get(path, **query)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        """Asked once; files that come later do not show in it."""
        self._info = self._info or self.get("/object_info")
        return self._info

    def view(self, file: dict[str, str]) -> bytes:
        return self.read("/view", **file)

    def path_of(self, file: dict[str, Any]) -> Path:
        """Of one of an output node's files, {"filename", "subfolder", "type"}."""
        return self.base / file["type"] / file["subfolder"] / file["filename"]

    def status(self) -> dict[str, Any]:
        return self.get("/cogloom/status")

    # --- prompts

    def queue(self, graph: dict[str, Any], workflow: Any = None) -> Run:
        """Put a graph (API form) in the queue, as the page does. Raises Rejected."""
        body = {"prompt": graph, "client_id": self.client, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        if workflow is None:
            del body["extra_data"]
        try:
            return Run(self.post("/prompt", body)["prompt_id"])
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            if error.code != 400:
                raise AssertionError(f"/prompt answered {error.code}: {text[:1000]}") from error
            raise Rejected(json.loads(text)) from error

    def wait(self, run: Run, until: Callable[[Run], bool] | None = None, seconds: float = RUN) -> Run:
        """Until the prompt is through (its end is the last message of it), or until `until(run)` says so."""
        deadline = time.monotonic() + seconds

        def there() -> bool:
            self._sort(run)
            return any(self._is_end(message) for message in run.messages) or (until is not None and until(run))

        with self._heard:
            while not there():
                left = deadline - time.monotonic()
                assert left > 0, f"prompt {run.id} is not through after {seconds:.0f} s\n{self.tail()}"
                assert self.process.poll() is None, f"the server is gone ({self.process.returncode})\n{self.tail()}"
                self._heard.wait(min(left, 1.0))
        if until is None or any(self._is_end(message) for message in run.messages):
            run.outputs = self.get(f"/history/{run.id}").get(run.id, {}).get("outputs", {})
        return run

    def run(self, graph: dict[str, Any], workflow: Any = None) -> Run:
        return self.wait(self.queue(graph, workflow))

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """What the page's "unload models and execution cache" does. It happens between two prompts, not at once."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def until(self, what: str, there: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Ask again and again, for what the server tells nobody; the value of `there()` once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := there()):
            assert time.monotonic() < deadline, f"{what}: not so after {seconds:.0f} s\n{self.tail()}"
            threading.Event().wait(0.05)
        return value

    # --- the log

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def import_times(self) -> str:
        """What the log says of each pack, from its own line on."""
        return self.log().partition("Import times for custom nodes:")[2][:4000]

    # --- the socket

    def connect(self) -> None:
        self._socket = WebSocket("127.0.0.1", self.port, f"/ws?clientId={self.client}")
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _listen(self, stream: WebSocket) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed from our side
            while (message := stream.receive()) is not None:
                told = ("", None)
                if isinstance(message, str):
                    data = json.loads(message)
                    told = (data["type"], data["data"])
                with self._heard:
                    self._messages.append(told)
                    self._heard.notify_all()

    def _sort(self, run: Run) -> None:
        """The messages of one prompt; a binary preview says no id, and belongs to the prompt that runs."""
        run.messages, run.previews, mine = [], 0, False
        for kind, data in self._messages:
            if kind == "":
                run.previews += mine
            elif isinstance(data, dict) and "prompt_id" in data:
                mine = data["prompt_id"] == run.id
                if mine:
                    run.messages.append((kind, data))
            elif mine:
                run.messages.append((kind, data))  # events of a pack's own, such as cogloom.preview

    @staticmethod
    def _is_end(message: tuple[str, Any]) -> bool:
        """Sent after the history has the outputs."""
        kind, data = message
        return kind == "executing" and data.get("node", "") is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def put_pack(base: Path, source: Path = ROOT, name: str = "cogloom") -> Path:
    """A pack into the base directory's custom_nodes: a link, or a copy where links are not allowed (Windows)."""
    target = base / "custom_nodes" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "output", "models")
        shutil.copytree(source, target, ignore=ignored)
    return target


@contextlib.contextmanager
def serving(
    environment: Environment,
    base: Path,
    *flags: str,
    frontend: Path | None = None,
    pack: bool = True,
    **variables: str,
) -> Iterator[Server]:
    """Start a server on a free port, wait until it answers, and stop it by its pid in the end."""
    if pack and not (base / "custom_nodes" / "cogloom").exists():
        put_pack(base)
    for folder in ("custom_nodes", "input", "output", "models", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    if frontend is None:  # for the API any page does
        frontend = base / "page"
        frontend.mkdir(exist_ok=True)
        (frontend / "index.html").write_text("<!doctype html><title>no page</title>", encoding="utf-8")
    port = free_port()
    log = base / "server.log"
    command = [str(environment.python), str(LAUNCH), str(environment.comfyui)]
    command += ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-auto-launch", "--dont-print-server", "--disable-api-nodes"]
    command += ["--database-url", "sqlite:///:memory:", "--front-end-root", str(frontend), *flags]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=base,
            env=environment.process_environment(COGLOOM_ENDS_WITH_INPUT="1", **variables),
        )
    server = Server(process, port, base, log)
    try:

        def answers() -> bool:
            assert process.poll() is None, f"the server ended with {process.returncode}\n{server.tail()}"
            try:
                return bool(server.get("/system_stats"))
            except OSError:
                return False

        server.until("the server is up", answers, START)
        assert "(IMPORT FAILED): " not in server.import_times(), server.tail()
        server.connect()
        yield server
    finally:
        server.disconnect()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
