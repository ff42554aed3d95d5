"""How others change adapters, each at its documented best, on the same transformer class, weights and files.

`Peft` and `Hotswap` call diffusers itself. `reload` and `Patched` do what well-known ComfyUI code does, written anew
without ComfyUI around it. `Floor` is what the fused swap cannot do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.material import load
from nodes.engine.lora_file import Adapter

Weighted = Sequence[tuple[Adapter, float]]


def _load_adapter(transformer: Any, file: Path, name: str, **options: Any) -> None:
    transformer.load_lora_adapter(
        str(file.parent),
        prefix="transformer",
        weight_name=file.name,
        adapter_name=name,
        local_files_only=True,
        **options,
    )


class Peft:
    """diffusers' LoRA methods over PEFT: an adapter is a pair of modules in every layer, switched on by name."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.held: list[str] = []

    def load(self, files: Iterable[Path]) -> list[str]:
        names = [
            f"slot{number}x" for number, _ in enumerate(files)
        ]  # none a part of another: PEFT looks for substrings
        for name, file in zip(names, files, strict=True):
            _load_adapter(self.transformer, file, name)
        self.held = names
        return names

    def replace(self, files: Sequence[Path], weights: Sequence[float]) -> None:
        """Delete what is there, load, set: how an adapter's memory is given back before the next one takes it."""
        self.transformer.delete_adapters(self.held)
        self.set(self.load(files), weights)

    def set(self, names: Sequence[str], weights: Sequence[float]) -> None:
        self.transformer.set_adapters(list(names), list(weights))

    def fuse(self, names: Sequence[str]) -> None:
        self.transformer.fuse_lora(adapter_names=list(names))

    def unfuse(self) -> None:
        self.transformer.unfuse_lora()


class Hotswap:
    """diffusers' hotswap: a new adapter's numbers are copied into the place of the one before, padded to one rank."""

    NAME = "hot"

    def __init__(self, transformer: Any, first: Path, rank: int) -> None:
        self.transformer = transformer
        transformer.enable_lora_hotswap(target_rank=rank)
        _load_adapter(transformer, first, self.NAME)

    def replace(self, file: Path) -> None:
        _load_adapter(self.transformer, file, self.NAME, hotswap=True)


def reload(folder: Path, file: Path, device: torch.device) -> Any:
    """A loader that takes the LoRA as its input: another adapter is another model, read and fused again."""
    transformer = load(folder, device)
    peft = Peft(transformer)
    peft.fuse(peft.load([file]))
    return transformer


class Patched:
    """Weights patched in place with a backup of each, as ComfyUI does: one adapter after another in float32, one
    rounding to the base's type at the end, and the backup copied back to take them off."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self._backup: dict[str, torch.Tensor] = {}

    def patch(self, stack: Weighted) -> None:
        parts: dict[str, list[tuple[Any, float]]] = {}
        for adapter, weight in stack:
            for module in adapter.modules:
                parts.setdefault(module.path, []).append((module, weight))
        with torch.no_grad():
            for path, layer in parts.items():
                weight = self._weight(path)
                self._backup[path] = weight.clone()
                sum_ = weight.float()
                for module, strength in layer:
                    up, down = (t.to(weight.device).float() for t in (module.B, module.A))
                    sum_ += strength * module.scale * (up @ down)
                weight.copy_(sum_)

    def restore(self) -> None:
        with torch.no_grad():
            for path, backup in self._backup.items():
                self._weight(path).copy_(backup)
        self._backup.clear()

    def _weight(self, path: str) -> torch.Tensor:
        return self.transformer.get_submodule(path).weight


class Floor:
    """Per layer one copy of the weight from memory and one product of the factors, already concatenated and in bf16.
    No swap that computes W + BA can be faster; this one computes nothing useful."""

    def __init__(self, transformer: Any, stack: Weighted) -> None:
        self._layers = []
        for modules in zip(*(adapter.modules for adapter, _ in stack), strict=True):
            weight = transformer.get_submodule(modules[0].path).weight.data
            up = torch.cat([m.B for m in modules], dim=1).to(weight.device)
            down = torch.cat([m.A for m in modules]).to(weight.device)
            # The copy comes from the host, where a checkpoint's page cache is too.
            self._layers.append((weight, weight.cpu().clone(), up, down))
        self._product = torch.empty_like(self._layers[0][0])

    def run(self) -> None:
        with torch.no_grad():
            for weight, pristine, up, down in self._layers:
                weight.copy_(pristine)
                torch.mm(up, down, out=self._product)
