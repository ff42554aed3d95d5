"""Choose, list and download bases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .engine.checkpoints import DEMO, FAMILIES, Checkpoint, find_checkpoint, hub_cached, local_folders, open_checkpoint
from .engine.errors import CogLoomError, DownloadFailed, UsageError
from .engine.pipeline import Base
from .host import Host


def choose_base(
    host: Host,
    name: str = DEMO,
    dtype: str = "auto",
    device: str = "auto",
    placement: str = "auto",
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    compile: bool = False,
    quantise: str = "none",
    rank_budget: int = 128,
    attention: str = "auto",
) -> Base:
    """Name a base and how to hold it. Checks that it is there and a CogVideoX; loads nothing.

    Raises:
        ModelNotFound, NotAModel, WrongFamily, UsageError
    """
    checkpoint = find_checkpoint(name, host.model_folders)
    return Base(
        checkpoint.name, str(checkpoint.folder), dtype, device, placement, vae_slicing, vae_tiling, compile, quantise,
        rank_budget, attention,
    )  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """One line of the list of bases. `state` is "here", "not downloaded", or why it cannot be used."""

    name: str
    title: str
    task: str
    state: str
    folder: str
    checkpoint: Checkpoint | None


def list_bases(host: Host) -> list[Listed]:
    """What is on this machine, then what of the family could be downloaded."""
    listed, seen = [], set()
    for folder in local_folders(host.model_folders):
        try:
            found = open_checkpoint(folder)
            family = found.family
            listed.append(Listed(found.name, family.title, family.task, "here", str(folder), found))
            seen.add(family.hub_id)
        except CogLoomError as error:
            listed.append(Listed(folder.name, "", "", str(error), str(folder), None))
    for family in FAMILIES:
        if family.hub_id and family.hub_id not in seen and family.loadable is None:
            cached = hub_cached(family.hub_id)
            state = "here" if cached else "not downloaded"
            listed.append(Listed(family.hub_id, family.title, family.task, state, str(cached or ""), None))
    return listed


def download(host: Host, hub_id: str) -> Path:
    """Fetch a base from Hugging Face into the first models folder, with progress. Only ever on request.

    Raises:
        UsageError, DownloadFailed, WrongFamily
    """
    parts = hub_id.split("/")
    if len(parts) != 2 or not all(parts) or any(p in (".", "..") for p in parts):
        raise UsageError(f"{hub_id!r} is not a Hugging Face id such as zai-org/CogVideoX-2b.")
    if not host.model_folders:
        raise UsageError("There is no models folder to download into.")
    folder = host.model_folders[0] / parts[1]
    from huggingface_hub import snapshot_download

    host.progress(0, 1, f"downloading {hub_id}")
    try:
        snapshot_download(
            hub_id,
            local_dir=folder,
            # Neither pickles nor samples: configs, tokenizer and safetensors are all a base is.
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
        )
    except Exception as error:  # the hub's own errors are many and change; each ends as one of ours with its first line
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadFailed(
            f"{hub_id} could not be downloaded ({type(error).__name__}: {line[:200]}). Check the network and the name; "
            f"what has arrived stays in {folder}, and the same command goes on from there. Or copy a diffusers folder "
            f"there by hand."
        ) from error
    host.progress(1, 1, f"downloaded {hub_id}")
    open_checkpoint(folder)
    return folder
