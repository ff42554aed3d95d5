"""What the Comfy registry reads and ships."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def listed(*flags: str) -> set[str]:
    """Files as git sees them, new ones that are not ignored among them."""
    done = subprocess.run(["git", "ls-files", *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\n") if name and (ROOT / name).is_file()}


def shipped() -> set[str]:
    """As `comfy node pack` chooses: what git tracks, without what .comfyignore names."""
    every = listed("--cached", "--others", "--exclude-standard")
    return every - listed("--cached", "--others", "--ignored", "--exclude-from=.comfyignore")


def declared(table: str) -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.split(r"^\[", text.partition(f"\n[{table}]\n" if table != "project" else "[project]\n")[2], flags=re.M)[0]


def test_dependencies_are_those_of_requirements():
    """The registry's tool reads the one, ComfyUI's manager and pip the other."""
    wanted = [
        line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#")
    ]  # fmt: skip
    block = declared("project").partition("dependencies = [")[2].partition("\n]")[0]
    assert re.findall(r'"([^"]+)"', block) == wanted
    assert not any("==" in line for line in wanted)  # ComfyUI's own torch is not to be moved


def test_the_registry_is_told_what_it_asks_for():
    project, comfy = declared("project"), declared("tool.comfy")
    assert 'name = "cogloom"' in project
    assert re.search(r'^version = "\d+\.\d+\.\d+"$', project, re.M)
    assert 'license = { file = "LICENSE" }' in project
    assert '"Operating System :: OS Independent"' in project
    assert 'PublisherId = "cogloom"' in comfy
    assert re.search(r'^requires-comfyui = ">=\d+\.\d+\.\d+"$', comfy, re.M)
    assert "web" not in comfy  # WEB_DIRECTORY says it; with both, scripts would load twice


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "app.py",
        "requirements.txt",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "nodes/comfyui.py",
        "nodes/engine/switch.py",
        "demo/cogloom-demo/transformer/diffusion_pytorch_model.safetensors",
        "demo/cogloom-demo-i2v/model_index.json",
        "demo/loras/neon.safetensors",
        "web/cogloom.js",
        "web/docs/CogLoomSampler/zh.md",
        "locales/zh/nodeDefs.json",
        "workflows/text_to_video.json",
        "workflows/text_to_video.jpg",
        "workflows/api/text_to_video.json",
    ],
)
def test_what_runs_is_shipped(name: str):
    assert name in shipped()


def test_what_only_builds_and_tests_is_not():
    tops = {name.split("/")[0] for name in shipped()}
    assert not tops & {"tests", "benchmarks", "constraints.txt", "requirements-dev.txt"}
    assert not [top for top in tops if top.startswith(".")]
    assert not [
        name for name in shipped() if name.startswith(("demo/", "locales/", "workflows/")) and name.endswith(".py")
    ]
    assert sum((ROOT / name).stat().st_size for name in shipped()) < 25e6


def test_no_module_that_is_shipped_names_a_file_that_is_not():
    """The product's own source never reaches into what stays behind."""
    left = re.compile(r"[\"'](?:tests|benchmarks)/|demo/(?:world|measure|train_\w+|evaluate|fit_preview)\.py")
    for name in shipped():
        if name.startswith("nodes/") and name.endswith(".py"):
            assert not left.search((ROOT / name).read_text(encoding="utf-8")), name


# What nodesafe 0.6 calls high without being able to read it: pattern -> (what has to be in the line, in which files).
REVIEWED = {
    "compile(": ("re.compile(", None),  # regular expressions
    "eval(": (".eval()", None),  # a torch module out of training mode
    "subprocess.run": ("subprocess.run(", {"nodes/doctor.py", "nodes/engine/sat.py"}),  # FFmpeg; the converter apart
    "subprocess.Popen": ("subprocess.Popen", {"nodes/engine/video.py", "ui/training.py"}),  # FFmpeg; a training apart
    "zlib.decompress": ("zlib.decompressobj(", {"nodes/engine/history.py"}),  # byte planes of checkpoints, bounded
    "bytes.fromhex": ("bytes.fromhex(whole", {"nodes/voting.py"}),  # the secret that keeps votes blind
    "importlib.import_module": ("import_module(", {"ui/app.py"}),  # names of our own tabs
}


def test_nodesafe_finds_nothing_that_was_not_reviewed(tmp_path: Path):
    """Hashes, addresses and names have to be clean. Its patterns are texts without context ("record(" has an "ord(",
    and every docstring is "high-entropy"), so of those what is high is compared with the list above."""
    nodesafe = shutil.which("nodesafe")
    if nodesafe is None:
        pytest.skip("nodesafe is not installed: pip install nodesafe, in an environment of its own")
    for name in shipped():
        target = tmp_path / "pack" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)

    def scan(layers: str) -> list[dict[str, Any]]:
        command = [nodesafe, "scan", str(tmp_path / "pack"), "--layers", layers, "--format", "json"]
        done = subprocess.run([*command, "--fail-on", "none"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["scan"]["layers_run"] == [f"L{layer}" for layer in layers.split(",")]
        return report["findings"]

    assert scan("0,1") == []
    # gradio itself is taken for a misspelling of another name.
    assert [found for found in scan("4") if "gradio" not in found["title"] + found["snippet"]] == []
    strange = []
    for found in scan("2,3"):
        if found["severity"] in ("high", "critical"):
            pattern = found["title"].split("`")[1].removesuffix("()")
            text, files = REVIEWED.get(pattern, ("", set()))
            file = Path(found["file"]).as_posix()
            if text not in found["snippet"] or (files is not None and file not in files):
                strange.append(f"{file}:{found['line']} {found['title']}: {found['snippet']}")
    assert strange == []
