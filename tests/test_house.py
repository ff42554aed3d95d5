"""The rules of the house, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.engine import VERSION

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(f for folder in ("nodes", "demo", "benchmarks", "tests") for f in (ROOT / folder).rglob("*.py"))
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "gradio", "ray", "imageio_ffmpeg", "PIL", "huggingface_hub"}


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(module, level) of every import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


@pytest.mark.parametrize("file", [f for f in SOURCES if "nodes" in f.relative_to(ROOT).parts[:1]], ids=lambda f: f.name)
def test_imports_go_one_way(file: Path):
    """Inside nodes/ imports are relative, the engine knows nobody above it, heavy libraries load at use."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    engine = "engine" in file.relative_to(ROOT).parts
    for module, level in imports(tree):
        top = module.split(".")[0]
        assert not (level == 0 and top in ("nodes", "demo", "ui", "app", "tests")), f"{file.name} imports {module}"
        if engine:
            assert level <= 1, f"{file.name}: the engine reaches above itself for {module}"
        # Its own MODEL cannot be had without comfy's classes: `native.py` imports them where it uses them.
        assert top not in ("comfy", "folder_paths", "server") or file.name in ("comfyui.py", "native.py")
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module, level in imports(ast.Module([node], [])):
                assert level > 0 or module.split(".")[0] not in HEAVY, f"{file.name} imports {module} at the top"


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_executes_data(file: Path):
    """No eval, no exec, no pickle, no torch.load of a whole object: the training scripts' states are weights only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system")
            if name == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name.startswith("subprocess."):
                assert not any(k.arg == "shell" for k in node.keywords)


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^version = "{re.escape(VERSION)}"$', text, re.M)
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_error_tree_is_the_one_that_is_drawn():
    from nodes.engine import errors

    drawn = re.findall(r"^[│├└─ ]*([A-Z]\w+)", errors.__doc__ or "", re.M)
    drawn = [name for name in drawn if name not in ("What",)]
    there = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert sorted(drawn) == sorted(there)


def test_importing_does_nothing_and_is_light(tmp_path: Path):
    """Neither heavy libraries nor files: ComfyUI imports this at its start."""
    code = (
        "import sys, os; before = set(os.listdir('.'));"
        "import nodes.render, nodes.train, nodes.model, nodes.lora, nodes.showcase, nodes.doctor;"
        f"print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)));"
        "assert set(os.listdir('.')) == before"
    )
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_readme_starts_with_the_two_commands():
    """One line each, as fresh machines will have them pasted in."""
    blocks = re.findall(r"```(?:sh|bash|shell|console)\s*\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    first, second = (block.strip() for block in blocks[:2])
    assert "\n" not in first + second
    assert "-r requirements.txt -c constraints.txt" in first
    assert first.endswith("app.py demo")
    assert "-r requirements-dev.txt -c constraints.txt" in second
    assert second.endswith("pytest")


def test_the_embedded_models_keep_to_their_sizes():
    def size(folder: Path) -> float:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6

    assert size(ROOT / "demo" / "cogloom-demo") <= 12
    assert size(ROOT / "demo" / "cogloom-demo-i2v") <= 8
    adapters = sorted((ROOT / "demo" / "loras").glob("*.safetensors"))
    assert len(adapters) >= 5
    assert all(f.stat().st_size <= 1e6 for f in adapters)


def test_no_file_is_too_clever_for_windows():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = [n for n in names if n]
    assert len({n.lower() for n in names}) == len(names)
    assert not any(set(n) & set('<>:"|?*\\') for n in names)
    assert not any((ROOT / n).is_symlink() for n in names)
