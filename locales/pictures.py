"""Makes the pictures of the help pages: web/docs/NODE/LANGUAGE.webp, each node as the real front end draws it.

    python locales/pictures.py http://127.0.0.1:8188 [NODE ...]

The server has this pack in custom_nodes. Its user's settings for language and first run are changed.
Needs what workflows/make.py needs.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workflows.make import front_end, rows  # noqa: E402

DOCS = ROOT / "web" / "docs"
LANGUAGES = ("en", "zh")
SCALE, MARGIN, BAR, BADGE = 1.25, 10, 30, 26  # canvas zoom; px around a node, of its title, and of the pack's badge


@dataclass(frozen=True)
class Picture:
    """A lone node with these widgets; or the one in a template, after it has run."""

    widgets: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (340, 0)
    template: str = ""


ADAPTERS = rows(
    {"adapter": "star.safetensors"},
    {"adapter": "bounce.safetensors", "weight": 0.8, "steps": "held 1@0 0@0.6"},
    {"on": False, "adapter": "sunset.safetensors", "weight": 0.7},
)
PICTURES = {
    "CogLoomBase": Picture(),
    "CogLoomBaseFile": Picture({"file": "my_finetune.safetensors", "like": "zai-org/CogVideoX-5b"}),
    "CogLoomLoraStack": Picture({"rows": ADAPTERS}, (420, 330)),
    "CogLoomLora": Picture({"adapter": "neon.safetensors", "weight": 0.8}),
    "CogLoomSchedule": Picture({"steps": "0@0 1@0.3 1@0.7 0.2@1", "adapters": "sunset"}, (380, 0)),
    "CogLoomBlocks": Picture({"blocks": "0-2:0.5,3-5:1", "adapters": "neon"}, (380, 0)),
    "CogLoomPrompt": Picture({"prompt": "a large cyan circle moving right on a navy background"}, (400, 250)),
    "CogLoomSampler": Picture({"seed": 7}),
    "CogLoomDecode": Picture({}, (260, 0)),
    "CogLoomSaveVideo": Picture(template="text_to_video"),
    "CogLoomCompare": Picture(template="compare_a_b"),
    "CogLoomLoraInfo": Picture({"adapter": "neon.safetensors"}),
    "CogLoomNativeLora": Picture({}, (300, 0)),
    "CogLoomGrid": Picture(
        {
            "prompts": "a large cyan triangle moving left on a navy background\n"
            "a small red square standing still on a gray background",
            "weights": "0,0.5,1",
            "vary": "guidance=4,6",
        },
        (420, 780),
    ),
    "CogLoomMetrics": Picture(template="sweep"),
    "CogLoomLoraSave": Picture({"name": "loras/neon-bounce"}),
    "CogLoomExtract": Picture({"finetuned": "my_finetune", "checkpoint": "zai-org/CogVideoX-5b"}, (380, 0)),
    "CogLoomMerge": Picture({"method": "svd", "keep": "energy", "name": "loras/neon-bounce"}, (380, 0)),
    "CogLoomResize": Picture({"adapter": "neon.safetensors", "keep": "energy", "name": "loras/neon-small"}, (380, 0)),
    "CogLoomConvert": Picture({"adapter": "neon.safetensors", "name": "loras/neon-comfyui"}, (380, 0)),
    "CogLoomBake": Picture({"checkpoint": "zai-org/CogVideoX-2b", "name": "diffusion_models/sunset"}, (380, 0)),
    "CogLoomTake": Picture({"source": "training/my-lora", "which": "best", "name": "loras/my-lora"}, (380, 0)),
    "CogLoomTrain": Picture({"dataset": "my-clips", "trigger_words": "sks dancer"}, (380, 0)),
    "CogLoomCheckpoints": Picture({"run": "my-lora", "action": "prune", "keep": "best, last"}, (380, 0)),
    "CogLoomLineage": Picture({"adapter": "neon.safetensors"}, (380, 0)),
}

LONE = """async ([kind, widgets, size]) => {
  const graph = window.app.graph;
  graph.clear();
  graph.last_node_id = window.shots = (window.shots ?? 0) + 1;  // the page remembers values by a node's number
  const node = LiteGraph.createNode(kind);
  graph.add(node);
  for (const [name, value] of Object.entries(widgets)) {
    const widget = node.widgets.find((one) => one.name === name);
    if (!widget) throw new Error(`${kind} has no widget ${name}`);
    widget.value = value;
    widget.callback?.(value, window.app.canvas, node);
  }
  await new Promise((done) => setTimeout(done, 800));
  node.setSize([Math.max(size[0], node.computeSize()[0]), Math.max(size[1], node.computeSize()[1])]);
}"""

# Moves the canvas to the only node of a kind; the rectangle of it on the screen, badge included.
CENTRE = """([kind, scale, bar, badge]) => {
  const canvas = window.app.canvas, node = window.app.graph.nodes.find((one) => one.type === kind);
  canvas.deselectAll?.();
  node.has_errors = false;  // a file of the picture's that is not there
  canvas.ds.scale = scale;
  canvas.ds.offset = [250 / scale - node.pos[0], 120 / scale - node.pos[1] + bar];
  canvas.setDirty(true, true);
  return [250, 120 - badge, node.size[0] * scale, (node.size[1] + bar) * scale + badge];
}"""


def put(url: str, path: str, value: Any) -> None:
    request = urllib.request.Request(url + path, json.dumps(value).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()


def shoot(page: Any, kind: str) -> bytes:
    x, y, width, height = page.evaluate(CENTRE, [kind, SCALE, BAR, BADGE])
    page.wait_for_timeout(1200)  # previews load, elements follow the canvas
    clip = {"x": x - MARGIN, "y": y - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    return page.screenshot(clip=clip)


def run(page: Any, url: str, name: str) -> None:
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
    before = len(json.load(urllib.request.urlopen(f"{url}/history")))
    page.evaluate("() => window.app.queuePrompt(0)")
    while len(json.load(urllib.request.urlopen(f"{url}/history"))) == before:
        time.sleep(0.5)
        page.evaluate("1")  # Playwright handles the page's events only while it is asked something
    page.wait_for_timeout(2500)


def webp(png: bytes) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(data, "WEBP", quality=82, method=6)
    return data.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("nodes", nargs="*", choices=[*PICTURES, []])
    told = parser.parse_args()
    put(told.url, "/settings/Comfy.TutorialCompleted", True)
    for language in LANGUAGES:
        put(told.url, "/settings/Comfy.Locale", language)
        with front_end(told.url) as page:
            page.set_viewport_size({"width": 1400, "height": 1500})
            for kind in told.nodes or PICTURES:
                picture = PICTURES[kind]
                if picture.template:
                    run(page, told.url, picture.template)
                else:
                    page.evaluate(LONE, [kind, picture.widgets, picture.size])
                data = webp(shoot(page, kind))
                (DOCS / kind / f"{language}.webp").write_bytes(data)
                sys.stdout.write(f"{kind} {language} {len(data):,} bytes\n")
    put(told.url, "/settings/Comfy.Locale", "en")


if __name__ == "__main__":
    main()
