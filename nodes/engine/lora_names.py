"""Spelling: which layer and which part of an adapter a tensor's name means, whoever chose the name.

A name is a stem, which says the layer, and a suffix, which says the part. Layouts differ in their stems alone: adding
one is adding a record. The suffixes are one table, so that every kind of adapter can come in every layout.

Sources: PEFT's and LyCORIS's state dicts, diffusers' CogVideoXTransformer3DModel, ComfyUI's own CogVideoX
(comfy/ldm/cogvideo), VideoX-Fun's lora_utils, CogVideo's tools/export_sat_lora_weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# --- suffixes ---------------------------------------------------------------------------------------------------------

_NAME = r"(?:\.[A-Za-z0-9_-]+)?"  # what PEFT called the adapter, "default" in most files that have it

SUFFIXES: Mapping[str, str] = {  # role -> how its suffix is spelt
    "A": rf"lora_A{_NAME}\.weight|lora\.down\.weight|lora_down\.weight|matrix_A(?=\.\d\Z)",
    "B": rf"lora_B{_NAME}\.weight|lora\.up\.weight|lora_up\.weight|matrix_B(?=\.\d\Z)",
    "bias": rf"lora_B{_NAME}\.bias",
    "alpha": r"alpha",
    "magnitude": rf"lora_magnitude_vector{_NAME}(?:\.weight)?",
    "dora_scale": r"dora_scale",
    **{role: role + _NAME for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{role: role + _NAME for role in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "diff": r"diff|w_norm",
    "diff_b": r"diff_b|b_norm",
}
KIND_OF_ROLE: Mapping[str, str] = {  # for the roles that make a kind by themselves
    "A": "lora",
    "B": "lora",
    "diff": "diff",
    **{role: "loha" for role in SUFFIXES if role.startswith("hada")},
    **{role: "lokr" for role in SUFFIXES if role.startswith("lokr")},
}

REFUSED: tuple[tuple[str, str, str], ...] = (  # suffix, what it is, what to do
    (r"lora_mid\.weight|hada_t[12]|lokr_t[12]", "LyCORIS with a Tucker core", "extract a plain LoRA with LyCORIS"),
    (r"set_weight|reshape_weight", "a weight that takes the base's place", "render with the model it was made from"),
    (r"b?oft_\w+", "OFT", "extract a plain LoRA with LyCORIS"),
    (r"[ab][12]\.weight", "GLoRA", "extract a plain LoRA with LyCORIS"),
    (r"on_input|ia3_l", "(IA)³", "train it as plain LoRA"),
    (r"scalar", "LyCORIS with a factor that was not folded in", "save it with LyCORIS's own writer"),
    (r"lora_E|lora_[AB]", "AdaLoRA", "train it as plain LoRA"),
    (r"vera_lambda_[bd]", "VeRA", "train it as plain LoRA"),
    # Whole biases, not differences: only the base they were trained on could say what is added to it.
    (r"base_layer\.(?:bias|weight)", "LoRA with trained biases of the base", "train it with bias='none'"),
)

_SUFFIX = re.compile(
    r"(?P<stem>.+?)\.(?:"
    + "|".join(f"(?P<{role}>{spelt})" for role, spelt in SUFFIXES.items())
    + r")(?P<slice>(?<=matrix_[AB])\.\d)?"
)
_REFUSED = tuple((re.compile(rf".*\.(?:{suffix}){_NAME}"), what, todo) for suffix, what, todo in REFUSED)
_TEXT_ENCODER = re.compile(r"text_encoder(?:_\d)?\.|lora_te\d?_")


class Name(NamedTuple):
    stem: str
    role: str


def parse(key: str) -> Name | None:
    """None where the suffix is none of the table's. SAT's matrices of one fused projection (…matrix_A.0, .1, .2) become
    stems of their own, with the number at the end."""
    found = _SUFFIX.fullmatch(key)
    if found is None:
        return None
    role = str(found.lastgroup)
    if role == "slice":
        return Name(found["stem"] + found["slice"], "A" if found["A"] else "B")
    return Name(found["stem"], role)


def refused(key: str) -> tuple[str, str] | None:
    """(what it is, what to do) for a part that changes the arithmetic in a way that is not read."""
    return next(((what, todo) for pattern, what, todo in _REFUSED if pattern.fullmatch(key)), None)


def of_text_encoder(key: str) -> bool:
    return _TEXT_ENCODER.match(key) is not None


# --- stems ------------------------------------------------------------------------------------------------------------

IN_BLOCK = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn1.norm_q", "attn1.norm_k", "ff.net.0.proj",
    "ff.net.2", "norm1.linear", "norm1.norm", "norm2.linear", "norm2.norm",
)  # fmt: skip
OUTSIDE = (
    "patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2",
    "ofs_embedding.linear_1", "ofs_embedding.linear_2", "norm_final", "norm_out.linear", "norm_out.norm", "proj_out",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One way of naming layers. `stem` recognises it, and what its group holds is what `path_of` is asked about."""

    name: str
    stem: re.Pattern[str]
    path_of: Callable[[str], str | None] = lambda rest: rest  # -> diffusers' module path; None: no such layer


def _blocks(spelt: str, inside: Mapping[str, str], outside: Mapping[str, str]) -> Callable[[str], str | None]:
    """Undo a renaming of CogVideoX's own layers by tables; `spelt` is how a layer of a block is written."""
    block = re.compile(spelt)

    def path_of(rest: str) -> str | None:
        found = block.fullmatch(rest)
        if found is None:
            return outside.get(rest)
        name = inside.get(found[2])
        return name and f"transformer_blocks.{int(found[1])}.{name}"

    return path_of


# A point became an underscore, of which the names have some themselves: only a table can undo that.
_underscored = _blocks(
    r"transformer_blocks_(\d{1,4})_(.+)", *({n.replace(".", "_"): n for n in names} for names in (IN_BLOCK, OUTSIDE))
)
_comfyui = _blocks(
    r"blocks\.(\d{1,4})\.(.+)",
    {n: n for n in IN_BLOCK if n.startswith("norm")}
    | {"q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "attn_out": "attn1.to_out.0"}
    | {"norm_q": "attn1.norm_q", "norm_k": "attn1.norm_k", "ff_proj": "ff.net.0.proj", "ff_out": "ff.net.2"},
    {n.replace("_embedding.", "_embedding_"): n for n in OUTSIDE},
)
_sat = _blocks(
    r"transformer\.layers\.(\d{1,4})\.(.+)",
    {f"attention.query_key_value.{i}": f"attn1.to_{x}" for i, x in enumerate("qkv")}
    | {"attention.dense.0": "attn1.to_out.0"},
    {},
)

SAT = "SAT"
DIFFUSERS = "diffusers"
PEFT = "PEFT"
LAYOUTS: tuple[Layout, ...] = (  # in this order: the bare names, which could be anything's, come last
    Layout("VideoX-Fun", re.compile(r"lora_unet__(.+)"), _underscored),
    Layout("kohya", re.compile(r"lora_unet_(.+)"), _underscored),
    Layout(SAT, re.compile(r"(?:model\.)?diffusion_model\.(transformer\.layers\..+)"), _sat),
    Layout("ComfyUI", re.compile(r"diffusion_model\.(.+)"), _comfyui),
    Layout(DIFFUSERS, re.compile(r"transformer\.(.+)")),
    Layout("PEFT model", re.compile(r"base_model\.model\.(?:transformer\.)?(.+)")),
    Layout(PEFT, re.compile(r"(.+)")),
)


def layout_of(stem: str) -> tuple[Layout, str]:
    """The layout, and the rest of the stem, which the layout's `path_of` understands."""
    return next((layout, found[1]) for layout in LAYOUTS if (found := layout.stem.fullmatch(stem)))
