"""Recognising checkpoints, their geometry, and what is said of those that are none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodes.engine import checkpoints as c
from nodes.engine.errors import GeometryError, ModelNotFound, NotAModel, UsageError, WrongFamily

# The true configs of the released transformers, as far as they differ from the classes' defaults.
RELEASED = {
    "CogVideoX-2b": (dict(num_attention_heads=30, num_layers=30), "CogVideoXPipeline", 694),
    "CogVideoX-5b": (
        dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
        "CogVideoXPipeline", 1188,
    ),
    "CogVideoX-5b-I2V": (
        dict(num_attention_heads=48, num_layers=42, in_channels=32, use_rotary_positional_embeddings=True,
             use_learned_positional_embeddings=True),
        "CogVideoXImageToVideoPipeline", 1188,
    ),
    "CogVideoX1.5-5B": (
        dict(num_attention_heads=48, num_layers=42, patch_size_t=2, patch_bias=False, sample_height=300,
             sample_width=300, sample_frames=81, use_rotary_positional_embeddings=True),
        "CogVideoXPipeline", 1188,
    ),
    "CogVideoX1.5-5B-I2V": (
        dict(num_attention_heads=48, num_layers=42, in_channels=32, patch_size_t=2, patch_bias=False, ofs_embed_dim=512,
             sample_height=300, sample_width=300, sample_frames=81, use_rotary_positional_embeddings=True),
        "CogVideoXImageToVideoPipeline", 1188,
    ),
    "CogVideoX-Fun-5b-Control": (
        dict(num_attention_heads=48, num_layers=42, in_channels=32, use_rotary_positional_embeddings=True),
        "CogVideoXFunControlPipeline", 1188,
    ),
}  # fmt: skip


def hollow(folder: Path, pipeline: str, transformer: dict) -> Path:
    """A checkpoint's configs without its weights, from the real classes built on the meta device."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**transformer)
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512), latent_channels=16,
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        )  # fmt: skip
    for part, config in (("transformer", model), ("vae", vae)):
        (folder / part).mkdir(parents=True)
        config.save_config(folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_recognised(name: str, tmp_path: Path):
    config, pipeline, _ = RELEASED[name]
    found = c.open_checkpoint(hollow(tmp_path / "anything", pipeline, config))
    assert found.family.name == name
    assert found.family.fixed_size == (name == "CogVideoX-5b-I2V")
    assert (found.latent_channels, found.spatial, found.temporal, found.text_length) == (16, 8, 4, 226)
    assert found.check_geometry(*found.defaults()).channels == 16


def test_fun_inpainting_is_named_and_refused(tmp_path: Path):
    config = dict(num_attention_heads=48, num_layers=42, in_channels=33)
    with pytest.raises(WrongFamily, match="33 input channels of Fun InP"):
        c.open_checkpoint(hollow(tmp_path / "x", "CogVideoXPipeline", config))


def test_a_size_of_its_own_gets_a_row_of_its_own(checkpoints: Path):
    found = {name: c.open_checkpoint(checkpoints / name) for name in ("tiny-t2v", "tiny-i2v", "tiny-1.5")}
    assert found["tiny-t2v"].family.task == "t2v"
    assert found["tiny-i2v"].family.task == "i2v"
    assert found["tiny-1.5"].family.frame_step == 16
    assert found["tiny-t2v"].family.sizes == ((64, 64),)


def test_the_embedded_ones():
    demo, sibling = (c.open_checkpoint(folder) for folder in c.demo_folders())
    assert (demo.family.task, sibling.family.task) == ("t2v", "i2v")
    assert sibling.part("vae") == demo.part("vae")  # shared, not copied
    assert sibling.part("transformer") != demo.part("transformer")
    assert demo.defaults() == (17, 64, 64)


FIVE_B = c.Checkpoint("CogVideoX-5b", Path("."), next(f for f in c.FAMILIES if f.name == "CogVideoX-5b"), None, 16, 8, 4, 2, 226)  # fmt: skip  # noqa: E501
FIFTEEN = replace(FIVE_B, name="CogVideoX1.5-5B", family=next(f for f in c.FAMILIES if f.name == "CogVideoX1.5-5B"))
LEARNED = replace(FIVE_B, name="CogVideoX-5b-I2V", family=replace(FIVE_B.family, fixed_size=True))


@pytest.mark.parametrize(
    ("checkpoint", "geometry", "said"),
    [
        (FIVE_B, (48, 720, 480), "the nearest is 49"),
        (FIVE_B, (0, 720, 480), "the nearest is 9"),
        (FIVE_B, (10, 720, 480), "the nearest is 9"),
        (FIVE_B, (13, 720, 480), "the nearest is"),
        (FIVE_B, (-1, 720, 480), "the nearest is 9"),
        (FIVE_B, (10000, 720, 480), "the nearest is 49"),
        (FIVE_B, (49, 725, 480), "the nearest is 720×480"),
        (FIVE_B, (49, 720, 8), "the nearest is 720×128"),
        (FIVE_B, (49, 4000, 4000), "pixels; the nearest is 720×720"),
        (FIFTEEN, (49 + 8, 1360, 768), "16·N + 1"),
        (FIFTEEN, (200, 1360, 768), "the nearest is 161"),
        (LEARNED, (49, 720, 496), "one size only, 720×480"),
    ],
)
def test_illegal_geometry_names_the_nearest_legal(checkpoint, geometry, said: str):
    with pytest.raises(GeometryError) as caught:
        checkpoint.check_geometry(*geometry)
    assert said in str(caught.value)
    assert checkpoint.name in str(caught.value)


def test_the_nearest_value_that_is_named_is_legal():
    import re

    for frames in range(-5, 80):
        for side in (1, 100, 333, 480, 2000):
            try:
                FIVE_B.check_geometry(frames, 720, side)
            except GeometryError as error:
                text = str(error)
                near_frames = re.search(r"frames:.*?nearest is (\d+)", text)
                near_size = re.search(r"nearest is (\d+)×(\d+)", text)
                size = (int(near_size[1]), int(near_size[2])) if near_size else (720, side)
                FIVE_B.check_geometry(int(near_frames[1]) if near_frames else frames, *size)


def broken(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "tiny-t2v", tmp_path / "models" / "mine"))


def test_what_is_wrong_with_a_folder_is_said(checkpoints: Path, tmp_path: Path):
    folder = broken(checkpoints, tmp_path)
    (folder / "transformer" / "config.json").write_text("{broken")
    with pytest.raises(NotAModel, match=r"config\.json cannot be read as JSON"):
        c.open_checkpoint(folder)
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(NotAModel, match="is missing"):
        c.open_checkpoint(folder)
    shutil.rmtree(folder / "vae")
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "CogVideoXTransformer3DModel"}))
    with pytest.raises(NotAModel, match="the part vae/ is missing"):
        c.open_checkpoint(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(WrongFamily, match="is a StableDiffusionPipeline, not a CogVideoX"):
        c.open_checkpoint(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(NotAModel, match=r"no model_index\.json"):
        c.open_checkpoint(folder)


def test_pickled_weights_are_never_taken(checkpoints: Path, tmp_path: Path):
    folder = broken(checkpoints, tmp_path)
    file = c.part_files(folder / "vae")[0]
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(NotAModel, match=r"Pickled weights .* are never loaded"):
        c.part_files(folder / "vae")


def test_missing_shards_are_counted(checkpoints: Path, tmp_path: Path):
    folder = broken(checkpoints, tmp_path) / "transformer"
    index = {"weight_map": {"a": "one-of-two.safetensors", "b": "../../escape.safetensors"}}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotAModel, match="2 of 2 weight files are missing"):
        c.part_files(folder)


def test_unknown_names_come_with_the_nearest(checkpoints: Path):
    with pytest.raises(ModelNotFound, match="tiny-t2v"):
        c.find_checkpoint("tiny-t2w", [checkpoints])
    with pytest.raises(ModelNotFound, match=r"models --download zai-org/CogVideoX-2b.*nothing is downloaded unasked"):
        c.find_checkpoint("cogvideox-2b", [checkpoints])
    for escape in ("../x", "a/../b", "/etc", "", "..", "a\\..\\b"):
        with pytest.raises(UsageError):
            c.find_checkpoint(escape, [checkpoints])


def test_names_are_found_in_any_case(checkpoints: Path):
    assert c.find_checkpoint("TINY-T2V", [checkpoints]).name == "tiny-t2v"


def test_a_fingerprint_knows_content_not_place(checkpoints: Path, tmp_path: Path):
    copy = Path(shutil.copytree(checkpoints / "tiny-t2v", tmp_path / "elsewhere"))
    assert c.fingerprint(copy / "vae") == c.fingerprint(checkpoints / "tiny-t2v" / "vae")
    file = c.part_files(copy / "vae")[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert c.fingerprint(copy / "vae") != c.fingerprint(checkpoints / "tiny-t2v" / "vae")
