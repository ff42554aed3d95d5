"""Run ComfyUI's main.py where torchvision and torchaudio do not exist: `python launch.py COMFYUI_FOLDER [its flags]`.

There is no CPU build of either, and ComfyUI imports both by name without needing them for a CogVideoX graph. Empty
modules stand in for them, in memory only. transformers and diffusers must go on seeing both as absent, or they would
reach for names the stand-ins lack; so they are asked first, and they keep their answer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import sys
import threading
import types
from pathlib import Path

STAND_INS = {
    "torchvision": (
        "datasets",
        "io",
        "ops",
        "transforms",
        "transforms.functional",
        "transforms.v2",
        "utils",
        "models",
        "models.optical_flow",
    ),
    "torchaudio": ("functional", "transforms"),
}


class StandIn(types.ModuleType):
    """Answers every name with a class of that name, so that `from torchaudio.transforms import MelScale` works."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


def put_stand_ins() -> None:
    absent = [name for name in STAND_INS if importlib.util.find_spec(name) is None]
    if not absent:
        return
    import diffusers.utils.import_utils  # noqa: F401
    import transformers.utils.import_utils as ask

    for question in ("is_torchvision_available", "is_torchvision_v2_available", "is_torchaudio_available"):
        getattr(ask, question, bool)()
    for name in absent:
        for full in (name, *(f"{name}.{part}" for part in STAND_INS[name])):
            module = StandIn(full)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
            sys.modules[full] = module
            parent, _, last = full.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)


def end_with_our_parent() -> None:
    """When the tests are killed, nobody stops this server: the end of its input does."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    if os.environ.get("COGLOOM_ENDS_WITH_INPUT"):
        threading.Thread(target=end_with_our_parent, daemon=True).start()
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(folder))
    sys.argv = [str(folder / "main.py"), *sys.argv[2:]]
    put_stand_ins()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
