"""Captions, grids and contact sheets."""

from __future__ import annotations

import pytest
import torch

from nodes.engine.errors import UsageError
from nodes.engine.layout import caption_strip, contact_sheet, edged, enlarged, grid, labelled


def clip(frames: int = 3, height: int = 48, width: int = 64, value: float = 0.5) -> torch.Tensor:
    return torch.full((frames, height, width, 3), value)


def ink(strip: torch.Tensor) -> torch.Tensor:
    return strip.amax(dim=-1) > 0.5


def test_a_strip_has_the_size_asked_for_and_an_even_height():
    for height in (24, 31, 32):
        strip = caption_strip(200, "glow 0.8", height)
        assert (strip.shape, strip.dtype) == ((height + height % 2, 200, 3), torch.float32)
        assert ink(strip).sum() > 50
    assert not ink(caption_strip(200, "")).any()


@pytest.mark.parametrize("width", [1, 8, 64, 192, 720])
@pytest.mark.parametrize("text", ["off", "glow 0.8 + ember 0.4, seed 7 " * 6, "Donaudampfschifffahrtsgesellschaft" * 4])
def test_text_stays_inside(width, text):
    strip = ink(caption_strip(width, text, 32))
    if width > 20:
        assert strip.any()
        assert not strip[:, :2].any()
        assert not strip[:, -2:].any()
        assert not strip[0].any()
        assert not strip[-1].any()


def test_short_text_is_set_larger_than_long_text():
    def tall(text: str) -> int:
        return int(ink(caption_strip(200, text, 28)).any(dim=1).sum())

    assert tall("HHH") > tall("H" * 18) > 0


def test_a_text_that_is_too_long_ends_in_an_ellipsis():
    full, longer = ("word " * count for count in (80, 90))
    assert torch.equal(caption_strip(192, full, 24), caption_strip(192, longer, 24))
    assert not torch.equal(caption_strip(192, "word word", 24), caption_strip(192, full, 24))


def test_letters_that_the_font_lacks_are_replaced_by_like_ones():
    assert torch.equal(caption_strip(300, "640×480 – Ä é → “x”"), caption_strip(300, '640x480 - A e -> "x"'))
    assert torch.equal(caption_strip(300, "漢"), caption_strip(300, "?"))


def test_the_label_is_above_the_clip_and_the_clip_untouched():
    frames = torch.rand(3, 64, 96, 3)
    out = labelled(frames, "off")
    assert out.shape == (3, 64 + 24, 96, 3)
    assert torch.equal(out[:, 24:], frames)
    assert torch.equal(out[0, :24], out[2, :24])
    assert labelled(clip(height=480, width=720), "off").shape == (3, 480 + 48, 720, 3)


def test_enlarging_repeats_pixels():
    frames = torch.rand(2, 4, 5, 3)
    large = enlarged(frames, 3)
    assert large.shape == (2, 12, 15, 3)
    assert torch.equal(large[:, 1::3, 2::3], frames)
    assert torch.equal(enlarged(frames, 1), frames)
    with pytest.raises(UsageError, match="Enlarged 0 times"):
        enlarged(frames, 0)


def test_a_grid_puts_each_clip_in_its_place():
    clips = [clip(value=value) for value in (0.2, 0.4, 0.6)]
    sheet = grid(clips, columns=2, gap=4)
    assert sheet.shape == (3, 48 * 2 + 4, 64 * 2 + 4, 3)
    assert torch.equal(sheet[:, :48, :64], clips[0])
    assert torch.equal(sheet[:, :48, 68:], clips[1])
    assert torch.equal(sheet[:, 52:, :64], clips[2])
    assert sheet[:, 48:52].unique().numel() == 1
    assert sheet[:, 52:, 68:].max() < 0.2


def test_a_shorter_clip_holds_its_last_frame():
    ramp = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 8, 8, 3)
    sheet = grid([ramp, ramp[:2]], columns=2, gap=0)
    assert sheet[:, 0, 8, 0].tolist() == [0, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(("height", "width", "gap"), [(7, 9, 0), (7, 9, 3), (8, 8, 1)])
def test_the_sides_of_a_grid_are_even(height, width, gap):
    for count in (1, 2, 3):
        sheet = grid([clip(2, height, width)] * count, columns=2, gap=gap)
        assert sheet.shape[1] % 2 == sheet.shape[2] % 2 == 0


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"one size; these are 64×48, 32×64"):
        grid([clip(), clip(height=64, width=32)], 2)
    for clips, columns in (([], 2), ([clip()], 0)):
        with pytest.raises(UsageError, match=r"A grid of \d clips in \d columns"):
            grid(clips, columns)


def test_a_contact_sheet_has_a_row_for_each_clip():
    ramp = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 48, 64, 3)
    sheet = contact_sheet([("base", ramp), ("glow", ramp[:2]), ("large", clip(3, 480, 720))], frames_per_clip=3)
    tile = 128 + 4  # 64 twice over, and the gap
    assert sheet.mode == "RGB"
    assert sheet.size == (160 + 3 * 164 - 4, 96 + 4 + 96 + 4 + 107)
    assert [sheet.getpixel((170 + i * tile, 40)) for i in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert [sheet.getpixel((170 + i * tile, 140)) for i in range(3)] == [(0,) * 3, (32,) * 3, (38,) * 3]
    assert ink(torch.tensor(list(sheet.crop((0, 0, 160, 96)).tobytes())).view(96, 160, 3) / 255).any()
    with pytest.raises(UsageError, match="0 clips"):
        contact_sheet([])


# --- a grid with its axes on the edges --------------------------------------------------------------------------------


def test_an_edged_grid_has_each_clip_under_its_column_and_beside_its_row():
    tiles = [[clip(value=0.1), None], [clip(value=0.3), clip(frames=2, value=0.4)]]
    sheet = edged(tiles, ["neon", "glow"], ["0.5", "1"])
    left, top, gap = 96, 28, 4
    assert sheet.shape == (3, top + 2 * 48 + gap, left + 2 * 64 + gap, 3)
    for i, row in enumerate(tiles):
        for j, one in enumerate(row):
            y, x = top + i * (48 + gap), left + j * (64 + gap)
            tile = sheet[:, y : y + 48, x : x + 64]
            expected = clip(value=38 / 255) if one is None else one[[0, 1, -1]]  # a shorter one holds its last
            assert torch.allclose(tile, expected)
    assert ink(sheet[0, :top, left : left + 64]).any()
    assert ink(sheet[0, top : top + 48, :left]).any()
    assert not ink(sheet[0, :top, :left]).any()


def test_edges_without_text_are_left_out_and_sides_are_even():
    sheet = edged([[clip(height=33, width=47)]], [""], [""])
    assert sheet.shape == (3, 34, 48, 3)
    assert edged([[clip(height=33, width=47)]], [""], ["a"]).shape == (3, 62, 48, 3)
    assert edged([[clip(height=33, width=47)]], ["a"], [""]).shape == (3, 34, 144, 3)


def test_half_floats_stay_half_and_are_the_same_eight_bits():
    frames = torch.arange(256).repeat(3).div(255).view(1, 16, 16, 3)
    whole, half = edged([[frames]], ["a"], ["b"]), edged([[frames.half()]], ["a"], ["b"])
    assert half.dtype == torch.float16
    assert torch.equal(whole.mul(255).round(), half.float().mul(255).round())


@pytest.mark.parametrize(
    ("tiles", "rows", "columns", "said"),
    [
        ([], [], [], "A grid of 0 clips in rows of none"),
        ([[None]], ["a"], ["b"], "A grid of 0 clips"),
        ([[clip()]], ["a", "b"], ["c"], "labelled 2 × 1"),
        ([[clip(), clip()], [clip()]], ["a", "b"], ["c", "d"], "in rows of 2, 1"),
        ([[clip(), clip(width=32)]], ["a"], ["b", "c"], "clips of one size"),
    ],
)
def test_an_edged_grid_that_does_not_fit_together_is_refused(tiles, rows, columns, said):
    with pytest.raises(UsageError, match=said):
        edged(tiles, rows, columns)
