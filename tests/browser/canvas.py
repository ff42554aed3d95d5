"""ComfyUI's page in a real Chromium, with the few things a test does on it."""

from __future__ import annotations

import base64
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, Playwright, Route

from ..comfyui.server import Server

ARTEFACTS = Path(os.environ.get("COGLOOM_ARTEFACTS") or Path(__file__).with_name("artefacts"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars"]  # fmt: skip
READY = 90_000  # ms until the page's graph is there; two seconds on an idle machine
SIZE = {"width": 1600, "height": 1000}


@dataclass(frozen=True)
class Mode:
    """A front end, and whether its nodes are drawn by Vue or on the canvas."""

    frontend: str
    vue: bool

    def __str__(self) -> str:
        return f"{self.frontend}-{'vue' if self.vue else 'classic'}"


MODES = (
    Mode("1.27.10", False),  # has no Vue nodes worth the name
    Mode("1.49.6", False),
    Mode("1.49.6", True),
    Mode("1.58.1", False),
    Mode("1.58.1", True),
)


def chromium(playwright: Playwright) -> Browser:
    """Debian's Chromium; COGLOOM_CHROMIUM names another. Nothing is downloaded.

    Raises:
        FileNotFoundError
    """
    path = os.environ.get("COGLOOM_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(path).exists():
        raise FileNotFoundError(
            f"There is no {path}. `apt-get install chromium fonts-dejavu-core fonts-noto-cjk` brings it; "
            "COGLOOM_CHROMIUM names another Chromium."
        )
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


class Canvas:
    """A page of its own, at a server. `canvas.page` is Playwright's, for whatever is not here."""

    def __init__(self, browser: Browser, server: Server, mode: Mode, **settings: Any) -> None:
        self.server, self.mode = server, mode
        self.errors: list[str] = []  # uncaught ones, and console errors other than files that are not there
        self.outside: list[str] = []  # what the page asked of other hosts; refused
        self._settings = {
            "Comfy.VueNodes.Enabled": mode.vue,
            "Comfy.TutorialCompleted": True,
            "Comfy.Locale": "en",
            "Comfy.Workflow.Persist": False,  # each test begins with its own graph
            "Comfy.Validation.Workflows": False,
            "Comfy.Graph.CanvasInfo": False,
            **settings,
        }
        self.context: BrowserContext = browser.new_context(viewport=SIZE, locale="en-US", permissions=[])  # type: ignore
        self.context.route("**/*", self._route)
        self.page: Page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(f"{error.message}\n{error.stack or ''}"))
        self.page.on("console", self._console)

    def _route(self, route: Route) -> None:
        """Only the local server is there; new front ends would ask a hub for templates."""
        url = urlsplit(route.request.url)
        if url.scheme in ("data", "blob") or url.netloc in (
            f"127.0.0.1:{self.server.port}",
            f"localhost:{self.server.port}",
        ):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def _console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def our_errors(self) -> list[str]:
        """Those with a file of ours in them; the front ends have some of their own."""
        return [error for error in self.errors if "/extensions/cogloom/" in error]

    # --- the page

    def open(self, node: str = "CogLoomLoraStack") -> Canvas:
        """Load the page, wait until it knows `node`, and close what it shows to newcomers."""
        self.server.post("/settings", self._settings)
        self.page.goto(self.server.url)
        self.ready(node)
        return self

    def ready(self, node: str = "CogLoomLoraStack") -> None:
        self.page.wait_for_function(
            "node => window.app?.graph && window.LiteGraph?.registered_node_types?.[node]", arg=node, timeout=READY
        )
        # The page restores or makes its first graph a moment after that, which would wipe out ours.
        self.page.wait_for_function("() => window.app.canvas?.graph && window.app.extensionManager", timeout=READY)
        self.page.wait_for_load_state("networkidle")
        for _ in range(3):
            self.page.keyboard.press("Escape")

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    def close(self) -> None:
        self.context.close()

    def set(self, setting: str, value: Any) -> None:
        """Change a setting while the page is open, as its dialog does."""
        self.evaluate("([id, value]) => window.app.extensionManager.setting.set(id, value)", [setting, value])

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def settle(self) -> None:
        """Two frames are drawn."""
        self.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screenshot(self, name: str, of: Locator | None = None) -> Path:
        """Into the artefacts, in a folder for each front end and mode."""
        self.settle()
        path = ARTEFACTS / str(self.mode) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (of or self.page).screenshot(path=path)
        return path

    # --- the graph

    def clear(self) -> None:
        self.evaluate("() => { window.app.graph.clear(); window.app.graph.setDirtyCanvas(true, true) }")

    def load(self, workflow: dict[str, Any]) -> None:
        self.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
        self.settle()

    def save(self) -> dict[str, Any]:
        """The workflow as a file would hold it."""
        return self.evaluate("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")

    def graph_to_prompt(self) -> dict[str, Any]:
        """What Run would queue, in API form."""
        return self.evaluate("async () => (await window.app.graphToPrompt()).output")

    def add(self, kind: str, x: float = 100, y: float = 100, **widgets: Any) -> str:
        """A new node at a place of the canvas; its id."""
        return self.evaluate(
            """([kind, pos, widgets]) => {
                const node = LiteGraph.createNode(kind);
                node.pos = pos;
                window.app.graph.add(node);
                for (const [name, value] of Object.entries(widgets)) {
                    const widget = node.widgets.find(w => w.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
                window.app.graph.setDirtyCanvas(true, true);
                return String(node.id);
            }""",
            [kind, [x, y], widgets],
        )

    def connect(self, source: str, output: str, target: str, input: str) -> None:
        self.evaluate(
            """([source, output, target, input]) => {
                const from = window.app.graph.getNodeById(source), to = window.app.graph.getNodeById(target);
                const slot = from.outputs.findIndex(o => o.name === output);
                const into = to.inputs.findIndex(i => i.name === input);
                if (slot < 0 || into < 0) throw new Error(`no ${output} or no ${input}`);
                from.connect(slot, to, into);
            }""",
            [source, output, target, input],
        )

    def widget(self, node: str, name: str) -> Any:
        return self.evaluate(
            "([id, name]) => window.app.graph.getNodeById(id).widgets.find(w => w.name === name).value", [node, name]
        )

    def text_to_video(self, **sampler: Any) -> dict[str, str]:
        """Base, stack, prompt, sampler, decode and save, wired; their ids by kind."""
        shot = {"seed": 5, "steps": 4, **sampler}
        ids = {
            "base": self.add("CogLoomBase", 0, 0, checkpoint="cogloom-demo"),
            "stack": self.add("CogLoomLoraStack", 0, 320),
            "prompt": self.add("CogLoomPrompt", 480, 0, prompt="a large cyan circle moving right"),
            "sampler": self.add("CogLoomSampler", 480, 320, **shot),
            "decode": self.add("CogLoomDecode", 900, 0),
            "save": self.add("CogLoomSaveVideo", 900, 200, name="page"),
        }
        for wire in (
            "base base prompt base", "base base sampler base", "prompt positive sampler positive",
            "prompt negative sampler negative", "stack stack sampler stack", "base base decode base",
            "sampler latent decode latent", "decode frames save frames", "decode fps save fps",
            "decode record save record",
        ):  # fmt: skip
            source, output, target, input = wire.split()
            self.connect(ids[source], output, ids[target], input)
        return ids

    def box(self, node: str) -> dict[str, float]:
        """Where a node's body is on the page, in CSS px: x, y, width, height."""
        return self.evaluate(
            """id => {
                const node = window.app.graph.getNodeById(id), view = window.app.canvas;
                const canvas = view.canvas.getBoundingClientRect(), {scale, offset} = view.ds;
                const x = canvas.x + (node.pos[0] + offset[0]) * scale;
                const y = canvas.y + (node.pos[1] + offset[1]) * scale;
                return {x, y, width: node.size[0] * scale, height: node.size[1] * scale};
            }""",
            node,
        )

    def show(self, node: str, scale: float = 1.0, x: float = 420, y: float = 160) -> None:
        """Move the view so that a node's corner lies at (x, y) of the page."""
        self.evaluate(
            """([id, scale, x, y]) => {
                const node = window.app.graph.getNodeById(id), view = window.app.canvas;
                const canvas = view.canvas.getBoundingClientRect();
                view.ds.scale = scale;
                view.ds.offset[0] = (x - canvas.x) / scale - node.pos[0];
                view.ds.offset[1] = (y - canvas.y) / scale - node.pos[1];
                view.setDirty(true, true);
            }""",
            [node, scale, x, y],
        )
        self.settle()

    def select(self, *nodes: str) -> None:
        self.evaluate(
            """ids => {
                const view = window.app.canvas;
                const nodes = ids.map(id => window.app.graph.getNodeById(id));
                (view.selectItems ?? view.selectNodes).call(view, nodes);
            }""",
            list(nodes),
        )

    def focus_canvas(self) -> None:
        """So that keys such as Ctrl+Z reach the page and no field."""
        self.evaluate("() => { document.activeElement?.blur(); window.app.canvas.canvas.focus() }")

    def drop(self, file: Path) -> None:
        """As if the file were dropped on the canvas."""
        self.evaluate(
            """async ([name, data, type]) => {
                const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
                await window.app.handleFile(new File([bytes], name, {type}));
            }""",
            [file.name, base64.b64encode(file.read_bytes()).decode(), f"video/{file.suffix[1:]}"],
        )
        self.settle()

    # --- running

    def press_run(self) -> str:
        """Press the Run button; the id of the prompt that comes of it."""
        before = self._prompts()
        self.page.locator('[data-testid="queue-button"]').first.click()

        def queued() -> list[str]:
            # Playwright's events come in only while one of its calls runs, and the page wants its time, too.
            self.page.wait_for_timeout(50)
            return sorted(self._prompts() - before)

        return self.server.until("a prompt is queued", queued)[0]

    def run(self, seconds: float = 300.0) -> dict[str, Any]:
        """Press Run and wait for the end; the outputs by node id, as `/history` has them."""
        prompt = self.press_run()

        def through() -> Any:
            self.page.wait_for_timeout(50)
            return self.server.get(f"/history/{prompt}").get(prompt)

        told = self.server.until("the prompt is through", through, seconds)
        assert told["status"]["status_str"] == "success", told["status"]["messages"]
        return told["outputs"]

    def _prompts(self) -> set[str]:
        waiting = self.server.get("/queue")
        running = {item[1] for kind in ("queue_running", "queue_pending") for item in waiting[kind]}
        return running | set(self.server.get("/history"))


__all__ = ["MODES", "Canvas", "Error", "Mode", "chromium"]
