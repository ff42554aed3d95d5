"""What a training will take, before it starts: memory by part, arithmetic, and time.

    estimate(config, settings, …) -> TrainEstimate      a few seconds, whatever the base's size

Nothing here is a rule of thumb. The trainer's own loss and its backward run with the base's true config on tensors that
have shapes and no memory (PyTorch's fake tensors); every allocation, every release and every product of matrices on the
way is counted. The blocks are alike, so a transformer with two of them and one with three say what the rest adds.

What is not seen: what a kernel takes for itself and gives back, and what an allocator loses between blocks. Measured on
the CPU against the profiler's peak, the sum was within a few per cent (tests/engine/test_train_plan.py).
"""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import NotEnoughMemory
from .finetune import ADAPTER, Batch, Settings, batch_loss, target_modules
from .train_buckets import Bucket, parse
from .train_quant import BLOCKS, Packed, moment_bytes, packed_bytes

GIB = 1 << 30
PROBE = 0.2  # seconds of matrix products that measure a device's speed
SHORT = 17  # frames of a clip whose encoding is traced: the autoencoder goes over longer ones in the same pieces


@dataclass(frozen=True)
class TrainEstimate:
    """Bytes on the device that trains. `memory` while it trains, `encoding` before it, while latents and text states
    are made that are not in the cache: one after the other, so the largest counts."""

    base: str
    device: str
    what: str  # what is trained on, in words
    memory: tuple[tuple[str, int], ...]
    encoding: tuple[tuple[str, int], ...]
    available: int | None  # bytes that are free there now, where that is known
    flops: float  # of one optimiser step, on one device
    steps: int
    speed: float | None  # flops a second that the device was measured to do, of matrix products alone
    advice: tuple[tuple[str, int], ...] = ()  # what to change, and the sum that this would make

    @property
    def total(self) -> int:
        return sum(size for _, size in self.memory)

    @property
    def peak(self) -> int:
        return max(self.total, *(size for _, size in self.encoding), 0)

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available

    @property
    def seconds_per_step(self) -> float | None:
        """At the measured speed: a bound from below, for a training is not matrix products alone."""
        return None if not self.speed else self.flops / self.speed

    def sentence(self) -> str:
        free = "" if self.available is None else f" ({_gib(self.available)} are free)"
        parts = ", ".join(f"{_gib(size)} {part}" for part, size in self.memory if size)
        said = f"Training {self.base} on {self.what} takes about {_gib(self.total)} on {self.device}{free}: {parts}."
        encoding = [f"{_gib(size)} for {what}" for what, size in self.encoding if size]
        if encoding:
            said += f" Encoding the dataset before takes {' and '.join(encoding)}."
        seconds = self.seconds_per_step
        if seconds is not None and self.speed:
            said += (
                f" A step is {_si(self.flops)}FLOP: at least {_duration(seconds)} at the {_si(self.speed)}FLOP/s that "
                f"this device was just measured to multiply matrices at, and {_duration(seconds * self.steps)} for "
                f"{self.steps} steps."
            )
        else:
            said += f" A step is {_si(self.flops)}FLOP."
        return said

    def check(self) -> None:
        """Raises NotEnoughMemory, with the numbers and what to change, when it cannot fit."""
        if self.fits:
            return
        ways = ", ".join(f"{what} ({_gib(size)})" for what, size in self.advice)
        if self.total <= (self.available or 0):
            ways = "free memory, or encode on a machine with more of it; the cache can be carried over"
        raise NotEnoughMemory(
            f"{self.sentence()} That does not fit. Change: {ways or 'a smaller base, or a device with more memory'}; "
            "or go on anyway (--anyway)."
        )

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"total": self.total, "fits": self.fits, "seconds_per_step": self.seconds_per_step}
        return found | {part: dict(getattr(self, part)) for part in ("memory", "encoding", "advice")}


def estimate(
    config: Mapping[str, Any],
    settings: Settings,
    *,
    base: str,
    task: str,
    dtype: torch.dtype,
    vae: Mapping[str, Any],
    device: str = "cpu",
    available: int | None = None,
    text_bytes: int = 0,
    vae_bytes: int = 0,
    processes: int = 1,
    measure: bool = False,
) -> TrainEstimate:
    """Of a training with `settings` on a transformer and an autoencoder of these configs.

    `dtype` is what the base is loaded in; `text_bytes` and `vae_bytes` are what its text encoder and its autoencoder
    hold. `measure` multiplies matrices for a moment to learn the device's speed. With several `processes` each has
    its share of a batch.

    Raises:
        UsageError: target modules that the transformer does not have.
    """
    waiting = (("the autoencoder", vae_bytes),) if device == "cpu" else ()  # elsewhere it waits beside the device

    def cost_of(settings: Settings) -> _Cost:
        found = _cost(config, vae, settings, base, task, dtype, device, processes)
        return replace(found, memory=(*found.memory, *waiting))

    cost = cost_of(settings)
    # On the CPU the transformer lies there as well while the others encode, and is packed only after that.
    beside = cost_of(replace(settings, quantise="none")).memory[0][1] if device == "cpu" else 0
    encoding = _encoding(vae, settings, dtype, text_bytes, vae_bytes, beside)
    found = TrainEstimate(
        base, device, _what(settings, task, dtype), cost.memory, encoding, available, cost.flops, settings.steps,
        _speed(device, dtype, settings.mixed_precision) if measure else None,
    )  # fmt: skip
    if found.total <= (available if available is not None else found.total):
        return found
    advice = []
    for change, saying in _changes(settings):
        size = sum(n for _, n in cost_of(change).memory)
        if size < found.total:
            advice.append((saying, size))
        if available is not None and size <= available:
            break  # the ways are ordered by what they cost; one that is enough ends the list
    return replace(found, advice=tuple(advice))


def _changes(settings: Settings) -> list[tuple[Settings, str]]:
    """Ways to need less, each with all before it, the cheapest first."""
    ways: list[tuple[dict[str, Any], str]] = []
    if not settings.gradient_checkpointing:
        ways.append(({"gradient_checkpointing": True}, "gradient checkpointing"))
    if settings.batch_size > 1:
        more = settings.gradient_accumulation * settings.batch_size
        ways.append(({"batch_size": 1, "gradient_accumulation": more}, f"batches of 1, accumulated over {more}"))
    if settings.quantise != "nf4":
        ways.append(({"quantise": "nf4"}, "the base in 4 bits (--qlora nf4)"))
    if settings.frames > 17:
        ways.append(({"frames": 17, "buckets": ()}, "clips of 17 frames"))
    found: list[tuple[Settings, str]] = []
    for change, saying in ways:
        settings = replace(settings, **change)
        found.append((settings, f"{'and ' if found else ''}{saying}"))
    return found


def _what(settings: Settings, task: str, dtype: torch.dtype) -> str:
    frames, height, width = largest(settings)
    size = (
        f"{'clips' if frames > 1 else 'stills'} of {frames} frames at {width}x{height}, {settings.batch_size} at once"
    )
    held = str(dtype).removeprefix("torch.") if settings.quantise == "none" else settings.quantise
    checkpointing = ", with gradient checkpointing" if settings.gradient_checkpointing else ""
    return f"{size}, rank {settings.rank}, the base in {held}, {settings.optimiser}{checkpointing} ({task})"


def largest(settings: Settings) -> tuple[int, int, int]:
    """(frames, height, width) of the bucket that takes the most memory; those that auto finds are no larger."""
    main = Bucket(settings.frames, settings.height, settings.width)
    found = max([main, *parse(settings.buckets, settings.frames)], key=lambda bucket: bucket.volume)
    return found.frames, found.height, found.width


# --- the transformer ---


@dataclass(frozen=True)
class _Cost:
    memory: tuple[tuple[str, int], ...]
    flops: float


def _cost(
    config: Mapping[str, Any],
    vae: Mapping[str, Any],
    settings: Settings,
    base: str,
    task: str,
    dtype: torch.dtype,
    device: str,
    processes: int,
) -> _Cost:
    frames, height, width = largest(settings)
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    shape = ((frames - 1) // vae["temporal_compression_ratio"] + 1, vae["latent_channels"])
    rows = -(-settings.batch_size // processes) if settings.batch_size % processes == 0 else settings.batch_size
    blocks = config["num_layers"]
    runs = [
        _trace(
            json.dumps({**config, "num_layers": layers}, sort_keys=True), settings, base, task, dtype,
            device != "cpu", (rows, *shape, height // spatial, width // spatial),
        )
        for layers in sorted({min(2, blocks), min(3, blocks)})
    ]  # fmt: skip

    def whole(values: list[float]) -> int:
        if len(values) == 1:
            return round(values[0])
        return round(values[0] + (blocks - 2) * (values[1] - values[0]))

    adapter = whole([run.adapter for run in runs])
    micro = settings.gradient_accumulation if rows < settings.batch_size or processes == 1 else (
        -(-settings.gradient_accumulation // processes)
    )  # fmt: skip
    return _Cost(
        (
            ("the base", whole([run.weights for run in runs])),
            ("the adapter", adapter),
            ("its gradients", adapter),
            ("the optimiser", whole([run.moments for run in runs])),
            ("activations", whole([run.work for run in runs])),
        ),
        micro * float(whole([run.flops for run in runs])),
    )


@dataclass(frozen=True)
class _Run:
    weights: int  # bytes, frozen ones and buffers
    adapter: int
    moments: int
    work: int  # bytes at the peak of a forward and its backward, besides all of these and the gradients
    flops: float


@lru_cache(maxsize=32)
def _trace(
    config: str, settings: Settings, base: str, task: str, dtype: torch.dtype, gpu: bool, shape: tuple[int, ...]
) -> _Run:
    """One forward and backward of the trainer's loss on latents of `shape` (B, F, C, h, w), without any numbers."""
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = json.loads(config)
    with torch.inference_mode(False), torch.enable_grad():
        with torch.device("meta"):
            model: Any = CogVideoXTransformer3DModel.from_config(given)
        model.requires_grad_(False).eval()
        targets = target_modules(model, base, settings)
        alpha: Any = settings.alpha
        model.add_adapter(LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(targets)), ADAPTER)
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        with FakeTensorMode():
            sizes = _materialise(model, settings, dtype)
            amp = settings.mixed_precision != "no"
            for module in model.modules():
                if amp and gpu and type(module) is torch.nn.LayerNorm:
                    module.__class__ = _Wide
            batch, frames = shape[0], shape[1] + -shape[1] % (model.config.patch_size_t or 1)
            shape = (batch, frames, *shape[2:])
            watch = _Watch()
            with watch:
                signal = torch.empty(1000)
                drawn = Batch(
                    torch.empty(shape),
                    torch.empty(shape) if task == "i2v" else None,
                    torch.empty(batch, model.config.max_text_seq_length, model.config.text_embed_dim, dtype=dtype),
                    torch.empty(shape),
                    torch.zeros(batch, dtype=torch.long),
                )
                kind = torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16
                with torch.autocast("cpu", kind, enabled=amp):
                    loss = batch_loss(model, model.config, signal, dtype, drawn).mean()
                loss.backward()
    return _Run(*sizes, work=watch.peak, flops=watch.flops)


def _materialise(model: Any, settings: Settings, dtype: torch.dtype) -> tuple[int, int, int]:
    """Give a meta model parameters without numbers, in their types, with gradients; bytes of weights, of the adapter
    and of its moments."""
    weights = adapter = moments = 0
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            trained = ".lora_A" in name or ".lora_B" in name
            new = torch.nn.Parameter(
                torch.empty(parameter.shape, dtype=torch.float32 if trained else dtype), requires_grad=trained
            )
            size = new.numel() * new.element_size()
            if trained:
                new.grad = torch.empty_like(new)
                adapter += size
                moments += moment_bytes(settings.optimiser, new.numel())
            elif settings.quantise != "none" and leaf == "weight" and _packable(module, name):
                module.__class__ = _Hollow
                module.kept, module.kind = dtype, settings.quantise
                rows, columns = parameter.shape
                size = packed_bytes(settings.quantise, rows, columns, new.element_size())
                new = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
            weights += 0 if trained else size
            module._parameters[leaf] = new
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)
                weights += buffer.numel() * buffer.element_size()
    return weights, adapter, moments


def _packable(module: Any, name: str) -> bool:
    return type(module) is torch.nn.Linear and name.startswith(BLOCKS)


class _Hollow(Packed):
    """A packed linear whose weight is bytes without a meaning."""

    kept: torch.dtype
    kind: str

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        shape = self.out_features, self.in_features
        if self.kind == "nf4":  # one kernel, straight to the type
            return torch.empty(shape, dtype=self.kept).to(dtype)
        if self.kind == "int4":  # to float32, where it is scaled in place
            return torch.empty(shape, dtype=torch.uint8).to(torch.float32).to(dtype)
        return (torch.empty(shape) * 1.0).to(self.kept).to(dtype)  # to float32, times the scale of the row


class _Watch(TorchDispatchMode):
    """Counts bytes that are alive and floating point operations; what was alive before is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0.0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        self.flops += _flops(func, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in before | self._alive:
                self._came(tensor.untyped_storage())
        return out

    def _came(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._went, key, size)

    def _went(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """As PyTorch's own counter has it, and the CPU's attention, which that does not know."""
    from torch.utils.flop_counter import flop_registry

    name = func.overloadpacket
    if name in flop_registry:
        return float(flop_registry[name](*args, **kwargs, out_val=out))
    aten = torch.ops.aten
    at = {
        aten._scaled_dot_product_flash_attention_for_cpu: 0,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
    }
    if name not in at:
        return 0.0
    q, k, v = args[at[name] : at[name] + 3]
    products = (
        5 if at[name] else 2
    )  # q kᵀ and p v; backward computes q kᵀ anew, and a product for each of four gradients
    return 2.0 * products * math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3]) / 2


class _Wide(torch.nn.LayerNorm):
    """Autocast on CUDA computes norms in float32 and keeps their input in it; on the CPU it does not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return torch.nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


# --- the encoders, and the device's speed ---


def _encoding(
    vae: Mapping[str, Any], settings: Settings, dtype: torch.dtype, text_bytes: int, vae_bytes: int, beside: int
) -> tuple[tuple[str, int], ...]:
    """`beside` are bytes that lie on the device all the while."""
    frames, height, width = largest(settings)
    work = _trace_encoder(json.dumps(dict(vae), sort_keys=True), dtype, min(frames, SHORT), height, width)
    clip = frames * height * width * 3 * (4 + 4 + dtype.itemsize)  # as decoded, cropped and cast
    return (("the autoencoder", beside + vae_bytes + work + clip), ("the text encoder", beside + text_bytes))


@lru_cache(maxsize=8)
def _trace_encoder(config: str, dtype: torch.dtype, frames: int, height: int, width: int) -> int:
    """Bytes at the peak of encoding a clip, besides the autoencoder's weights."""
    from diffusers import AutoencoderKLCogVideoX
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            vae: Any = AutoencoderKLCogVideoX.from_config(json.loads(config))
        vae.eval()
        with FakeTensorMode():
            for module in vae.modules():
                for leaf, value in list(module._parameters.items()):
                    if value is not None:
                        module._parameters[leaf] = torch.nn.Parameter(
                            torch.empty(value.shape, dtype=dtype), requires_grad=False
                        )
            clip = torch.empty(1, 3, frames, height, width, dtype=dtype)
            watch = _Watch()
            with watch:
                vae.encode(clip).latent_dist.mode()
    return watch.peak


@lru_cache(maxsize=8)
def _speed(device: str, dtype: torch.dtype, precision: str) -> float:
    """Flops a second of a product of matrices of a transformer's size, in the type that training computes in."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, dtype)
    side = 4096 if device == "cuda" else 1024
    a, b = (torch.ones(side, side, dtype=kind, device=device) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(2):  # the first ones choose a kernel
        torch.mm(a, b)
    wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE:
        torch.mm(a, b)
        wait()
        done += 1
    return done * 2 * side**3 / (time.perf_counter() - started)


# --- words ---


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def _si(value: float) -> str:
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value / 1e6:.3g} M"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
