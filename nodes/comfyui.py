"""ComfyUI's face: a class for each node of `graph`, and what its host has to give. The only file that imports comfy.

Everything here is thin: classes are made from schemas, errors are passed on, memory is lent and asked back.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import base64
import functools
import inspect
import io
import json
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args as comfy_args
from server import PromptServer

from . import graph as _graph  # noqa: F401  its import fills NODES
from . import page
from .engine.checkpoints import part_bytes
from .engine.errors import AdapterNotFound, Cancelled, CogLoomError
from .engine.pipeline import DEVICES, Base, Resident, bases
from .engine.preview import Look
from .schema import NODES, Choice, Field, Flag, Input, Node, Number, Shown, Socket, Text, Whole, sentence

log = logging.getLogger("cogloom")

BASES, LORAS = "CogVideo", "cogvideox_loras"  # keys of folder_paths, and of extra_model_paths.yaml
SAID = 0.5  # seconds that a line under a node stands at the least


def _register_folders() -> None:
    """The names that CogVideoX packs share, so that files need not be there twice."""
    models = Path(folder_paths.models_dir)
    folder_paths.add_model_folder_path(BASES, str(models / "CogVideo"))
    folder_paths.add_model_folder_path(LORAS, str(models / "CogVideo" / "loras"))


def _folders(*keys: str) -> tuple[Path, ...]:
    known = (path for key in keys if key in folder_paths.folder_names_and_paths for path in _paths(key))
    return tuple(dict.fromkeys(known))


def _paths(key: str) -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(key)]


# --- the host ---------------------------------------------------------------------------------------------------------


class ComfyHost:
    """One execution of one node. Without a node it answers the page's questions."""

    def __init__(self, node: str | None = None, prompt: Any = None, workflow: Any = None) -> None:
        self._node, self._prompt, self._workflow = node, prompt, workflow
        self._bar: Any = None
        self._said: tuple[str, float] | None = None  # what stands under the node, and since when
        self._previews: Callable[[Look], Any] | None = None
        self._swap, self._began = bases.last_swap, time.monotonic()

    @property
    def model_folders(self) -> tuple[Path, ...]:
        return _folders(BASES, "diffusers")

    @property
    def lora_folders(self) -> tuple[Path, ...]:
        return _folders(LORAS, "loras")

    @property
    def transformer_folders(self) -> tuple[Path, ...]:
        return _folders("diffusion_models")

    @property
    def input_folder(self) -> Path:
        return Path(folder_paths.get_input_directory())

    @property
    def output_folder(self) -> Path:
        return Path(folder_paths.get_output_directory())

    @property
    def temp_folder(self) -> Path:
        return Path(folder_paths.get_temp_directory())

    @property
    def cache_folder(self) -> Path:
        # ComfyUI serves no folder of `user` that begins with two underscores, and prompts are private.
        return Path(folder_paths.get_user_directory()) / "__cogloom"

    @property
    def tags(self) -> dict[str, str]:
        if comfy_args.disable_metadata:
            return {}
        # ComfyUI writes what IS_CHANGED says into the graph it runs; a clip carries the graph that was sent.
        sent = {
            number: {key: value for key, value in one.items() if key != "is_changed"}
            for number, one in (self._prompt or {}).items()
        }
        found = {"prompt": sent or None, **(self._workflow or {})}
        return {name.lower(): json.dumps(value) for name, value in found.items() if value is not None}

    @property
    def device(self) -> str:
        kind = comfy.model_management.get_torch_device().type
        return kind if kind in DEVICES else "auto"

    @property
    def placement(self) -> str:
        """--highvram, --lowvram and --novram are the user's word on it."""
        if self.device == "cpu":
            return "auto"
        state = comfy.model_management.VRAMState
        said = {state.HIGH_VRAM: "resident", state.LOW_VRAM: "model", state.NO_VRAM: "group"}
        return said.get(comfy.model_management.vram_state, "auto")

    def unknown(self, node: Node) -> dict[str, Any]:
        """Inputs of the graph that the node does not have; ComfyUI drops them without a word."""
        sent = (self._prompt or {}).get(self._node, {}).get("inputs", {})
        return {name: value for name, value in sent.items() if name not in {one.name for one in node.inputs}}

    def seen(self, path: Path) -> dict[str, list[Any]]:
        if path.suffix.lower() == ".mkv":  # lossless RGB, which no browser plays
            return {"text": [path.name]}
        for kind, folder in (("output", self.output_folder), ("temp", self.temp_folder)):
            if folder.resolve() in path.resolve().parents:
                below = path.resolve().parent.relative_to(folder.resolve()).as_posix()
                item = {"filename": path.name, "subfolder": "" if below == "." else below, "type": kind}
                return {"images": [item], "animated": [True]}
        return {}

    def check_cancelled(self) -> None:
        if comfy.model_management.processing_interrupted():
            raise Cancelled("Stopped at your request; nothing was written.")

    def make_room(self, base: Base) -> None:
        if any(resident.base == base for resident in bases.resident()):
            return
        checkpoint = base.checkpoint()
        needed = sum(part_bytes(checkpoint.part(part)) for part in ("transformer", "vae"))
        comfy.model_management.free_memory(needed * 1.1, comfy.model_management.get_torch_device())

    def holds(self, resident: Resident) -> None:
        lent = _lent.setdefault(resident.base, Lent(resident.base))
        lent.take(resident)
        comfy.model_management.load_models_gpu([lent])

    def progress(self, done: int, total: int, what: str, preview: Look | None = None) -> None:
        if self._node is None:
            return
        bar = self._bar = self._bar or comfy.utils.ProgressBar(total)
        picture = None
        if preview is not None:
            self._animate(done, total, preview)
            if self._previews is None:
                self._previews = _previewer(preview)
            picture = self._previews(preview)
        elif what and (done == 0 or self._due(what)):
            if done == 0:
                log.info("%s", what)
            self._said = what, time.monotonic()
            _say(self._node, what)
        try:
            bar.update_absolute(done, total, picture)
        except comfy.model_management.InterruptProcessingException:
            # Work that is stopped in the middle of a step has nothing to go on from: `check_cancelled` stops between.
            comfy.model_management.interrupt_current_processing()

    def _due(self, what: str) -> bool:
        """Layers and losses come faster than they can be read."""
        return self._said is None or (what != self._said[0] and time.monotonic() - self._said[1] >= SAID)

    def finish(self) -> None:
        """Under the node stays not what it was last busy with, but what it cost."""
        if self._said is None or self._node is None:
            return
        swap = bases.last_swap
        if swap is None or swap is self._swap:  # no base was asked: a tool of the workshop
            _say(self._node, f"{time.monotonic() - self._began:.1f} s")
        else:
            _say(self._node, f"base loads: {bases.loads} · last swap: {swap.seconds * 1000:.1f} ms")

    def _animate(self, done: int, total: int, look: Look) -> None:
        """The whole clip so far, for the page to play: ComfyUI's own preview message holds one picture."""
        from PIL import Image

        frames = look.rgb()  # (F', h, w, 3)
        count, height, width = frames.shape[:3]
        sheet = Image.fromarray(frames.permute(1, 0, 2, 3).reshape(height, count * width, 3).numpy())
        kind = "PNG" if width <= 128 else "JPEG"  # JPEG would smear the little pictures of small bases
        data = io.BytesIO()
        sheet.save(data, kind)
        text = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
        PromptServer.instance.send_sync(
            "cogloom.preview",
            {"node": self._node, "sheet": text, "count": count, "width": width, "height": height,
             "fps": max(look.fps / 4, 1), "step": done, "total": total},
            PromptServer.instance.client_id,
        )  # fmt: skip


def _say(node: str, text: str) -> None:
    """A line under the node, where the server can show one."""
    show = getattr(PromptServer.instance, "send_progress_text", None)
    if show is not None:
        show(text, node)


def _previewer(look: Look) -> Callable[[Look], Any]:
    """ComfyUI's previewer, or the one that VideoHelperSuite puts in its place: chosen by the user's settings there."""
    import latent_preview

    factors = look.factors
    if factors is None:
        return lambda look: None

    class CogVideoX:
        """As ComfyUI's latent formats are: x @ factors + bias lies in [-1, 1]."""

        latent_channels = len(factors) - 1
        latent_rgb_factors = (2 * factors[:-1]).tolist()
        latent_rgb_factors_bias = (2 * factors[-1] - 1).tolist()
        latent_rgb_factors_reshape = None
        taesd_decoder_name = None

    previewer = latent_preview.get_previewer(look.latents.device, CogVideoX())
    if previewer is None:
        return lambda look: None

    def show(look: Look) -> Any:
        with torch.no_grad():
            x0 = look.latents.float().permute(1, 0, 2, 3)[None]  # (1, C, F', h, w)
            return previewer.decode_latent_to_preview_image("JPEG", x0)

    return show


# --- memory -----------------------------------------------------------------------------------------------------------

_lent: dict[Base, Lent] = {}


class CogVideoX:
    """Stands for a transformer in ComfyUI's list; its name is what the log shows."""


class Lent:
    """A resident base as `comfy.model_management` sees its models, so that it is counted and can be asked to go.

    It goes as a whole or stays: a base is one with what its switch holds. `ModelPatcher` itself cannot have it, since
    that moves and patches weights on its own.
    """

    parent = None

    def __init__(self, base: Base) -> None:
        self.base, self._bytes = base, 0
        self.load_device = comfy.model_management.get_torch_device()
        self.offload_device = torch.device("cpu")
        # Not the transformer: ComfyUI cleans its list when `model` dies, and that must not happen in the middle of its
        # own `free_memory`, which is when the transformer does. So this, and the Lent with it, is kept for good.
        self.model = CogVideoX()
        self._resident: weakref.ref[Resident] | None = None

    def take(self, resident: Resident) -> None:
        self._resident = weakref.ref(resident)
        modules = (resident.transformer, resident.vae)
        self._bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    @property
    def resident(self) -> Resident | None:
        return None if self._resident is None else self._resident()

    def model_size(self) -> int:
        return self._bytes

    def loaded_size(self) -> int:
        return 0 if self.resident is None else self._bytes

    def current_loaded_device(self) -> torch.device:
        return self.offload_device if self.resident is None else self.load_device

    def model_dtype(self) -> torch.dtype:
        return torch.float32 if self.resident is None else self.resident.dtype

    def detach(self, unpatch_all: bool = True) -> None:
        if unpatch_all:  # False comes at every reuse, and is no wish to have it gone
            self._resident = None
            bases.unload(self.base)

    def partially_unload(self, device: torch.device, memory_to_free: int = 0, **_: Any) -> int:
        return 0  # then it is asked to go as a whole

    def partially_load(self, device: torch.device, extra_memory: int = 0, **_: Any) -> int:
        return 0

    def model_patches_to(self, device: Any) -> None: ...

    def model_patches_models(self) -> list[Any]:
        return []

    def memory_required(self, input_shape: Any) -> int:
        return 0

    def lowvram_patch_counter(self) -> int:
        return 0

    def is_clone(self, other: Any) -> bool:
        return other is self

    def is_dynamic(self) -> bool:
        return False

    def cleanup(self) -> None: ...


# --- classes ----------------------------------------------------------------------------------------------------------

# Under names that no input has: a node may well have a `prompt` of its own.
_HIDDEN = {"hidden_prompt": "PROMPT", "hidden_pnginfo": "EXTRA_PNGINFO", "hidden_id": "UNIQUE_ID"}


def _class(node: Node) -> type:
    def input_types(cls: type) -> dict[str, Any]:
        host, kinds = ComfyHost(), {"required": {}, "optional": {}}
        for one in node.inputs:
            kinds["required" if one.required else "optional"][one.name] = _widget(one, host)
        return {**kinds, "hidden": dict(_HIDDEN)}

    def run(self: Any, **values: Any) -> Any:
        host = ComfyHost(values.get("hidden_id"), values.get("hidden_prompt"), values.get("hidden_pnginfo"))
        # Weights that were made or changed in inference mode could never be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                result = node.run(host, **node.checked(host, host.unknown(node) | _constants(values)))
            except Cancelled:
                comfy.model_management.throw_exception_if_processing_interrupted()
                raise comfy.model_management.InterruptProcessingException() from None
            except CogLoomError as error:
                raise type(error)(sentence(error)) from error
        host.finish()
        return {"ui": dict(result.ui), "result": result.outputs} if isinstance(result, Shown) else result

    def validate(cls: type, **values: Any) -> bool | str:
        try:
            node.checked(ComfyHost(), _constants(values))
        except CogLoomError as error:
            return sentence(error)
        return True

    # ComfyUI asks for the inputs that are named here, leaves its own check of them out, and repeats an error for each
    # of them. So only those it would judge wrongly, and the one that most can be wrong in.
    own = [one.name for one in node.inputs if isinstance(one.kind, Choice) and one.kind.others]
    if not own and node.check is not None:
        own = list(inspect.signature(node.check).parameters)[1:2]
    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("cls", *own)]
    validate.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]

    def is_changed(cls: type, **values: Any) -> Any:
        try:
            assert node.stamp is not None
            return json.dumps(node.stamp(ComfyHost(), **_constants(values)))
        except CogLoomError as error:  # it is said when the node runs
            return str(error)

    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(out.type for out in node.outputs),
        "RETURN_NAMES": tuple(out.name for out in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(out.tip for out in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": node.category,
        "DESCRIPTION": " ".join(node.about.split()),
        "OUTPUT_NODE": node.shows,
        "SEARCH_ALIASES": list(node.search),
        "run": run,
    }
    if own:
        members["VALIDATE_INPUTS"] = classmethod(validate)
    if node.stamp is not None:
        members["IS_CHANGED"] = classmethod(is_changed)
    return type(node.id, (), members)


def _constants(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is hidden, and what is linked: that is None until it has run."""
    return {name: value for name, value in values.items() if name not in _HIDDEN and value is not None}


def _widget(one: Input, host: ComfyHost) -> tuple[Any, dict[str, Any]]:
    kind: Field = one.kind
    options: dict[str, Any] = {"tooltip": kind.tip}
    if kind.advanced:
        options["advanced"] = True
    if isinstance(kind, Socket):
        return kind.type, options
    if one.has_default:
        options["default"] = one.default
    if isinstance(kind, Choice):
        return kind.now(host), options
    if isinstance(kind, (Whole, Number)):
        options |= {"min": kind.low, "max": kind.high, "step": kind.step}
        if isinstance(kind, Whole) and kind.seed:
            options["control_after_generate"] = True
        if isinstance(kind, Number):
            options["round"] = False
        return ("INT" if isinstance(kind, Whole) else "FLOAT"), options
    if isinstance(kind, Text):
        return "STRING", options | {"multiline": kind.lines}
    assert isinstance(kind, Flag)
    return "BOOLEAN", options


# --- what the page asks -----------------------------------------------------------------------------------------------


def _answer(look: Callable[[ComfyHost, dict[str, str]], Any]) -> Callable[[Any], Awaitable[Any]]:
    """A handler: reads files, so not in the event loop; errors of ours are sentences with a status."""
    from aiohttp import web

    async def handler(request: Any) -> Any:
        ask = functools.partial(look, ComfyHost(), dict(request.query))
        try:
            found = await asyncio.get_running_loop().run_in_executor(None, ask)
        except AdapterNotFound as error:
            return web.json_response({"error": sentence(error)}, status=404)
        except CogLoomError as error:
            return web.json_response({"error": sentence(error)}, status=400)
        return web.FileResponse(found) if isinstance(found, Path) else web.json_response(found)

    return handler


def _open_routes() -> None:
    """All of them GET, and none writes: who can reach ComfyUI can ask them."""
    for name, look in page.ANSWERS.items():
        PromptServer.instance.routes.get(f"/cogloom/{name}")(_answer(look))


_register_folders()
_open_routes()
NODE_CLASS_MAPPINGS = {node.id: _class(node) for node in NODES.values()}
NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.title for node in NODES.values()}
