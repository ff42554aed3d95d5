"""Prompt encodings on disk, so that a repeated prompt never loads the text encoder (9.5 GB in the real family)."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch

from .errors import CogLoomError
from .files import write_atomic

log = logging.getLogger("cogloom")
LIMIT = 1 << 30  # bytes; a real prompt takes 1.8 MB


class PromptCache:
    """One text encoder's encodings at one length and dtype: text -> (1, L, D). `folder` None keeps nothing."""

    def __init__(self, folder: Path | None, encoder: str, *settings: str) -> None:
        self._folder = folder / "prompts" if folder is not None else None
        self._key = "\0".join((encoder, *settings))

    def _file(self, text: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{self._key}\0{text}".encode()).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def get(self, text: str) -> torch.Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self._file(text)
        if file is None or not file.is_file():
            return None
        try:
            states = load(file.read_bytes())["states"]
            os.utime(file)
        except (SafetensorError, OSError, KeyError) as error:
            log.warning("the cached prompt %s is broken (%s) and is made again", file.name, error)
            return None
        return states

    def put(self, text: str, states: torch.Tensor) -> None:
        """Written aside and renamed: no reader meets half a file. A full disk costs the cache, not the render."""
        from safetensors.torch import save

        file = self._file(text)
        if file is None:
            return
        try:
            write_atomic(file, save({"states": states.contiguous()}))
            self._prune()
        except (CogLoomError, OSError) as error:
            log.warning("the prompt's encoding could not be kept (%s)", error)

    def _prune(self) -> None:
        assert self._folder is not None
        files = sorted(
            ((f.stat().st_mtime, f.stat().st_size, f) for f in self._folder.glob("*.safetensors")), reverse=True
        )
        total = 0
        for _, size, file in files:
            total += size
            if total > LIMIT:
                file.unlink(missing_ok=True)
