"""The comparison player: two clocks that stay together, frames to the frame, its modes and keys; and in its node."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from nodes.engine.video import write_video

from ..comfyui.server import Server
from .canvas import MODES, Canvas

FPS = 8
FRAMES = 17
READY = "() => [...document.querySelectorAll('video[data-url]')].every(video => video.readyState >= 2)"
ALONE = pytest.mark.parametrize("mode", [MODES[-1]], ids=str, indirect=True)  # what has nothing to do with ComfyUI


@pytest.fixture
def clips(server: Server) -> list[dict[str, Any]]:
    """Three clips whose grey is the frame's number × 12, the first two alike but for a coloured corner."""
    folder = server.base / "output"
    folder.mkdir(exist_ok=True)
    told = []
    for n, name in enumerate("abc"):
        frames = torch.ones(FRAMES, 64, 96, 3) * (torch.arange(FRAMES) * 12 / 255)[:, None, None, None]
        frames[:, :16, :16, n] = 1.0
        write_video(frames, folder / f"clip-{name}.mp4", FPS, quality=10)
        url = f"/api/view?filename=clip-{name}.mp4&subfolder=&type=output"
        told.append({"url": url, "label": f"clip {name}", "frames": FRAMES})
    return told


class Player:
    """A player on the page, over everything else."""

    def __init__(self, canvas: Canvas, clips: list[dict[str, Any]], **options: Any) -> None:
        self.canvas, self.page = canvas, canvas.page
        canvas.evaluate(
            """async options => {
                const {createPlayer} = await import('/extensions/cogloom/player.js');
                const {texts} = await import('/extensions/cogloom/text.js');
                const host = document.createElement('div');
                host.style.cssText = 'position:fixed;left:100px;top:100px;width:480px;z-index:9999;background:#222';
                document.body.append(host);
                window.host = host;
                window.player = createPlayer(host, {text: texts('en'), ...options});
            }""",
            {"clips": clips, "fps": FPS, "autoplay": False, **options},
        )
        self.element = self.page.locator(".cogloom-player")
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('video[data-url]')].every(v => v.readyState >= 2)"
        )

    def shown(self, which: str) -> int:
        """The number of the frame that a video shows, by its grey."""
        grey = self.canvas.evaluate(
            """async which => {
                const video = document.querySelector(`.cogloom-player video.${which}`);
                const seeking = () => [...document.querySelectorAll('video[data-url]')].some(video => video.seeking);
                while (seeking()) await new Promise(done => setTimeout(done, 10));
                const canvas = document.createElement('canvas');
                [canvas.width, canvas.height] = [1, 1];
                const context = canvas.getContext('2d');
                context.drawImage(video, 60, 40, 1, 1, 0, 0, 1, 1);
                return context.getImageData(0, 0, 1, 1).data[0];
            }""",
            which,
        )
        return round(grey / 12)

    def key(self, key: str) -> None:
        self.element.press(key)

    def counter(self) -> str:
        return self.element.locator(".counter").inner_text()

    def colours(self, x: float, y: float) -> tuple[int, int, int]:
        """The picture's colour at a place, in parts of its width and height."""
        box = self.element.locator(".picture").bounding_box()
        assert box
        shot = Image.open(BytesIO(self.page.screenshot(clip=box))).convert("RGB")
        colour = shot.getpixel((int(x * shot.width), int(y * shot.height)))
        assert isinstance(colour, tuple)
        return colour  # type: ignore


@ALONE
def test_it_steps_frame_by_frame(canvas: Canvas, clips: list[dict[str, Any]]):
    player = Player(canvas, clips)
    assert (player.shown("a"), player.shown("b"), player.counter()) == (0, 0, "1 / 17")
    for n in range(1, 6):
        player.key("ArrowRight")
        assert (player.shown("a"), player.shown("b"), player.counter()) == (n, n, f"{n + 1} / 17")
    for n in (4, 3):
        player.element.get_by_role("button", name="One frame back").click()
        assert (player.shown("a"), player.shown("b")) == (n, n)
    player.key("End")
    assert (player.shown("a"), player.shown("b"), player.counter()) == (16, 16, "17 / 17")
    player.key("ArrowRight")  # round, while it loops
    assert (player.shown("a"), player.counter()) == (0, "1 / 17")
    player.key("l")
    player.key("ArrowLeft")
    assert player.counter() == "1 / 17"
    slider = player.element.get_by_role("slider", name="Frame")
    slider.evaluate("input => { input.value = 9; input.dispatchEvent(new Event('input')) }")
    for _ in range(6):  # faster than a video can seek
        player.key("ArrowRight")
    assert (player.shown("a"), player.shown("b"), player.counter()) == (15, 15, "16 / 17")


@ALONE
@pytest.mark.parametrize("speed", ["1", "2"])
def test_both_clocks_stay_within_a_frame(canvas: Canvas, clips: list[dict[str, Any]], speed: str):
    """Also through the turn of the loop, and after B was thrown off."""
    player = Player(canvas, clips)
    player.element.get_by_role("combobox", name="Speed").select_option(speed)
    player.key(" ")
    apart = canvas.evaluate(
        """async frames => {
            const [a, b] = document.querySelectorAll('.cogloom-player video');
            const wait = () => new Promise(done => requestAnimationFrame(done));
            while (a.currentTime < 0.2 || b.currentTime < 0.2) await wait();
            const seen = [];
            let turns = 0, last = a.currentTime;
            while (turns < 2) {
                if (!a.seeking && !b.seeking) seen.push(Math.abs(a.currentTime - b.currentTime));
                turns += a.currentTime < last - 0.5;
                last = a.currentTime;
                await wait();
            }
            b.currentTime = a.currentTime + 0.8;
            while (b.seeking || Math.abs(a.currentTime - b.currentTime) > 1 / 8) await wait();
            return [Math.max(...seen), seen.length];
        }""",
        FRAMES,
    )
    assert apart[1] > 20
    assert apart[0] < 1 / FPS
    player.key(" ")
    assert player.shown("a") == player.shown("b") == int(player.counter().split(" ")[0]) - 1


@ALONE
def test_its_modes(canvas: Canvas, clips: list[dict[str, Any]]):
    player = Player(canvas, clips)
    element = player.element
    for _ in range(8):
        player.key("ArrowRight")
    assert player.shown("a") == player.shown("b") == 8

    def corner(x: float) -> str:
        """Whose corner is at this part of the width: A's is red, B's green."""
        red, green, blue = player.colours(x, 0.22)
        assert blue < 140
        return "a" if red > green + 60 else "b" if green > red + 60 else "neither"

    # wipe: to the right of the divider is B
    expect(element.get_by_role("radio", name="Wipe")).to_have_attribute("aria-checked", "true")
    assert corner(0.08) == "a"
    box = element.locator(".picture").bounding_box()
    assert box
    player.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    player.page.mouse.down()
    player.page.mouse.move(box["x"] + 4, box["y"] + box["height"] / 2, steps=5)
    player.page.mouse.up()
    assert corner(0.08) == "b"
    divider = element.get_by_role("slider", name="Divider between A and B")
    at = int(divider.get_attribute("aria-valuenow") or -1)
    divider.press("ArrowRight")
    assert int(divider.get_attribute("aria-valuenow") or -1) == at + 2
    assert player.counter() == "9 / 17"  # the arrow was the divider's
    canvas.screenshot("player-wipe", element)
    # side by side: B's corner begins in the middle
    player.key("2")
    assert (corner(0.04), corner(0.54)) == ("a", "b")
    canvas.screenshot("player-side", element)
    # difference: the same is black, what differs is not; the gain is a gain
    player.key("3")
    for _ in range(100):  # a busy machine presents two videos that were sought one after the other
        if max(player.colours(0.6, 0.6)) < 40:
            break
        canvas.settle()
    assert max(player.colours(0.6, 0.6)) < 40
    assert max(player.colours(0.08, 0.22)) > 150
    element.get_by_role("slider", name="Gain").fill("1")
    assert "brightness(1)" in (element.locator(".frames").get_attribute("style") or "")
    # blink: one, then the other
    player.key("4")
    for class_, whose in ((".shows-b", "b"), (":not(.shows-b)", "a"), (".shows-b", "b")):
        player.page.wait_for_function("class_ => document.querySelector('.cogloom-player' + class_)", arg=class_)
        assert corner(0.08) == whose
    # swap, and choose the third
    player.key("1")
    player.key("s")
    expect(element.locator(".label.a")).to_have_text("clip b")
    element.get_by_role("combobox", name="Clip B").select_option("2")
    expect(element.locator(".label.b")).to_have_text("clip c")
    player.page.wait_for_function("() => document.querySelector('video.b').readyState >= 2")
    assert player.shown("a") == player.shown("b") == 8  # other clips, the same frame
    assert player.element.evaluate("player => player.classList.contains('pixelated')")  # 96 pixels are not blurred


@ALONE
def test_one_clip_other_clips_and_none(canvas: Canvas, clips: list[dict[str, Any]]):
    label = "<img src=x onerror=window.pwned=1>"
    player = Player(canvas, [{**clips[0], "label": label, "frames": 0}])
    expect(player.element.locator(".label.a")).to_have_text(label)
    expect(player.element.get_by_role("radiogroup")).to_be_hidden()
    assert player.counter() == "1 / 17"  # counted, where it is not told
    player.key("ArrowRight")
    assert player.shown("a") == 1
    canvas.evaluate("clips => window.player.update({clips})", clips[:2])
    expect(player.element.get_by_role("radiogroup")).to_be_visible()
    player.page.wait_for_function("() => document.querySelector('video.b').readyState >= 2")
    assert player.shown("b") == 1
    canvas.evaluate("clips => window.player.update({clips})", [{**clips[0], "url": "/api/view?filename=gone.mp4"}])
    expect(player.element.get_by_role("alert")).to_contain_text("cannot be shown")
    canvas.evaluate("() => window.player.destroy()")
    assert canvas.evaluate("() => window.host.children.length") == 0
    assert canvas.evaluate("() => window.pwned ?? null") is None
    assert canvas.our_errors() == []


# --- in the node ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(canvas: Canvas) -> str:
    """A compare node that has run on the demo's base; its id."""
    base = canvas.add("CogLoomBase", 0, 0, checkpoint="cogloom-demo")
    stack = canvas.add("CogLoomLoraStack", 0, 260, rows='[{"adapter": "neon.safetensors"}]')
    prompt = canvas.add("CogLoomPrompt", 0, 520, prompt="a large cyan circle moving right")
    node = canvas.add("CogLoomCompare", 520, 0, steps=2, seed=int(torch.randint(1 << 30, ()).item()))
    canvas.connect(base, "base", prompt, "base")
    canvas.connect(base, "base", node, "base")
    canvas.connect(prompt, "positive", node, "positive")
    canvas.connect(prompt, "negative", node, "negative")
    canvas.connect(stack, "stack", node, "b")
    canvas.show(node, scale=0.8, x=700, y=120)
    canvas.run()
    canvas.page.locator(".cogloom-player").wait_for()
    return node


def test_the_compare_node_plays_its_clips_once(canvas: Canvas, compared: str):
    element = canvas.page.locator(".cogloom-player")
    canvas.page.wait_for_function(READY)
    expect(element.locator(".label.b")).to_contain_text("neon")
    urls = element.locator("video").evaluate_all("videos => videos.map(v => v.currentSrc)")
    assert len(set(urls)) == 2
    assert all("/view?" in url for url in urls)
    # the front end's own preview of the side-by-side file would show it a second time
    assert canvas.page.locator("video").count() == 2
    names = canvas.evaluate("id => app.graph.getNodeById(id).widgets.map(w => w.name)", compared)
    assert not [name for name in names if "image-preview" in name or "video-preview" in name]
    values = next(node for node in canvas.save()["nodes"] if str(node["id"]) == compared)["widgets_values"]
    assert len(values) <= len([name for name in names if not name.startswith("cogloom_")])  # "$$…" are the front end's
    assert not {"cogloom_player", "cogloom_preview"} & set(canvas.graph_to_prompt()[compared]["inputs"])
    # the wheel over it is the canvas's, its keys are its own
    scale = canvas.evaluate("() => app.canvas.ds.scale")
    element.hover()
    canvas.page.mouse.wheel(0, 120)
    canvas.page.wait_for_function("scale => app.canvas.ds.scale !== scale", arg=scale)
    canvas.select(compared)
    element.press("Delete")
    assert canvas.evaluate("id => app.graph.getNodeById(id) !== null", compared)
    canvas.screenshot("compare-node")
    # another run shows its own clips in the same player
    canvas.evaluate("id => { app.graph.getNodeById(id).widgets.find(w => w.name === 'seed').value += 1 }", compared)
    canvas.run()
    canvas.page.wait_for_function(
        "url => document.querySelector('.cogloom-player video.a').currentSrc !== url", arg=urls[0]
    )
    expect(element).to_have_count(1)
    canvas.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", compared)
    expect(element).to_have_count(0)
    assert canvas.our_errors() == []


@ALONE
def test_the_player_comes_back_with_its_node(canvas: Canvas, compared: str):
    """Undo makes every node anew, and the front end gives them what they had put out."""
    canvas.evaluate(
        """id => {
            app.canvas.emitBeforeChange();
            app.graph.getNodeById(id).title = 'another title';
            app.canvas.emitAfterChange();
            window.before = app.graph.getNodeById(id);
        }""",
        compared,
    )
    canvas.focus_canvas()
    canvas.page.keyboard.press("Control+z")
    canvas.page.wait_for_function("id => app.graph.getNodeById(id) !== window.before", arg=compared)
    expect(canvas.page.locator(".cogloom-player")).to_have_count(1)
    canvas.page.wait_for_function(READY)


def test_the_player_stands_alone():
    """What it imports is of the same folder and knows nothing of ComfyUI, so that other pages can use it."""
    folder = Path(__file__).parents[2] / "web"
    for name in ("player.js", "dom.js", "text.js"):
        source = (folder / name).read_text(encoding="utf-8")
        assert "scripts/app.js" not in source
        assert "scripts/api.js" not in source
