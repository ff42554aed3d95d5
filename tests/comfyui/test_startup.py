"""What ComfyUI knows of the pack once it is up, and what its start costs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .graphs import OUTPUTS
from .server import LAUNCH, ROOT, Environment, Server

PUBLISHED = Path(__file__).with_name("published.json")
HEAVY = ("diffusers", "transformers", "peft", "gradio", "accelerate", "imageio_ffmpeg", "torchao")


def ours(info: dict[str, Any]) -> dict[str, Any]:
    return {id: node for id, node in info.items() if node["python_module"] == "custom_nodes.cogloom"}


def sockets(node: dict[str, Any]) -> dict[str, Any]:
    """What a saved workflow depends on: inputs in order, each with its type, and outputs in order."""

    def kind(spec: list[Any]) -> str:
        return "COMBO" if isinstance(spec[0], list) else spec[0]

    inputs = node["input"]
    return {
        "required": [[name, kind(inputs["required"][name])] for name in node["input_order"].get("required", [])],
        "optional": [[name, kind(inputs["optional"][name])] for name in node["input_order"].get("optional", [])],
        "outputs": [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)],
        "shows": node["output_node"],
    }


def test_every_node_is_there_with_its_sockets_in_order(info: dict[str, Any]):
    """published.json only grows: names, types and order of what it lists are in people's saved workflows, where a
    widget is known by its position. Append what is new to it."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    there = {id: sockets(node) for id, node in ours(info).items()}
    assert set(there) == set(published), "add new nodes to published.json; a published one never goes"
    for id, before in published.items():
        now = there[id]
        for part in ("required", "optional", "outputs"):
            assert now[part][: len(before[part])] == before[part], f"{id}: {part} changed"
            assert len(now[part]) == len(before[part]), f"{id}: append its new {part} to published.json"
        assert now["shows"] == before["shows"]


def test_the_tests_own_list_of_outputs_is_the_published_one():
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert {id: tuple(name for name, _ in node["outputs"]) for id, node in published.items()} == OUTPUTS


def test_widgets_come_before_optional_sockets(info: dict[str, Any]):
    """Optional inputs are sockets only, so that the order of widgets is the order of `required`."""
    for id, node in ours(info).items():
        for name, spec in node["input"].get("optional", {}).items():
            assert not isinstance(spec[0], list), f"{id}.{name}"
            assert spec[0] not in ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"), f"{id}.{name}"


def test_everything_says_what_it_is(info: dict[str, Any]):
    for id, node in ours(info).items():
        assert node["display_name"] not in ("", id), id
        assert len(node["description"]) > 30, id
        assert node["category"] in ("CogLoom", "CogLoom/native", "CogLoom/workshop"), id
        for kind in ("required", "optional"):
            for name, spec in node["input"].get(kind, {}).items():
                assert len(spec[1].get("tooltip", "")) > 10, f"{id}.{name} has no tooltip"
        assert len(node.get("output_tooltips") or ()) == len(node["output"]), id
        assert all(node.get("output_tooltips") or ()), id


def test_defaults_are_legal(info: dict[str, Any]):
    """A node just added to the canvas runs as it stands, apart from its sockets."""
    for id, node in ours(info).items():
        for name, spec in node["input"]["required"].items():
            kind, options = spec[0], spec[1]
            if isinstance(kind, list) and (id, name) != ("CogLoomBaseFile", "file"):  # no such file may be there
                assert options.get("default", kind[0]) in kind, f"{id}.{name}"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], f"{id}.{name}"


def test_the_embedded_base_comes_first_and_absent_ones_are_marked(info: dict[str, Any]):
    names = info["CogLoomBase"]["input"]["required"]["checkpoint"][0]
    assert names[:2] == ["cogloom-demo", "cogloom-demo-i2v"]
    known = [name for name in names if name.startswith("zai-org/")]
    assert known
    assert all("not downloaded" in name for name in known)


def test_the_pages_routes_answer(server: Server):
    listed = server.get("/cogloom/adapters", base="cogloom-demo")
    there = {one["name"]: one for one in listed["adapters"]}
    offered = server.get("/object_info/CogLoomLora")["CogLoomLora"]["input"]["required"]["adapter"][0]
    assert set(there) == set(offered)
    for name in ("neon.safetensors", "sunset.safetensors", "bounce.safetensors"):
        assert there[name]["error"] is None
        assert there[name]["problem"] is None
    assert listed["blocks"] > 0
    card = server.get("/cogloom/adapter", name="neon.safetensors", base="cogloom-demo")
    assert re.fullmatch("[0-9a-f]{64}", card["sha256"])
    assert 0 < card["effect"]["overall"] < 10
    assert len(card["effect"]["blocks"]) == listed["blocks"]
    assert server.get("/cogloom/curve", steps="0@0 1@1", total=5)["factors"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    factors = server.get("/cogloom/blocks", blocks="0-1:0.5", base="cogloom-demo")["factors"]
    assert factors["attention"][:3] == [0.5, 0.5, factors["attention"][2]]
    assert len(factors["feed_forward"]) == listed["blocks"]
    status = server.get("/cogloom/status")
    assert isinstance(status["loads"], int)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/cogloom/adapter", {"name": "nowhere.safetensors"}),
        ("/cogloom/adapter", {"name": "../../../../etc/passwd"}),
        ("/cogloom/adapter", {"name": "/etc/passwd"}),
        ("/cogloom/adapter", {}),
        ("/cogloom/picture", {"name": "../__init__.py"}),
        ("/cogloom/picture", {"name": "neon.safetensors\0.png"}),
        ("/cogloom/adapters", {"base": "../.."}),
        ("/cogloom/curve", {"steps": "nonsense", "total": "30"}),
        ("/cogloom/curve", {"steps": "1", "total": "999999999999"}),
        ("/cogloom/blocks", {"blocks": "0-99:1", "base": "cogloom-demo"}),
        ("/cogloom/blocks", {"blocks": "1:nan"}),
    ],
    ids=str,
)
def test_routes_refuse_with_a_sentence(server: Server, path: str, query: dict[str, str]):
    status, answer = server.status_of(path, **query)
    assert 400 <= status < 500
    assert len(answer["error"]) > 15
    assert "Traceback" not in answer["error"]


def test_there_is_no_route_that_writes(server: Server):
    """Anyone who reaches ComfyUI reaches these: they are asked, never told."""
    import urllib.error
    import urllib.request

    for name in ("adapters", "adapter", "picture", "curve", "blocks", "status"):
        request = urllib.request.Request(f"{server.url}/cogloom/{name}", b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=30)
        assert raised.value.code in (403, 404, 405)


def test_the_start_is_light(server: Server, environment: Environment, tmp_path: Path):
    """What the pack adds to ComfyUI's start: nothing heavy, and less than half a second. In a process with ComfyUI in
    it, as it is at the pack's turn; in CPU time, since a busy machine's clock says nothing of us."""
    code = f"""
import compileall, importlib.util, json, runpy, sys, time
launch = runpy.run_path({str(LAUNCH)!r})
launch["put_stand_ins"]()
sys.path.insert(0, {str(environment.comfyui)!r})
sys.argv = ["main.py", "--cpu", "--base-directory", {str(tmp_path)!r}, "--front-end-root", {str(tmp_path)!r}]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config
import asyncio, server
server.PromptServer(asyncio.new_event_loop())
import nodes
root = {str(ROOT)!r}
sys.pycache_prefix = {str(tmp_path / "compiled")!r}  # the first start after an update compiles; the others are meant
compileall.compile_dir(root + "/nodes", quiet=1)
with_comfy, before = set(sys.modules), time.process_time()
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
spent = time.process_time() - before
assert len(pack.NODE_CLASS_MAPPINGS) > 10
heavy = sorted(name for name in set(sys.modules) - with_comfy if name.split(".")[0] in {HEAVY!r})
print("TOLD", json.dumps([spent, heavy]))
"""
    done = subprocess.run(
        [str(environment.python), "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment.process_environment(PYTHONDONTWRITEBYTECODE="1"),
    )
    assert done.returncode == 0, done.stderr
    spent, heavy = json.loads(done.stdout.partition("TOLD ")[2])
    assert heavy == []
    assert spent < 0.5
    assert re.search(r"[\d.]+ seconds: \S*cogloom\s", server.import_times())
