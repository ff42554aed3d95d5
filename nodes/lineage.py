"""Where an adapter comes from, proved against the files that are here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from .engine import lora_file
from .engine.checkpoints import (
    Checkpoint,
    find_checkpoint,
    local_folders,
    open_checkpoint,
    tensors_of,
    transformer_hash,
    transformer_weights,
    with_file,
)
from .engine.errors import CogLoomError
from .engine.lineage import Found, Lineage, held, proved, recorded
from .engine.lora_file import adapter_name
from .engine.safetensors_file import opened
from .host import Host
from .lora import adapter_hash, find_adapter, list_adapters

__all__ = ["Lineage", "lineage", "unlike"]

_HASHED = 2 << 30  # bytes of files that are hashed for a claim that tells neither name nor size of one that is here


def lineage(host: Host, adapter: Path | str, base: str | None = None, anywhere: bool = False) -> Lineage:
    """The tree of an adapter (a file, or a name as `loras` lists it), every claim of it compared with what lies in the
    adapters' and the models' folders: SHA-256 of an adapter's file, the hash of a base's transformer. Hashes are kept
    between calls for as long as size and mtime of a file stay. `base` is one more to compare with.

    Raises:
        AdapterNotFound, AdapterUnreadable, ModelError: `base` cannot be found.
    """
    path = adapter if isinstance(adapter, Path) else find_adapter(host, adapter, anywhere)
    outline = lora_file.outline(path)
    tree = recorded(adapter_name(path), outline.metadata, adapter_hash(host, path))
    return proved(tree, _Search(host, base).find)


def unlike(host: Host, adapter: Path | str, base: str, anywhere: bool = False) -> str | None:
    """A sentence where an adapter was made for other weights than a base has, else None. No adapter is hashed.

    Raises:
        AdapterNotFound, AdapterUnreadable, ModelError
    """
    path = adapter if isinstance(adapter, Path) else find_adapter(host, adapter, anywhere)
    checkpoint = find_checkpoint(base, host.model_folders)
    outline = lora_file.outline(path)
    return held(recorded(adapter_name(path), outline.metadata), checkpoint.name, transformer_hash(checkpoint))[1]


class _Search:
    """For files that are what a claim says; each is looked at once."""

    def __init__(self, host: Host, base: str | None) -> None:
        self.host = host
        self.adapters = list_adapters(host)
        self.bases: list[Checkpoint] | None = None
        self.also = [] if base is None else [find_checkpoint(base, host.model_folders)]

    def find(self, claim: Lineage) -> Found:
        return self._adapter(claim) if claim.role == "adapter" else self._base(claim)

    def _adapter(self, claim: Lineage) -> Found:
        asked = claim.name.casefold()
        named = [path for path in self.adapters if asked in (adapter_name(path).casefold(), path.name.casefold())]
        others = [path for path in self.adapters if path not in named]
        sizes = {path: lora_file.stamp(path)[0] for path in others}
        if claim.nbytes:
            others = [path for path in others if sizes[path] == claim.nbytes]
        elif sum(sizes.values()) > _HASHED:
            others = []
        for path in (*named, *others):
            try:
                if adapter_hash(self.host, path) == claim.sha256:
                    with opened(path) as source:
                        return Found("verified", source.metadata)
            except CogLoomError:  # broken, or gone meanwhile: not what is looked for
                continue
        return Found("differs" if named else "not here")

    def _base(self, claim: Lineage) -> Found:
        named = False
        for checkpoint in self._bases(claim.name):
            named = named or checkpoint.name.casefold() == claim.name.casefold()
            try:
                if transformer_hash(checkpoint) == claim.sha256:
                    # A base that the workshop wrote tells what is inside it.
                    return Found("verified", _metadata(checkpoint))
            except (CogLoomError, OSError):
                continue
        return Found("differs" if named else "not here")

    def _bases(self, name: str) -> Iterable[Checkpoint]:
        yield from self.also
        if self.bases is None:
            self.bases = []
            for folder in local_folders(self.host.model_folders):
                try:
                    self.bases.append(open_checkpoint(folder))
                except CogLoomError:
                    continue
        yield from self.bases
        with contextlib.suppress(CogLoomError):
            yield find_checkpoint(name, self.host.model_folders)  # also one that the Hub's cache has
        for folder in self.host.transformer_folders:
            file = folder / Path(name.replace("\\", "/")).name
            if not file.is_file():
                continue
            for lender in self.bases:  # the hash is of the file and of the config that goes with it
                try:
                    yield with_file(lender, file)
                except CogLoomError:
                    continue


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    try:
        file = transformer_weights(checkpoint).files[0]
        tensors_of(file)
        with opened(file) as source:
            return {key: text for key, text in source.metadata.items() if key == "cogloom"}
    except (CogLoomError, OSError):
        return {}
