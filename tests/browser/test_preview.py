"""The animated preview on a node that samples."""

from __future__ import annotations

import torch
from playwright.sync_api import expect

from .canvas import Canvas


def test_the_preview_plays_while_it_samples_and_is_gone_after(canvas: Canvas):
    ids = canvas.text_to_video(steps=30, seed=int(torch.randint(1 << 30, ()).item()))
    sampler = ids["sampler"]
    canvas.show(sampler, scale=0.8, x=700, y=120)
    before = canvas.save()
    height = canvas.evaluate("id => app.graph.getNodeById(id).size[1]", sampler)
    canvas.press_run()
    picture = canvas.page.locator(".cogloom-preview canvas")
    picture.wait_for()
    expect(canvas.page.locator(".cogloom-preview-line")).to_contain_text("/ 30")
    seen = canvas.evaluate(
        """async () => {
            const canvas = document.querySelector('.cogloom-preview canvas'), seen = new Set();
            const hash = () => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.join();
            for (let tries = 0; tries < 400 && seen.size < 4; tries++) {
                if (canvas.width && canvas.isConnected) seen.add(hash());
                await new Promise(done => setTimeout(done, 10));
            }
            return [seen.size, canvas.width, canvas.height];
        }"""
    )
    assert seen[0] >= 4  # it moves
    assert seen[1] > 1
    tall = canvas.evaluate("id => app.graph.getNodeById(id).size[1]", sampler)
    room = canvas.evaluate("() => parseFloat(document.querySelector('.cogloom-preview').style.minHeight)")
    assert tall >= height + room
    canvas.screenshot("preview")
    during = canvas.save()

    def values(saved: dict, node: str) -> list:
        return next(one for one in saved["nodes"] if str(one["id"]) == node)["widgets_values"]

    names = canvas.evaluate("id => app.graph.getNodeById(id).widgets.map(w => w.name)", sampler)
    assert "cogloom_preview" in names
    told, kept = values(during, sampler), values(before, sampler)
    assert told[2 : len(kept)] == kept[2:]  # the seed moves on
    assert len(told) <= len(kept) + sum(name.startswith("$$") for name in names)  # 1.27 saves its own line of text
    assert "cogloom_preview" not in canvas.graph_to_prompt()[sampler]["inputs"]
    picture.wait_for(state="hidden", timeout=120_000)
    # the room is given back; a line of text that the front end has put there meanwhile may stay
    canvas.page.wait_for_function(
        "([id, height]) => app.graph.getNodeById(id).size[1] < height + 2", arg=[sampler, tall - room]
    )
    # it loads again with the values in their places
    saved = canvas.save()
    canvas.clear()
    canvas.load(saved)
    assert values(canvas.save(), sampler)[: len(kept)] == values(saved, sampler)[: len(kept)]
    assert canvas.our_errors() == []


def test_an_interrupted_run_takes_its_preview_away(canvas: Canvas):
    ids = canvas.text_to_video(steps=60, seed=int(torch.randint(1 << 30, ()).item()))
    canvas.show(ids["sampler"], scale=0.8, x=700, y=120)
    canvas.press_run()
    picture = canvas.page.locator(".cogloom-preview canvas")
    picture.wait_for()
    canvas.server.post("/interrupt", {})
    picture.wait_for(state="hidden")


def test_what_is_no_preview_harms_nothing(canvas: Canvas):
    node = canvas.add("CogLoomSampler", 100, 100)
    canvas.evaluate(
        """async id => {
            const {showPreview, endPreviews} = await import('/extensions/cogloom/preview.js');
            const {texts} = await import('/extensions/cogloom/text.js');
            showPreview({node: 'gone:7', sheet: '', count: 3}, texts('en'));
            showPreview({node: id, sheet: '', count: 0}, texts('en'));
            endPreviews('gone');
            endPreviews();
        }""",
        node,
    )
    expect(canvas.page.locator(".cogloom-preview")).to_have_count(0)
    assert canvas.our_errors() == []
