"""Adapter files as a broken download, a careless trainer or an enemy makes them, and what a fuzzer makes of good ones.

Small, deterministic and all different. Each is a sound file with one thing wrong, so that it is refused for that and
for nothing else; what is sound before is in `GOOD` and `SEEDS`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nodes.engine import lora_file
from nodes.engine.safetensors_file import HEADER_CAP

Q = "transformer_blocks.0.attn1.to_q"  # 64 × 64 in `tests.tiny`
LAST = "transformer_blocks.1.attn1.to_v"
A, B = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
RANK, WIDTH = 4, 64
NAN, INF = float("nan"), float("inf")

HEADER, VALUES, BASE, SUM, CHANCE = "header", "values", "base", "sum", "chance"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Bad:
    """One file, and what lies beside it. `found` is what gives it away: the header (with what it scales by and what
    lies beside it), the values, the base it is meant for, or the sum with the base and the others, which is no single
    file's fault. `chance`: it may still be sound. `said`: a pattern of the message, in any case."""

    name: str
    content: bytes | Callable[[Path], Any]  # or what puts it there
    said: str = ""
    found: str = HEADER
    file: str = ""  # in a folder of its own; else the name makes the file's
    beside: Mapping[str, bytes] = field(default_factory=dict)

    def put(self, root: Path) -> Path:
        path = root / self.name / self.file if self.file else root / f"{self.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        for name, data in self.beside.items():
            path.with_name(name.replace("@", path.name)).write_bytes(data)
        return path


# --- sound files ------------------------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Finite, small, and no two rows alike."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return (((torch.arange(count) * 7) % 31 - 15) / 40).to(dtype).reshape(shape)


def pair(
    stem: str = f"transformer.{Q}", rank: int = RANK, into: int = WIDTH, out: int = WIDTH, parts: str = "lora_A lora_B"
) -> dict[str, torch.Tensor]:
    down, up = parts.split()
    return {f"{stem}.{down}.weight": numbers(rank, into), f"{stem}.{up}.weight": numbers(out, rank)}


_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.float8_e4m3fn: "F8_E4M3",
}


def laid_out(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    """Header and body. By hand, for the library's own writer shuffles the metadata: not the same bytes each time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    body = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        at = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": at}
        body += raw
    return header, body


def container(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + body


def file(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    return container(*laid_out(tensors, metadata))


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


GOOD_HEADER, GOOD_BODY = laid_out(pair())
GOOD = container(GOOD_HEADER, GOOD_BODY)


def _written() -> bytes:
    modules = {path: (numbers(RANK, WIDTH), numbers(WIDTH, RANK)) for path in (Q, LAST)}
    with tempfile.TemporaryDirectory() as folder:
        path = lora_file.write(Path(folder, "x.safetensors"), modules, 2, {"modelspec.title": "x"})
        return path.read_bytes()


def _lycoris(stem: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{stem}.{suffix}": numbers(*shape) + 0.01 for suffix, shape in shapes.items()}


LOHA = {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)}
LOKR = {"lokr_w1": (8, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}
ALPHA = torch.tensor(2.0)
UNET = f"lora_unet_{Q.replace('.', '_')}"
SAT = "model.diffusion_model.transformer.layers.0.attention"

SEEDS: Mapping[str, bytes] = {
    "diffusers": _written(),
    "comfyui": safetensors.torch.save(
        pair("diffusion_model.blocks.0.q", parts="lora_down lora_up") | {"diffusion_model.blocks.0.q.alpha": ALPHA}
    ),
    "kohya": file(
        pair(UNET, parts="lora_down lora_up") | {f"{UNET}.alpha": ALPHA},
        {"ss_network_alpha": "2.0", "ss_network_dim": "4", "ss_base_model_version": "cogvideox"},
    ),
    "sat": file(
        {f"{SAT}.query_key_value.matrix_{side}.{i}": numbers(*shape)
         for i in range(3) for side, shape in (("A", (4, 64)), ("B", (64, 4)))}
    ),
    "loha": file(_lycoris(f"transformer.{Q}", **LOHA)),
    "lokr": file(_lycoris(f"transformer.{Q}", **LOKR) | {f"transformer.{Q}.alpha": ALPHA}),
    "dora": file(pair() | {f"transformer.{Q}.dora_scale": numbers(64, 1) + 1}),
    "differences": file({f"transformer.{Q}.diff": numbers(64, 64), f"transformer.{Q}.diff_b": numbers(64)}),
}  # fmt: skip


def sound() -> list[Bad]:
    """What all the others are made of, with nothing wrong."""
    return [
        *(Bad(f"sound-{name}", data) for name, data in SEEDS.items()),
        *_doors("sound", config(), ""),
        Bad("sound-sidecar", GOOD, beside={"@.json": b'{"scale": 0.5, "trigger_words": ["x"], "notes": ""}'}),
        Bad("sound-metadata", container(metadata_of('"x"'), GOOD_BODY)),
        Bad("sound-field", container(field_of(A, "shape", "[4, 64]"), GOOD_BODY)),
    ]


# --- not a safetensors at all -----------------------------------------------------------------------------------------


def _zipped(name: str, data: bytes) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), data)
    return memory.getvalue()


def _other_formats() -> Iterator[Bad]:
    pickled = "a pickle, which can run any program"
    for protocol in range(2, 6):
        yield Bad(f"pickle-protocol-{protocol}", pickle.dumps({A: [1.0] * 20}, protocol), pickled)
    yield Bad("pickle-of-torch", _zipped("archive/data.pkl", pickle.dumps({A: [1.0] * 20}, 2)), pickled)
    html = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body onload=alert(1)></body></html>"
    blank_page = b"\n\n\n\n\n\n\n\n" + html
    for name, data, said in (
        ("html-page", html, "a web page"),
        ("html-page-in-capitals", html.upper(), "a web page"),
        ("html-page-after-blank-lines", blank_page, "bytes long"),
        ("html-page-after-a-byte-order-mark", b"\xef\xbb\xbf" + html, "bytes long"),
        ("xml-error-of-a-bucket", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        ("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "LFS"),
        ("gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(40), "GGUF"),
        ("zip-with-a-good-one-inside", _zipped("neon.safetensors", GOOD), pickled),
        ("empty-zip", b"PK\x05\x06" + bytes(18), "bytes long"),
        ("gzip-of-a-good-one", gzip.compress(GOOD, mtime=0), "bytes long"),
        ("seven-zip", b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(60), "bytes long"),
        ("rar", b"Rar!\x1a\x07\x01\x00" + bytes(60), "bytes long"),
        ("png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(60), "bytes long"),
        ("jpeg", b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(60), "bytes long"),
        ("mp4", b"\x00\x00\x00\x20ftypisom" + bytes(60), "bytes long"),
        ("pdf", b"%PDF-1.7\n" + bytes(60), "bytes long"),
        ("elf", b"\x7fELF\x02\x01\x01\x00" + bytes(60), "bytes long"),
        ("npy", b"\x93NUMPY\x01\x00" + b"{'descr': '<f4'}" + bytes(40), "bytes long"),
        ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(60), "bytes long"),
        ("shell-script", b"#!/bin/sh\nrm -rf ~\n", "bytes long"),
        ("json-alone", json.dumps(GOOD_HEADER).encode(), "bytes long"),
        ("index-of-shards", b'{"metadata": {}, "weight_map": {"x": "y.safetensors"}}', "bytes long"),
        ("json-of-an-api-error", b'{"error": "Repository not found", "status": 404}', "bytes long"),
        ("plain-text", b"Entry not found, please try again later", "bytes long"),
        ("utf-16-text", "Entry not found".encode("utf-16"), "bytes long"),
        ("pickle-protocol-0", pickle.dumps({A: [1.0]}, 0), "bytes long"),
        ("empty", b"", "0 bytes"),
        ("one-byte", b"\x08", "1 bytes"),
        ("seven-bytes", GOOD[:7], "7 bytes"),
        ("eight-bytes", GOOD[:8], "8 bytes"),
        ("nine-bytes", GOOD[:9], "9 bytes"),
        ("zeros", bytes(4096), "brace"),
        ("all-ones", b"\xff" * 4096, "bytes long"),
        ("noise", random.Random(1).randbytes(4096), "bytes long"),
        ("noise-behind-a-fair-length", struct.pack("<Q", 64) + random.Random(2).randbytes(4096), "brace"),
    ):
        yield Bad(name, data, said)


def _not_files() -> Iterator[Bad]:
    yield Bad("folder", lambda path: path.mkdir(), "no adapter|not a file")
    if os.name != "posix":
        return
    yield Bad("pipe", os.mkfifo, "not a file")
    yield Bad("link-to-endless-zeros", lambda path: path.symlink_to("/dev/zero"), "not a file")
    yield Bad("link-to-nothing", lambda path: path.symlink_to("gone.safetensors"), "not there|no such file")
    yield Bad("link-to-itself", lambda path: path.symlink_to(path.name), "not there|cannot be read|no such file")
    if os.geteuid() != 0:  # nothing is locked to root

        def locked(path: Path) -> None:
            path.write_bytes(GOOD)
            path.chmod(0)

        yield Bad("no-right-to-read", locked, "cannot be read")


# --- the container ----------------------------------------------------------------------------------------------------


def _framing() -> Iterator[Bad]:
    head = json.dumps(GOOD_HEADER).encode()
    for name, length, said in (
        ("length-0", 0, "brace|broken"),
        ("length-1", 1, "broken"),
        ("length-one-less", len(head) - 1, "broken"),
        ("length-one-more", len(head) + 1, "broken|UTF-8"),
        ("length-of-the-whole-file", len(head) + len(GOOD_BODY) + 8, "bytes long"),
        ("length-up-to-the-end", len(head) + len(GOOD_BODY), "broken|UTF-8"),
        ("length-of-4-gib", 1 << 32, "bytes long"),
        ("length-2-to-62", 1 << 62, "bytes long"),
        ("length-2-to-63", 1 << 63, "bytes long"),
        ("length-2-to-64", (1 << 64) - 1, "bytes long"),
        ("length-big-endian", struct.unpack(">Q", struct.pack("<Q", len(head)))[0], "bytes long"),
    ):
        yield Bad(name, container(head, GOOD_BODY, length), said)
    for name, tail, said in (
        ("body-without-its-last-byte", GOOD_BODY[:-1], "tells of"),
        ("body-cut-in-half", GOOD_BODY[: len(GOOD_BODY) // 2], "tells of"),
        ("body-missing", b"", "tells of"),
        ("one-byte-behind", GOOD_BODY + b"\0", "tells of"),
        ("zeros-behind", GOOD_BODY + bytes(4096), "tells of"),
        ("another-file-behind", GOOD_BODY + GOOD, "tells of"),
        ("zip-behind", GOOD_BODY + _zipped("x", b"x"), "tells of"),
    ):
        yield Bad(name, container(head, tail), said)
    for name, raw, said in (
        ("header-empty-object", b"{}", "no tensors"),
        ("header-of-metadata-alone", b'{"__metadata__": {"format": "pt"}}', "no tensors"),
        ("header-after-blanks", b"    " + head, "brace"),
        ("header-after-a-byte-order-mark", b"\xef\xbb\xbf" + head, "brace"),
        ("header-list", b"[" + head + b"]", "brace"),
        ("header-null", b"null", "brace"),
        ("header-text", b'"transformer"', "brace"),
        ("header-utf-16", head.decode().encode("utf-16-le"), "broken|UTF-8|JSON"),
        ("header-latin-1", head.replace(b"lora_A", b"l\xf6ra_A"), "UTF-8"),
        ("header-cut-utf-8", head.replace(b"lora_A", b"lora\xe2\x82A"), "UTF-8"),
        ("header-with-a-raw-nul", head.replace(b"lora_A", b"lora\0A"), "broken"),
        ("header-padded-with-nul", head + bytes(8), "broken"),
        ("header-twice", head + head, "broken"),
        ("header-with-a-tail", head + b" // end", "broken"),
        ("header-with-a-comment", head.replace(b"{", b"{/* */", 1), "broken"),
        ("header-trailing-comma", head[:-1] + b",}", "broken"),
        ("header-single-quotes", head.replace(b'"', b"'"), "broken"),
        ("header-unclosed", head[:-1], "broken"),
        ("header-python", b"{**__import__('os').environ}", "broken"),
        ("header-too-deep-in-lists", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply|broken"),
        ("header-too-deep-in-objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too deeply|broken"),
        ("header-with-an-empty-number", head.replace(b"[0,", b"[,"), "broken"),
    ):
        yield Bad(name, container(raw, GOOD_BODY), said)


def _bombs() -> Iterator[Bad]:
    """Large, so they are made when they are put there."""
    head = json.dumps(GOOD_HEADER).encode()

    def lazily(name: str, make: Callable[[], bytes], said: str, body: bytes = GOOD_BODY) -> Bad:
        return Bad(name, lambda path: path.write_bytes(container(make(), body)), said)

    def one(field: str, value: Callable[[], bytes]) -> Callable[[], bytes]:
        return lambda: field_of(A, field, "@@").replace(b"@@", value())

    room = HEADER_CAP - 4096
    yield lazily("white-space-90-mb", lambda: head + b" " * (90 << 20), "header has")
    yield lazily("white-space-behind-the-header", lambda: head + b" " * room, "blanks in a row")
    yield lazily("white-space-inside", lambda: b"{" + b" " * room + head[1:], "blanks in a row")
    yield lazily("white-space-of-line-ends", lambda: head + b"\n" * room, "blanks in a row")
    yield lazily("white-space-of-all-kinds", lambda: b"{" + b"\r\n \t" * (room // 4) + head[1:], "blanks in a row")
    yield lazily("metadata-of-9-mb", lambda: metadata_of(json.dumps("x" * (9 << 20))), "header has")
    yield lazily("header-one-byte-too-long", lambda: metadata_of('"%s"' % ("x" * HEADER_CAP))[: HEADER_CAP + 1],
                 "header has")  # fmt: skip
    yield lazily(
        "empty-tensors-100000", lambda: json.dumps({f"t{i}": entry([0], 0) for i in range(100_000)}).encode(),
        "JSON has more|tensors", b"",
    )  # fmt: skip
    yield lazily(
        "tensors-25000",
        lambda: json.dumps({f"t{i}": entry([1], 4 * i) for i in range(25_000)}).encode(),
        "25,000 tensors",
        bytes(100_000),
    )
    yield lazily(
        "metadata-of-250000-texts",
        lambda: metadata_of(json.dumps({f"k{i}": "" for i in range(250_000)}), whole=True),
        "JSON has more",
    )
    yield lazily("one-key-a-million-times", lambda: b"{" + b'"a":1,' * 1_200_000 + head[1:], "JSON has more")
    yield lazily("a-million-objects", one("shape", lambda: b"[" + b"{}," * 1_500_000 + b"{}]"), "JSON has more")
    yield lazily("two-million-lists-for-a-shape", one("shape", lambda: b"[" + b"[]," * 2_000_000 + b"[]]"), "shape")
    yield lazily("three-million-zeros-for-a-shape", one("shape", lambda: b"[" + b"0," * 3_000_000 + b"0]"), "shape")
    yield lazily("a-million-texts-for-offsets", one("data_offsets", lambda: b"[" + b'"ab",' * 1_000_000 + b'""]'),
                 "offsets")  # fmt: skip
    yield lazily("dtype-of-7-mb", one("dtype", lambda: b'"' + b"F" * (7 << 20) + b'"'), "unknown dtype")
    yield lazily("name-of-7-mb", lambda: head.replace(b"lora_A", b"a" * (7 << 20)), "too long")
    yield lazily("abyss-of-7-mb", lambda: b'{"a":' + b"[" * (7 << 20), "lists|too deeply|broken")


def entry(shape: list[int], begin: int = 0, end: int | None = None, dtype: str = "F32") -> dict[str, Any]:
    count = 4
    for size in shape:
        count *= size
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + count if end is None else end]}


def field_of(key: str, field: str, token: str) -> bytes:
    """The good header as JSON, in which one field is any text, JSON or not."""
    header = {**GOOD_HEADER, key: {**GOOD_HEADER[key], field: "@value@"}}
    return json.dumps(header).replace('"@value@"', token).encode()


def metadata_of(token: str, key: str = "comment", whole: bool = False) -> bytes:
    value = "@value@" if whole else {key: "@value@"}
    return json.dumps({"__metadata__": value, **GOOD_HEADER}).replace('"@value@"', token).encode()


def _twice() -> Iterator[Bad]:
    text = json.dumps(GOOD_HEADER)
    first = f'"{A}": {json.dumps(GOOD_HEADER[A])}'
    spelt = f'"\\u0074{A[1:]}": {json.dumps(GOOD_HEADER[A])}'
    for name, raw in (
        ("tensor", text.replace(first, f"{first}, {first}")),
        ("tensor-with-another-shape", text.replace(first, f"{first}, {first.replace('[4, 64]', '[64, 4]')}")),
        ("tensor-by-an-escape", text.replace(first, f"{first}, {spelt}")),
        ("dtype", text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"', 1)),
        ("shape", text.replace('"shape": [4, 64]', '"shape": [4, 64], "shape": [64, 4]', 1)),
        ("offsets", text.replace('"data_offsets"', '"data_offsets": [0, 1], "data_offsets"', 1)),
        ("metadata", '{"__metadata__": {"a": "b"}, "__metadata__": {"a": "c"}, ' + text[1:]),
        ("metadata-key", metadata_of('"x", "comment": "y"').decode()),
    ):
        yield Bad(f"twice-{name}", container(raw.encode(), GOOD_BODY), "gives .* twice")


def _fields() -> Iterator[Bad]:
    huge = "9" * 10_000
    dtypes = (
        ("unknown", '"F33"'), ("lower-case", '"f32"'), ("long", '"FLOAT32"'), ("blank", '"F32 "'), ("empty", '""'),
        ("null", "null"), ("list", '["F32"]'), ("number", "32"), ("torch", '"torch.float32"'), ("fp4", '"F4"'),
        ("int4", '"I4"'), ("html", '"<script>alert(1)</script>"'), ("escape", '"\\u001b[31mF32"'),
        ("bidi", '"F32\\u202e"'),
    )  # fmt: skip
    for name, token in dtypes:
        yield Bad(f"dtype-{name}", container(field_of(A, "dtype", token), GOOD_BODY), "unknown dtype")
    for dtype, count in (
        ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("U8", 1), ("I8", 1), ("I16", 2), ("U16", 2),
        ("I32", 4), ("U32", 4), ("I64", 8), ("U64", 8), ("C64", 8),
    ):  # fmt: skip
        size = count * RANK * WIDTH
        header = {A: entry([RANK, WIDTH], 0, size, dtype), B: entry([WIDTH, RANK], size)}
        body = bytes(size) + GOOD_BODY[-1024:]
        yield Bad(f"matrix-of-{dtype.lower()}", container(header, body), f"is {dtype}; convert|unknown dtype")
    shapes = (
        ("negative", "[-4, -64]"), ("float", "[4.0, 64]"), ("exponent", "[4e0, 64]"), ("texts", '["4", "64"]'),
        ("text", '"4, 64"'), ("true", "[true, 256]"), ("null", "null"), ("null-inside", "[4, null]"),
        ("nested", "[[4, 64]]"), ("object", '{"0": 4, "1": 64}'), ("number", "256"),
        ("nine-axes", "[4, 64, 1, 1, 1, 1, 1, 1, 1]"), ("thousand-axes", str([4, 64] + [1] * 1000)),
        ("infinite-exponent", "[1e999, 64]"),
    )  # fmt: skip
    for name, token in shapes:
        yield Bad(f"shape-{name}", container(field_of(A, "shape", token), GOOD_BODY), "impossible shape")
    for name, token in (
        ("scalar", "[]"), ("flat", "[64]"), ("too-large", "[4, 65]"), ("too-small", "[4, 63]"),
        ("2-to-62", f"[{1 << 62}]"), ("2-to-62-twice", f"[{1 << 62}, {1 << 62}]"),
        ("wraps-to-zero", f"[{1 << 32}, {1 << 32}]"), ("wraps-to-its-size", f"[{(1 << 62) + 256}]"),
        ("zero-and-2-to-62", f"[0, {1 << 62}]"), ("zero", "[0, 64]"), ("eight-huge-axes", str([10**19] * 8)),
    ):  # fmt: skip
        yield Bad(f"shape-{name}", container(field_of(A, "shape", token), GOOD_BODY), "takes .* bytes")
    for name, token in (("10000-digits", f"[{huge}, 64]"), ("minus-10000-digits", f"[-{huge}, 64]")):
        yield Bad(f"shape-{name}", container(field_of(A, "shape", token), GOOD_BODY), "digits")
    for name, token in (("nan", "[NaN, 64]"), ("infinity", "[Infinity, 64]"), ("minus-infinity", "[-Infinity, 64]")):
        yield Bad(f"shape-{name}", container(field_of(A, "shape", token), GOOD_BODY), "no number")
    empty = container({A: entry([0, 1 << 62], 0, 0), B: entry([WIDTH, RANK])}, GOOD_BODY[1024:])
    yield Bad("shape-empty-and-2-to-62", empty, "is empty")
    yield Bad("rank-0", container({A: entry([0, WIDTH]), B: entry([WIDTH, 0])}), "is empty")
    for name, token in (
        ("negative", "[-1024, 0]"), ("three", "[0, 512, 1024]"), ("one", "[1024]"), ("none", "[]"),
        ("floats", "[0.0, 1024.0]"), ("texts", '["0", "1024"]'), ("null", "null"), ("text", '"0:1024"'),
        ("bools", "[false, 1024]"), ("nested", "[[0, 1024]]"), ("object", '{"begin": 0, "end": 1024}'),
    ):  # fmt: skip
        yield Bad(f"offsets-{name}", container(field_of(A, "data_offsets", token), GOOD_BODY), "impossible offsets")
    for key, name, token, said in (
        (A, "reversed", "[1024, 0]", "takes"), (A, "too-few", "[0, 1020]", "takes"),
        (A, "too-many", "[0, 1028]", "takes"), (A, "not-from-0", "[4, 1028]", "gap|overlaps"),
        (B, "equal", "[0, 1024]", "overlaps"), (B, "overlapping", "[1020, 2044]", "overlaps"),
        (B, "of-one-byte-less", "[1023, 2047]", "overlaps"), (B, "beyond-the-file", "[4096, 5120]", "gap"),
        (B, "beyond-a-tebibyte", f"[{1 << 40}, {(1 << 40) + 1024}]", "gap"),
        (B, "at-2-to-63", f"[{1 << 63}, {(1 << 63) + 1024}]", "gap"),
        (B, "spanning-2-to-62", f"[1024, {1 << 62}]", "takes"), (B, "10000-digits", f"[1024, {huge}]", "digits"),
    ):  # fmt: skip
        yield Bad(f"offsets-{name}", container(field_of(key, "data_offsets", token), GOOD_BODY), said)
    gap = {A: GOOD_HEADER[A], B: entry([WIDTH, RANK], 1032)}
    yield Bad("offsets-with-a-gap", container(gap, GOOD_BODY + bytes(8)), "gap")
    yield Bad("offsets-behind-a-hidden-start", container({A: entry([4, 64], 64), B: entry([64, 4], 1088)},
              bytes(64) + GOOD_BODY), "gap")  # fmt: skip
    for name in ("dtype", "shape", "data_offsets"):
        left = {part: value for part, value in GOOD_HEADER[A].items() if part != name}
        yield Bad(f"entry-without-{name}", container({**GOOD_HEADER, A: left}, GOOD_BODY), "not described by")
    for name, value in (
        ("list", ["F32", [4, 64], [0, 1024]]), ("null", None), ("text", "F32"), ("number", 1), ("true", True),
        ("empty", {}), ("with-code", {**GOOD_HEADER[A], "__reduce__": "os.system"}),
        ("inside-another", {"F32": GOOD_HEADER[A]}),
    ):  # fmt: skip
        yield Bad(f"entry-{name}", container({**GOOD_HEADER, A: value}, GOOD_BODY), "not described by")


LONG = "a" * 150  # a name as long as may be, and longer than any module's


def _names() -> Iterator[Bad]:
    odd = (
        ("nul", "a\0b"), ("html", "<img src=x onerror=alert(1)>"), ("script", "<script>alert(1)</script>"),
        ("line-end", "a\nb"), ("tab", "a\tb"), ("terminal-escape", "\x1b]0;owned\x07\x1b[31m"),
        ("bidi", "a\u202egnp.b"), ("isolate", "a\u2066b\u2069"), ("zero-width", "to\u200b_q"),
        ("soft-hyphen", "to\u00ad_q"), ("line-separator", "a\u2028b"), ("homoglyph", "\u0430ttn1"),
        ("full-width", "\uff41ttn1"), ("emoji", "\U0001f4a3"), ("combining", "a" + "\u0301" * 50),
        ("lone-surrogate", "a\ud800b"), ("private-use", "\ue000"), ("empty", ""), ("blank", " "),
        ("quotes", "a\"b'c"), ("backslash", "..\\..\\x"), ("percent", "%s%s%n"), ("braces", "{0.__class__}"),
        ("dollar", "${HOME}`id`"), ("ansi-c1", "a\x9b31mb"), ("byte-order-mark", "\ufeffa"),
        ("201-letters", "a" * 201), ("5000-letters", "a" * 5000), ("a-megabyte", "a" * (1 << 20)),
    )  # fmt: skip
    said = "characters that no module has, or is too long"
    for name, text in odd:
        header = {**GOOD_HEADER, text: entry([1], 2048)}
        yield Bad(f"name-{name}", container(header, GOOD_BODY + bytes(4)), said)
        if name in ("nul", "html", "bidi", "terminal-escape", "homoglyph", "lone-surrogate"):  # in the layer's own
            header = {f"transformer.{Q}.{text}.lora_A.weight": GOOD_HEADER[A], B: GOOD_HEADER[B]}
            yield Bad(f"name-of-a-layer-{name}", container(header, GOOD_BODY), said)
    # legal letters, as many as are allowed: the messages have to stay short all the same
    stem, part = f"transformer.{LONG}", f"transformer.{Q}.lora_@.{LONG[:120]}.weight"
    four = [tensor for i in range(4) for tensor in pair(f"{stem}.{i}").items()]
    for name, tensors, said, found in (
        ("of-no-layout", {f"{LONG}.{i}": numbers(2) for i in range(4)}, "no LoRA layout", HEADER),
        ("of-no-layer", pair(stem), "no such layer", BASE),
        ("of-many-layers", dict(four), "no such layer", BASE),
        ("of-two-layouts", pair(stem) | pair(f"base_model.model.{LONG}"), "mixes two layouts", HEADER),
        ("twice", pair(stem) | pair(stem, parts="lora_A.x lora_B.x"), "given twice", HEADER),
        ("alone", {f"{stem}.lora_A.weight": numbers(4, 64)}, "no B", HEADER),
        ("of-no-comfyui-layer", pair(f"diffusion_model.{LONG}"), "has no layer", HEADER),
        ("with-a-long-part", {part.replace("@", "A"): numbers(4, 64).int()}, "convert", HEADER),
        ("of-a-tucker-core", {f"{LONG}.hada_t1": numbers(4)}, "Tucker", HEADER),
        ("with-nan", {key: tensor * NAN for key, tensor in pair(stem).items()}, "not finite", VALUES),
        ("of-an-alpha", {f"{stem}.alpha": ALPHA}, "belongs to no matrix", HEADER),
        ("with-an-alpha-of-0", pair(stem) | {f"{stem}.alpha": ALPHA * 0}, "alpha is", HEADER),
    ):
        yield Bad(f"long-name-{name}", file(tensors), said, found)
    many = {LONG: entry([1], 2048, 2052), **GOOD_HEADER, f"{LONG}.b": entry([10**19] * 8, 2052, 2056)}
    yield Bad("long-name-and-huge-shape", container(many, GOOD_BODY + bytes(8)), "takes")


# --- metadata, and what lies beside the file --------------------------------------------------------------------------


def _metadata() -> Iterator[Bad]:
    for name, token in (
        ("list", '["x"]'), ("text", '"x"'), ("null", "null"), ("number", "1"), ("true", "true"),
    ):  # fmt: skip
        yield Bad(f"metadata-{name}", container(metadata_of(token, whole=True), GOOD_BODY), "not a table of texts")
    for name, token in (
        ("number", "1"), ("null", "null"), ("list", "[]"), ("object", '{"a": "b"}'), ("true", "true"),
    ):  # fmt: skip
        yield Bad(f"metadata-value-{name}", container(metadata_of(token), GOOD_BODY), "not a table of texts")
    surrogates = (("value", '"\\ud800"'), ("key", '"", "\\udfff": ""'))
    for name, token in surrogates:
        yield Bad(f"metadata-lone-surrogate-in-a-{name}", container(metadata_of(token), GOOD_BODY), "Unicode")
    for name, token, said in (
        ("nan", "NaN", "no number"),
        ("10000-digits", "1" * 10_000, "digits"),
        ("deep", "[" * 100_000 + "]" * 100_000, "too deeply|broken"),
        ("tensor-inside", json.dumps(GOOD_HEADER[A]), "not a table of texts"),
    ):
        yield Bad(f"metadata-value-{name}", container(metadata_of(token), GOOD_BODY), said)
    for key, value in (
        ("ss_network_alpha", "nan"), ("ss_network_alpha", "inf"), ("ss_network_alpha", "-1"),
        ("ss_network_alpha", "4e9"), ("ss_network_alpha", "0"), ("ss_network_dim", "0"), ("ss_network_dim", "-4"),
        ("ss_network_dim", "1e999"),
    ):  # fmt: skip
        metadata = {"ss_network_alpha": "2", "ss_network_dim": "4"} | {key: value}
        yield Bad(f"{key.replace('_', '-')}-{value.replace('-', 'minus-')}", file(pair(), metadata), f"{key} is")


def config(**changed: str) -> str:
    """What PEFT calls a LoraConfig, in which values may be any text, JSON or not."""
    fields = {"peft_type": '"LORA"', "r": "4", "lora_alpha": "4"} | changed
    return "{" + ", ".join(f'"{key}": {token}' for key, token in fields.items()) + "}"


def _configs() -> Iterator[tuple[str, str, str]]:
    """(name, JSON or what should be, pattern of the message)."""
    yield "not-json", "r=4, lora_alpha=4", "broken"
    yield "cut-short", config()[:-4], "broken"
    yield "list", "[4, 4]", "not a JSON object"
    yield "text", '"r4"', "not a JSON object"
    yield "number", "4", "not a JSON object"
    yield "twice", config()[:-1] + ', "r": 8}', "gives .* twice"
    yield "deep", "[" * 100_000 + "]" * 100_000, "too deeply|broken"
    yield "deep-inside", config(target_modules="[" * 100_000 + "]" * 100_000), "too deeply|broken"
    yield "10000-digits", config(lora_alpha="9" * 10_000), "digits"
    for name, token in (("nan", "NaN"), ("infinite", "Infinity"), ("minus-infinite", "-Infinity")):
        yield f"alpha-{name}", config(lora_alpha=token), "no number"
    for name, token in (
        ("4e9", "4e9"), ("1e999", "1e999"), ("minus-1", "-1"), ("0", "0"), ("text", '"1"'), ("true", "true"),
        ("null", "null"), ("list", "[4]"), ("object", '{"value": 4}'), ("html", '"<b>4</b>"'),
    ):  # fmt: skip
        yield f"alpha-{name}", config(lora_alpha=token), "lora_alpha in .* is"
    for name, token in (
        ("0", "0"), ("minus-4", "-4"), ("text", '"4"'), ("true", "true"), ("null", "null"), ("huge", "1e300"),
    ):  # fmt: skip
        yield f"r-{name}", config(r=token), "r in .* is"
    yield "r-of-another-rank", config(r="8"), "says rank 8 .* matrices have 4"
    yield "r-of-half-a-rank", config(r="4.5"), "says rank 4.5 .* matrices have 4"
    yield "rank-pattern-of-another-rank", config(rank_pattern=json.dumps({Q: 64})), "says rank 64"
    bombs = (
        ("nested", "(a+)+$"), ("alternation", "(a|a)*b"), ("backreference", r"(.*)\\1\\1x"), ("star", ".*.*.*.*.*x"),
        ("possessive", "^(([a-z])+.)+[A-Z]([a-z])+$"), ("html", "<img src=x>"), ("line-end", "a\\n"),
    )  # fmt: skip
    for part in ("rank_pattern", "alpha_pattern"):
        short = part.removesuffix("_pattern")
        for name, bomb in bombs:
            yield f"{short}-pattern-{name}", config(**{part: f'{{"{bomb}": 4}}'}), "only plain module names"
        yield f"{short}-pattern-list", config(**{part: '["to_q"]'}), "not a JSON object"
        yield f"{short}-pattern-text", config(**{part: '"to_q"'}), "not a JSON object"
        yield f"{short}-pattern-minus-1", config(**{part: '{"to_q": -1}'}), f"{part} of to_q"
        yield f"{short}-pattern-text-inside", config(**{part: '{"to_q": "4"}'}), f"{part} of to_q"
        yield f"{short}-pattern-null-inside", config(**{part: '{"to_q": null}'}), f"{part} of to_q"
    many = {**{f"x{i}": 4 for i in range(150_000)}, "to_q": -1}
    yield "alpha-pattern-of-150000", config(alpha_pattern=json.dumps(many)), "alpha_pattern of to_q|longer than"
    yield "dora-without-magnitudes", config(use_dora="true"), "DoRA"
    yield "ia3", config(peft_type='"IA3"'), "not read"
    yield "type-html", config(peft_type='"<script>alert(1)</script>"'), "not read"
    yield "type-list", config(peft_type='["LORA"]'), "not read"
    yield "of-another-kind", config(peft_type='"LOHA"', alpha="4"), "says LOHA, but"
    yield "begun-as-pissa", config(init_lora_weights='"pissa_niter_4"'), "begun as"
    yield "begun-as-loftq", config(init_lora_weights='"loftq"'), "begun as"


def _doors(name: str, token: str, said: str) -> Iterator[Bad]:
    """One configuration, three places to put it."""
    prefixed = re.sub(r'"(\w+)": ', r'"transformer.\1": ', token) if "pattern" not in token else token
    yield Bad(f"diffusers-{name}", file(pair(), {"lora_adapter_metadata": prefixed}), said)
    yield Bad(f"finetrainers-{name}", file(pair(), {"lora_config": token}), said)
    weights = file(pair(f"base_model.model.{Q}"))
    beside = {"adapter_config.json": token.encode()}
    yield Bad(f"peft-{name}", weights, said, file="adapter_model.safetensors", beside=beside)


def _configured() -> Iterator[Bad]:
    for name, token, said in _configs():
        yield from _doors(name, token, said)
    for name, raw, said in (
        ("empty", b"", "broken"),
        ("not-utf-8", b'{"r": "\xff"}', "UTF-8"),
        ("byte-order-mark", b'\xef\xbb\xbf{"r": 4}', "broken|BOM"),
        ("of-2-mb", b'{"x": "' + b"x" * (2 << 20) + b'"}', "longer than"),
    ):
        beside = {"adapter_config.json": raw}
        yield Bad(f"peft-config-{name}", GOOD, said, file="adapter_model.safetensors", beside=beside)


def _sidecars() -> Iterator[Bad]:
    shape = "should look like"
    for name, raw, said in (
        ("empty", b"", "broken"),
        ("not-json", b"scale: 0.5", "broken"),
        ("not-utf-8", b'{"notes": "\xff"}', "UTF-8"),
        ("utf-16", '{"scale": 0.5}'.encode("utf-16"), "UTF-8"),
        ("list", b"[0.5]", shape),
        ("number", b"0.5", shape),
        ("null", b"null", shape),
        ("unknown-part", b'{"scal": 0.5}', shape),
        ("scale-0", b'{"scale": 0}', shape),
        ("scale-minus-1", b'{"scale": -1}', shape),
        ("scale-text", b'{"scale": "0.5"}', shape),
        ("scale-true", b'{"scale": true}', shape),
        ("scale-null", b'{"scale": null}', shape),
        ("scale-nan", b'{"scale": NaN}', "no number"),
        ("scale-infinite", b'{"scale": 1e999}', shape),
        ("scale-4e9", b'{"scale": 4e9}', shape),
        ("scale-10000-digits", b'{"scale": ' + b"1" * 10_000 + b"}", "digits"),
        ("scale-twice", b'{"scale": 1, "scale": 2}', "twice"),
        ("words-text", b'{"trigger_words": "neon"}', shape),
        ("words-numbers", b'{"trigger_words": [1]}', shape),
        ("notes-number", b'{"notes": 1}', shape),
        ("deep", b"[" * 100_000 + b"]" * 100_000, "too deeply|broken"),
        ("of-2-mb", b'{"notes": "' + b"x" * (2 << 20) + b'"}', "longer than"),
    ):
        yield Bad(f"sidecar-{name}", GOOD, said, beside={"@.json": raw})


# --- values -----------------------------------------------------------------------------------------------------------


def _values() -> Iterator[Bad]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for key in (A, B):
            for name, value in (("nan", NAN), ("inf", INF), ("minus-inf", -INF)):
                tensors = {part: tensor.to(dtype) for part, tensor in pair().items()}
                tensors[key].view(-1)[-1] = value
                short = f"{name}-in-{key[-8]}-{_DTYPES[dtype].lower()}"
                yield Bad(short, file(tensors), "not finite", VALUES)
    payload = pair()
    payload[A].view(torch.int32)[0, 0] = 0x7F800001  # a NaN that signals
    yield Bad("nan-that-signals", file(payload), "not finite", VALUES)
    yield Bad("nan-all-over", file({k: t * NAN for k, t in pair().items()}), "not finite", VALUES)
    for name, tensors in (
        ("loha", _lycoris(f"transformer.{Q}", **LOHA)),
        ("lokr", _lycoris(f"transformer.{Q}", **LOKR)),
        ("diff", {f"transformer.{Q}.diff": numbers(64, 64)}),
        ("diff-b", {f"transformer.{Q}.diff_b": numbers(64)}),
        ("bias", pair() | {f"transformer.{Q}.lora_B.bias": numbers(64)}),
        ("magnitude", pair() | {f"transformer.{Q}.lora_magnitude_vector": numbers(64) + 1}),
        ("dora-scale", pair() | {f"transformer.{Q}.dora_scale": numbers(64, 1) + 1}),
    ):
        for word, value in (("nan", NAN), ("inf", INF)):
            last = [*tensors][-1]
            broken = {**tensors, last: tensors[last].clone()}
            broken[last].view(-1)[0] = value
            yield Bad(f"{word}-in-{name}", file(broken), "not finite", VALUES)
    # every number finite, their sum is not
    for dtype, value in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float64, 1e300)):
        huge = {key: torch.full_like(tensor, value, dtype=dtype) for key, tensor in pair().items()}
        yield Bad(f"huge-values-{_DTYPES[dtype].lower()}", file(huge), "cannot hold", SUM)
    diff = {f"transformer.{Q}.diff": torch.full((64, 64), 1e300, dtype=torch.float64)}
    yield Bad("huge-difference", file(diff), "cannot hold", SUM)
    loha = {key: torch.full_like(tensor, 1e30) for key, tensor in _lycoris(f"transformer.{Q}", **LOHA).items()}
    yield Bad("huge-loha", file(loha), "cannot hold", SUM)
    lokr = {key: torch.full_like(tensor, 1e30) for key, tensor in _lycoris(f"transformer.{Q}", **LOKR).items()}
    yield Bad("huge-lokr", file(lokr), "cannot hold", SUM)
    magnitude = pair() | {f"transformer.{Q}.dora_scale": torch.full((64, 1), 1e300, dtype=torch.float64)}
    yield Bad("huge-magnitude", file(magnitude), "cannot hold", SUM)


# --- what the parts mean together -------------------------------------------------------------------------------------


def _alphas() -> Iterator[Bad]:
    key = f"transformer.{Q}.alpha"

    def alpha(value: Any, dtype: torch.dtype = torch.float32) -> bytes:
        return file(pair() | {key: torch.tensor(value, dtype=dtype)})

    for name, value in (
        ("nan", NAN), ("inf", INF), ("negative", -1.0), ("0", 0.0), ("1e30", 1e30), ("4e9", 4e9), ("65537", 65537.0),
    ):  # fmt: skip
        yield Bad(f"alpha-{name}", alpha(value), "alpha is|alpha has values that are not finite")
    yield Bad("alpha-negative-whole", alpha(-4, torch.int64), "alpha is")
    yield Bad("alpha-huge-whole", alpha(1 << 62, torch.int64), "alpha is")
    for name, value, dtype in (
        ("two-numbers", [1.0, 2.0], torch.float32), ("per-rank", [[1.0]] * 4, torch.float32),
        ("a-bool", True, torch.bool), ("fp8", 2.0, torch.float8_e4m3fn),
    ):  # fmt: skip
        yield Bad(f"alpha-is-{name}", alpha(value, dtype), "is not one number")
    yield Bad("alpha-alone", file({key: ALPHA}), "belongs to no matrix")
    yield Bad("alpha-of-no-matrix", file(pair() | {f"transformer.{LAST}.alpha": ALPHA}), "belongs to no matrix")
    yield Bad(
        "alpha-of-a-difference", file({f"transformer.{Q}.diff": numbers(64, 64), key: ALPHA}), "belongs to no matrix"
    )
    some = pair() | pair(f"transformer.{LAST}") | {key: ALPHA}
    yield Bad("alpha-of-some-layers", file(some), "1 of 2 layers have an alpha")
    yield Bad("alpha-in-another-layout", file(pair() | {f"{UNET}.alpha": ALPHA}), "mixes two layouts")


def _pairs() -> Iterator[Bad]:
    a, b = pair().values()
    yield Bad("a-without-b", file({A: a}), "has A but no B")
    yield Bad("b-without-a", file({B: b}), "has B but no A")
    yield Bad("b-missing-in-the-second-layer", file(pair() | {f"transformer.{LAST}.lora_A.weight": a}), "no B")
    yield Bad("a-missing-in-the-second-layer", file(pair() | {f"transformer.{LAST}.lora_B.weight": b}), "no A")
    for name, one, other, said in (
        ("ranks-disagree", numbers(4, 64), numbers(64, 8), "has rank 4, but"),
        ("ranks-disagree-by-one", numbers(4, 64), numbers(64, 5), "has rank 4, but"),
        ("a-and-b-swapped", numbers(64, 4), numbers(4, 64), "0 of 2 tensors fit"),
        ("b-turned", numbers(4, 64), numbers(4, 64), "has rank 4, but"),
        ("a-is-a-vector", numbers(256), numbers(64, 4), "matrices"),
        ("b-is-a-vector", numbers(4, 64), numbers(256), "matrices"),
        ("both-are-vectors", numbers(64), numbers(64), "matrices"),
        ("a-is-a-number", numbers(), numbers(64, 4), "matrices"),
        ("a-is-a-cube", numbers(4, 8, 8), numbers(64, 4), "matrices"),
        ("both-are-cubes", numbers(4, 64, 1), numbers(64, 4, 1), "matrices"),
        ("both-have-five-axes", numbers(4, 64, 1, 1, 1), numbers(64, 4, 1, 1, 1), "matrices"),
        ("both-have-eight-axes", numbers(4, 64, *[1] * 6), numbers(64, 4, *[1] * 6), "matrices"),
        ("a-is-of-a-convolution", numbers(4, 64, 1, 1), numbers(64, 4), "matrices"),
        ("b-is-of-a-convolution", numbers(4, 64), numbers(64, 4, 1, 1), "matrices"),
        ("b-has-a-kernel", numbers(4, 64, 1, 1), numbers(64, 4, 2, 2), "matrices"),
    ):
        found = BASE if name == "a-and-b-swapped" else HEADER
        yield Bad(name, file({A: one, B: other}), said, found)
    turned = file({A: numbers(64, 4), B: numbers(64, 4)})
    yield Bad("a-turned", turned, "has rank 64, but")
    for name, more in (
        ("in-two-spellings", {A.replace("lora_A", "lora_A.default"): a}),
        ("in-old-and-new-spelling", {A.replace("lora_A", "lora.down"): a}),
        ("of-two-adapters", pair(parts="lora_A.one lora_B.one")),
    ):
        yield Bad(f"a-matrix-{name}", file(pair() | more), "given twice")
    for name, stem in (("kohya", UNET), ("comfyui", "diffusion_model.blocks.0.k"), ("peft", LAST), ("sat", SAT)):
        parts = "lora_down lora_up" if name == "kohya" else "lora_A lora_B"
        both = pair() | pair(stem, parts=parts)
        yield Bad(f"two-layouts-diffusers-and-{name}", file(both), "mixes two layouts|no layer")
    for name, more in (
        ("lora-and-difference", {f"transformer.{Q}.diff": numbers(64, 64)}),
        ("lora-and-loha", _lycoris(f"transformer.{Q}", **LOHA)),
        ("two-biases", {f"transformer.{Q}.lora_B.bias": numbers(64), f"transformer.{Q}.diff_b": numbers(64)}),
    ):
        yield Bad(f"changed-twice-{name}", file(pair() | more), "2 ways at once")
    bias = f"transformer.{Q}.lora_B.bias"
    for name, tensors, said in (
        ("alone", {bias: numbers(64)}, "belongs to no matrices"),
        ("too-short", pair() | {bias: numbers(63)}, "belongs to no matrices"),
        ("of-two-axes", pair() | {bias: numbers(64, 1)}, "belongs to no matrices"),
    ):
        yield Bad(f"bias-{name}", file(tensors), said)


def _other_models() -> Iterator[Bad]:
    text = {"text_encoder.encoder.block.0.layer.0.SelfAttention.q": "lora_A lora_B", "lora_te_encoder_block_0_q":
            "lora_down lora_up", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "lora_A lora_B"}  # fmt: skip
    for n, (stem, parts) in enumerate(text.items(), 1):
        yield Bad(f"text-encoder-alone-{n}", file(pair(stem, parts=parts)), "text encoder only")
    whole = {f"transformer_blocks.{i}.attn1.to_q.weight": numbers(64, 64) for i in range(2)}
    yield Bad("a-whole-model", file(whole), "whole model")
    yield Bad("a-whole-model-with-prefix", file({f"transformer.{k}": t for k, t in whole.items()}), "whole model")
    yield Bad("an-autoencoder", file({"decoder.conv_in.conv.weight": numbers(8, 4, 3, 3, 3)}), "no LoRA layout")
    yield Bad("an-embedding", file({"emb_params": numbers(4, 64)}), "no LoRA layout")
    yield Bad("a-control-net", file({"controlnet_blocks.0.weight": numbers(64, 64)}), "no LoRA layout")
    sat = pair(f"{SAT}.dense", parts="matrix_A matrix_B")
    sat = {key.replace(".weight", ".0"): tensor for key, tensor in sat.items()}
    yield Bad("sat-with-its-base", file(sat | {f"{SAT}.dense.original.weight": numbers(64, 64)}), "tensors of the base")
    for name, stem in (
        ("index-3", f"{SAT}.query_key_value.matrix_@.3"), ("dense-1", f"{SAT}.dense.matrix_@.1"),
        ("no-such-part", f"{SAT}.cross_attention.matrix_@.0"),
        ("block-10000", f"{SAT.replace('layers.0', 'layers.10000')}.dense" ".matrix_@.0"),
        ("feed-forward", f"{SAT.replace('attention', 'mlp')}.dense_h_to_4h.matrix_@.0"),
    ):  # fmt: skip
        tensors = {stem.replace("@", "A"): numbers(4, 64), stem.replace("@", "B"): numbers(64, 4)}
        yield Bad(f"sat-{name}", file(tensors), "has no layer")
    deep = f"{SAT}.query_key_value.matrix_@.10"
    tensors = {deep.replace("@", "A"): numbers(4, 64), deep.replace("@", "B"): numbers(64, 4)}
    yield Bad("sat-index-10", file(tensors), "no LoRA layout")
    for name, stem in (
        ("fused-qkv", "diffusion_model.blocks.0.qkv"), ("no-such-part", "diffusion_model.blocks.0.to_z"),
        ("wan", "diffusion_model.blocks.0.self_attn.q"), ("flux", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("block-without-number", "diffusion_model.blocks.x.q"), ("block-negative", "diffusion_model.blocks.-1.q"),
        ("block-of-six-digits", "diffusion_model.blocks.100000.q"),
        ("sd", "diffusion_model.input_blocks.1.1.proj_in"),
    ):  # fmt: skip
        yield Bad(f"comfyui-{name}", file(pair(stem, parts="lora_down lora_up")), "has no layer")
    for name, stem in (
        ("sd", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("flux", "lora_unet_double_blocks_0_img_attn_qkv"), ("wan", "lora_unet_blocks_0_self_attn_q"),
        ("no-such-part", "lora_unet_transformer_blocks_0_attn1_to_z"),
        ("second-attention", "lora_unet__transformer_blocks_0_attn2_to_q"),
        ("block-of-five-digits", "lora_unet__transformer_blocks_99999_attn1_to_q"),
        ("no-layer", "lora_unet__transformer_blocks_0"), ("three-underscores", f"lora_unet___{Q.replace('.', '_')}"),
    ):  # fmt: skip
        yield Bad(f"kohya-{name}", file(pair(stem, parts="lora_down lora_up")), "has no layer")
    for suffix, said in (
        ("lora_mid.weight", "Tucker"), ("hada_t1", "Tucker"), ("hada_t2", "Tucker"), ("lokr_t2", "Tucker"),
        ("oft_diag", "OFT"), ("oft_blocks", "OFT"), ("boft_R", "OFT"), ("a1.weight", "GLoRA"),
        ("b2.weight", "GLoRA"), ("on_input", "IA"), ("ia3_l", "IA"), ("scalar", "factor"),
        ("set_weight", "base's place"), ("reshape_weight", "base's place"), ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
    ):  # fmt: skip
        yield Bad(
            f"unread-{suffix.replace('.', '-').replace('_', '-').lower()}",
            file(pair() | {f"transformer.{Q}.{suffix}": numbers(4, 4)}),
            said,
        )


def _other_bases() -> Iterator[Bad]:
    def misfit(name: str, stem: str, into: int = WIDTH, out: int = WIDTH, rank: int = RANK) -> Bad:
        return Bad(f"misfit-{name}", file(pair(stem, rank, into, out)), "0 of 2 tensors fit", BASE)

    q = f"transformer.{Q}"
    for name, into, out in (
        ("in-smaller", 32, 64), ("in-larger", 128, 64), ("in-one-less", 63, 64), ("in-of-one", 1, 64),
        ("out-smaller", 64, 32), ("out-larger", 64, 128), ("out-one-more", 64, 65), ("both-smaller", 32, 32),
        ("of-the-demo", 192, 192), ("of-the-2b", 1920, 1920), ("of-the-5b", 3072, 3072),
    ):  # fmt: skip
        yield misfit(name, q, into, out)
    yield misfit("swapped-in-and-out", "transformer.transformer_blocks.0.ff.net.0.proj", 256, 64)
    for name, path in (
        ("block-2", Q.replace("0", "2", 1)), ("block-7", Q.replace("0", "7", 1)),
        ("block-999", Q.replace("0", "999", 1)), ("block-10-digits", Q.replace("0", "9999999999", 1)),
        ("block-minus-1", Q.replace("0", "-1", 1)), ("block-01", Q.replace("0", "01", 1)),
        ("block-00", Q.replace("0", "00", 1)), ("block-1e0", Q.replace("0", "1e0", 1)),
        ("block-without-number", Q.replace(".0", "", 1)), ("block-x", Q.replace("0", "x", 1)),
        ("attn2", Q.replace("attn1", "attn2")), ("to-x", Q.replace("to_q", "to_x")),
        ("a-module-of-layers", "transformer_blocks.0.attn1"), ("a-block", "transformer_blocks.0"),
        ("the-parameter", f"{Q}.weight"), ("upper-case", Q.upper()), ("two-points", Q.replace(".", "..")),
        ("a-path-outside", "../../../../etc/passwd"), ("an-attribute", "__class__.__init__"),
        ("ofs", "ofs_embedding.linear_1"), ("prefix-twice", f"transformer.{Q}"),
        ("llama", "model.layers.0.self_attn.q_proj"), ("flux", "single_transformer_blocks.0.attn.to_q"),
        ("wan", "blocks.0.attn1.to_q"),
    ):  # fmt: skip
        yield misfit(name, f"transformer.{path}")
    yield misfit("a-norm", "transformer.norm_final")
    yield misfit("linear-for-a-convolution", "transformer.patch_embed.proj", 16, 64)
    conv = "transformer.patch_embed.proj"
    for name, stem, kernel, into in (
        ("convolution-for-a-linear", q, 1, 64), ("kernel-of-three", conv, 3, 4), ("channels-of-i2v", conv, 2, 8),
        ("channels-of-one", conv, 2, 1),
    ):  # fmt: skip
        tensors = {
            f"{stem}.lora_A.weight": numbers(4, into, kernel, kernel),
            f"{stem}.lora_B.weight": numbers(64, 4, 1, 1),
        }
        yield Bad(f"misfit-{name}", file(tensors), "0 of 2 tensors fit", BASE)
    mixed = pair() | pair(f"transformer.{LAST}", into=32)
    yield Bad("misfit-in-one-layer-of-two", file(mixed), "2 of 4 tensors fit", BASE)
    for name, key, *shape in (
        ("diff-too-small", f"{q}.diff", 32, 64), ("diff-turned", "transformer.proj_out.diff", 64, 16),
        ("diff-flat", f"{q}.diff", 4096), ("diff-of-four-axes", f"{q}.diff", 64, 64, 1, 1),
        ("norm-too-long", "transformer.norm_final.w_norm", 65), ("diff-b-too-long", f"{q}.diff_b", 65),
        ("diff-b-of-no-layer", "transformer.transformer_blocks.0.attn1.diff_b", 64),
        ("norm-for-a-linear", f"{q}.w_norm", 64),
    ):  # fmt: skip
        yield Bad(f"misfit-{name}", file({key: numbers(*shape)}), "0 of 1 tensors fit", BASE)
    for name, key, *shape in (
        ("diff-of-a-number", f"{q}.diff"), ("diff-of-eight-axes", f"{q}.diff", 64, 64, 1, 1, 1, 1, 1, 1),
        ("diff-b-of-two-axes", f"{q}.diff_b", 64, 1), ("diff-b-of-a-number", f"{q}.diff_b"),
    ):  # fmt: skip
        yield Bad(f"misfit-{name}", file({key: numbers(*shape)}), "shaped like no")


def _kinds() -> Iterator[Bad]:
    q = f"transformer.{Q}"

    def made(parts: Mapping[str, tuple[int, ...]], **changed: tuple[int, ...] | None) -> bytes:
        shapes = {suffix: shape for suffix, shape in (parts | changed).items() if shape is not None}
        return file(_lycoris(q, **shapes))

    for suffix in LOHA:
        yield Bad(f"loha-without-{suffix[5:].replace('_', '-')}", made(LOHA, **{suffix: None}), f"no {suffix}")
    for name, changed, said in (
        ("ranks-disagree", {"hada_w1_a": (64, 3)}, "cannot be multiplied"),
        ("turned", {"hada_w2_a": (4, 64)}, "cannot be multiplied"),
        ("vector", {"hada_w1_b": (256,)}, "cannot be multiplied"),
        ("four-axes", {"hada_w2_b": (4, 64, 1, 1)}, "cannot be multiplied"),
        ("products-disagree", {"hada_w2_a": (32, 4)}, "two products"),
    ):
        yield Bad(f"loha-{name}", made(LOHA, **changed), said)
    yield Bad(
        "loha-of-another-width", made({k: tuple(n * 2 if n == 64 else n for n in s) for k, s in LOHA.items()}),
        "0 of 4 tensors fit", BASE,
    )  # fmt: skip
    for name, changed, said in (
        ("without-w1", {"lokr_w1": None}, "no lokr_w1_a"),
        ("without-w2-a", {"lokr_w2_a": None}, "no lokr_w2_a"),
        ("without-w2-b", {"lokr_w2_b": None}, "no lokr_w2_b"),
        ("w1-in-full-and-as-a-product", {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8)}, "both in full and as a product"),
        ("w2-in-full-and-as-a-product", {"lokr_w2": (8, 8)}, "both in full and as a product"),
        ("w2-ranks-disagree", {"lokr_w2_b": (3, 8)}, "cannot be multiplied"),
        ("w1-ranks-disagree", {"lokr_w1": None, "lokr_w1_a": (8, 3), "lokr_w1_b": (2, 8)}, "cannot be multiplied"),
        ("sides-of-two-ranks", {"lokr_w1": None, "lokr_w1_a": (8, 3), "lokr_w1_b": (3, 8)}, "no Kronecker product"),
        ("w1-vector", {"lokr_w1": (64,)}, "no Kronecker product"),
        ("w1-cube", {"lokr_w1": (8, 4, 2)}, "no Kronecker product"),
        ("w2-vector", {"lokr_w2_a": None, "lokr_w2_b": None, "lokr_w2": (64,)}, "no Kronecker product"),
        ("w2-of-six-axes", {"lokr_w2_a": None, "lokr_w2_b": None, "lokr_w2": (8, 8, 1, 1, 1, 1)}, "no Kronecker"),
    ):
        yield Bad(f"lokr-{name}", made(LOKR, **changed), said)
    for name, changed in (
        ("too-large", {"lokr_w1": (16, 16)}), ("too-small", {"lokr_w1": (4, 4)}),
        ("swapped-sides", {"lokr_w1": (4, 16)}), ("prime", {"lokr_w1": (7, 9)}),
        ("vast", {"lokr_w1": (1, 4096), "lokr_w2_a": (4096, 2), "lokr_w2_b": (2, 4096)}),
        ("vaster", {"lokr_w1": (512, 512), "lokr_w2_a": (8192, 1), "lokr_w2_b": (1, 8192)}),
    ):  # fmt: skip
        yield Bad(f"lokr-{name}", made(LOKR, **changed), "0 of 3 tensors fit", BASE)

    def dora(**parts: torch.Tensor) -> bytes:
        return file(pair() | {f"{q}.{suffix}": tensor for suffix, tensor in parts.items()})

    for name, parts, said in (
        ("too-long", {"dora_scale": numbers(65, 1)}, "neither one for each row"),
        ("too-short", {"dora_scale": numbers(32, 1)}, "neither one for each row"),
        ("a-number", {"dora_scale": numbers()}, "neither one for each row"),
        ("a-matrix", {"dora_scale": numbers(64, 64)}, "neither one for each row"),
        ("of-wrong-columns", {"dora_scale": numbers(1, 63)}, "neither one for each row"),
        ("of-four-axes", {"dora_scale": numbers(8, 8, 1, 1)}, "neither one for each row"),
        ("magnitude-too-long", {"lora_magnitude_vector": numbers(65)}, "neither one for each row"),
        ("magnitude-a-matrix", {"lora_magnitude_vector": numbers(8, 8)}, "neither one for each row"),
        ("twice", {"dora_scale": numbers(64, 1), "lora_magnitude_vector": numbers(64)}, "stand there twice"),
        ("with-a-bias", {"dora_scale": numbers(64, 1), "lora_B.bias": numbers(64)}, "go with a bias"),
        ("whole-numbers", {"dora_scale": torch.ones(64, 1, dtype=torch.int32)}, "is I32; convert"),
    ):
        yield Bad(f"dora-{name}", dora(**parts), said)
    alone = {f"{q}.dora_scale": numbers(64, 1) + 1}
    yield Bad("dora-without-matrices", file(alone), "belong to no matrices")
    yield Bad("dora-of-a-difference", file(alone | {f"{q}.diff": numbers(64, 64)}), "belong to no matrices")
    elsewhere = pair() | {f"transformer.{LAST}.dora_scale": numbers(64, 1)}
    yield Bad("dora-of-another-layer", file(elsewhere), "belong to no matrices")
    conv = {"transformer.patch_embed.proj.lora_A.weight": numbers(4, 4, 2, 2),
            "transformer.patch_embed.proj.lora_B.weight": numbers(64, 4, 1, 1),
            "transformer.patch_embed.proj.dora_scale": numbers(1, 4, 1, 1)}  # fmt: skip
    yield Bad("dora-by-a-convolutions-inputs", file(conv), "convolution, which is not read")
    # strange, but arithmetic: rows that the adapter takes out, or turns round
    yield Bad("dora-of-zeros", dora(dora_scale=torch.zeros(64, 1)), found=CHANCE)
    yield Bad("dora-below-zero", dora(dora_scale=-torch.ones(64, 1)), found=CHANCE)


def hand_made() -> list[Bad]:
    """Every one of them has to be refused, but for the few that are marked as a matter of chance."""
    return [
        bad
        for group in (
            _other_formats, _not_files, _framing, _bombs, _twice, _fields, _names, _metadata, _configured, _sidecars,
            _values, _alphas, _pairs, _other_models, _other_bases, _kinds,
        )
        for bad in group()
    ]  # fmt: skip


# --- what a fuzzer makes of good ones ---------------------------------------------------------------------------------

_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 1 << 31, 1 << 62, 10**19, 0.5, 1e308, "", "F16", "BF16", "I64", "x", [], {}, [0], [1],
    [-1, 1], [64], [64, 4], [4, 64], [1, 1, 4, 64], [[4, 64]], [0, 0], [1024, 0], [1 << 62, 1 << 62], {"a": {}},
)  # fmt: skip


def _boundaries(data: bytes) -> list[int]:
    """Where the parts of a file end, and a byte before."""
    header, body = taken_apart(data)
    start = len(data) - len(body)
    ends = {start, start - 1, 8, 9, 10, len(data) - 1, start // 2}
    for name, spec in header.items():
        if name != "__metadata__":
            ends |= {start + spec["data_offsets"][1], start + spec["data_offsets"][1] - 1}
    return sorted(end for end in ends if end < len(data))


def _flipped(data: bytes, dice: random.Random) -> bytes:
    """A few bits of the length or the header, seldom of the values."""
    changed, head = bytearray(data), len(data) - len(taken_apart(data)[1])
    for _ in range(dice.choice((1, 1, 2, 5))):
        end = head if dice.random() < 0.9 else len(data)
        changed[dice.randrange(end)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _spliced(data: bytes, dice: random.Random) -> bytes:
    """A piece taken out, put in, doubled, moved or written over."""
    size = dice.choice((1, 1, 3, 8, 64, 256))
    at, other = (dice.randrange(len(data) - size) for _ in range(2))
    piece = data[at : at + size]
    return dice.choice(
        (
            lambda: data[:at] + data[at + size :],
            lambda: data[:at] + dice.randbytes(size) + data[at:],
            lambda: data[:at] + piece + data[at:],
            lambda: data[:other] + piece + data[other:],
            lambda: data[:at] + bytes(size) + data[at + size :],
        )
    )()


def _retold(data: bytes, dice: random.Random) -> bytes:
    """Another header that is JSON, over the same values."""
    header, body = taken_apart(data)
    names = [name for name in header if name != "__metadata__"]
    name, other = dice.choice(names), dice.choice(names)
    spec = header[name]

    def odd() -> None:
        spec[dice.choice(("dtype", "shape", "data_offsets"))] = dice.choice(_ODD)

    def size() -> None:
        part = spec[dice.choice(("shape", "data_offsets"))]
        if part:
            part[dice.randrange(len(part))] += dice.choice((-64, -4, -1, 1, 4, 64))

    def turned() -> None:
        spec[dice.choice(("shape", "data_offsets"))].reverse()

    def lost() -> None:
        del header[name]

    def field_lost() -> None:
        del spec[dice.choice(("dtype", "shape", "data_offsets"))]

    def renamed() -> None:
        odd = dice.choice(("x", ".0", "\0", "<b>", "\u202e", ".lora_A", "_", "a" * 600))
        header[dice.choice((name + odd, odd + name, name[:-1], name.replace(".", "_", 1), name.upper()))] = spec
        del header[name]

    def swapped() -> None:
        header[name], header[other] = header[other], header[name]

    def replaced() -> None:
        header[name] = dice.choice(_ODD)

    def added() -> None:
        header[dice.choice(("x", "", "__metadata__", name + ".alpha"))] = dice.choice((*_ODD, spec))

    def told() -> None:
        header["__metadata__"] = dice.choice(({"lora_config": dice.choice(_ODD)}, dice.choice(_ODD)))

    often, seldom = (odd, size, renamed), (turned, lost, field_lost, swapped, replaced, added, told)
    dice.choice((*often, *often, *seldom))()
    return container(header, body)


def fuzzed(count: int) -> list[Bad]:
    """`count` of each way for each of the seeds, and a cut at every boundary."""
    made: list[Bad] = []
    seen = {*SEEDS.values(), *(bad.content for bad in hand_made() if isinstance(bad.content, bytes))}
    for seed, data in SEEDS.items():
        ways = {"cut": [data[:end] for end in _boundaries(data)]}
        for way in (_flipped, _spliced, _retold):
            dice = random.Random(f"{seed} {way.__name__}")
            ways[way.__name__[1:]] = [way(data, dice) for _ in range(count)]
        for name, contents in ways.items():
            for number, content in enumerate(contents):
                if content not in seen:
                    seen.add(content)
                    made.append(Bad(f"fuzz-{seed}-{name}-{number:02}", content, found=CHANCE))
    return made
