"""Makes the templates in the front end of a running ComfyUI: NAME.json (what opens on the canvas), api/NAME.json (what
`/prompt` takes) and NAME.jpg (frames of the clip that it gave, or the canvas).

    python workflows/make.py http://127.0.0.1:8188 text_to_video schedule
    python workflows/make.py http://127.0.0.1:8188 --shots FOLDER     all of them, and a picture of each canvas

The server has this pack in custom_nodes; the demo's base and adapters are all that is needed, except for native_model,
which is not run. Needs `pip install playwright` and Chromium (CHROMIUM names the program).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
GAP, TITLE, LEFT, TOP = 50, 30, 80, 120  # px on the canvas: between nodes, and a node's title above its position
THUMBNAIL, GUTTER = (640, 360), 6  # px


@dataclass(frozen=True)
class Put:
    """A node on the canvas. Inputs are a widget's value, or `Wire` for a link."""

    kind: str
    inputs: dict[str, Any]
    width: int = 330
    height: int = 0  # at least; what grows after a run has room for it
    title: str = ""


@dataclass(frozen=True)
class Wire:
    node: str  # key in the template
    output: str


@dataclass(frozen=True)
class Template:
    """`groups`: title -> columns, each a list of keys of `nodes`, from top to bottom. Groups stand in a row."""

    title: str
    note: str
    nodes: dict[str, Put]
    groups: dict[str, list[list[str]]]
    runs: bool = True
    thumbnail: str = "save"  # the node whose clip it shows
    filmstrip: bool = True  # frames beside one another; else one frame


def rows(*entries: dict[str, Any]) -> str:
    """The stack node's text, as its widget writes it."""
    whole = [{"on": True, "weight": 1, "blocks": "", "steps": "", "partial": False, **entry} for entry in entries]
    ordered = [{key: row[key] for key in ("on", "adapter", "weight", "blocks", "steps", "partial")} for row in whole]
    return json.dumps(ordered)


def base(checkpoint: str = "cogloom-demo") -> Put:
    return Put("CogLoomBase", {"checkpoint": checkpoint})


def prompt(text: str, of: str = "base", **more: Any) -> Put:
    return Put("CogLoomPrompt", {"base": Wire(of, "base"), "prompt": text, "negative": "", **more}, 400, 250)


def sampler(of: str = "base", text: str = "prompt", seed: int = 0, **more: Any) -> Put:
    wires = {
        "base": Wire(of, "base"),
        "positive": Wire(text, "positive"),
        "negative": Wire(text, "negative"),
    }
    return Put("CogLoomSampler", {**wires, "seed": seed, **more}, 330, 800)  # the preview is as high as it is wide


def decode(of: str = "base", latent: str = "sampler") -> Put:
    return Put("CogLoomDecode", {"base": Wire(of, "base"), "latent": Wire(latent, "latent")}, 250, 170)


def save(name: str, of: str = "decode") -> Put:
    wires = {output: Wire(of, output) for output in ("frames", "fps", "record")}
    return Put("CogLoomSaveVideo", {**wires, "name": f"CogLoom/{name}", "format": "mp4"}, 400, 600)


STACK = Wire("stack", "stack")

TEMPLATES = {
    "text_to_video": Template(
        "Text to video",
        "With one LoRA. Choose your base and your adapters; the demo's need no download. The base is "
        "loaded once: change the row's weight or its adapter and run again, and only the clip is made anew.",
        {
            "base": base(),
            "stack": Put("CogLoomLoraStack", {"rows": rows({"adapter": "sunset.safetensors"})}, 400, 260),
            "prompt": prompt("a large cyan triangle moving right on a navy background"),
            "sampler": sampler(stack=STACK, seed=4),
            "decode": decode(),
            "save": save("text_to_video"),
        },
        {
            "Base and LoRA": [["note", "base"], ["stack", "prompt"]],
            "Sample": [["sampler"]],
            "Save": [["decode", "save"]],
        },
    ),
    "image_to_video": Template(
        "Image to video",
        "The picture is the first frame of a clip that is made in the left half; put Load Image in its "
        "place for one of your own. The base is an image-to-video one, and its prompt does not name the colour: that "
        "comes from the picture.",
        {
            "text_base": base(),
            "text_prompt": prompt("a large orange triangle standing still on a navy background", "text_base"),
            "text_sampler": sampler("text_base", "text_prompt", seed=3),
            "text_decode": decode("text_base", "text_sampler"),
            "first": Put(
                "ImageFromBatch", {"image": Wire("text_decode", "frames"), "batch_index": 0, "length": 1}, 250
            ),
            "base": base("cogloom-demo-i2v"),
            "prompt": prompt("a large triangle moving up on a navy background"),
            "sampler": sampler(image=Wire("first", "IMAGE"), seed=3),
            "decode": decode(),
            "save": save("image_to_video"),
        },
        {
            "A picture": [["note", "text_base", "text_prompt"], ["text_sampler"], ["text_decode", "first"]],
            "Image to video": [["base", "prompt"], ["sampler"], ["decode", "save"]],
        },
    ),
    "video_to_video": Template(
        "Video to video",
        "The clip that is changed is made in the left half; put Load Video and Get Video Components in its place for "
        "one of your own. strength is how much is made anew: 0.3 keeps most, 0.9 little more than the motion.",
        {
            "base": base(),
            "source_prompt": prompt("a large yellow triangle moving right on a navy background"),
            "source": sampler(text="source_prompt", seed=3),
            "source_decode": decode(latent="source"),
            "stack": Put("CogLoomLoraStack", {"rows": rows({"adapter": "neon.safetensors"})}, 400, 260),
            "prompt": prompt("a large magenta triangle moving right on a navy background"),
            "sampler": sampler(video=Wire("source_decode", "frames"), stack=STACK, strength=0.9, seed=3),
            "decode": decode(),
            "save": save("video_to_video"),
        },
        {
            "A video": [["note", "base", "source_prompt"], ["source"], ["source_decode"]],
            "Video to video": [["stack", "prompt"], ["sampler"], ["decode", "save"]],
        },
    ),
    "stack_of_three": Template(
        "Stack of three",
        "Three adapters at once: a subject, a motion and a style, each with its own weight. Their order does not "
        "matter. Turn rows off and on, and move the weights: the base is not loaded again.",
        {
            "base": base(),
            "stack": Put(
                "CogLoomLoraStack",
                {
                    "rows": rows(
                        {"adapter": "star.safetensors"},
                        {"adapter": "bounce.safetensors", "weight": 0.8},
                        {"adapter": "sunset.safetensors", "weight": 0.7},
                    )
                },
                400,
                340,
            ),
            "prompt": prompt("a large yellow star bouncing on a navy background"),
            "sampler": sampler(stack=STACK, seed=5),
            "decode": decode(),
            "save": save("stack_of_three"),
        },
        {
            "Base and LoRA": [["note", "base"], ["stack", "prompt"]],
            "Sample": [["sampler"]],
            "Save": [["decode", "save"]],
        },
    ),
    "schedule": Template(
        "LoRA schedule",
        "Adapters that come and go along the steps: orbit decides the motion and leaves at half of the steps, sunset "
        "comes in from 30 to 70 %. A point is FACTOR@POSITION; held keeps a factor until the next point.",
        {
            "base": base(),
            "stack": Put(
                "CogLoomLoraStack",
                {"rows": rows({"adapter": "orbit.safetensors"}, {"adapter": "sunset.safetensors"})},
                400,
                300,
            ),
            "early": Put(
                "CogLoomSchedule", {"stack": STACK, "steps": "held 1@0 0@0.5", "adapters": "orbit"}, 400, title="Early"
            ),
            "late": Put(
                "CogLoomSchedule",
                {"stack": Wire("early", "stack"), "steps": "0@0.3 1@0.7", "adapters": "sunset"},
                400,
                title="Late",
            ),
            "prompt": prompt("a large green circle circling on a navy background"),
            "sampler": sampler(stack=Wire("late", "stack"), seed=7),
            "decode": decode(),
            "save": save("schedule"),
        },
        {
            "Base and prompt": [["note", "base", "prompt"]],
            "LoRA along the steps": [["stack", "early", "late"]],
            "Sample": [["sampler"]],
            "Save": [["decode", "save"]],
        },
    ),
    "compare_a_b": Template(
        "Compare A and B",
        "The same shot with two stacks: same prompt, noise and settings, one base. Run it, then drag the line in the "
        "player, or choose side by side or difference. With nothing at a, b is compared with no adapter.",
        {
            "base": base(),
            "a": Put(
                "CogLoomLoraStack", {"rows": rows({"adapter": "sunset.safetensors"})}, 400, 260, title="LoRA Stack A"
            ),
            "b": Put(
                "CogLoomLoraStack", {"rows": rows({"adapter": "neon.safetensors"})}, 400, 260, title="LoRA Stack B"
            ),
            "prompt": prompt("a large cyan triangle moving left on a navy background"),
            "compare": Put(
                "CogLoomCompare",
                {
                    "base": Wire("base", "base"),
                    "positive": Wire("prompt", "positive"),
                    "negative": Wire("prompt", "negative"),
                    "seed": 3,
                    "name": "CogLoom/compare_a_b",
                    "labels": "A sunset, B neon",
                    "a": Wire("a", "stack"),
                    "b": Wire("b", "stack"),
                },
                620,
                900,
            ),
        },
        {
            "Base and prompt": [["note", "base", "prompt"]],
            "A and B": [["a", "b"]],
            "Compare": [["compare"]],
        },
        thumbnail="compare",
        filmstrip=False,
    ),
    "sweep": Template(
        "Which weight?",
        "A LoRA at several weights over prompts and seeds: a grid with the weights along its edge, and a table of what "
        "was measured, with what can be told apart in words. Weight 0 is the base. Stop it at any moment: the next run "
        "goes on where it was, and another stack or seed is added to what is there.",
        {
            "base": base(),
            "stack": Put("CogLoomLoraStack", {"rows": rows({"adapter": "sunset.safetensors"})}, 400, 260),
            "grid": Put(
                "CogLoomGrid",
                {
                    "base": Wire("base", "base"),
                    "name": "sweep",
                    "prompts": "a large cyan triangle moving left on a navy background\n"
                    "a large yellow circle moving up on a maroon background\n"
                    "a small red square standing still on a gray background",
                    "seeds": "0-1",
                    "weights": "0,0.5,1",
                    "base_too": False,
                    "steps": 10,
                    "stack": STACK,
                },
                480,
                1480,
            ),
            "metrics": Put("CogLoomMetrics", {"study": Wire("grid", "study"), "metrics": ""}, 620, 620),
        },
        {
            "Base and LoRA": [["note", "base", "stack"]],
            "Grid": [["grid"]],
            "Metrics": [["metrics"]],
        },
        thumbnail="grid",
        filmstrip=False,
    ),
    "workshop": Template(
        "Two LoRAs become one file",
        "The stack is merged into one LoRA by SVD, as few ranks in each layer as keep 99.9 % of what it adds, and both "
        "are rendered with the same noise: left the stack, right the file. It lies in output/loras, where every list "
        "of LoRAs finds it after a refresh. The other tools of CogLoom/workshop connect in the same way.",
        {
            "base": base(),
            "prompt": prompt("a large cyan triangle moving left on a navy background"),
            "stack": Put(
                "CogLoomLoraStack",
                {"rows": rows({"adapter": "neon.safetensors", "weight": 0.8}, {"adapter": "bounce.safetensors"})},
                400,
                300,
            ),
            "merge": Put(
                "CogLoomMerge",
                {"stack": STACK, "method": "svd", "keep": "energy", "energy": 0.999, "name": "loras/neon-bounce"},
                480,
                620,
            ),
            "compare": Put(
                "CogLoomCompare",
                {
                    "base": Wire("base", "base"),
                    "positive": Wire("prompt", "positive"),
                    "negative": Wire("prompt", "negative"),
                    "a": STACK,
                    "b": Wire("merge", "stack"),
                    "seed": 4,
                    "steps": 20,
                    "name": "CogLoom/workshop",
                    "labels": "stack, merged",
                },
                620,
                980,
            ),
        },
        {
            "Base and prompt": [["note", "base", "prompt"]],
            "Merge": [["stack", "merge"]],
            "Compare": [["compare"]],
        },
        thumbnail="compare",
        filmstrip=False,
    ),
    "native_model": Template(
        "LoRA on ComfyUI's own model",
        "A CogLoom stack on ComfyUI's own CogVideoX (ComfyUI 0.21 or newer), with KSampler and the core nodes. Choose "
        "your files in the three loaders: the transformer, t5xxl, and CogVideoX's VAE. The conditionings pass through "
        "LoRA Stack on MODEL because schedules travel with them.",
        {
            "unet": Put(
                "UNETLoader", {"unet_name": "cogvideox_5b_transformer.safetensors", "weight_dtype": "default"}, 400
            ),
            "clip": Put("CLIPLoader", {"clip_name": "t5xxl_fp16.safetensors", "type": "cogvideox"}, 400),
            "vae": Put("VAELoader", {"vae_name": "cogvideox_vae.safetensors"}, 400),
            "positive": Put(
                "CLIPTextEncode",
                {
                    "clip": Wire("clip", "CLIP"),
                    "text": "A paper boat drifts along a rain gutter in the evening, seen from close above the water; "
                    "street lamps are mirrored in the ripples. The camera follows slowly.",
                },
                400,
                190,
                title="Prompt",
            ),
            "negative": Put(
                "CLIPTextEncode", {"clip": Wire("clip", "CLIP"), "text": ""}, 400, 150, title="Negative prompt"
            ),
            "stack": Put("CogLoomLoraStack", {"rows": "[]"}, 400, 260),
            "apply": Put(
                "CogLoomNativeLora",
                {
                    "model": Wire("unet", "MODEL"),
                    "stack": STACK,
                    "positive": Wire("positive", "CONDITIONING"),
                    "negative": Wire("negative", "CONDITIONING"),
                },
                400,
            ),
            "latent": Put("EmptyHunyuanLatentVideo", {"width": 720, "height": 480, "length": 49, "batch_size": 1}, 330),
            "sampler": Put(
                "KSampler",
                {
                    "model": Wire("apply", "model"),
                    "positive": Wire("apply", "positive"),
                    "negative": Wire("apply", "negative"),
                    "latent_image": Wire("latent", "LATENT"),
                    "seed": 0,
                    "steps": 50,
                    "cfg": 6.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                    "denoise": 1.0,
                },
                330,
                500,
            ),
            "decode": Put("VAEDecode", {"samples": Wire("sampler", "LATENT"), "vae": Wire("vae", "VAE")}, 250),
            "save": Put(
                "CogLoomSaveVideo",
                {"frames": Wire("decode", "IMAGE"), "fps": 8.0, "name": "CogLoom/native_model", "format": "mp4"},
                400,
                600,
            ),
        },
        {
            "ComfyUI's own CogVideoX": [["note", "unet", "clip", "vae"], ["positive", "negative"]],
            "LoRA": [["stack", "apply"]],
            "Sample": [["latent", "sampler"]],
            "Save": [["decode", "save"]],
        },
        runs=False,
    ),
}

# Adds the nodes, wires them, then places them in columns by the sizes that they really have.
BUILD = """async ([template, title, noteKind, sizes]) => {
  const { gap, bar, left, top } = sizes;
  const graph = window.app.graph;
  graph.clear();
  const made = {};
  for (const [key, put] of Object.entries(template.nodes)) {
    const node = LiteGraph.createNode(put.kind);
    if (!node) throw new Error(`no node ${put.kind}`);
    graph.add(node);
    made[key] = node;
    if (put.title) node.title = put.title;
    for (const [name, value] of Object.entries(put.widgets)) {
      const widget = node.widgets.find((one) => one.name === name);
      if (!widget) throw new Error(`${put.kind} has no widget ${name}`);
      widget.value = value;
      widget.callback?.(value, window.app.canvas, node);
    }
    const control = node.widgets?.find((one) => one.name === "control_after_generate");
    if (control) control.value = "fixed";
  }
  for (const [key, put] of Object.entries(template.nodes))
    for (const [name, [from, output]] of Object.entries(put.links)) {
      const slot = made[from].outputs.findIndex((one) => one.name === output);
      const input = made[key].inputs.findIndex((one) => one.name === name);
      if (slot < 0 || input < 0) throw new Error(`${from}.${output} -> ${key}.${name}`);
      made[from].connect(slot, made[key], input);
    }
  const note = LiteGraph.createNode(noteKind);
  note.title = title;
  graph.add(note);
  note.widgets[0].value = template.note;
  made.note = note;
  await new Promise((done) => setTimeout(done, 500));  // widgets that are elements find their height
  const wanted = { ...template.nodes, note: { width: 0, height: 150 } };
  let x = 0;
  for (const [name, columns] of Object.entries(template.groups)) {
    const from = x;
    let low = 0;
    for (const keys of columns) {
      const width = Math.max(...keys.map((key) => wanted[key].width));
      let y = 0;
      for (const key of keys) {
        const node = made[key];
        const [, least] = node.computeSize();
        node.setSize([width, Math.max(least, wanted[key].height)]);
        node.pos = [x, y + bar];
        y += node.size[1] + bar + gap;
      }
      low = Math.max(low, y);
      x += width + gap;
    }
    const group = new LiteGraph.LGraphGroup(name);
    group.pos = [from - gap / 2, -top + gap];
    group.size = [x - from, low + top - gap];
    graph.add(group);
    x += left;
  }
  graph.setDirtyCanvas(true, true);
  const { output } = await window.app.graphToPrompt();
  return JSON.stringify([graph.serialize(), output]);  // leaves out what is undefined
}"""


def build(page: Any, name: str, template: Template) -> tuple[dict[str, Any], dict[str, Any]]:
    """(workflow, API form), both as they are to be in the files."""
    told = {
        "note": template.note,
        "groups": template.groups,
        "nodes": {
            key: {
                "kind": put.kind,
                "title": put.title,
                "width": put.width,
                "height": put.height,
                "widgets": {at: value for at, value in put.inputs.items() if not isinstance(value, Wire)},
                "links": {at: [wire.node, wire.output] for at, wire in put.inputs.items() if isinstance(wire, Wire)},
            }
            for key, put in template.nodes.items()
        },
    }
    sizes = {"gap": GAP, "bar": TITLE, "left": LEFT, "top": TOP}
    workflow, api = json.loads(page.evaluate(BUILD, [told, template.title, "Note", sizes]))
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"cogloom/workflows/{name}"))  # the same at every making
    workflow["extra"] = {"ds": {"scale": 0.6, "offset": [100, 150]}}
    for node in workflow["nodes"]:
        node["properties"]["cnr_id"] = "cogloom" if node["type"].startswith("CogLoom") else "comfy-core"
        node["properties"].pop("ver", None)  # of this machine; the sockets are for good
    return workflow, api


@contextmanager
def front_end(url: str) -> Iterator[Any]:
    """A page that asks nobody but the server."""
    from playwright.sync_api import sync_playwright

    host = urllib.parse.urlsplit(url).netloc
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=flags
        )
        context = browser.new_context(viewport={"width": 1600, "height": 900})
        context.route(
            "**/*", lambda it: it.continue_() if urllib.parse.urlsplit(it.request.url).netloc == host else it.abort()
        )
        page = context.new_page()
        page.goto(url)
        ready = "!!(window.app?.graph && window.LiteGraph.registered_node_types.CogLoomBase)"
        page.wait_for_function(ready, timeout=120_000)
        page.wait_for_timeout(2500)
        for _ in range(3):  # what greets at the first start
            page.keyboard.press("Escape")
        yield page
        browser.close()


def clip_of(url: str, api: dict[str, Any], workflow: dict[str, Any], kind: str) -> bytes:
    """Run a template; the file that its only node of `kind` wrote."""
    body = {"prompt": api, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
    request = urllib.request.Request(f"{url}/prompt", json.dumps(body).encode(), {"Content-Type": "application/json"})
    id = json.load(urllib.request.urlopen(request))["prompt_id"]
    while not (past := json.load(urllib.request.urlopen(f"{url}/history/{id}"))):
        time.sleep(0.5)
    if past[id]["status"]["status_str"] != "success":
        raise SystemExit(json.dumps(past[id]["status"], indent=2))
    (node,) = (key for key, one in api.items() if one["class_type"] == kind)
    (file,) = past[id]["outputs"][node]["images"]
    return urllib.request.urlopen(f"{url}/view?{urllib.parse.urlencode(file)}").read()


def thumbnail(clip: bytes, filmstrip: bool) -> bytes:
    """A JPEG of a clip: six of its frames, or the middle one."""
    import imageio.v3 as imageio

    frames = list(imageio.imiter(clip, extension=".mp4", plugin="FFMPEG"))
    picked = [round(n * (len(frames) - 1) / 5) for n in range(6)] if filmstrip else [len(frames) // 2]
    return _jpeg([Image.fromarray(frames[n]) for n in picked])


def _jpeg(pictures: list[Image.Image]) -> bytes:
    """Six pictures, or one, on black."""
    whole = Image.new("RGB", THUMBNAIL)
    columns, lines = (3, 2) if len(pictures) == 6 else (1, 1)
    width, height = THUMBNAIL[0] // columns, THUMBNAIL[1] // lines
    for n, picture in enumerate(pictures):
        scale = min((width - GUTTER) / picture.width, (height - GUTTER) / picture.height)
        how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS  # the demo's pixels stay pixels
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), how)
        left, top = n % columns * width, n // columns * height
        whole.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
    data = io.BytesIO()
    whole.save(data, "JPEG", quality=85)
    return data.getvalue()


def shoot(page: Any, workflow: dict[str, Any]) -> tuple[Image.Image, tuple[float, ...]]:
    """(the page with the whole of a template in view, the template's rectangle in it)"""
    page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
    box = page.evaluate(
        """() => {
          const canvas = window.app.canvas, around = [Infinity, Infinity, -Infinity, -Infinity];
          for (const group of window.app.graph._groups) {
            around[0] = Math.min(around[0], group.pos[0]); around[1] = Math.min(around[1], group.pos[1]);
            around[2] = Math.max(around[2], group.pos[0] + group.size[0]);
            around[3] = Math.max(around[3], group.pos[1] + group.size[1]);
          }
          const [w, h] = [window.innerWidth - 120, window.innerHeight - 120];
          canvas.ds.scale = Math.min(w / (around[2] - around[0]), h / (around[3] - around[1]));
          canvas.ds.offset = [80 / canvas.ds.scale - around[0], 80 / canvas.ds.scale - around[1]];
          canvas.setDirty(true, true);
          const left = 80, top = 80, scale = canvas.ds.scale;
          return [left, top, left + (around[2] - around[0]) * scale, top + (around[3] - around[1]) * scale];
        }"""
    )
    page.wait_for_timeout(1500)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB"), tuple(box)


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("names", nargs="*", choices=[*TEMPLATES, []])
    parser.add_argument("--shots", type=Path, help="a folder for pictures of the canvas")
    parser.add_argument("--no-run", action="store_true", help="leave the thumbnails as they are")
    told = parser.parse_args()
    with front_end(told.url) as page:
        for name in told.names or TEMPLATES:
            template = TEMPLATES[name]
            workflow, api = build(page, name, template)
            write(HERE / f"{name}.json", workflow)
            write(HERE / "api" / f"{name}.json", api)
            canvas, box = shoot(page, workflow)
            if told.shots:
                told.shots.mkdir(parents=True, exist_ok=True)
                canvas.save(told.shots / f"{name}.png")
            if not template.runs:
                (HERE / f"{name}.jpg").write_bytes(_jpeg([canvas.crop(box)]))
            elif not told.no_run:
                clip = clip_of(told.url, api, workflow, template.nodes[template.thumbnail].kind)
                (HERE / f"{name}.jpg").write_bytes(thumbnail(clip, template.filmstrip))
            sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
