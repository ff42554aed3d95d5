"""The resident bases: load once, keep, lend.

`Base` is a description. `Bases.session(base, adapters)` locks, loads the base only if it is not there, makes its
transformer hold exactly the wanted adapters, and lends it. Every place that needs weights goes through it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoints import (
    DEMO,
    Checkpoint,
    fingerprint,
    open_checkpoint,
    part_bytes,
    part_files,
    transformer_config,
    transformer_hash,
    transformer_weights,
    with_file,
)
from .effect import StackEffect, stack_effect
from .errors import CogLoomError, NotAModel, NotEnoughMemory, PlacementError, UsageError
from .hold import Choice, choose_hold
from .lora_file import Adapter, fit
from .lora_stack import Blocks, Entry, LoraStack, Strength
from .pristine import PristineFiles
from .prompts import PromptCache
from .switch import Swap, Switch

log = logging.getLogger("cogloom")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("auto", "cuda", "mps", "cpu")
PLACEMENTS = ("auto", "resident", "model", "group", "sequential")
QUANTISED = ("none", "int8", "fp8")
ATTENTION = ("auto", "flash", "efficient", "cudnn", "math")  # which of PyTorch's kernels; diffusers' own switch is deaf
SMALL = 512 << 20  # bytes; a text encoder up to this size stays loaded


@dataclass(frozen=True)
class Base:
    """Which base and how to hold it. Equal descriptions mean the same resident base."""

    name: str = DEMO
    folder: str = ""
    dtype: str = "auto"  # auto, fp32, bf16, fp16
    device: str = "auto"  # auto, cuda, mps, cpu
    placement: str = "auto"  # auto, resident, model, group, sequential
    vae_slicing: bool = False
    vae_tiling: bool = False
    compile: bool = False
    quantise: str = "none"  # none, int8 (torchao, weights only), fp8 (cast for storage, computed in `dtype`)
    rank_budget: int = 128  # ranks of a stack held at run time that are compiled in beforehand
    attention: str = "auto"  # a kernel of scaled_dot_product_attention, or what PyTorch thinks best
    file: str = ""  # of a transformer, which stands in for that of `folder`; see `checkpoints.with_file`
    stamp: tuple[int, ...] = ()  # of that file, its size and mtime: an overwritten one is another base

    def __post_init__(self) -> None:
        for value, legal, what in (
            (self.dtype, ("auto", *DTYPES), "dtype"),
            (self.device, DEVICES, "device"),
            (self.placement, PLACEMENTS, "placement"),
            (self.quantise, QUANTISED, "quantise"),
            (self.attention, ATTENTION, "attention"),
        ):
            if value not in legal:
                raise UsageError(f"{what} {value!r} is none of {', '.join(legal)}.")
        if self.quantise == "fp8" and self.compile:
            raise PlacementError(
                "fp8 weights are cast by hooks around every layer, which torch.compile cannot look through. Choose "
                "int8 to compile, or fp8 without compiling."
            )
        if not 0 < self.rank_budget <= 4096:
            raise UsageError(f"the rank budget is {self.rank_budget}; it lies above 0 and up to 4096.")
        if self.quantise != "none" and self.placement in ("group", "sequential"):
            raise PlacementError(
                f"{self.quantise} weights are not moved in parts: placement {self.placement} is for float bases. "
                "Choose placement auto, resident or model, or quantise none."
            )

    def checkpoint(self) -> Checkpoint:
        checkpoint = open_checkpoint(Path(self.folder))
        return with_file(checkpoint, Path(self.file)) if self.file else checkpoint


@dataclass(frozen=True)
class Placement:
    """How a base is held, and why, in a sentence for the user."""

    device: str
    dtype: str
    kind: str  # resident, model, group, sequential
    reason: str


def choose_device(wanted: str) -> str:
    """Raises PlacementError when the device is not on this machine."""
    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return next(name for name, there in have.items() if there)
    if not have[wanted]:
        there = ", ".join(name for name, yes in have.items() if yes)
        raise PlacementError(
            f"This machine's PyTorch {torch.__version__} sees no {wanted} device (it has: {there}). Choose device auto"
            + (", or install a CUDA build of PyTorch." if wanted == "cuda" else ".")
        )
    return wanted


def free_memory(device: str) -> int:
    """Bytes that could be taken on the device now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    available = psutil.virtual_memory().available
    if device == "mps":  # shared with the system
        return min(available, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return available


def plan_placement(
    family_dtype: str, sizes: dict[str, int], work: tuple[int, int], base: Base, device: str, free: int, ram: int
) -> Placement:
    """Pure. `sizes` are the parts' bytes on disk in 16 bit, `work` those that denoising and decoding take besides;
    `free` and `ram` are bytes on the device and of memory.

    Raises:
        NotEnoughMemory, PlacementError
    """
    dtype = base.dtype
    if dtype == "auto":
        dtype = family_dtype if device != "cpu" or family_dtype == "fp32" else "bf16"
    scale = 2 if dtype == "fp32" else 1
    transformer, vae, text = (scale * sizes[k] for k in ("transformer", "vae", "text_encoder"))
    if base.quantise != "none":
        transformer = sizes["transformer"] // 2
    denoising, decoding = work
    gib = 1 / (1 << 30)
    if device == "cpu":
        if base.placement == "model":
            raise PlacementError("Placement model moves a base between memory and a GPU; on the CPU choose auto.")
        need = transformer + vae + max(work)
        if need > ram:
            raise NotEnoughMemory(
                f"The base needs about {need * gib:.1f} GiB in {dtype} ({transformer * gib:.1f} the transformer) and "
                f"{ram * gib:.1f} GiB of memory are free. Close other programs, choose a smaller base"
                + (", or dtype bf16." if dtype == "fp32" else ".")
            )
        kind = "resident" if base.placement == "auto" else base.placement
        return Placement(
            device, dtype, kind, f"{kind} in {dtype} on the CPU: {need * gib:.1f} of {ram * gib:.1f} GiB free"
        )
    need = {
        "resident": transformer + vae + max(work) + (text if text <= SMALL else 0),
        "model": vae + max(transformer + denoising, text, decoding),
        "group": vae + max(transformer // 20 + denoising, decoding),
        "sequential": vae + max(transformer // 60 + denoising, decoding),
    }
    if base.placement == "auto":
        kinds = ("resident", "model") if base.quantise != "none" else tuple(need)
        kind = next((k for k in kinds if need[k] <= 0.92 * free), None)
        if kind is None:
            raise NotEnoughMemory(
                f"Even {kinds[-1]} offload of this base needs about {need[kinds[-1]] * gib:.1f} GiB on {device} and "
                f"{free * gib:.1f} are free. Turn VAE tiling on, choose fewer frames or a smaller size, or device cpu."
            )
        why = f"auto chose {kind}"
    else:
        kind, why = base.placement, f"{base.placement} as asked"
    if kind != "resident" and transformer + vae > ram:
        raise NotEnoughMemory(
            f"Offload {kind} keeps {(transformer + vae) * gib:.1f} GiB in memory and {ram * gib:.1f} GiB are free."
        )
    return Placement(
        device, dtype, kind,
        f"{why} in {dtype}: {need[kind] * gib:.1f} of {free * gib:.1f} GiB free on {device}"
        + (f" (resident would take {need['resident'] * gib:.1f})" if kind != "resident" else ""),
    )  # fmt: skip


class Resident:
    """One base in memory: its transformer with the switch that owns its weights, its autoencoder, how it is placed."""

    def __init__(self, base: Base, checkpoint: Checkpoint, placement: Placement, vae: Any) -> None:
        self.base, self.checkpoint, self.placement = base, checkpoint, placement
        self.vae: Any = vae
        self.device = torch.device(placement.device)
        self.dtype = DTYPES[placement.dtype]
        self.hash = transformer_hash(checkpoint)
        self.transformer = load_transformer(checkpoint, self.dtype)
        self._quantise()
        # Before the placement's hooks, so that it sees every parameter where it was loaded.
        self.switch = Switch(self.transformer, pristine_files(checkpoint, self.dtype), self.dtype, self.device)
        self.shapes = self.switch.shapes()
        self._fitted: weakref.WeakKeyDictionary[Adapter, dict[bool, Adapter | None]] = weakref.WeakKeyDictionary()
        self._place()
        self.switch.seal()

    def _quantise(self) -> None:
        if self.base.quantise == "int8":
            try:
                from torchao.quantization import Int8WeightOnlyConfig, quantize_
            except ImportError as error:
                raise PlacementError("int8 needs torchao: `pip install torchao`; or choose quantise none.") from error

            blocks = "transformer_blocks."  # the few layers outside are small, and the picture hangs on them
            quantize_(
                self.transformer.to(self.device) if self.placement.kind == "resident" else self.transformer,
                Int8WeightOnlyConfig(),
                filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name.startswith(blocks),
            )
        elif self.base.quantise == "fp8":
            self.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)

    def fitted(self, adapter: Adapter, partial: bool) -> Adapter:
        """The adapter, or with `partial` the share of it that fits. Raises AdapterMismatch."""
        known = self._fitted.setdefault(adapter, {})
        if partial not in known:
            family = self.checkpoint.family
            fitted = fit(adapter, self.shapes, self.checkpoint.name, family.width, family.blocks, partial)
            known[partial] = fitted if fitted is not adapter else None  # itself would keep its own key alive for ever
        return known[partial] or adapter

    def effect(self, wanted: Sequence[tuple[Adapter, Entry]]) -> StackEffect:
        """How strong a stack is on this base, each adapter at the height of its schedule; see `effect`."""
        strengths = [(adapter, _plain(entry.strength(entry.height))) for adapter, entry in wanted]
        return stack_effect(strengths, self.switch.norms, self.switch.pristine)

    def _place(self) -> None:
        kind, model = self.placement.kind, self.transformer
        if kind == "resident":
            model.to(self.device)
        elif kind == "group":
            model.enable_group_offload(
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self.device.type == "cuda",
            )
        elif kind == "sequential":
            from accelerate import cpu_offload

            cpu_offload(model, execution_device=self.device)
        if self.base.compile:
            # The class lists no repeated blocks, and without them diffusers refuses; one block compiled serves all.
            if not self.switch.fusable():
                self.switch.reserve(self.base.rank_budget)  # shapes that stay, so that a new stack compiles nothing
            model._repeated_blocks = ["CogVideoXBlock"]
            model.compile_repeated_blocks(fullgraph=True)

    @contextlib.contextmanager
    def denoising(self) -> Iterator[None]:
        """The transformer where it computes, with the attention that was asked for. Placement `model` has it on the
        device for this alone and not while decoding; others are where they belong."""
        with _attention(self.base.attention), self._transformer_on_device():
            yield

    @contextlib.contextmanager
    def _transformer_on_device(self) -> Iterator[None]:
        if self.placement.kind != "model":
            yield
            return
        self.transformer.to(self.device)
        try:
            yield
        finally:
            self.transformer.to("cpu")
            torch.cuda.empty_cache() if self.device.type == "cuda" else None


@dataclass(eq=False)
class Session:
    """A base lent for a while, with its stack in place. Do not keep it after the `with` block."""

    resident: Resident
    swap: Swap
    loaded: bool  # this session had to load the base
    encode: Callable[[Sequence[str]], torch.Tensor]  # prompts -> (B, text_length, D) in the base's dtype, on its device
    stack: tuple[tuple[Adapter, Entry], ...]
    holds: tuple[tuple[str, Choice], ...]  # adapter's name, how it is held and why
    effect: StackEffect  # ‖ΔW‖/‖W‖, of each and of the sum
    _stack: Callable[[float], Swap]  # make the transformer hold the stack as it is at a position, 0 the first step
    _changes: Callable[[int], Sequence[int]]  # of so many steps, those before which a weight changes
    weights: list[tuple[int, tuple[tuple[str, float], ...]]] = field(default_factory=list)  # read back: from step on

    def before_step(self, step: int, total: int) -> None:
        """Bring the weights to where their schedules have them. Raises what a swap raises."""
        if step in self._changes(total):
            self._stack(step / (total - 1) if total > 1 else 0.0)
            self.weights.append((step, self.resident.switch.names))

    def at(self, position: float) -> Swap:
        """Bring the weights to where their schedules have them at a position, 0 the first step to 1 the last. Raises
        what a swap raises."""
        return self._stack(position)


class Bases:
    """All bases of this process. One is worked with at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._resident: OrderedDict[Base, Resident] = OrderedDict()
        self._vaes: dict[tuple[str, str, str], Any] = {}
        self._texts: dict[tuple[str, str], Any] = {}
        self.last_swap: Swap | None = None
        self.loads = 0  # how often a base's transformer was read from disk; swaps never raise it

    @contextlib.contextmanager
    def session(
        self,
        base: Base,
        adapters: Sequence[tuple[Adapter, Entry | float]] = (),
        cache: Path | None = None,
        note: Callable[[str], None] = log.info,
        check: Callable[[], None] = lambda: None,
        hold: str = "auto",
        tokens: int = 0,
    ) -> Iterator[Session]:
        """Lend `base` holding exactly `adapters`; `cache` is the folder for prompt encodings, `check` may cancel.
        `hold` and `tokens` are those of `choose_hold`.

        Raises:
            ModelError, AdapterMismatch, StackError; whatever `check` raises. The earlier stack then stays active.
        """
        with self._lock:
            loads = self.loads
            resident = self._ready(base, note)
            checkpoint = resident.checkpoint
            family = checkpoint.family
            wanted: list[tuple[Adapter, Entry]] = []
            for adapter, entry in adapters:
                entry = entry if isinstance(entry, Entry) else Entry(str(adapter.path), adapter.name, entry)
                Blocks.parse(entry.blocks).check(family.blocks, checkpoint.name)
                fitted = resident.fitted(adapter, entry.partial)
                if fitted is not adapter:
                    note(
                        f"{adapter.name}: {fitted.tensors_used} of {fitted.tensors_total} tensors fit and are used; "
                        f"not used are {', '.join(fitted.unused)}"
                    )
                wanted.append((fitted, entry))
            effect = resident.effect(wanted)
            for warning in dict.fromkeys((*(one.warning for one in effect.each), effect.warning)):
                if warning is not None:
                    note(warning)
            chosen = {
                id(adapter): choose_hold(
                    hold, fusable=resident.switch.fusable(), dtype=resident.dtype, width=family.width, tokens=tokens,
                    scheduled=bool(entry.steps), ratio=one.overall,
                )
                for (adapter, entry), one in zip(wanted, effect.each, strict=True)
            }  # fmt: skip

            def stacked_at(position: float) -> Swap:
                now = [(adapter, _plain(entry.strength(position))) for adapter, entry in wanted]
                self.last_swap = resident.switch.apply(now, check, lambda adapter, _: chosen[id(adapter)].hold)
                return self.last_swap

            changes = LoraStack(tuple(entry for _, entry in wanted)).changes
            try:
                if base.compile and any(choice.hold == "stacked" for choice in chosen.values()):
                    resident.switch.reserve(base.rank_budget)
                    total = sum(max(m.factor_rank for m in adapter.modules) for adapter, _ in wanted)
                    if total > base.rank_budget:
                        note(
                            f"the stack's ranks add up to {total}, more than the rank budget of {base.rank_budget}, so "
                            "its first step compiles anew; a larger budget avoids that and costs a little in every step"
                        )
                yield Session(
                    resident,
                    stacked_at(0.0),
                    self.loads > loads,
                    lambda texts: self._encode(checkpoint, resident.placement, texts, cache, note).to(resident.device),
                    tuple(wanted),
                    tuple((adapter.name, chosen[id(adapter)]) for adapter, _ in wanted),
                    effect,
                    stacked_at,
                    functools.cache(changes),
                )
            finally:
                if resident.switch.spoiled:
                    self.unload(base)

    def encode(
        self, base: Base, texts: Sequence[str], cache: Path | None = None, note: Callable[[str], None] = log.info
    ) -> torch.Tensor:
        """Prompts as the base's sessions encode them: (B, text_length, D) in the base's dtype, on the CPU. The
        transformer is not loaded for it, so that the text encoder, which is as large, can be there first.

        Raises:
            ModelError
        """
        with self._lock:
            checkpoint = base.checkpoint()
            resident = self._resident.get(base)
            placement = self._plan(base, checkpoint) if resident is None else resident.placement
            return self._encode(checkpoint, placement, texts, cache, note)

    @contextlib.contextmanager
    def autoencoder(self, base: Base) -> Iterator[Any]:
        """Lend the base's autoencoder alone: the transformer is neither loaded for it nor is its stack touched.

        Raises:
            ModelError
        """
        with self._lock:
            checkpoint = base.checkpoint()
            resident = self._resident.get(base)
            yield self._vae(checkpoint, self._plan(base, checkpoint)) if resident is None else resident.vae

    def _ready(self, base: Base, note: Callable[[str], None]) -> Resident:
        if base in self._resident:
            self._resident.move_to_end(base)
            return self._resident[base]
        for other in list(self._resident):
            if other.file and other.file == base.file and other.stamp != base.stamp:
                self.unload(other)  # what it was loaded from is gone
        checkpoint = base.checkpoint()
        placement = self._plan(base, checkpoint)
        note(f"loading {checkpoint.name}: {placement.reason}")
        with _loading(checkpoint.name):
            resident = Resident(base, checkpoint, placement, self._vae(checkpoint, placement))
        self.loads += 1
        self._resident[base] = resident
        return resident

    def _plan(self, base: Base, checkpoint: Checkpoint) -> Placement:
        device = choose_device(base.device)
        sizes = {k: part_bytes(checkpoint.part(k)) for k in ("vae", "text_encoder")}
        sizes["transformer"] = transformer_weights(checkpoint).nbytes
        frames, width, height = checkpoint.defaults()
        tokens = (frames // checkpoint.temporal + 1) * width * height // (checkpoint.spatial * checkpoint.patch) ** 2
        # Both guidance branches hold about a dozen token-wide tensors in 16 bit; the decoder about three of 256
        # channels for eight frames at full size, a quarter of that in tiles.
        denoising = tokens * checkpoint.family.width * 2 * 2 * 12
        decoding = width * height * 8 * 256 * 2 * 3 // (4 if base.vae_tiling else 1)
        while True:
            try:
                return plan_placement(
                    checkpoint.family.dtype,
                    sizes,
                    (denoising, decoding),
                    base,
                    device,
                    free_memory(device),
                    free_memory("cpu"),
                )
            except NotEnoughMemory:
                if not self._resident:
                    raise
                self.unload(next(iter(self._resident)))  # the one used longest ago

    def _vae(self, checkpoint: Checkpoint, placement: Placement) -> torch.nn.Module:
        """Shared between bases whose autoencoders are the same file: 5B and its I2V sibling load one."""
        key = (fingerprint(checkpoint.part("vae")), placement.dtype, placement.device)
        if key not in self._vaes:
            self._vaes[key] = load_vae(checkpoint, DTYPES[placement.dtype]).to(placement.device)
        return self._vaes[key]

    def _encode(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        texts: Sequence[str],
        cache: Path | None,
        note: Callable[[str], None],
    ) -> torch.Tensor:
        folder, length = checkpoint.part("text_encoder"), checkpoint.text_length
        store = PromptCache(cache, fingerprint(folder), str(length), placement.dtype)
        states = {text: found for text in texts if (found := store.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in states]
        if missing:
            tokenizer, encoder = self._text(checkpoint, placement, note)
            for text in missing:
                whole = tokenizer(text).input_ids
                if len(whole) > length:
                    lost = tokenizer.decode(whole[length - 1 : -1])
                    note(f"the prompt has {len(whole)} tokens and the base reads {length}: «{lost}» is not read")
                # One by one: what is cached must not depend on its neighbours in a batch.
                states[text] = tokens_of(encoder, tokenizer, [text], length).to("cpu", DTYPES[placement.dtype])
                store.put(text, states[text])
            if part_bytes(folder) > SMALL:  # 9.5 GB in the real family: needed for a moment, and then in the way
                self._texts.clear()
                _collect(placement.device)
        return torch.cat([states[text] for text in texts])

    def _text(self, checkpoint: Checkpoint, placement: Placement, note: Callable[[str], None]) -> Any:
        folder = checkpoint.part("text_encoder")
        key = (fingerprint(folder), placement.dtype)
        if key not in self._texts:
            note("loading the text encoder")
            tokenizer, encoder = load_text(checkpoint, DTYPES[placement.dtype])
            if placement.kind in ("group", "sequential") and placement.device != "cpu":
                from accelerate import cpu_offload

                cpu_offload(encoder, execution_device=torch.device(placement.device))
            elif placement.kind == "model" or part_bytes(folder) <= SMALL:
                encoder.to(placement.device)
            self._texts[key] = tokenizer, encoder
        return self._texts[key]

    def resident(self) -> tuple[Resident, ...]:
        return tuple(self._resident.values())

    def unload(self, base: Base | None = None) -> None:
        """Free one base, or all of them with what they share."""
        with self._lock:
            gone = [base] if base is not None else list(self._resident)
            devices = {self._resident.pop(b).placement.device for b in gone if b in self._resident}
            used = {id(r.vae) for r in self._resident.values()}
            self._vaes = {k: v for k, v in self._vaes.items() if id(v) in used}
            if not self._resident:
                self._texts.clear()
            for device in devices:
                _collect(device)


@contextlib.contextmanager
def _attention(kernel: str) -> Iterator[None]:
    """`sdpa_kernel` leaves no second choice, so one that this machine or dtype lacks is an error at the first step."""
    if kernel == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    try:
        with sdpa_kernel(kernels[kernel]):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise PlacementError(
            f"Attention {kernel} is not to be had on this device in this dtype ({_first(error)}). Choose auto."
        ) from error


def _plain(strength: Strength) -> float | Strength:
    return strength if str(strength.blocks) else strength.weight


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A fresh transformer on the CPU. The resident base's own is never handed out for training."""
    from diffusers import CogVideoXTransformer3DModel

    folder = checkpoint.part("transformer")
    transformer_weights(checkpoint)
    with _loading(checkpoint.name):
        if checkpoint.file is not None:
            model = _from_file(checkpoint, dtype)
        else:
            model = CogVideoXTransformer3DModel.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
    return model.requires_grad_(False).eval()


def pristine_files(checkpoint: Checkpoint, dtype: torch.dtype) -> PristineFiles:
    """The transformer's parameters, to be read one by one as a fresh load would give them. Raises ModelError."""
    weights = transformer_weights(checkpoint)
    return PristineFiles(weights.files, dtype, weights.spelling)


def _from_file(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """diffusers loads no CogVideoX from a single file. What `from_pretrained` would give, to the bit."""
    from accelerate import init_empty_weights
    from diffusers import CogVideoXTransformer3DModel

    pristine = pristine_files(checkpoint, dtype)
    with init_empty_weights():
        model: Any = CogVideoXTransformer3DModel.from_config(transformer_config(checkpoint))
    try:
        for name, empty in [*model.named_parameters(), *model.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            if name in pristine.shapes():  # all but the table of fixed positions, which is made with the model
                value = torch.empty(empty.shape, dtype=dtype)
                pristine.into(name, value)
                kept = (
                    torch.nn.Parameter(value, requires_grad=False) if isinstance(empty, torch.nn.Parameter) else value
                )
                setattr(model.get_submodule(owner), leaf, kept)
    finally:
        pristine.release()
    return model


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A fresh autoencoder on the CPU. Raises NotAModel."""
    from diffusers import AutoencoderKLCogVideoX

    folder = checkpoint.part("vae")
    part_files(folder)
    with _loading(f"{checkpoint.name}'s autoencoder"):
        vae = AutoencoderKLCogVideoX.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    return vae.requires_grad_(False).eval()


def load_text(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and a fresh text encoder on the CPU. Raises NotAModel."""
    from transformers import AutoTokenizer, T5EncoderModel

    folder = checkpoint.part("text_encoder")
    part_files(folder)
    with _loading(f"{checkpoint.name}'s text encoder"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.part("tokenizer"), local_files_only=True)
        encoder = T5EncoderModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return tokenizer, encoder.requires_grad_(False).eval()


def tokens_of(encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Prompts -> text states (B, length, D) in the encoder's dtype. Padding is attended to, as in the pipelines."""
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return encoder(ids.to(encoder.device))[0]


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what libraries raise while loading into our own errors, and keep their chatter off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    bars = [(m, m.is_progress_bar_enabled()) for m in (diffusers_logging, transformers_logging)]
    try:
        for module, _ in bars:
            module.disable_progress_bar()
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            # diffusers prefers `dtype` to `torch_dtype`, which its older releases do not know.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    except CogLoomError:
        raise
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            f"{name} did not fit on the GPU ({_first(error)}). Choose placement model or group."
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if "allocate memory" in str(error):
            raise NotEnoughMemory(
                f"{name} did not fit into memory ({_first(error)}). Choose a smaller base."
            ) from error
        raise NotAModel(
            f"{name} cannot be loaded: {_first(error)}. Its files are broken or of another model."
        ) from error
    finally:
        for module, enabled in bars:
            if enabled:
                module.enable_progress_bar()


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


bases = Bases()
