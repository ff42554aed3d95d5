"""The first steps that several arms go through alike, computed once.

Two stacks of which one enters late predict the same until it does. What is kept is the transformer's output, under all
that it depends on: what it holds, read back from the switch, and its inputs, by hash. So nothing is assumed about arms,
prompts or schedulers, everything around the transformer runs as ever, and a clip has the bits that it has alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .pipeline import Resident

LIMIT = 1 << 30  # bytes of outputs that are kept: 100 steps of 49 frames of 720×480 in 16 bit take 0.9 GB


class Trunk:
    """Outputs of one base's transformer; those used longest ago go when there are more than `limit` bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.computed = self.shared = 0  # steps
        self._known: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def over(self, resident: Resident, keep: int) -> Any:
        """What a pipeline takes for the transformer: it asks here first. Outputs of the first `keep` steps are kept."""
        return _Asked(self, resident, keep)

    def forget(self) -> None:
        self._known.clear()
        self._bytes = 0

    def get(self, key: Hashable) -> torch.Tensor | None:
        if key in self._known:
            self._known.move_to_end(key)
            self.shared += 1
            return self._known[key]
        self.computed += 1
        return None

    def put(self, key: Hashable, output: torch.Tensor) -> None:
        kept = output.detach().to("cpu", copy=True)
        self._known[key] = kept
        self._bytes += kept.nbytes
        while self._bytes > self.limit:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= oldest.nbytes


class _Asked:
    """Stands in for the transformer in one render. Anything but the call is the transformer's own."""

    def __init__(self, trunk: Trunk, resident: Resident, keep: int) -> None:
        self._trunk, self._resident, self._keep = trunk, resident, keep
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resident.transformer, name)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """One forward: (output,), as pipelines ask for it."""
        transformer, step = self._resident.transformer, self._step
        self._step += 1
        # A step cache (diffusers' hooks) makes a forward depend on those before it.
        if step >= self._keep or transformer.is_cache_enabled or args or inputs.get("return_dict", True):
            self._trunk.computed += 1
            return transformer(*args, **inputs)
        key = (self._resident.base, self._resident.switch.state, _digest(inputs))
        known = self._trunk.get(key)
        if known is not None:
            return (known.to(self._resident.device),)
        output = transformer(**inputs)
        self._trunk.put(key, output[0])
        return output


def _digest(inputs: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (tuple, list)):
            digest.update(f"{len(value)}(".encode())
            for part in value:
                add(part)
        elif isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(f"{name}:".encode())
                add(value[name])
        else:
            digest.update(repr(value).encode())

    add(inputs)
    return digest.hexdigest()
