"""ComfyUI's own MODEL with our stack on it, and a base whose transformer is a file of its own.

ComfyUI is imported inside functions: this module is part of the product that runs without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .engine.checkpoints import FAMILIES, could_be, find_checkpoint, with_file
from .engine.errors import StackError, WrongFamily
from .engine.lora_file import Adapter, fit, stamp
from .engine.lora_stack import Blocks, Entry, Steps
from .engine.native import Part, add, flat, native_names, whole
from .engine.pipeline import Base
from .host import Host

_INSIDE = "diffusion_model."  # where ComfyUI's MODEL keeps its network
Patches = dict[str, tuple[Part, ...]]  # parameter of ComfyUI's model -> what is added to it


def base_from_file(
    host: Host,
    file: Path,
    like: str,
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
    """A base whose transformer is a single file, with ComfyUI's names or diffusers'; the checkpoint `like`, by name as
    in `choose_base`, lends its config and the other parts. Reads the header and compares it; loads nothing.

    Raises:
        ModelNotFound, NotAModel, WrongFamily, UsageError, PlacementError
    """
    file = Path(file).absolute()
    checkpoint = with_file(find_checkpoint(like, host.model_folders), file)
    return Base(
        checkpoint.name, str(checkpoint.folder), dtype, device, placement, vae_slicing, vae_tiling, compile, quantise,
        rank_budget, attention, str(file), stamp(file)[:2],
    )  # fmt: skip


def native_lora(
    model: Any,
    entries: Sequence[tuple[Adapter, Entry]],
    positive: Any = None,
    negative: Any = None,
) -> tuple[Any, Any, Any]:
    """A clone of ComfyUI's MODEL that adds the adapters; `model` itself stays as it is. What a schedule changes hangs
    on the conditionings, as ComfyUI's hooks do, and is switched before each step; the rest is of the model.

    Args:
        model: ComfyUI's ModelPatcher of its own CogVideoX
        entries: as `read_stack` gives them
        positive, negative: CONDITIONING; needed where a weight is scheduled

    Returns:
        (model, positive, negative); what nothing is added to is what was given

    Raises:
        WrongFamily: the model is no CogVideoX of ComfyUI's. AdapterMismatch: an adapter does not fit it.
        StackError: blocks that it does not have, or a schedule without a conditioning to hang it on.
    """
    names, shapes = _parameters(model)
    width = shapes["patch_embed.text_proj.weight"][0]
    blocks = sum(name.endswith(".norm1.linear.weight") for name in shapes)
    title = _title(shapes)
    constant: list[tuple[Adapter, Entry, float]] = []
    scheduled: dict[str, list[tuple[Adapter, Entry, float]]] = {}
    # The order of a sum is in its last bit: the same set gives the same bits, whatever the order in the stack.
    for adapter, entry in sorted(entries, key=lambda one: (one[0].fingerprint, str(one[1]))):
        Blocks.parse(entry.blocks).check(blocks, title)
        fitted = fit(adapter, shapes, title, width, blocks, entry.partial)
        if _changes(Steps.parse(entry.steps)):
            scheduled.setdefault(entry.steps, []).append((fitted, entry, entry.weight))
        else:
            constant.append((fitted, entry, entry.strength().weight))
    if scheduled and positive is None:
        late = ", ".join(sorted({adapter.name for group in scheduled.values() for adapter, _, _ in group}))
        raise StackError(
            f"The weight of {late} changes from step to step, and ComfyUI keeps such weights on the conditioning: "
            "connect positive (and negative, where there is one) through this node to the sampler, or take the steps "
            "out of the stack."
        )
    if patches := _patches(constant, names):
        model = model.clone()
        model.add_patches(_as_adapters(patches))
    if scheduled:
        hooks = _hooks({steps: _patches(group, names) for steps, group in scheduled.items()})
        from comfy.hooks import set_hooks_for_conditioning  # pyright: ignore[reportMissingImports]

        positive, negative = (
            None if given is None else set_hooks_for_conditioning(given, hooks) for given in (positive, negative)
        )
    return model, positive, negative


def _parameters(model: Any) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Parameter of diffusers' model -> ComfyUI's key of it, and -> its shape."""
    inner = getattr(getattr(model, "model", None), "diffusion_model", None)
    own = dict(inner.named_parameters()) if isinstance(inner, torch.nn.Module) else {}
    names = native_names(own)
    if names is None:
        raise WrongFamily(
            f"The model that is connected is {type(inner or model).__name__}, not ComfyUI's own CogVideoX "
            "(CogVideoXTransformer3DModel, in ComfyUI since 0.21). Load a CogVideoX with ComfyUI's Load Diffusion "
            "Model, or render with CogVideoX Base and CogVideoX Sampler, which take this stack as it is."
        )
    return {name: _INSIDE + native for name, native in names.items()}, {
        name: tuple(own[native].shape) for name, native in names.items()
    }


def _title(shapes: dict[str, tuple[int, ...]]) -> str:
    return "ComfyUI's " + next((family.name for family in FAMILIES if could_be(family, shapes)), "CogVideoX")


def _changes(steps: Steps) -> bool:
    return len(steps.points) > 1 or steps.held


def _patches(group: Iterable[tuple[Adapter, Entry, float]], names: dict[str, str]) -> Patches:
    """What the adapters add to each parameter that they change, by ComfyUI's key."""
    found: dict[str, list[Part]] = {}
    for adapter, entry, weight in group:
        by_layer = Blocks.parse(entry.blocks).factor
        for module in adapter.modules:
            factor = weight * by_layer(module.path)
            if factor:
                found.setdefault(names[module.name], []).append((module, factor))
    return {key: tuple(parts) for key, parts in found.items()}


def _as_adapters(patches: Patches) -> dict[str, Any]:
    kind = _adapter_class()
    return {
        key: kind(set(), tuple((flat(module), factor) for module, factor in parts)) for key, parts in patches.items()
    }


@functools.cache
def _adapter_class() -> type:
    """One patch for all that a stack adds to a parameter, in place of one per adapter: it is rounded once, and DoRA
    goes by the weight as it was before the others were added.

    ComfyUI's own LoRAAdapter would do for plain LoRA; of several, each rounds to the dtype that ComfyUI patches in,
    which is fp16 on many GPUs. Its DoRA weighs otherwise than training did. No matrix is copied, and no difference is
    made before ComfyUI asks for it.
    """
    from comfy.weight_adapter import WeightAdapterBase  # pyright: ignore[reportMissingImports]

    class StackAdapter(WeightAdapterBase):
        name = "cogloom"

        def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:  # ComfyUI makes others like it
            self.loaded_keys, self.weights = loaded_keys, weights

        def calculate_weight(
            self,
            weight: torch.Tensor,
            key: str,
            strength: float,
            strength_model: float,
            offset: Any,
            function: Any,
            intermediate_dtype: torch.dtype = torch.float32,
            original_weight: Any = None,
        ) -> torch.Tensor:
            parts = [(whole(parts), factor * strength) for parts, factor in self.weights if factor * strength]
            # Hooks come with every weight as it was loaded, and with what makes a plain tensor of it.
            loaded = original_weight[key][0] if original_weight is not None and key in original_weight else None
            pristine = None if loaded is None else loaded[1](loaded[0].to(weight.device, copy=True), inplace=True)
            return add(weight, parts, pristine) if parts else weight

    return StackAdapter


def _hooks(groups: dict[str, Patches]) -> Any:
    """A HookGroup with a hook for each schedule. The patches come with the hook and not with the model: so the
    conditioning is whole, and on a model that does not have these parameters it does nothing."""
    from comfy.hooks import HookGroup, WeightHook  # pyright: ignore[reportMissingImports]

    hooks, schedule = HookGroup(), _schedule_class()
    for steps, patches in groups.items():
        hook = WeightHook(strength_model=1.0, strength_clip=0.0)
        hook.weights, hook.weights_clip, hook.need_weight_init = _as_adapters(patches), {}, False
        hook.hook_keyframe = schedule(Steps.parse(steps).at)
        hooks.add(hook)
    return hooks


@functools.cache
def _schedule_class() -> type:
    """ComfyUI's keyframes stand at shares of the noise, and which step falls on which depends on scheduler and number
    of steps; a curve would become a staircase of our making. But the sampler tells all its noise levels, so that each
    step knows its number, and has the factor that it would have in a render of ours."""
    from comfy.hooks import HookKeyframeGroup  # pyright: ignore[reportMissingImports]

    class StepSchedule(HookKeyframeGroup):
        def __init__(self, at: Callable[[float], float] = lambda position: 1.0) -> None:
            super().__init__()
            self._at, self._now, self._factor = at, None, at(0.0)

        @property
        def strength(self) -> float:
            return self._factor

        def reset(self) -> None:
            super().reset()
            self._now, self._factor = None, self._at(0.0)

        def is_empty(self) -> bool:
            return False

        def has_guarantee_steps(self) -> bool:
            return False

        def clone(self) -> StepSchedule:
            return type(self)(self._at)

        def initialize_timesteps(self, model: Any) -> None:
            self.reset()

        def prepare_current_keyframe(self, curr_t: Any, transformer_options: dict[str, Any]) -> bool:
            now, before = float(curr_t), self._factor
            if now != self._now:
                self._now = now
                self._factor = self._at(position(now, transformer_options["sample_sigmas"].tolist()))
            return self._factor != before

    return StepSchedule


def position(sigma: float, sigmas: Sequence[float]) -> float:
    """Where in the schedule a sampler is, from 0 for the first step to 1 for the last: the step that begins at this
    noise level or, as second-order samplers ask between two, above it. `sigmas` descend; the last ends the last step.
    """
    steps = max(len(sigmas) - 1, 1)
    near = 1e-4 * abs(sigma)  # the level has been to the model's dtype and back
    step = sum(level >= sigma - near for level in sigmas[:steps]) - 1
    return max(step, 0) / (steps - 1) if steps > 1 else 0.0
