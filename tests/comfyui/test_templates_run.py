"""Every template through the real server, and what the page fetches of ours besides scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch

from locales.make import DOCS, LOCALES
from nodes.engine.video import read_tags, read_video
from nodes.schema import NODES
from workflows.make import HERE, TEMPLATES

from .server import Server

RUNNABLE = [name for name, one in TEMPLATES.items() if one.runs]


def files(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(API form, workflow)."""
    return tuple(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for folder in (HERE / "api", HERE))  # type: ignore[return-value]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_template_gives_a_clip_that_restores_it(server: Server, name: str):
    graph, workflow = files(name)
    run = server.run(graph, workflow).ok()
    saving = TEMPLATES[name].nodes[TEMPLATES[name].thumbnail].kind
    (node,) = (id for id, one in graph.items() if one["class_type"] == saving)
    (file,) = run.outputs[node]["images"]
    path = server.path_of(file)
    assert path.suffix == ".mp4"
    assert path.parent == server.base / "output" / "CogLoom"
    tags = read_tags(path)
    assert json.loads(tags["prompt"]) == graph
    assert json.loads(tags["workflow"]) == workflow
    frames, fps = read_video(path)
    assert len(frames) == 17
    assert fps == 8.0
    assert frames.std() > 0.05  # a picture
    assert not torch.equal(frames[0], frames[-1])  # that moves


def test_comfy_lint_finds_nothing(server: Server, tmp_path: Path):
    """It reads the API forms against what the server offers; the native template wants files of the user's."""
    lint = shutil.which("comfy-lint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if lint is None:
        pytest.skip("comfy-lint is not installed: pip install comfy-lint")
    for node in files("native_model")[0].values():
        for key, folder in (("unet_name", "diffusion_models"), ("clip_name", "text_encoders"), ("vae_name", "vae")):
            if key in node["inputs"]:
                file = server.base / "models" / folder / node["inputs"][key]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    schema = server.get("/object_info")
    (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    native = "cogvideox" in str(schema["CLIPLoader"]["input"]["required"]["type"])  # ComfyUI has it since 0.21
    names = [name for name in TEMPLATES if name in RUNNABLE or native]
    command = [lint, "--schema-cache", str(tmp_path / "schema.json"), "--strict"]
    command += [str(HERE / "api" / f"{name}.json") for name in names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(names)} files clean" in done.stdout + done.stderr


def test_templates_and_thumbnails_are_offered(server: Server):
    assert set(server.get("/workflow_templates")["cogloom"]) == set(TEMPLATES)
    for name in TEMPLATES:
        for suffix in (".json", ".jpg"):
            assert (
                server.read(f"/api/workflow_templates/cogloom/{name}{suffix}")
                == (HERE / f"{name}{suffix}").read_bytes()
            )


def test_texts_are_served_in_both_languages(server: Server):
    told = server.get("/i18n")
    for language in ("en", "zh"):
        definitions = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert {id: told[language]["nodeDefs"][id] for id in NODES} == definitions
        assert told[language]["nodeCategories"]["CogLoom"]


@pytest.mark.parametrize("node", NODES)
def test_help_pages_are_where_the_page_looks(server: Server, node: str):
    """NODE/LANGUAGE.md, else NODE.md; pictures are named from the folder of all pages."""
    for page in (f"{node}/en.md", f"{node}/zh.md", f"{node}.md", f"{node}/en.webp", f"{node}/zh.webp"):
        assert server.read(f"/extensions/cogloom/docs/{page}") == (DOCS / page).read_bytes()
    with pytest.raises(urllib.error.HTTPError):  # so that other languages come to NODE.md
        server.read(f"/extensions/cogloom/docs/{node}/fr.md")
