"""Training with little memory: the base's weights in 8 or 4 bits (QLoRA), the optimiser's moments in 8.

    quantise(transformer, kind, device)         the blocks' linears, one by one; they stay frozen
    make_optimiser(kind, params, lr, decay)     AdamW, or one with moments in 8 bits

torchao's and bitsandbytes' tensors are used as they are. What is our own is the backward of int8: torchao's would keep
every unpacked weight until the backward pass, which is more memory than the float base takes.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear

from .errors import PlacementError

BLOCKS = "transformer_blocks."  # the few layers outside are small, and the picture hangs on them
BLOCK = 256  # values of a moment in 8 bits that share a scale, in torchao and bitsandbytes alike
SMALLEST = 4096  # values; a smaller moment stays in float32, in both
INT4_GROUP = 64  # weights of a row that share a scale, or fewer where a row is no multiple of it
NF4_BLOCK = 64  # weights that share a scale, which is itself in 8 bits with one float32 for 256 of them


class Packed(torch.nn.Linear):
    """A frozen linear whose weight is unpacked in the forward and again in the backward, and not kept in between.

    It computes y = x Wᵀ + b in the type that autocast gives to a linear, else in x's.
    """

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in)"""
        packed: Any = self.weight
        return packed.dequantize().to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        y: Any = _Unpacking.apply(input, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Packed4(Packed):
    """With two weights in a byte: `weight` is uint8 (out, in / 2), the first of a pair in the low half, each 8 more
    than what it means; `scale` float32 (out, in / group)."""

    scale: torch.Tensor

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        pairs = torch.stack((self.weight & 15, self.weight >> 4), dim=-1)
        values = pairs.to(torch.float32).view(*self.scale.shape, -1)
        return values.sub_(8).mul_(self.scale.unsqueeze(-1)).view(self.out_features, self.in_features).to(dtype)


class _Unpacking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed) -> torch.Tensor:
        ctx.layer = layer
        return linear(x, layer.unpacked(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.unpacked(grad.dtype), None


def quantise(transformer: Any, kind: str, device: torch.device | str) -> int:
    """Pack the blocks' linears in place and move each to the device; the number of layers that were packed.

    One layer after the other, so that the device never holds more than one of them in float. There is no way back: the
    transformer is one that was loaded to be trained on.

    Raises:
        PlacementError: the package is missing, or the layers are not of a kind that it packs.
    """
    if kind == "none":
        return 0
    pack = {"int8": _int8, "int4": _int4, "nf4": _nf4}[kind]
    layers = [(n, m) for n, m in transformer.named_modules() if type(m) is torch.nn.Linear and n.startswith(BLOCKS)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own, about what they will change
        prepared = _prepare(kind)
        for name, layer in layers:
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, pack(prepared, layer, torch.device(device)))
    return len(layers)


def _prepare(kind: str) -> Any:
    name = "bitsandbytes" if kind == "nf4" else "torchao"
    try:
        if name == "torchao":
            import torchao.quantization as package
        else:
            import bitsandbytes as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PlacementError(
            f"Training on a base in {kind} needs {name}: `pip install {name}`; or choose quantise "
            f"{'int8' if kind == 'nf4' else 'nf4'} or none."
        ) from error
    return package


def _int8(torchao: Any, layer: torch.nn.Linear, device: torch.device) -> torch.nn.Linear:
    layer.to(device)
    # One scale a row, symmetric.
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, _: module is layer)
    layer.requires_grad_(False)
    layer.__class__ = Packed
    return layer


def _int4(torchao: Any, layer: torch.nn.Linear, device: torch.device) -> torch.nn.Linear:
    """torchao rounds; its own tensors in 4 bits keep a byte a weight, or need a further package or another processor.

    Raises:
        PlacementError: a row cannot be taken in pairs.
    """
    group = int4_group(layer.in_features)
    if group < 2:
        raise PlacementError(f"A row of {layer.in_features} weights cannot be packed in pairs; choose quantise int8.")
    layer.to(device)
    four: Any = torch.int4  # pyright: ignore[reportAttributeAccessIssue]  its stubs do not have it
    kind = torchao.IntxWeightOnlyConfig(weight_dtype=four, granularity=torchao.PerGroup(group))
    torchao.quantize_(layer, kind, filter_fn=lambda module, _: module is layer)
    rounded: Any = layer.weight
    codes = (rounded.qdata + 8).to(torch.uint8)  # symmetric: -8 to 7, and no zero point
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.register_buffer("scale", rounded.scale.to(torch.float32), persistent=False)
    layer.requires_grad_(False)
    layer.__class__ = Packed4
    return layer


def int4_group(columns: int) -> int:
    """Weights of a row that share a scale."""
    return math.gcd(columns, INT4_GROUP)


def _nf4(bitsandbytes: Any, layer: torch.nn.Linear, device: torch.device) -> torch.nn.Linear:
    """As bitsandbytes documents it for a layer that exists: weights are packed when they arrive on the device."""
    packed = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    packed.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
    )
    packed.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.data, requires_grad=False)
    return packed.to(device)


def packed_bytes(kind: str, rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a weight (rows, columns) of a linear in the blocks; `itemsize` bytes has a number that is not packed."""
    if kind == "int8":
        return rows * columns + 4 * rows
    if kind == "int4":
        return rows * columns // 2 + 4 * rows * columns // int4_group(columns)
    if kind == "nf4":
        blocks = -(-rows * columns // NF4_BLOCK)
        return -(-rows * columns // 2) + blocks + 4 * -(-blocks // 256)
    return rows * columns * itemsize


# --- the optimiser ---


def make_optimiser(kind: str, params: Iterable[torch.nn.Parameter], lr: float, decay: float) -> Any:
    """AdamW, or one whose moments are in 8 bits with a scale for every 256 values: by bitsandbytes on CUDA, by torchao
    elsewhere.

    Raises:
        PlacementError: the package is missing.
    """
    params = list(params)
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay)
    gpu = bool(params) and params[0].device.type == "cuda"
    name = "bitsandbytes" if gpu else "torchao"
    try:
        if gpu:
            import bitsandbytes  # pyright: ignore[reportMissingImports]

            return bitsandbytes.optim.AdamW8bit(params, lr=lr, weight_decay=decay)
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise PlacementError(
            f"The optimiser adamw8bit needs {name} here: `pip install {name}`; or choose adamw."
        ) from error

    class Eager(AdamW8bit):
        """Without the compiler that torchao calls for every shape: a step of an adapter is short, and a machine need
        not have one."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Eager(params, lr=lr, weight_decay=decay, block_size=BLOCK)


def moment_bytes(kind: str, values: int) -> int:
    """Bytes of both moments of one tensor."""
    if kind == "adamw" or values < SMALLEST or values % BLOCK:
        return 8 * values
    return 2 * (values + 4 * values // BLOCK + 4 * 256)


def set_rate(optimiser: Any, rates: Iterable[float]) -> None:
    """The learning rates of the groups; torchao keeps them in tensors, which have to stay the same ones."""
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def moments(optimiser: Any, params: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Everything the optimiser keeps for each parameter as plain tensors, `<key>.<name>`; packed ones in their parts,
    `exp_avg.codes.<name>`. `restore_moments` makes the same state of it, to the bit."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in params.items():
        for key, value in optimiser.state[parameter].items():
            if hasattr(value, "tensor_attrs"):  # torchao's
                found |= {f"{key}.{part}.{name}": getattr(value, part).detach() for part in value.tensor_attrs}
            elif isinstance(value, torch.Tensor):
                found[f"{key}.{name}"] = value.detach()
            else:  # bitsandbytes counts its steps in an int
                found[f"{key}.{name}"] = torch.tensor(value)
    return found


def restore_moments(optimiser: Any, params: dict[str, torch.nn.Parameter], found: dict[str, torch.Tensor]) -> bool:
    """Give the optimiser what `moments` took from it. False, and nothing changed, when the tensors are others than
    this optimiser keeps for these parameters, in name, shape or dtype, or are not numbers."""
    state: dict[Any, dict[str, Any]] = {}
    left = set(found)
    for name, parameter in params.items():
        state[parameter] = {}
        for key, value in _blank(optimiser, parameter).items():
            parts = getattr(value, "tensor_attrs", ())
            for part in parts:
                into, label = getattr(value, part), f"{key}.{part}.{name}"
                if not _like(found.get(label), into):
                    return False
                into.copy_(found[label])
                left.discard(label)
            if not parts:
                label, given = f"{key}.{name}", found.get(f"{key}.{name}")
                number = isinstance(value, (int, float))
                if given is None or not _like(given, torch.tensor(value) if number else value):
                    return False
                state[parameter][key] = given.item() if number else given.to(value.device)
                left.discard(label)
            else:
                state[parameter][key] = value
    if left:
        return False
    for parameter, kept in state.items():
        optimiser.state[parameter] = kept
    return True


def _like(given: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    if given is None or given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    return not wanted.is_floating_point() or bool(given.isfinite().all())


def _blank(optimiser: Any, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """What the optimiser keeps for a parameter, as it is made for a first step. Of the optimiser's own class."""
    if isinstance(optimiser, torch.optim.AdamW):
        # The count stays on the CPU, as AdamW makes it.
        return {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if hasattr(optimiser, "_new_buffer"):  # torchao's
        return {
            "step": torch.tensor(0.0),
            "exp_avg": optimiser._new_buffer(parameter, True),
            "exp_avg_sq": optimiser._new_buffer(parameter, False),
        }
    with _kept(optimiser, parameter):
        (index,) = [
            (g, p) for g, group in enumerate(optimiser.param_groups) for p, one in enumerate(group["params"])
            if one is parameter
        ]  # fmt: skip
        optimiser.init_state(optimiser.param_groups[index[0]], parameter, *index)
        return dict(optimiser.state[parameter])


@contextlib.contextmanager
def _kept(optimiser: Any, parameter: torch.nn.Parameter) -> Iterator[None]:
    """bitsandbytes makes a first state in the optimiser itself; take it out again."""
    before = optimiser.state.pop(parameter, None)
    try:
        yield
    finally:
        optimiser.state.pop(parameter, None)
        if before is not None:
            optimiser.state[parameter] = before
