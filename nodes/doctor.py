"""Is everything here that rendering needs, and if not, what is there to do?"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .engine import VERSION
from .engine.errors import CogLoomError
from .host import Host
from .lora import describe_adapters
from .model import list_bases

# The oldest versions that the engine's calls exist in.
PACKAGES = {
    "torch": "2.4",
    "diffusers": "0.36",
    "transformers": "4.49",
    "safetensors": "0.4.3",
    "peft": "0.14",
    "accelerate": "1.0",
    "imageio-ffmpeg": "0.5",
    "pillow": "10.1",
}


@dataclass(frozen=True)
class Finding:
    """One line: `state` is "ok", "warn" (works, but) or "fail" (will not work); `remedy` says what to do."""

    topic: str
    state: str
    text: str
    remedy: str = ""


def examine(host: Host) -> list[Finding]:
    """Look at everything; nothing is changed and no network is asked."""
    return [
        Finding(
            "CogLoom",
            "ok",
            f"{VERSION} on Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ),
        *_packages(),
        *_guarded("device", _devices),
        *_guarded("FFmpeg", _ffmpeg),
        *_folders(host),
        *_guarded("bases", lambda: _bases(host)),
        *_guarded("adapters", lambda: _adapters(host)),
    ]


def _guarded(topic: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """A missing library must not keep the doctor from the other findings."""
    try:
        return look()
    except (ImportError, OSError, RuntimeError, CogLoomError) as error:
        return [Finding(topic, "fail", f"{type(error).__name__}: {error}", "Install with -r requirements.txt again.")]


def _packages() -> list[Finding]:
    found = []
    for name, least in PACKAGES.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(Finding(name, "fail", "not installed", f"pip install '{name}>={least}'"))
            continue
        old = _numbers(have) < _numbers(least)
        found.append(
            Finding(name, "fail" if old else "ok", have, f"pip install '{name}>={least}'" if old else "")
        )  # fmt: skip
    return found


def _numbers(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def _devices() -> list[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    gib = 1 / (1 << 30)
    found = [
        Finding(
            "memory",
            "ok" if memory.available * gib > 2 else "warn",
            f"{memory.available * gib:.1f} of {memory.total * gib:.1f} GiB free",
            "" if memory.available * gib > 2 else "The demo fits; a real base needs 6 GiB and more.",
        )
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            dtypes = "fp32, fp16" + (", bf16" if torch.cuda.is_bf16_supported() else "")
            found.append(
                Finding(
                    "cuda",
                    "ok",
                    f"{torch.cuda.get_device_name(index)}, {free * gib:.1f} of {total * gib:.1f} GiB free, {dtypes}",
                )
            )
    elif torch.backends.mps.is_available():
        found.append(Finding("mps", "ok", "Apple GPU; fp32, fp16, bf16"))
    else:
        flags = torch.backends.cpu.get_cpu_capability()
        found.append(
            Finding(
                "device",
                "warn",
                f"cpu alone, {os.cpu_count()} cores, {flags}; fp32, bf16; fp16 is slow",
                "The demo renders in seconds; real bases take hours here. They want an NVIDIA card of 8 GB or more.",
            )
        )
    return found


def _ffmpeg() -> list[Finding]:
    import subprocess

    import imageio_ffmpeg

    exe = imageio_ffmpeg.get_ffmpeg_exe()
    encoders = subprocess.run([exe, "-hide_banner", "-encoders"], capture_output=True, text=True, check=True).stdout
    missing = [name for name in ("libx264", "libvpx-vp9", "ffv1", "gif") if name not in encoders]
    if missing:
        return [
            Finding("FFmpeg", "fail", f"lacks {', '.join(missing)}", "pip install --force-reinstall imageio-ffmpeg")
        ]
    return [Finding("FFmpeg", "ok", f"{imageio_ffmpeg.get_ffmpeg_version()}: mp4, webm, gif, lossless mkv")]


def _folders(host: Host) -> list[Finding]:
    found = []
    for topic, folder in (("output", host.output_folder), ("cache", host.cache_folder)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            free = shutil.disk_usage(folder).free / (1 << 30)
            state = "ok" if free > 1 else "warn"
            found.append(
                Finding(topic, state, f"{folder}, {free:.1f} GiB free", "" if free > 1 else "Free some space.")
            )
        except OSError as error:
            variable = f"COGLOOM_{topic.upper()}"
            found.append(
                Finding(topic, "fail", f"{folder}: {error.strerror}", f"Set {variable} to a folder you can write.")
            )
    return found


def _bases(host: Host) -> list[Finding]:
    found = []
    for base in list_bases(host):
        if base.state == "here":
            found.append(Finding("base", "ok", f"{base.name} ({base.title})"))
        elif base.state != "not downloaded":
            found.append(Finding("base", "warn", f"{base.name}: {base.state}"))
    if not any(f.state == "ok" for f in found):
        remedy = "The folder demo/ is not whole; get the project again."
        found.append(Finding("base", "fail", "none, not even the embedded demo", remedy))
    where = ", ".join(str(f) for f in host.model_folders)
    return [*found, Finding("models folders", "ok", f"{where} (COGLOOM_MODELS names others)")]


def _adapters(host: Host) -> list[Finding]:
    found, rows = [], describe_adapters(host)
    for path, about, error in rows:
        if about is None:
            found.append(Finding("adapter", "warn", str(error)))
        elif not about["alpha_known"]:
            text = f"{path.name}: scale {about['scale']}, alpha unknown"
            found.append(Finding("adapter", "warn", text, " ".join(about["hints"])))
    where = ", ".join(str(Path(f)) for f in host.lora_folders)
    readable = sum(1 for row in rows if row.about)
    return [Finding("adapters", "ok", f"{readable} readable; searched demo/loras, {where}"), *found]
