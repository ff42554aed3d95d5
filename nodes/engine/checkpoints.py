"""The CogVideoX family as a table, and what one checkpoint folder is: its row, its geometry, where its parts lie.

Sources: the model cards and transformer/vae configs of zai-org (formerly THUDM) CogVideoX-2b, -5b, -5b-I2V,
CogVideoX1.5-5B, 1.5-5B-I2V and alibaba-pai CogVideoX-Fun, and the pipelines of diffusers.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import native
from .errors import AdapterError, GeometryError, ModelNotFound, NotAModel, UsageError, WrongFamily
from .pristine import STORED
from .safetensors_file import Spec, opened

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo"
DEMO = "cogloom-demo"
Task = Literal["t2v", "i2v", "control"]
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Family:
    """One row: what a base of this kind was trained for. Sizes are (width, height) in px, lengths in frames."""

    name: str
    title: str
    hub_id: str | None
    task: Task
    width: int  # of the transformer: heads x head size
    blocks: int
    in_channels: int
    patch_size_t: int | None  # None: the 1.0 generation; 2: 1.5
    frame_step: int  # legal lengths are frame_step * N + 1
    default_frames: int
    max_frames: int
    sizes: tuple[tuple[int, int], ...]  # recommended, the default first
    min_side: int
    max_pixels: int  # width x height
    fps: int
    dtype: str  # recommended on a GPU
    guidance: float
    scheduler: str  # "ddim" or "dpm"
    steps: int = 50
    fixed_size: bool = False  # learned positions: one size only
    loadable: str | None = None  # why it is not, in a sentence


_HD = ((1360, 768), (768, 1360), (1024, 768), (768, 768))
_SD = ((720, 480),)
_FUN = ((672, 384), (384, 672), (720, 480), (1024, 576))
_SD_PIXELS, _HD_PIXELS = 720 * 720, 1360 * 1360

FAMILIES: tuple[Family, ...] = (
    Family("cogloom-demo", "Embedded demo, text to video", None, "t2v", 192, 6, 6, None, 8, 17, 33, ((64, 64),),
           32, 96 * 96, 8, "fp32", 2.0, "ddim", steps=30),
    Family("cogloom-demo-i2v", "Embedded demo, image to video", None, "i2v", 192, 6, 12, None, 8, 17, 33, ((64, 64),),
           32, 96 * 96, 8, "fp32", 2.0, "ddim", steps=30),
    Family("CogVideoX-2b", "CogVideoX 2B, text to video", "zai-org/CogVideoX-2b", "t2v", 1920, 30, 16, None,
           8, 49, 49, _SD, 128, _SD_PIXELS, 8, "fp16", 6.0, "ddim"),
    Family("CogVideoX-5b", "CogVideoX 5B, text to video", "zai-org/CogVideoX-5b", "t2v", 3072, 42, 16, None,
           8, 49, 49, _SD, 128, _SD_PIXELS, 8, "bf16", 6.0, "dpm"),
    Family("CogVideoX-5b-I2V", "CogVideoX 5B, image to video", "zai-org/CogVideoX-5b-I2V", "i2v", 3072, 42, 32, None,
           8, 49, 49, _SD, 128, _SD_PIXELS, 8, "bf16", 6.0, "dpm", fixed_size=True),
    Family("CogVideoX1.5-5B", "CogVideoX 1.5 5B, text to video", "zai-org/CogVideoX1.5-5B", "t2v", 3072, 42, 16, 2,
           16, 81, 161, _HD, 256, _HD_PIXELS, 16, "bf16", 6.0, "dpm"),
    Family("CogVideoX1.5-5B-I2V", "CogVideoX 1.5 5B, image to video", "zai-org/CogVideoX1.5-5B-I2V", "i2v", 3072, 42,
           32, 2, 16, 81, 161, _HD, 256, _HD_PIXELS, 16, "bf16", 6.0, "dpm"),
    Family("CogVideoX-Fun-5b-Control", "CogVideoX-Fun 5B, control video", "alibaba-pai/CogVideoX-Fun-V1.1-5b-Control",
           "control", 3072, 42, 32, None, 8, 49, 49, _FUN, 128, _HD_PIXELS, 8, "bf16", 6.0, "ddim"),
    Family("CogVideoX-Fun-5b-InP", "CogVideoX-Fun 5B, inpainting", "alibaba-pai/CogVideoX-Fun-V1.1-5b-InP", "i2v",
           3072, 42, 33, None, 8, 49, 49, _FUN, 128, _HD_PIXELS, 8, "bf16", 6.0, "ddim",
           loadable="diffusers has no pipeline for the 33 input channels of Fun InP; its Control models do load"),
    Family("CogVideoX-Fun-2b-InP", "CogVideoX-Fun 2B, inpainting", "alibaba-pai/CogVideoX-Fun-V1.1-2b-InP", "i2v",
           1920, 30, 33, None, 8, 49, 49, _FUN, 128, _HD_PIXELS, 8, "bf16", 6.0, "ddim",
           loadable="diffusers has no pipeline for the 33 input channels of Fun InP; its Control models do load"),
)  # fmt: skip


@dataclass(frozen=True)
class LatentShape:
    """What a clip is inside the base: (1, frames, channels, height, width), frames without 1.5's padding."""

    frames: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Checkpoint:
    """One diffusers folder that holds a CogVideoX: which family, how its latents are shaped, where its parts lie."""

    name: str
    folder: Path
    family: Family
    shared: Path | None  # the folder that has the parts this one lacks
    latent_channels: int
    spatial: int  # px per latent
    temporal: int  # frames per latent
    patch: int
    text_length: int  # tokens
    file: Path | None = None  # which holds the transformer, in place of this folder's own

    def part(self, kind: str) -> Path:
        """The folder of a part (one of PARTS). Raises NotAModel when neither this nor the shared folder has it."""
        for folder in (self.folder, self.shared):
            if folder is not None and (folder / kind).is_dir():
                return folder / kind
        raise NotAModel(
            f"{self.name}: the part {kind}/ is missing in {self.folder}. A diffusers checkpoint has "
            f"{', '.join(p + '/' for p in PARTS)}; the download may have been broken off, so fetch it again."
        )

    def defaults(self) -> tuple[int, int, int]:
        """(frames, width, height) it was trained for."""
        width, height = self.family.sizes[0]
        return self.family.default_frames, width, height

    def check_geometry(self, frames: int, width: int, height: int) -> LatentShape:
        """Legal or refused, with the nearest legal value. Lengths in frames, sizes in px.

        Raises:
            GeometryError
        """
        family, problems = self.family, []
        near = min(max(1, round((frames - 1) / family.frame_step)), (family.max_frames - 1) // family.frame_step)
        near_frames = near * family.frame_step + 1
        if frames != near_frames:
            problems.append(
                f"{frames} frames: {self.name} makes {family.frame_step}·N + 1 frames, "
                f"{family.frame_step + 1} to {family.max_frames}; the nearest is {near_frames}"
            )
        if family.fixed_size:
            if (width, height) != family.sizes[0]:
                problems.append(
                    f"{width}×{height}: {self.name} has learned positions and makes one size only, "
                    f"{family.sizes[0][0]}×{family.sizes[0][1]}"
                )
        else:
            unit = self.spatial * self.patch
            near_width, near_height = (max(family.min_side, round(side / unit) * unit) for side in (width, height))
            while near_width * near_height > family.max_pixels:
                if near_width >= near_height:
                    near_width -= unit
                else:
                    near_height -= unit
            if (width, height) != (near_width, near_height):
                problems.append(
                    f"{width}×{height}: for {self.name} both sides are multiples of {unit}, at least "
                    f"{family.min_side}, and at most {family.max_pixels} pixels; the nearest is "
                    f"{near_width}×{near_height}"
                )
        if problems:
            raise GeometryError("; ".join(problems) + ".")
        return LatentShape(
            (frames - 1) // self.temporal + 1, self.latent_channels, height // self.spatial, width // self.spatial
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's configs (not its weights) and say what it is.

    Raises:
        ModelNotFound, NotAModel, WrongFamily
    """
    index_file = folder / "model_index.json"
    if not folder.is_dir():
        raise ModelNotFound(f"There is no folder {folder}.")
    if not index_file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise NotAModel(
            f"{folder.name}: no model_index.json in {folder} (it holds {found}). A base is a folder in diffusers "
            "layout; a transformer in a single file needs one that lends it the other parts."
        )
    index = _json(index_file)
    pipeline = str(index.get("_class_name", ""))
    if not pipeline.startswith("CogVideoX"):
        raise WrongFamily(
            f"{folder.name} is a {pipeline or 'checkpoint without a pipeline class'}, not a CogVideoX. "
            "CogLoom renders with the CogVideoX family alone: `python app.py models` lists it."
        )
    shares = index.get("_cogloom_shares")
    shared = None
    if isinstance(shares, str):
        if Path(shares).name != shares:
            raise NotAModel(f"{index_file}: _cogloom_shares may only name a folder beside this one, not {shares!r}.")
        shared = folder.parent / shares
    bare = Checkpoint(folder.name, folder, FAMILIES[0], shared, 0, 0, 0, 0, 0)
    transformer = _json(bare.part("transformer") / "config.json")
    vae = _json(bare.part("vae") / "config.json")
    if (
        transformer.get("_class_name") != "CogVideoXTransformer3DModel"
        or vae.get("_class_name") != "AutoencoderKLCogVideoX"
    ):
        raise WrongFamily(
            f"{folder.name}: its transformer is a {transformer.get('_class_name')} and its autoencoder a "
            f"{vae.get('_class_name')}; a CogVideoX has CogVideoXTransformer3DModel and AutoencoderKLCogVideoX."
        )
    try:
        checkpoint = replace(
            bare,
            family=_recognise(folder.name, pipeline, transformer, vae),
            latent_channels=int(vae["latent_channels"]),
            spatial=2 ** (len(vae["block_out_channels"]) - 1),
            temporal=int(vae["temporal_compression_ratio"]),
            patch=int(transformer["patch_size"]),
            text_length=int(transformer["max_text_seq_length"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NotAModel(
            f"{folder.name}: its config.json lacks or garbles {error}; fetch the checkpoint again."
        ) from error
    if checkpoint.family.loadable is not None:
        raise WrongFamily(f"{folder.name} is {checkpoint.family.title}: {checkpoint.family.loadable}.")
    return checkpoint


def _recognise(name: str, pipeline: str, transformer: dict[str, Any], vae: dict[str, Any]) -> Family:
    """The table's row whose shapes these are; a checkpoint of other sizes gets a row of its own from its config."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    control = pipeline == "CogVideoXFunControlPipeline"
    shape = (width, transformer["num_layers"], transformer["in_channels"], transformer.get("patch_size_t"))
    for family in FAMILIES:
        same = (family.width, family.blocks, family.in_channels, family.patch_size_t) == shape
        if same and (family.task == "control") == control:
            return replace(family, fixed_size=bool(transformer.get("use_learned_positional_embeddings")))
    newer = transformer.get("patch_size_t") is not None
    model = next(f for f in FAMILIES if (f.patch_size_t is not None) == newer and f.width > 192)
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    side = (transformer["sample_width"] * spatial, transformer["sample_height"] * spatial)
    channels = vae["latent_channels"]
    task: Task = "control" if control else "i2v" if transformer["in_channels"] == 2 * channels else "t2v"
    odd = None
    if transformer["in_channels"] not in (channels, 2 * channels):
        odd = (
            f"its {transformer['in_channels']} input channels are neither {channels} (text) nor {2 * channels} (image)"
        )
    return replace(
        model, name=name, title=f"CogVideoX of width {width}", hub_id=None, task=task, width=width,
        blocks=transformer["num_layers"], in_channels=transformer["in_channels"], sizes=(side,),
        dtype="fp32" if width < 1024 else model.dtype,
        min_side=min(*side, 4 * spatial * transformer["patch_size"]), max_pixels=2 * side[0] * side[1],
        fixed_size=bool(transformer.get("use_learned_positional_embeddings")), loadable=odd,
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotAModel(
            f"{path} is missing; the download may have been broken off, so fetch the checkpoint again."
        ) from error
    except (OSError, ValueError) as error:
        raise NotAModel(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise NotAModel(
            f"{path} holds a {type(value).__name__} where a JSON object belongs; fetch the checkpoint again."
        )
    return value


def demo_folders() -> tuple[Path, ...]:
    return tuple(f for f in (DEMO_FOLDER / DEMO, DEMO_FOLDER / f"{DEMO}-i2v") if (f / "model_index.json").is_file())


def local_folders(model_folders: Iterable[Path]) -> Iterator[Path]:
    """Every checkpoint folder on this machine, the embedded ones first; each is a direct child of a models folder."""
    yield from demo_folders()
    for parent in model_folders:
        if parent.is_dir():
            yield from sorted(f for f in parent.iterdir() if (f / "model_index.json").is_file())


def find_checkpoint(name: str, model_folders: Iterable[Path]) -> Checkpoint:
    """By the embedded name, a folder name under the models folders, a family name, or a hub id already downloaded.

    Raises:
        ModelNotFound: with the nearest names, or the command that downloads it.
    """
    model_folders = tuple(model_folders)
    if not name.strip() or any(part in ("", ".", "..") for part in name.replace("\\", "/").split("/")):
        raise UsageError(f"{name!r} is not a base's name; `python app.py models` lists them.")
    here = {f.name.lower(): f for f in reversed(tuple(local_folders(model_folders)))}
    wanted = name.lower()
    hub_id = next((f.hub_id for f in FAMILIES if f.hub_id and wanted in (f.name.lower(), f.hub_id.lower())), None)
    if hub_id is None and wanted.count("/") == 1:
        hub_id = name
    for key in (wanted, (hub_id or wanted).rsplit("/", 1)[-1].lower()):
        if key in here:
            return open_checkpoint(here[key])
    for parent in model_folders:  # a folder that is there but is no checkpoint says what is wrong with it
        if "/" not in name and (parent / name).is_dir():
            return open_checkpoint(parent / name)
    cached = hub_cached(hub_id) if hub_id else None
    if cached is not None:
        return replace(open_checkpoint(cached), name=hub_id.rsplit("/", 1)[-1] if hub_id else name)
    if hub_id:
        raise ModelNotFound(
            f"{hub_id} is not on this machine. `python app.py models --download {hub_id}` fetches it from Hugging Face "
            f"into {model_folders[0] if model_folders else 'the models folder'}; nothing is downloaded unasked."
        )
    names = sorted({*(f.name for f in local_folders(model_folders)), *(f.name for f in FAMILIES if f.hub_id)})
    near = difflib.get_close_matches(name, names, 3, 0.4) or names[:3]
    raise ModelNotFound(
        f"No base is called {name!r}. The nearest names are {', '.join(near)}; searched: the embedded demo and "
        f"{', '.join(str(f) for f in model_folders) or 'no models folder'}."
    )


def hub_cached(hub_id: str) -> Path | None:
    """The snapshot folder of an earlier Hugging Face download, without asking the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def part_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a part, safetensors alone. Raises NotAModel when there are none, or shards are missing."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if missing or not names:
            raise NotAModel(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing[:3])}); the "
                "download may have been broken off, so fetch the checkpoint again."
            )
        return tuple(folder / n for n in names)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise NotAModel(
            f"{folder} has no .safetensors weights. Pickled weights (.bin, .pt) can execute code and are never loaded; "
            "fetch the safetensors version."
        )
    return files


def part_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in part_files(folder))


def fingerprint(folder: Path) -> str:
    """SHA-256 of a part: its config and weights. Files above 64 MiB count by size, head and 64 evenly spaced samples.

    So two downloads of the same 9.5 GB text encoder are known as one without reading either. "sampled:" marks it.
    """
    return _hashed(folder / "config.json", part_files(folder))


def _hashed(config: Path, files: Iterable[Path]) -> str:
    status = [(file, file.stat()) for file in files]
    return _fingerprint(config, tuple((str(file), s.st_size, s.st_mtime_ns) for file, s in status))


@lru_cache(maxsize=64)
def _fingerprint(config: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    head = b""
    if config.is_file():
        plain = {k: v for k, v in _json(config).items() if not k.startswith("_")}  # not the version that wrote it
        head = json.dumps(plain, sort_keys=True).encode()
    return hash_of_files([Path(name) for name, _, _ in stamp], head)


def hash_of_files(files: Iterable[Path], head: bytes = b"") -> str:
    """SHA-256 of `head` and the files, in order; of large files, of size, head and samples each, and then marked so."""
    import hashlib

    digest, sampled = hashlib.sha256(head), False
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size <= 64 << 20:
                digest.update(file.read())
                continue
            sampled = True
            digest.update(str(size).encode())
            for i in range(65):
                file.seek(min(i * size // 64, size - (64 << 10)))
                digest.update(file.read(64 << 10))
    return ("sampled:" if sampled else "") + digest.hexdigest()


# --- a transformer in a file of its own -------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Where a transformer's weights lie. `spelling` is tensor in the file -> parameter, None where they are alike."""

    files: tuple[Path, ...]
    spelling: Mapping[str, str] | None
    nbytes: int  # of the files; of a file of its own, what its numbers take in 16 bit


def transformer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Raises NotAModel."""
    return _json(checkpoint.part("transformer") / "config.json")


def transformer_weights(checkpoint: Checkpoint) -> Weights:
    """Of the checkpoint's folder, or of the file that stands in for it.

    Raises:
        ModelNotFound, NotAModel, WrongFamily
    """
    if checkpoint.file is None:
        folder = checkpoint.part("transformer")
        return Weights(part_files(folder), None, part_bytes(folder))
    spelling, count = _spelling(checkpoint, checkpoint.file)
    return Weights((checkpoint.file,), spelling, 2 * count)


def transformer_hash(checkpoint: Checkpoint) -> str:
    """As `fingerprint`: of the config and of the weights that are used with it."""
    folder = checkpoint.part("transformer")
    return fingerprint(folder) if checkpoint.file is None else _hashed(folder / "config.json", (checkpoint.file,))


def with_file(like: Checkpoint, file: Path) -> Checkpoint:
    """The checkpoint with the transformer of a single file: with ComfyUI's names or diffusers', in float or cast to fp8
    for storage. Its header is read and compared with the config of `like`, which lends everything else; weights of
    its own transformer need not be there.

    Raises:
        ModelNotFound, NotAModel, WrongFamily: with both numbers, where the two do not go together.
    """
    _spelling(like, file)
    return replace(like, name=file.name, file=file)


def _spelling(like: Checkpoint, file: Path) -> tuple[Mapping[str, str], int]:
    """Tensor in the file -> parameter, and how many numbers there are."""
    config = transformer_config(like)
    try:
        wanted = native.shapes_of(config)
    except (KeyError, TypeError) as error:
        raise NotAModel(f"{like.folder.name}: its transformer's config.json lacks or garbles {error}.") from error
    tensors = tensors_of(file)
    spelt = native.spelling(tensors)
    if spelt is None:
        names = ", ".join(list(tensors)[:3])
        what = native.what_instead(tensors) or f"no CogVideoX transformer: its tensors have names like {names}"
        raise NotAModel(f"{file.name} is {what}.")
    of = dict(spelt.of)
    if not config.get("use_rotary_positional_embeddings"):  # as the 2b's, whose table of fixed positions is computed
        of = {name: parameter for name, parameter in of.items() if parameter != native.TABLE}
    shapes = {parameter: tensors[name].shape for name, parameter in of.items()}
    own, its = native.traits(wanted), native.traits(shapes)
    apart = [f"{its[trait]} (there {own[trait]})" for trait in own if trait in its and its[trait] != own[trait]]
    if apart:
        near = next((f.name for f in FAMILIES if f.width > 192 and not f.loadable and could_be(f, shapes)), None)
        raise WrongFamily(
            f"{file.name} does not go with {like.folder.name}: it has {'; '.join(apart)}. Choose the checkpoint that "
            f"it was made from{f', such as {near},' if near else ''} to lend it what it lacks."
        )
    seen: set[str] = set()
    twice = [name for name, parameter in of.items() if parameter in seen or seen.add(parameter)]
    strange = [*spelt.strange, *(name for name, parameter in of.items() if parameter not in wanted)]
    missing = [name for name in wanted if name not in shapes]
    odd = [name for name, shape in shapes.items() if wanted.get(name, shape) != shape]
    cast = [name for name in of if tensors[name].dtype not in STORED]
    for names, what in (
        (missing, f"of the {len(wanted)} tensors of such a transformer are missing"),
        (twice, "tensors are there twice, by two spellings of one name"),
        (strange, "tensors are none of a CogVideoX transformer's, such as the scales of quantised weights"),
        (odd, f"tensors have other shapes than in {like.folder.name}"),
        (cast, f"tensors are in dtypes that are not read ({', '.join(STORED)} are)"),
    ):
        if names:
            raise NotAModel(
                f"{file.name}: {len(names)} {what}; the first is {names[0]}. Get a file of the whole transformer that "
                "is not quantised, or the checkpoint as a folder in diffusers layout."
            )
    return of, sum(math.prod(shape) for shape in shapes.values())


def could_be(family: Family, shapes: native.Shapes) -> bool:
    """Whether a transformer with these parameters may be of this row, as far as shapes tell."""
    flat = family.in_channels * 4 * (family.patch_size_t or 1)
    takes = (family.in_channels, 2, 2) if family.patch_size_t is None else (flat,)
    return (
        shapes.get("patch_embed.proj.weight") == (family.width, *takes)
        and f"transformer_blocks.{family.blocks - 1}.norm1.linear.weight" in shapes
        and f"transformer_blocks.{family.blocks}.norm1.linear.weight" not in shapes
    )


_PICKLE = "Pickled weights can execute code and are never loaded; get the safetensors version"


def tensors_of(file: Path) -> Mapping[str, Spec]:
    """The checked header. Raises ModelNotFound, NotAModel."""
    if not file.is_file():
        raise ModelNotFound(f"There is no file {file}. Choose one that is there.")
    if file.suffix.lower() != ".safetensors":
        raise NotAModel(f"{file.name}: a base in one file is a .safetensors file. {_PICKLE}.")
    try:
        with open(file, "rb") as handle:
            start = handle.read(10)
        if len(start) < 10:
            raise NotAModel(f"{file.name}: {len(start)} bytes, too short to be a base. Download it again.")
        if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
            raise NotAModel(f"{file.name}: a pickle, whatever its name says. {_PICKLE}.")
        with opened(file) as source:
            return source.tensors
    except OSError as error:
        raise NotAModel(f"{file.name}: it cannot be read ({error.strerror or error}).") from error
    except AdapterError as error:  # the container is an adapter's, and is read with the same suspicion
        raise NotAModel(f"{error}") from error
