"""The nodes as a graph has them: each a few lines over the node functions, its schema in its signature.

Ids, sockets and the order of inputs are for good: saved workflows know widgets by position. Append only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch

from .compare import compare, side_by_side
from .engine.checkpoints import DEMO
from .engine.denoise import SCHEDULERS
from .engine.errors import AdapterError, ModelNotFound, StackError, UsageError
from .engine.lora_file import listed_in
from .engine.lora_file import stamp as file_stamp
from .engine.lora_stack import WEIGHT_CAP, Blocks, LoraStack, Steps
from .engine.pipeline import ATTENTION, DTYPES, PLACEMENTS, QUANTISED, Base
from .engine.switch import HOLDS
from .engine.video import SUFFIXES
from .host import Host, numbered
from .lora import (
    change_entries,
    find_adapter,
    inspect_adapter,
    listed,
    measure_stack,
    read_stack,
    save_adapter,
    stack_rows,
    stack_tuples,
    trigger_words,
    tuples_of,
)
from .model import choose_base, list_bases
from .native import base_from_file, native_lora
from .render import Clip, Encoded, Shot, decode, encode, hash_of, sample, save
from .schema import BASE, LORA_STACK, RECORD, STACK, STUDY, Choice, Flag, Number, Out, Shown, Socket, Text, Whole, node

ABSENT = " (not downloaded)"  # behind an id in the list of checkpoints; never part of its name


def base_names(host: Host) -> list[str]:
    """The embedded base first, then local folders, then known ids; broken folders are not offered."""
    bases = [one for one in list_bases(host) if one.state in ("here", "not downloaded")]
    names = [one.name if one.state == "here" else f"{one.name}{ABSENT}" for one in bases]
    return sorted(names, key=lambda name: (name != DEMO, not name.startswith(DEMO), name.endswith(ABSENT)))


def adapter_names(host: Host) -> list[str]:
    return [name for name, _ in listed(host)]


# What several nodes ask for, in the same words.
Checkpoint = Annotated[str, Choice(
    base_names, others=True,
    tip="The base: the embedded demo, a diffusers folder in models/CogVideo, or a known id. Loaded once; it stays.",
)]  # fmt: skip
Dtype = Annotated[str, Choice(
    ("auto", *DTYPES), tip="Precision of the weights. auto: what the base was trained in, bf16 on a CPU for large ones."
)]  # fmt: skip
Placement = Annotated[str, Choice(
    PLACEMENTS, tip="What stays on the GPU. auto: by the memory that is free; group and sequential need least.",
)]  # fmt: skip
Attention = Annotated[str, Choice(
    ATTENTION, advanced=True, tip="Which attention kernel of PyTorch's. auto: PyTorch's own choice."
)]  # fmt: skip
Tiling = Annotated[bool, Flag(tip="Decode in tiles: less memory, a little slower.")]
Compile = Annotated[bool, Flag(
    advanced=True, tip="torch.compile: the first run takes longer, later ones less. New adapters compile nothing anew."
)]  # fmt: skip
Quantise = Annotated[str, Choice(
    QUANTISED, advanced=True, tip="Half the memory: int8 by torchao, or fp8. Adapters are then held beside the weights."
)]  # fmt: skip
RankBudget = Annotated[int, Whole(
    1, 4096, advanced=True, tip="With compile or quantise: how many ranks a stack may have without compiling anew."
)]  # fmt: skip
BaseIn = Annotated[Base, Socket(BASE, tip="The base, from CogVideoX Base.")]
StackIn = Annotated[LoraStack, Socket(STACK, tip="A LoRA stack.")]
StackMaybe = Annotated[LoraStack | None, Socket(STACK, tip="A LoRA stack to add to. Not connected: none.")]
TuplesMaybe = Annotated[Any, Socket(LORA_STACK, tip="A LORA_STACK of another pack (Efficiency, LoRA Manager) to add.")]
BlocksText = Annotated[str, Text(
    tip="Where it acts: 0-9:0.5,10-29:1 by block, attn:1 or ff:0.5 by part. Empty: everywhere at full weight."
)]  # fmt: skip
StepsText = Annotated[str, Text(
    tip="When it acts: FACTOR@POSITION, position 0 (first step) to 1 (last), such as 0@0 1@0.3. Empty: always."
)]  # fmt: skip
Only = Annotated[str, Text(tip="Names of the adapters that are meant, with commas. Empty: all of the stack.")]
Hold = Annotated[str, Choice(
    HOLDS, advanced=True, tip="How adapters are held: fused into the weights (no cost per step), stacked beside them, "
    "or auto. All are exact; their last bits differ."
)]  # fmt: skip
Positive = Annotated[Any, Socket("CONDITIONING", tip="What to show: from CogVideoX Prompt, or ComfyUI's text encoder.")]
Negative = Annotated[Any, Socket("CONDITIONING", tip="What not to show. Needed when guidance is above 1.")]
Seed = Annotated[int, Whole(0, 2**63 - 1, seed=True, tip="One seed is one video, on every device.")]
StepCount = Annotated[int, Whole(0, 1000, tip="Denoising steps. 0: as many as the base is made for.")]
Guidance = Annotated[float, Number(
    0.0, 100.0, 0.1, tip="How closely to follow the prompt. 0: the base's own; 1: off, which halves the time."
)]  # fmt: skip
Dynamic = Annotated[bool, Flag(advanced=True, tip="Let guidance grow along the steps, as in the paper.")]
Scheduler = Annotated[str, Choice(("auto", *SCHEDULERS), tip="auto: the one the base was published with.")]
Frames = Annotated[int, Whole(
    0, 1000, tip="Length: 8·N + 1 for CogVideoX 1.0, 16·N + 1 for 1.5. 0: the base's own, or the video's."
)]  # fmt: skip
Width = Annotated[int, Whole(0, 4096, 8, tip="In pixels. 0: what the base was trained for.")]
Height = Annotated[int, Whole(0, 4096, 8, tip="In pixels. 0: what the base was trained for.")]
Prefix = Annotated[str, Text(tip="Where in the output folder, and the beginning of the name; a number follows.")]
BASE_OUT = Out("base", BASE, "A description of the base. It is loaded when something is sampled, once.")
STACK_OUTS = (
    Out("stack", STACK, "The stack, for the sampler or the next stack."),
    Out(
        "lora_stack", LORA_STACK, "The same as a LORA_STACK, without blocks and schedules, which that has no place for."
    ),
    Out("trigger_words", "STRING", "The trigger words of all active adapters, with commas."),
)


@node("CogLoomBase", "CogVideoX Base", (BASE_OUT,), search=("CogVideo loader", "load model", "checkpoint"))
def base(
    host: Host,
    checkpoint: Checkpoint = DEMO,
    dtype: Dtype = "auto",
    placement: Placement = "auto",
    attention: Attention = "auto",
    vae_tiling: Tiling = False,
    compile: Compile = False,
    quantise: Quantise = "none",
    rank_budget: RankBudget = 128,
) -> tuple[Base]:
    """Choose a CogVideoX base and how it is held. It is loaded when first sampled and stays in memory; changing
    adapters never loads it again."""
    return (
        choose_base(
            host, checkpoint.removesuffix(ABSENT), dtype, host.device, placed(host, placement, quantise), vae_tiling,
            False, compile, quantise, rank_budget, attention,
        ),
    )  # fmt: skip


def placed(host: Host, placement: str, quantise: str) -> str:
    """The host's word where the user said nothing; quantised weights are not moved in parts."""
    if placement != "auto":
        return placement
    return "model" if quantise != "none" and host.placement == "group" else host.placement


def transformer_names(host: Host) -> list[str]:
    names = [name for name, _ in listed_in(host.transformer_folders)]
    return names or ["(none in models/diffusion_models)"]  # an empty list shows as "undefined"


def _transformer(host: Host, name: str) -> Path:
    path = dict(listed_in(host.transformer_folders)).get(name.replace("\\", "/"))
    if path is None:
        where = ", ".join(map(str, host.transformer_folders))
        raise ModelNotFound(f"There is no file {name[:200]!r} in {where}. Choose one of the list, or put it there.")
    return path


def _stamp_file(host: Host, file: str | None = None, **_: Any) -> Any:
    return None if file is None else file_stamp(_transformer(host, file))[:2]


@node(
    "CogLoomBaseFile", "CogVideoX Base from File", (BASE_OUT,), category="CogLoom/native", stamp=_stamp_file,
    search=("diffusion model", "unet loader", "single file"),
)  # fmt: skip
def base_file(
    host: Host,
    file: Annotated[str, Choice(transformer_names, others=True, tip="A CogVideoX transformer in "
                                "models/diffusion_models, with ComfyUI's names or diffusers'.")],
    like: Annotated[str, Choice(base_names, others=True, tip="The checkpoint that lends text encoder, VAE, scheduler "
                                "and config: the same size and task as the file.")] = DEMO,
    dtype: Dtype = "auto",
    placement: Placement = "auto",
    attention: Attention = "auto",
    vae_tiling: Tiling = False,
    compile: Compile = False,
    quantise: Quantise = "none",
    rank_budget: RankBudget = 128,
) -> tuple[Base]:  # fmt: skip
    """A base whose transformer is a single file, such as a full fine-tune or one that was downloaded for ComfyUI."""
    made = base_from_file(
        host, _transformer(host, file), like.removesuffix(ABSENT), dtype, host.device,
        placed(host, placement, quantise), vae_tiling, False, compile, quantise, rank_budget, attention,
    )  # fmt: skip
    return (made,)


def _check_stack(host: Host, rows: str = "[]", **_: Any) -> None:
    _rows(host, rows)


def _stamp_stack(host: Host, rows: str = "[]", **_: Any) -> Any:
    return [(entry.name, entry.stamp) for entry in _rows(host, rows)]


def _rows(host: Host, text: str, stack: LoraStack | None = None) -> LoraStack:
    try:
        rows = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise StackError(f"rows cannot be read as JSON ({error}); it is a list of objects, [] for none.") from None
    return stack_rows(host, rows, stack)


@node(
    "CogLoomLoraStack", "CogVideoX LoRA Stack", STACK_OUTS, check=_check_stack, stamp=_stamp_stack,
    search=("lora loader", "power lora", "stack", "multi lora"),
)  # fmt: skip
def lora_stack(
    host: Host,
    rows: Annotated[str, Text(
        lines=True, tip='The rows. As text: a JSON list such as [{"on": true, "adapter": "neon.safetensors", '
        '"weight": 0.8, "blocks": "", "steps": ""}].'
    )] = "[]",
    hold: Hold = "auto",
    stack: StackMaybe = None,
    lora_stack: TuplesMaybe = None,
) -> tuple[LoraStack, list[tuple[str, float, float]], str]:  # fmt: skip
    """Any number of adapters, each with a weight, the blocks it acts in and a schedule over the steps. A description:
    nothing is loaded here, and a change costs milliseconds at the next render."""
    made = _rows(host, rows, _added(host, stack, lora_stack))
    return _stack_outs(host, LoraStack(made.entries, hold if hold != "auto" else made.hold))


def _check_lora(host: Host, adapter: str | None = None, blocks: str = "", steps: str = "", **_: Any) -> None:
    if adapter is not None:
        find_adapter(host, adapter)
    Blocks.parse(blocks)
    Steps.parse(steps)


def _stamp_lora(host: Host, adapter: str | None = None, **_: Any) -> Any:
    return None if adapter is None else file_stamp(find_adapter(host, adapter))


@node("CogLoomLora", "CogVideoX LoRA", STACK_OUTS, check=_check_lora, stamp=_stamp_lora, search=("lora loader",))
def lora(
    host: Host,
    adapter: Annotated[str, Choice(adapter_names, others=True, tip="A LoRA file, from models/CogVideo/loras or "
                                   "models/loras; any layout.")],
    weight: Annotated[float, Number(-WEIGHT_CAP, WEIGHT_CAP, 0.05, tip="1 is the strength it was trained at; 0 is "
                                    "absent; a negative weight turns its effect round.")] = 1.0,
    blocks: BlocksText = "",
    steps: StepsText = "",
    partial: Annotated[bool, Flag(advanced=True, tip="Use what fits of an adapter that was made for another base.")]
    = False,
    stack: StackMaybe = None,
    lora_stack: TuplesMaybe = None,
) -> tuple[LoraStack, list[tuple[str, float, float]], str]:  # fmt: skip
    """One adapter, for chaining and for workflows that are driven by the API."""
    row = {"adapter": adapter, "weight": weight, "blocks": blocks, "steps": steps, "partial": partial}
    return _stack_outs(host, stack_rows(host, [row], _added(host, stack, lora_stack)))


def _added(host: Host, stack: LoraStack | None, tuples: Any) -> LoraStack:
    stack = LoraStack() if stack is None else stack
    return stack if tuples is None else stack_tuples(host, tuples, stack)


def _stack_outs(host: Host, stack: LoraStack) -> tuple[LoraStack, list[tuple[str, float, float]], str]:
    return stack, tuples_of(host, stack), trigger_words(host, stack)


def _check_steps(host: Host, steps: str = "", **_: Any) -> None:
    Steps.parse(steps)


@node(
    "CogLoomSchedule", "LoRA Schedule", (STACK_OUTS[0],), check=_check_steps, search=("lora keyframes", "per step")
)  # fmt: skip
def schedule(host: Host, stack: StackIn, steps: StepsText = "0@0 1@0.3", adapters: Only = "") -> tuple[LoraStack]:
    """Let adapters of a stack come and go along the denoising steps. Replaces the schedule they had."""
    return (change_entries(stack, adapters, steps=steps),)


def _check_blocks(host: Host, blocks: str = "", **_: Any) -> None:
    Blocks.parse(blocks)


@node(
    "CogLoomBlocks", "LoRA Blocks", (STACK_OUTS[0],), check=_check_blocks, search=("block weight", "layer weight")
)  # fmt: skip
def blocks(host: Host, stack: StackIn, blocks: BlocksText = "attn:1", adapters: Only = "") -> tuple[LoraStack]:
    """Let adapters of a stack act in some of the base's blocks, or in attention or feed-forward alone."""
    return (change_entries(stack, adapters, blocks=blocks),)


@node(
    "CogLoomPrompt", "CogVideoX Prompt",
    (
        Out("positive", "CONDITIONING", "What to show."),
        Out("negative", "CONDITIONING", "What not to show; that of an empty text, if none was given."),
    ),
    search=("text encode", "T5"),
)  # fmt: skip
def prompt(
    host: Host,
    base: BaseIn,
    prompt: Annotated[str, Text(lines=True, tip="What to show. CogVideoX likes long, plain descriptions.")] = "",
    negative: Annotated[str, Text(lines=True, tip="What not to show; may stay empty.")] = "",
    clip: Annotated[Any, Socket("CLIP", tip="ComfyUI's own T5 (t5xxl, of type cogvideox), in place of the base's.")]
    = None,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """Encode a prompt with the base's own text encoder, once per prompt: the encodings are kept on disk."""
    if clip is not None:
        positive, other = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative))
        return _tell(positive, prompt, own=False), _tell(other, negative, own=False)
    positive, other = (
        _tell([[one.states, {}]], one.text or "", own=True) for one in encode(host, base, [prompt, negative])
    )  # fmt: skip
    return positive, other


def _tell(conditioning: list[Any], text: str, own: bool) -> list[Any]:
    """The text travels with its encoding, and that encoding's hash: what another node changes is not that text any
    more, and a record must not say so."""
    return [
        [states, {**extra, "cogloom": {"text": text, "own": own, "sha256": hash_of(states)}}]
        for states, extra in conditioning
    ]


def _encoded(conditioning: Any, what: str) -> Encoded:
    """Raises UsageError for a conditioning that means more than one text."""
    if not isinstance(conditioning, (list, tuple)) or len(conditioning) != 1:
        count = len(conditioning) if isinstance(conditioning, (list, tuple)) else type(conditioning).__name__
        raise UsageError(f"{what} holds {count} encodings; CogVideoX reads one. Join the texts in one prompt.")
    states, extra = conditioning[0]
    strange = sorted(
        key for key, value in extra.items()
        if value is not None and key not in ("cogloom", "pooled_output", "attention_mask")
    )  # fmt: skip
    if strange:
        raise UsageError(f"{what} has {', '.join(strange)}, which CogVideoX cannot follow. Connect a plain encoding.")
    told = extra.get("cogloom")
    known = isinstance(told, dict) and told.get("sha256") == hash_of(states)
    return Encoded(states.clone(), told["text"], told["own"]) if known else Encoded(states.clone())


def _pair(positive: Any, negative: Any) -> tuple[Encoded, Encoded | None]:
    return _encoded(positive, "positive"), None if negative is None else _encoded(negative, "negative")


def _shot(
    seed: int,
    steps: int,
    guidance: float,
    dynamic_guidance: bool,
    scheduler: str,
    frames: int,
    width: int,
    height: int,
    **more: Any,
) -> Shot:
    """0 and auto are the base's own."""
    return Shot(
        "", seed=seed, steps=steps or None, guidance=guidance or None, dynamic_guidance=dynamic_guidance,
        scheduler=None if scheduler == "auto" else scheduler, frames=frames or None, width=width or None,
        height=height or None, **more,
    )  # fmt: skip


@node(
    "CogLoomSampler", "CogVideoX Sampler",
    (Out("latent", "LATENT", "Latents of the clip, for CogVideoX Decode or ComfyUI's own VAE Decode."),),
    search=("KSampler", "text to video", "image to video", "video to video"),
)  # fmt: skip
def sampler(
    host: Host,
    base: BaseIn,
    positive: Positive,
    seed: Seed = 0,
    steps: StepCount = 0,
    guidance: Guidance = 0.0,
    dynamic_guidance: Dynamic = False,
    scheduler: Scheduler = "auto",
    frames: Frames = 0,
    width: Width = 0,
    height: Height = 0,
    strength: Annotated[float, Number(0.01, 1.0, 0.01, tip="Video to video: how much is made anew.")] = 0.8,
    verify: Annotated[bool, Flag(advanced=True, tip="Prove afterwards, to the bit, that every weight is what base and "
                                 "adapters make of it. The record says so.")] = False,
    negative: Negative = None,
    stack: StackMaybe = None,
    image: Annotated[Any, Socket("IMAGE", tip="A picture to start from, on an image-to-video base.")] = None,
    video: Annotated[Any, Socket("IMAGE", tip="Frames to change, on a text-to-video base.")] = None,
    latent: Annotated[Any, Socket("LATENT", tip="Latents to change, in place of a video. An empty latent says the size "
                                  "and length.")] = None,
) -> tuple[dict[str, Any]]:  # fmt: skip
    """Make a clip: text to video, image to video or video to video, by what is connected. The base is loaded if it is
    not in memory, takes the stack in milliseconds, and keeps both."""
    given = _shot(
        seed, steps, guidance, dynamic_guidance, scheduler, frames, width, height, strength=strength,
        image=None if image is None else _rgb(image)[0], video=None if video is None else _rgb(video),
    )  # fmt: skip
    given, start = _begin(base, given, latent)
    made = sample(host, base, stack or LoraStack(), given, verify, _pair(positive, negative), start)
    told = {"record": made.record, "fps": made.fps, "sha256": hash_of(made.samples)}
    return ({"samples": made.samples, "cogloom": told},)


def _rgb(frames: torch.Tensor) -> torch.Tensor:
    """IMAGE (F, H, W, 3 or 4) -> (F, H, W, 3), float32, a copy: what comes from ComfyUI may be an inference tensor."""
    return frames[..., :3].float().cpu().clone()


def _begin(base: Base, shot: Shot, latent: Any) -> tuple[Shot, torch.Tensor | None]:
    """An empty latent is a size and a length, as everywhere in ComfyUI; another is a clip to change."""
    if latent is None:
        return shot, None
    samples = latent["samples"].float().cpu().clone()
    if samples.ndim != 5 or bool(samples.any()):
        return shot, samples
    checkpoint = base.checkpoint()
    sizes = {
        "frames": (samples.shape[2] - 1) * checkpoint.temporal + 1,
        "height": samples.shape[3] * checkpoint.spatial,
        "width": samples.shape[4] * checkpoint.spatial,
    }
    return replace(shot, **{name: getattr(shot, name) or size for name, size in sizes.items()}), None


@node(
    "CogLoomDecode", "CogVideoX Decode",
    (
        Out("frames", "IMAGE", "The clip's frames."),
        Out("fps", "FLOAT", "Frames per second, as the base was trained."),
        Out("record", RECORD, "How it was made: every setting, adapter and hash."),
    ),
    search=("VAE decode",),
)  # fmt: skip
def decode_latent(
    host: Host,
    base: BaseIn,
    latent: Annotated[Any, Socket("LATENT", tip="From CogVideoX Sampler.")],
) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """Latents to frames, with the base's autoencoder."""
    samples, told = latent["samples"], latent.get("cogloom") or {}
    frames = decode(host, base, samples.clone())
    record = dict(told.get("record") or {})
    if record and told["sha256"] != hash_of(samples):
        record["notes"] = [*record["notes"], "another node changed the latents after they were sampled"]
    if record:
        record["frames_sha256"] = hash_of(frames)
    return frames, float(told.get("fps", base.checkpoint().family.fps)), record


@node(
    "CogLoomSaveVideo", "Save Video (CogLoom)", (Out("frames", "IMAGE", "The same frames."),), shows=True,
    search=("video combine", "mp4", "export"),
)  # fmt: skip
def save_video(
    host: Host,
    frames: Annotated[torch.Tensor, Socket("IMAGE", tip="Frames to save.")],
    fps: Annotated[float, Number(0.1, 240.0, 0.1, tip="Frames per second; CogVideoX Decode tells the base's.")] = 8.0,
    name: Prefix = "CogLoom",
    format: Annotated[str, Choice(tuple(suffix[1:] for suffix in SUFFIXES), tip="mp4 and webm play everywhere; mkv "
                                  "is lossless; gif has 256 colours.")] = "mp4",
    record: Annotated[Any, Socket(RECORD, tip="How it was made, from CogVideoX Decode; goes into the file.")] = None,
) -> Shown:  # fmt: skip
    """Write a clip, with its record and the workflow inside: drop the file on the canvas to get the graph back."""
    told = dict(record or {})
    if told and told.get("frames_sha256") != hash_of(_rgb(frames)):
        told["notes"] = [*told["notes"], "another node changed the frames after they were decoded"]
    path = numbered(host.output_folder, name, f".{format}")
    save(host, Clip(_rgb(frames), fps, told), path=path)
    return Shown((frames,), host.seen(path))


@node(
    "CogLoomCompare", "Compare LoRA Stacks",
    (
        Out("side_by_side", "IMAGE", "All of them in one picture, labelled."),
        Out("a", "IMAGE", "Frames of A."),
        Out("b", "IMAGE", "Frames of B."),
        Out("fps", "FLOAT", "Frames per second."),
    ),
    shows=True, search=("A/B", "XY plot", "grid", "versus"),
)  # fmt: skip
def compare_stacks(
    host: Host,
    base: BaseIn,
    positive: Positive,
    seed: Seed = 0,
    steps: StepCount = 0,
    guidance: Guidance = 0.0,
    dynamic_guidance: Dynamic = False,
    scheduler: Scheduler = "auto",
    frames: Frames = 0,
    width: Width = 0,
    height: Height = 0,
    name: Prefix = "CogLoom-compare",
    labels: Annotated[str, Text(tip="Names for A, B, C, D, with commas. Empty: made from the stacks.")] = "",
    negative: Negative = None,
    a: Annotated[LoraStack | None, Socket(STACK, tip="The first stack. Not connected: no adapter.")] = None,
    b: Annotated[LoraStack | None, Socket(STACK, tip="The second stack. Not connected: no adapter.")] = None,
    c: Annotated[LoraStack | None, Socket(STACK, tip="A third, if you like.")] = None,
    d: Annotated[LoraStack | None, Socket(STACK, tip="A fourth, if you like.")] = None,
) -> Shown:
    """Render the same shot with two to four stacks: same prompt, noise and settings, one base, loaded once. The player
    shows them as a wipe, side by side or as their difference; the labelled video is saved."""
    stacks = [a or LoraStack(), b or LoraStack(), *(one for one in (c, d) if one is not None)]
    given = [label.strip() for label in labels.split(",")] if labels.strip() else []
    if len(given) > len(stacks):
        raise UsageError(f"labels names {len(given)} and {len(stacks)} stacks are compared; give as many or fewer.")
    shot = _shot(seed, steps, guidance, dynamic_guidance, scheduler, frames, width, height)
    named = [(given[n] if n < len(given) else "", stack) for n, stack in enumerate(stacks)]
    arms = compare(host, base, named, shot, _pair(positive, negative))
    picture, fps = side_by_side(arms), arms[0].clip.fps
    path = numbered(host.output_folder, name, ".mp4")
    about = {"compared": [{"label": arm.label, "record": arm.clip.record} for arm in arms]}
    save(host, Clip(picture, fps, about), path=path)
    clips = []
    for number, arm in enumerate(arms):
        one = numbered(host.temp_folder, f"cogloom-{'abcd'[number]}", ".mp4")
        save(host, arm.clip, path=one)
        (seen,) = host.seen(one)["images"]
        clips.append({**seen, "label": arm.label, "frames": len(arm.clip.frames)})
    outputs = (picture, arms[0].clip.frames, arms[1].clip.frames, fps)
    return Shown(outputs, {**host.seen(path), "cogloom_clips": clips, "cogloom_fps": [fps]})


@node(
    "CogLoomLoraInfo", "LoRA Info", (Out("text", "STRING", "What the file is, a line for each thing."),), shows=True,
    check=_check_lora, stamp=_stamp_lora, search=("lora metadata", "trigger words", "inspect"),
)  # fmt: skip
def lora_info(
    host: Host,
    adapter: Annotated[str, Choice(adapter_names, others=True, tip="A LoRA file.")],
    base: Annotated[Base | None, Socket(BASE, tip="Tells whether it fits, and how strong it is there.")] = None,
) -> Shown:
    """What a LoRA file is: layout, rank, the scale and why, which base it fits, trigger words, hash, effect size."""
    about = inspect_adapter(host, adapter)
    lines = [
        f"{about['name']} ({about['file']}, {about['size_bytes'] / 1e6:.2f} MB)",
        f"layout: {about['layout']}; kind: {about['kind']}; rank: {_range(about['rank'])}",
        f"scale: {_range(about['scale'])} ({about['scale_reason']})",
        f"tensors used: {about['tensors_used']} of {about['tensors_total']}",
        f"fits: {', '.join(about['fits']) or 'no base that is known'}",
        f"trigger words: {', '.join(about['trigger_words']) or 'none are said'}",
        *([f"notes: {about['notes']}"] if about["notes"] else []),
        f"sha256: {about['sha256']}",
        *about["hints"],
    ]
    if base is not None:
        try:
            lines.append(_effect_line(host, base, adapter))
        except AdapterError as error:
            lines.append(f"on {base.name}: {error}")
    text = "\n".join(lines)
    return Shown((text,), {"text": [text]})


def _effect_line(host: Host, base: Base, adapter: str) -> str:
    effect = measure_stack(host, base, stack_rows(host, [{"adapter": adapter}]))
    return f"on {base.name}: fits; effect ‖ΔW‖/‖W‖ {effect.overall:.3g}" + (
        f"; {effect.warning}" if effect.warning else ""
    )


def _range(value: Any) -> str:
    return f"{value[0]:g} to {value[-1]:g}" if isinstance(value, list) else f"{value:g}"


@node(
    "CogLoomNativeLora", "LoRA Stack on MODEL",
    (
        Out("model", "MODEL", "A clone with the adapters on it."),
        Out("positive", "CONDITIONING", "The same, with the schedules attached."),
        Out("negative", "CONDITIONING", "The same, with the schedules attached."),
    ),
    category="CogLoom/native", search=("load lora", "native", "KSampler"),
)  # fmt: skip
def lora_on_model(
    host: Host,
    model: Annotated[Any, Socket("MODEL", tip="ComfyUI's own CogVideoX, from Load Diffusion Model.")],
    stack: StackIn,
    positive: Annotated[Any, Socket("CONDITIONING", tip="Needed when the stack has schedules: they travel with it.")]
    = None,
    negative: Annotated[Any, Socket("CONDITIONING", tip="Needed when the stack has schedules: they travel with it.")]
    = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """A CogLoom stack on ComfyUI's own CogVideoX model, for KSampler and every other core node: all layouts, blocks and
    schedules, where ComfyUI's LoRA loader knows no CogVideoX adapter by its name."""
    return native_lora(model, read_stack(stack), positive, negative)


@node("CogLoomLoraSave", "Save LoRA", (), shows=True, search=("save lora", "merge lora", "export"))
def lora_save(host: Host, stack: StackIn, name: Prefix = "loras/CogLoom") -> Shown:
    """Write a stack as one LoRA file that diffusers, PEFT and ComfyUI read, exactly the sum of its adapters at their
    weights, with a record of what went in."""
    path = save_adapter(host, stack, numbered(host.output_folder, name, ".safetensors"))
    return Shown((), {"text": [f"{path.relative_to(host.output_folder.resolve()).as_posix()}, "
                               f"{path.stat().st_size / 1e6:.2f} MB"]})  # fmt: skip


# --- studies ----------------------------------------------------------------------------------------------------------

# `grid` and what it builds on take most of a second to import: when a study is asked for, and not at ComfyUI's start.


def _check_grid(
    host: Host,
    vary: str | None = None,
    seeds: str | None = None,
    weights: str | None = None,
    prompts: str | None = None,
    name: str | None = None,
    **_: Any,
) -> None:
    from . import grid

    grid.check_texts(vary, seeds, weights, prompts, name)


@node(
    "CogLoomGrid", "CogVideoX Grid",
    (
        Out("grid", "IMAGE", "All clips in one picture, in step, with what varies on its edges."),
        Out("fps", "FLOAT", "Frames per second."),
        Out("study", STUDY, "The study, for CogVideoX Metrics Table."),
        Out("verdict", "STRING", "What was found to differ, in words."),
    ),
    shows=True, check=_check_grid, search=("XY plot", "sweep", "study", "weights", "seeds", "parameter grid"),
)  # fmt: skip
def grid_of_clips(
    host: Host,
    base: BaseIn,
    name: Annotated[str, Text(tip="The study's name, a folder in output/studies. The same name goes on with it: what "
                              "is there is not rendered again.")] = "sweep",
    prompts: Annotated[str, Text(lines=True, tip="One a line. Lines that begin with # are left out.")] = "",
    negative: Annotated[str, Text(lines=True, tip="What not to show, for all of them; may stay empty.")] = "",
    seeds: Annotated[str, Text(tip="Such as 0-3 or 1,5,7. Each prompt is rendered with each of them.")] = "0-1",
    weights: Annotated[str, Text(tip="Such as 0.5,1: every stack at each of them, which multiply its own weights. "
                                 "Empty: each stack once, as it is.")] = "",
    vary: Annotated[str, Text(lines=True, tip="A setting with its values, one a line, such as guidance=4,6 or "
                              "steps=20,50. Empty: none.")] = "",
    labels: Annotated[str, Text(tip="Names of the stacks, with commas. Empty: made from the stacks.")] = "",
    base_too: Annotated[bool, Flag(tip="Render the base without any adapter as well, which the others are measured "
                                   "against.")] = True,
    steps: StepCount = 0,
    guidance: Guidance = 0.0,
    dynamic_guidance: Dynamic = False,
    scheduler: Scheduler = "auto",
    frames: Frames = 0,
    width: Width = 0,
    height: Height = 0,
    stack: Annotated[LoraStack | None, Socket(STACK, tip="A LoRA stack to try. Not connected: none.")] = None,
    stack_b: Annotated[LoraStack | None, Socket(STACK, tip="A second, if you like.")] = None,
    stack_c: Annotated[LoraStack | None, Socket(STACK, tip="A third, if you like.")] = None,
    stack_d: Annotated[LoraStack | None, Socket(STACK, tip="A fourth, if you like.")] = None,
    image: Annotated[Any, Socket("IMAGE", tip="A picture that all clips start from, on an image-to-video base.")]
    = None,
) -> Shown:  # fmt: skip
    """Render stacks, weights and settings over prompts and seeds, with the same noise for all, measure every clip and
    lay them out as one video with labelled edges. Stopped at any moment, it goes on where it was."""
    from . import grid

    shot = _shot(
        0, steps, guidance, dynamic_guidance, scheduler, frames, width, height, negative=negative,
        image=None if image is None else _rgb(image)[0],
    )  # fmt: skip
    arms = grid.arms_from((stack, stack_b, stack_c, stack_d), labels, weights, vary, base_too)
    study = grid.render_study(host, base, name, arms, prompts, seeds, shot)
    picture, fps, left_out = grid.picture(host, study)
    said = "\n".join((*grid.verdict_of(study), *left_out))
    path = numbered(host.output_folder, f"CogLoom/{name.strip()}", ".mp4")
    save(host, Clip(picture, fps, grid.record_of(study)), path=path)
    return Shown((picture, fps, study, said), {**host.seen(path), "text": [said]})


def _check_metrics(host: Host, metrics: str | None = None, **_: Any) -> None:
    from . import grid

    grid.names_from(metrics or "")


def _stamp_metrics(host: Host, **_: Any) -> Any:
    from . import grid

    return grid.state_of(host)


@node(
    "CogLoomMetrics", "CogVideoX Metrics Table",
    (
        Out("table", "STRING", "Arms and what they measure as a Markdown table, and the verdicts in words."),
        Out("json", "STRING", "All of it as JSON: means, differences, intervals, votes."),
    ),
    shows=True, check=_check_metrics, stamp=_stamp_metrics, search=("statistics", "compare metrics", "study", "report"),
)  # fmt: skip
def metrics_table(
    host: Host,
    name: Annotated[str, Text(tip="A study of output/studies by its name, when none is connected.")] = "",
    metrics: Annotated[str, Text(tip="Names with commas, such as motion, psnr: built-in ones, and those of installed "
                                 "packages. Empty: all that are built in.")] = "",
    level: Annotated[float, Number(0.5, 0.999, 0.01, tip="How sure intervals are: 0.95 is usual. Higher tells less and "
                                   "errs less.")] = 0.95,
    report: Annotated[bool, Flag(tip="Write report.html into the study's folder as well: clips, plots and numbers in "
                                 "one file that opens anywhere.")] = False,
    study: Annotated[Any, Socket(STUDY, tip="From CogVideoX Grid. Not connected: the one of the name.")] = None,
) -> Shown:  # fmt: skip
    """What a study has shown: a mean for each arm and metric, and which arms differ, with intervals that are corrected
    for their number. Differences are taken between clips of equal prompt and seed."""
    from . import grid

    found = grid.named_study(host, name) if study is None else study
    concluded = grid.concluded_of(host, found, grid.names_from(metrics), level)
    table = grid.table_of(found, concluded)
    text, lines = table.markdown(), table.shown()
    if report:
        page = grid.write_report(host, found, level)
        lines["words"].append(f"Report: {page}")
    return Shown((text, grid.as_json(concluded)), {"text": [text], "cogloom_table": [lines]})


# The workshop's nodes use the inputs above, and belong to the same graph.
from . import workshop_nodes as _workshop  # noqa: E402, F401  its import fills NODES
