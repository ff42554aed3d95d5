"""Templates, Chinese texts and help pages in every front end and mode, as people meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locales.make import DOCS, LOCALES
from nodes.schema import NODES
from workflows.make import HERE, TEMPLATES

from .canvas import Canvas


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def canvas(open_canvas: Callable[..., Canvas]) -> Canvas:
    canvas = open_canvas()
    canvas.clear()
    return canvas


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Titles and the order of keys aside; rows by what they mean, since the widget may write them anew."""

    def plain(graph: dict[str, Any]) -> dict[str, Any]:
        nodes = {id: {"class_type": node["class_type"], **node["inputs"]} for id, node in graph.items()}
        for node in nodes.values():
            if isinstance(node.get("rows"), str):
                node["rows"] = json.loads(node["rows"])
        return nodes

    assert plain(one) == plain(other)


def test_every_template_opens_as_its_api_form(canvas: Canvas):
    """From where the template browser fetches it."""
    for name in TEMPLATES:
        workflow = json.loads(canvas.server.read(f"/api/workflow_templates/cogloom/{name}.json"))
        canvas.clear()
        canvas.load(workflow)
        same(canvas.graph_to_prompt(), read(HERE / "api" / f"{name}.json"))
        canvas.screenshot(f"template-{name}")
        kept = canvas.save()
        assert [node["type"] for node in kept["nodes"]] == [node["type"] for node in workflow["nodes"]]
        assert [group["title"] for group in kept["groups"]] == list(TEMPLATES[name].groups)


def test_nodes_speak_chinese(open_canvas: Callable[..., Canvas]):
    """Titles, sockets and widgets; no text is broken by the page's own syntax."""
    canvas = open_canvas(**{"Comfy.Locale": "zh"})
    canvas.clear()
    texts = read(LOCALES / "zh" / "nodeDefs.json")
    for number, kind in enumerate(NODES):
        canvas.add(kind, 450 * (number % 5), 450 * (number // 5))
    canvas.settle()
    canvas.page.wait_for_timeout(300)
    canvas.screenshot("zh")
    shown = canvas.evaluate(
        """() => Object.fromEntries(window.app.graph.nodes.map(node => [node.type, {
          title: node.title,
          inputs: Object.fromEntries(node.inputs.map(one => [one.name, one.localized_name ?? one.label])),
          outputs: node.outputs.map(one => one.localized_name ?? one.label),
        }]))"""
    )
    for kind, told in texts.items():
        assert shown[kind]["title"] == told["display_name"]
        assert shown[kind]["inputs"] == {name: one["name"] for name, one in told["inputs"].items()}
        assert shown[kind]["outputs"] == [one["name"] for one in told["outputs"].values()]
    assert [error for error in canvas.errors if "SyntaxError" in error or "unhandled node type" in error] == []


SELECT = """kind => {
  const node = LiteGraph.createNode(kind);
  window.app.graph.add(node);
  window.app.canvas.selectNode(node);
  window.app.canvas.onSelectionChange?.(window.app.canvas.selected_nodes);
}"""
# The page hears of the selection a while later, and then chooses a tab of its own.
OPEN_HELP = """kind => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  const help = stores.get('nodeHelp'), sidebar = stores.get('sidebarTab');
  stores.get('canvas')?.updateSelectedItems?.();  // front end 1.49 does so at a click alone
  if (!help) stores.get('rightSidePanel').openPanel('info');
  else {  // front end 1.27 has it in the sidebar
    if (sidebar.activeSidebarTabId !== 'node-library') sidebar.toggleSidebarTab('node-library');
    help.openHelp(stores.get('nodeDef').nodeDefsByName[kind]);
  }
  return Boolean(document.querySelector('.node-help-content img'));
}"""


@pytest.mark.parametrize(("locale", "page"), [("en", "en"), ("zh", "zh"), ("fr", "en")])
def test_the_help_panel_shows_our_page_and_its_picture(open_canvas: Callable[..., Canvas], locale: str, page: str):
    """In French, which has no page of its own, the English one."""
    canvas = open_canvas(**{"Comfy.Locale": locale})
    canvas.clear()
    canvas.evaluate(SELECT, "CogLoomSchedule")
    canvas.page.wait_for_function(OPEN_HELP, arg="CogLoomSchedule", timeout=30_000, polling=500)
    picture = canvas.page.locator(f"img[src$='docs/CogLoomSchedule/{page}.webp']")
    picture.wait_for(timeout=20_000)
    canvas.page.wait_for_function("image => image.naturalWidth > 200", arg=picture.element_handle())
    canvas.screenshot(f"help-{locale}")
    wanted = (DOCS / "CogLoomSchedule" / f"{page}.md").read_text(encoding="utf-8")
    shown = canvas.page.locator(".node-help-content").inner_text()
    for heading in [line[3:] for line in wanted.splitlines() if line.startswith("## ")]:
        assert heading in shown
    assert "0@0 1@0.3 1@0.7 0.2@1" in shown
