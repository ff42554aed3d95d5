"""Two other homes of a CogVideoX transformer: ComfyUI's own model, and a file of its own. Names, shapes, arithmetic.

ComfyUI's core renames the modules (comfy/ldm/cogvideo/model.py) and leaves every weight as it is; no file is opened and
nothing of ComfyUI is imported here. The table of its names is the layout "ComfyUI" of `lora_names`, for adapters that
were trained there are spelt with them, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from .lora_kinds import Module
from .lora_names import LAYOUTS, SAT, layout_of, parse

Shapes = Mapping[str, tuple[int, ...]]  # by parameter, as diffusers names it

TABLE = "patch_embed.pos_embedding"  # of learned positions; no parameter in diffusers, but in the files
_FIRST = "norm1.linear.weight"  # of block 0: what ComfyUI looks for, too, to know a CogVideoX
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
_path_of = next(layout.path_of for layout in LAYOUTS if layout.name == "ComfyUI")


def diffusers_name(name: str) -> str | None:
    """Of a parameter of ComfyUI's own CogVideoX; None for what it does not have."""
    if name == TABLE:
        return TABLE
    path, _, leaf = name.rpartition(".")
    found = _path_of(path) if leaf in ("weight", "bias") else None
    return found and f"{found}.{leaf}"


def native_names(names: Iterable[str]) -> dict[str, str] | None:
    """Parameter of diffusers' model -> of ComfyUI's, for a model with these parameters; None when it is another's."""
    found = {diffusers_name(name): name for name in names}
    if None in found or f"transformer_blocks.0.{_FIRST}" not in found:
        return None
    return {str(name): native for name, native in found.items()}


# --- a file -----------------------------------------------------------------------------------------------------------


class Spelling(NamedTuple):
    """How a file names a transformer's tensors."""

    of: Mapping[str, str]  # tensor in the file -> parameter
    strange: tuple[str, ...]  # tensors that stand among them and are none of a CogVideoX's


def spelling(names: Iterable[str]) -> Spelling | None:
    """ComfyUI's names or diffusers', with or without a prefix; what stands beside a prefix (text encoder, autoencoder)
    is another part's. None when there is no CogVideoX transformer."""
    names = list(names)
    there = set(names)
    for prefix in _PREFIXES:
        native = f"{prefix}blocks.0.{_FIRST}" in there
        if native or f"{prefix}transformer_blocks.0.{_FIRST}" in there:
            inside = [name for name in names if name.startswith(prefix)]
            of = {n: diffusers_name(n[len(prefix) :]) if native else n[len(prefix) :] for n in inside}
            return Spelling({n: to for n, to in of.items() if to}, tuple(n for n, to in of.items() if not to))
    return None


def what_instead(names: Iterable[str]) -> str | None:
    """What a file without a CogVideoX transformer is, where its names tell, and what to do with it."""
    for name in names:
        found = parse(name)
        if found is not None:
            return "a LoRA adapter, not a base. Put it among the LoRA files and stack it on a base"
        if layout_of(name)[0].name == SAT:
            return "a transformer with the names of SAT, its training code, whose q, k and v are one; get it converted"
    return None


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of diffusers' CogVideoXTransformer3DModel with this config, without making one.

    Raises:
        KeyError, TypeError: a config that lacks or garbles what it needs.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    head, width = config["attention_head_dim"], config["num_attention_heads"] * config["attention_head_dim"]
    time, ofs, patch = config["time_embed_dim"], config.get("ofs_embed_dim"), config["patch_size"]
    length = config.get("patch_size_t")
    area = patch * patch * (length or 1)
    affine = config.get("norm_elementwise_affine", True)

    def linear(path: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{path}.weight"] = shape
        if bias:
            shapes[f"{path}.bias"] = shape[:1]

    def norm(path: str, size: int, affine: bool = affine) -> None:
        if affine:
            linear(path, size)

    if length is None:
        linear("patch_embed.proj", width, config["in_channels"], patch, patch, bias=config.get("patch_bias", True))
    else:
        linear("patch_embed.proj", width, config["in_channels"] * area)
    linear("patch_embed.text_proj", width, config["text_embed_dim"])
    if config.get("use_learned_positional_embeddings"):
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        patches = config["sample_height"] // patch * (config["sample_width"] // patch) * (frames // (length or 1))
        shapes[TABLE] = (1, config["max_text_seq_length"] + patches, width)
    linear("time_embedding.linear_1", time, width)
    linear("time_embedding.linear_2", time, time)
    if ofs:
        linear("ofs_embedding.linear_1", ofs, ofs)
        linear("ofs_embedding.linear_2", ofs, ofs)
    for block in range(config["num_layers"]):
        path = f"transformer_blocks.{block}"
        for n in (1, 2):
            linear(f"{path}.norm{n}.linear", 6 * width, time)
            norm(f"{path}.norm{n}.norm", width)
        for x in "qkv":
            linear(f"{path}.attn1.to_{x}", width, width, bias=config.get("attention_bias", True))
        norm(f"{path}.attn1.norm_q", head, True)
        norm(f"{path}.attn1.norm_k", head, True)
        linear(f"{path}.attn1.to_out.0", width, width)
        linear(f"{path}.ff.net.0.proj", 4 * width, width)
        linear(f"{path}.ff.net.2", width, 4 * width)
    norm("norm_final", width)
    linear("norm_out.linear", 2 * width, time)
    norm("norm_out.norm", width)
    linear("proj_out", area * config["out_channels"], width)
    return shapes


def traits(shapes: Shapes) -> dict[str, str]:
    """What tells one CogVideoX from another, in words, of as much as is there."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    found = {"blocks": f"{len(blocks)} blocks"}
    for trait, name, axis, said in (
        ("width", "patch_embed.text_proj.weight", 0, "a width of {}"),
        ("text", "patch_embed.text_proj.weight", 1, "text states of {}"),
        ("time", "time_embedding.linear_1.weight", 0, "time states of {}"),
        ("out", "proj_out.weight", 0, "{} numbers out for a patch"),
    ):
        if len(shapes.get(name, ())) == 2:
            found[trait] = said.format(shapes[name][axis])
    proj = shapes.get("patch_embed.proj.weight", ())
    if len(proj) == 4:
        found["in"] = f"{proj[1]} channels in, by a convolution of {proj[2]}×{proj[3]}"
    elif len(proj) == 2:
        found["in"] = f"{proj[1]} numbers in for a patch, by a linear layer as in 1.5"
    found["ofs"] = (
        "an ofs embedding" if any(name.startswith("ofs_embedding.") for name in shapes) else "no ofs embedding"
    )
    found["positions"] = "learned positions" if TABLE in shapes else "no learned positions"
    return found


# --- ComfyUI's model --------------------------------------------------------------------------------------------------

Flat = tuple[Any, ...]  # a module as ComfyUI's loader can look through it: tensors in tuples, and its class first
Part = tuple[Module, float]  # and what it is multiplied with


def flat(module: Module) -> Flat:
    """ComfyUI moves the tensors of a patch to the GPU ahead of their use, where it finds them: in tuples."""
    return type(module), tuple(
        flat(value) if isinstance(value, Module) else value
        for value in (getattr(module, field.name) for field in fields(module))
    )


def whole(parts: Flat) -> Module:
    """The reverse of `flat`, of tensors that may lie elsewhere by now."""
    kind, values = parts
    return kind(*(whole(v) if isinstance(v, tuple) and v and isinstance(v[0], type) else v for v in values))


def add(weight: torch.Tensor, parts: Sequence[Part], pristine: torch.Tensor | None = None) -> torch.Tensor:
    """Add the parts to a weight, in place: summed in float32, rounded once. `pristine`, by default the weight as it is
    given, is what the parts that depend on the base's values (DoRA) go by.

    As `switch` does it with the base's own weights; here the weight is ComfyUI's, in a dtype of ComfyUI's choice.
    """
    W = weight.to(torch.float32).contiguous()
    base = None
    if any(module.kind == "dora" for module, _ in parts):
        base = (weight if pristine is None else pristine).to(W.device, torch.float32, copy=True)
    for module, factor in parts:
        factors = module.factors() if module.kind == "lora" else None
        if factors is not None:
            up, down = (t.to(W.device, torch.float32) for t in factors)
            W.flatten(1).addmm_(up, down, alpha=factor * module.strength)
        else:
            W.add_(module.dense(W if base is None else base), alpha=factor)
    return weight if W is weight else weight.copy_(W)
