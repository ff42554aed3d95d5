"""The few nodes of ComfyUI's own that graphs around ours need, done without it: the names, sockets and meaning are
ComfyUI's, and so is the order of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch

from .engine import video
from .engine.errors import UsageError
from .host import Host, contained, numbered
from .render import Clip, save
from .schema import Choice, Node, Number, Out, Shown, Socket, Text, Whole, node

CORE: dict[str, Node] = {}
_SIDE, _BATCH = 16384, 4096
IMAGE_OUT = (Out("IMAGE", "IMAGE", "Pictures."),)
ImageIn = Annotated[torch.Tensor, Socket("IMAGE", tip="Pictures.")]


def input_names(host: Host) -> list[str]:
    folder = host.input_folder
    names = (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else ()
    return sorted(path.relative_to(folder).as_posix() for path in names)


@node("LoadImage", "Load Image", (*IMAGE_OUT, Out("MASK", "MASK", "1 − alpha.")), registry=CORE)
def load_image(
    host: Host,
    image: Annotated[str, Choice(input_names, others=True, tip="A picture in the input folder.")],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of the input folder. Its mask is empty here: none of our nodes reads one."""
    picture = video.read_image(_input(host, image))[None]
    return picture, torch.zeros(1, *picture.shape[1:3])


def _input(host: Host, name: str) -> Path:
    name = name.removesuffix(" [input]")
    if name.endswith("]"):
        raise UsageError(
            f"{name!r} lies in another folder of ComfyUI's; copy it to the input folder and name it alone."
        )
    return contained(host.input_folder, name)


@node("EmptyImage", "EmptyImage", IMAGE_OUT, registry=CORE)
def empty_image(
    host: Host,
    width: Annotated[int, Whole(1, _SIDE, tip="In pixels.")] = 512,
    height: Annotated[int, Whole(1, _SIDE, tip="In pixels.")] = 512,
    batch_size: Annotated[int, Whole(1, _BATCH, tip="How many.")] = 1,
    color: Annotated[int, Whole(0, 0xFFFFFF, tip="0xRRGGBB.")] = 0,
) -> tuple[torch.Tensor]:
    """Pictures of one colour."""
    if width * height * batch_size > video.MAX_PIXELS:
        raise UsageError(f"{batch_size} pictures of {width}×{height} are more than {video.MAX_PIXELS:,} pixels.")
    rgb = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]) / 255
    return (rgb.expand(batch_size, height, width, 3).contiguous(),)


@node("ImageFromBatch", "ImageFromBatch", IMAGE_OUT, registry=CORE)
def image_from_batch(
    host: Host,
    image: ImageIn,
    batch_index: Annotated[int, Whole(0, _BATCH - 1, tip="The first, from 0.")] = 0,
    length: Annotated[int, Whole(1, _BATCH, tip="How many.")] = 1,
) -> tuple[torch.Tensor]:
    """Some pictures of a batch; past the end, what there is."""
    first = min(len(image) - 1, batch_index)
    return (image[first : first + min(len(image) - first, length)].clone(),)


@node("RepeatImageBatch", "RepeatImageBatch", IMAGE_OUT, registry=CORE)
def repeat_image_batch(
    host: Host, image: ImageIn, amount: Annotated[int, Whole(1, _BATCH, tip="How often.")] = 1
) -> tuple[torch.Tensor]:
    """A batch several times over."""
    return (image.repeat(amount, 1, 1, 1),)


@node("LoadVideo", "Load Video", (Out("VIDEO", "VIDEO", "A clip."),), registry=CORE)
def load_video(
    host: Host,
    file: Annotated[str, Choice(input_names, others=True, tip="A clip in the input folder.")],
) -> tuple[Clip]:
    """A clip of the input folder."""
    frames, fps = video.read_video(_input(host, file))
    return (Clip(frames, fps, {}),)


@node(
    "GetVideoComponents",
    "Get Video Components",
    (
        Out("images", "IMAGE", "The frames."),
        Out("audio", "AUDIO", "Sound, which is not read here."),
        Out("fps", "FLOAT", "Frames per second."),
    ),
    registry=CORE,
)
def video_components(
    host: Host, video: Annotated[Clip, Socket("VIDEO", tip="A clip.")]
) -> tuple[torch.Tensor, None, float]:
    """A clip taken apart."""
    return video.frames, None, video.fps


@node("CreateVideo", "Create Video", (Out("VIDEO", "VIDEO", "A clip."),), registry=CORE)
def create_video(
    host: Host,
    images: ImageIn,
    fps: Annotated[float, Number(1.0, 120.0, 1.0, tip="Frames per second.")] = 30.0,
    audio: Annotated[Any, Socket("AUDIO", tip="Sound, which is not written here.")] = None,
) -> tuple[Clip]:
    """Frames and a speed."""
    if audio is not None:
        raise UsageError("Sound is not written outside ComfyUI; take the link to audio away.")
    return (Clip(images, fps, {}),)


@node("SaveVideo", "Save Video", (), shows=True, registry=CORE)
def save_video(
    host: Host,
    video: Annotated[Clip, Socket("VIDEO", tip="A clip.")],
    filename_prefix: Annotated[str, Text(tip="Beginning of the name, below the output folder.")] = "video/ComfyUI",
    format: Annotated[str, Choice(("auto", "mp4"), tip="Of the file.")] = "auto",
    codec: Annotated[str, Choice(("auto", "h264"), tip="Of the pictures.")] = "auto",
) -> Shown:
    """Written as mp4, with the graph inside."""
    path = numbered(host.output_folder, filename_prefix, ".mp4")
    save(host, video, path=path)
    return Shown((), host.seen(path))


@node("PreviewAny", "Preview Any", (), shows=True, registry=CORE)
def preview_any(host: Host, source: Annotated[Any, Socket("*", tip="Anything.")]) -> Shown:
    """A value as text."""
    return Shown((), {"text": [str(source)[:10_000]]})
