"""CogLoom at the command line: CogVideoX with LoRA adapters, stacked on a base that is loaded once.

Every command is a thin face of a node function in `nodes/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nodes.engine import VERSION
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.files import write_atomic
from nodes.host import LocalHost

EPILOG = """
examples:
  python app.py demo
  python app.py render "a large cyan circle moving right on a navy background" --lora neon:0.8 --lora bounce -o clip.mp4
  python app.py render "the same again" --like clip.mp4 --seed 7
  python app.py models                          what is here, what could be downloaded
  python app.py loras inspect neon              layout, rank, scale and why
  python app.py train my_clips --name mine      an adapter from a folder of clips and stills
  python app.py doctor                          what works on this machine, and what to do about the rest

exit codes: 0 done, 1 failed (one paragraph on stderr says why), 2 wrong arguments, 130 stopped
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    host = LocalHost()
    bar = _Bar()
    host.on_progress = bar
    previous = _stop_on_interrupt(host)
    try:
        return args.run(host, args)
    except CogLoomError as error:
        bar.close()
        if args.traceback:
            raise
        _say_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        bar.close()
        _say_error("Stopped.")
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        bar.close()
        if args.traceback:
            raise
        _say_error(
            f"{type(error).__name__}: {error}. This is a defect in CogLoom, not in what you did; "
            "run the same command with --traceback and report what it prints."
        )
        return 1
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show where in the code it arose")

    def form(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=min(_width(), 110))

    parser = argparse.ArgumentParser(
        prog="python app.py", description=__doc__, epilog=EPILOG, formatter_class=form, parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"CogLoom {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, run: Callable[[LocalHost, argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=form, parents=[common])
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "render the demo: one base, its adapters alone, stacked, and at several weights")
    demo.add_argument("--prompt", help="what to show; the toy world knows sizes, colours, shapes, motions, backgrounds")
    demo.add_argument("--seed", type=int, default=3)
    demo.add_argument("--json", type=Path, metavar="FILE", help="write what was done as data, too")

    render = command("render", _render, "render one clip")
    render.add_argument("prompt", help="what to show")
    render.add_argument("-o", "--output", type=Path, metavar="FILE",
                        help=".mp4, .webm, .gif, or .mkv (lossless); default: output/<prompt>-001.mp4")  # fmt: skip
    render.add_argument("--lora", action="append", default=[], metavar="NAME[:WEIGHT]",
                        help="an adapter and its weight (1 if not said, may be negative); again for more")  # fmt: skip
    render.add_argument("--negative", metavar="TEXT", help="what not to show")
    render.add_argument("--seed", type=int, help="default 0; one seed is one video")
    render.add_argument("--steps", type=int, help="denoising steps; default: the base's")
    render.add_argument("--guidance", type=float, help="how closely to follow the prompt; 1 is off")
    render.add_argument("--dynamic-guidance", action="store_true", default=None,
                        help="let guidance grow along the steps")  # fmt: skip
    render.add_argument("--scheduler", choices=("ddim", "dpm"))
    render.add_argument("--frames", type=int, help="length; 8·N + 1 for CogVideoX 1.0, 16·N + 1 for 1.5")
    render.add_argument("--size", metavar="WxH", help="in pixels, such as 720x480")
    render.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from (image-to-video bases)")
    render.add_argument("--video", type=Path, metavar="FILE", help="a video to change (text-to-video bases)")
    render.add_argument("--strength", type=float, help="how much of the video is made anew, above 0 to 1; default 0.8")
    render.add_argument("--like", type=Path, metavar="CLIP",
                        help="take every setting from the record in this clip, then those given here")  # fmt: skip
    _base_options(render)

    models = command("models", _models, "list the bases on this machine and those that could be downloaded")
    models.add_argument("--download", metavar="ID", help="fetch a base from Hugging Face, such as zai-org/CogVideoX-2b")
    models.add_argument("--json", action="store_true", help="print data")

    loras = command("loras", _loras, "list the adapters found, or inspect one")
    loras.add_argument("action", nargs="?", choices=("list", "inspect"), default="list")
    loras.add_argument("name", nargs="?", help="an adapter's name, as listed, or a file")
    loras.add_argument("--json", action="store_true", help="print data")

    record = command("record", _record, "print the record inside a clip: every setting, hash and version")
    record.add_argument("clip", type=Path)

    doctor = command("doctor", _doctor, "check device, memory, FFmpeg, versions, bases and adapters")
    doctor.add_argument("--json", action="store_true", help="print data")

    train = command("train", _train, "fine-tune an adapter on a folder of clips and stills with captions")
    train.add_argument("data", type=Path, help="x.mp4 or x.png beside x.txt, or prompts.txt with videos.txt")
    train.add_argument("--name", required=True, help="the adapter's name")
    train.add_argument("--out", type=Path, help="run folder; default: output/training/<name>")
    train.add_argument("--fresh", action="store_true", help="start over instead of going on from the last checkpoint")
    from nodes.train import add_settings

    add_settings(train)
    _base_options(train)
    return parser


def _base_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base")
    group.add_argument("--base", metavar="NAME", help="as `models` lists them; default: the embedded demo")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    group.add_argument("--placement", choices=("auto", "resident", "model", "group", "sequential"), default="auto",
                       help="what stays on the GPU; auto chooses by the memory that is free, and says why")  # fmt: skip
    group.add_argument("--vae-tiling", action="store_true", help="decode in tiles: less memory, slower")
    group.add_argument("--vae-slicing", action="store_true", help="decode clips of a batch one by one")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's block")


def _demo(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.showcase import PROMPT, showcase

    prompt = args.prompt or PROMPT
    print(f"“{prompt}”, seed {args.seed}\n")
    shown = showcase(host, prompt, args.seed)
    _Bar.clear()
    print(f"base: {shown.base}, {shown.placement}; loaded in {shown.load_seconds:.2f} s\n")
    print("clips")
    for clip in shown.clips:
        loras = " + ".join(f"{c['name']} {c['weight']:g}" for c in clip["loras"]) or "no adapter"
        print(f"  {loras:<24} {clip['seconds']:5.1f} s   {clip['path']}")
    print("\nswaps on the resident base")
    for swap in shown.swaps:
        print(f"  {swap['from']:<24} -> {swap['to']:<24} {swap['seconds'] * 1000:6.1f} ms")
    print(f"\nbase loads: {shown.base_loads}")
    verified = (
        "bit-identical to the checkpoint's file" if shown.base_verified else "NOT what the checkpoint's file holds"
    )
    print(f"base verified: with the stack off every weight is {verified}")
    print(f"\ngrid:          {shown.grid}\ncontact sheet: {shown.sheet}")
    if args.json:
        write_atomic(args.json, (json.dumps(shown.to_json(), indent=2) + "\n").encode())
    return 0 if shown.base_verified else 1


def _render(host: LocalHost, args: argparse.Namespace) -> int:
    from dataclasses import replace

    from nodes.engine import video
    from nodes.lora import stack_loras
    from nodes.model import choose_base
    from nodes.render import Shot, render, save, shot_from
    from nodes.render import read_record as read

    shot, loras, name = Shot(prompt=args.prompt), list(args.lora), args.base
    if args.like:
        record = read(args.like)
        shot = replace(shot_from(record), prompt=args.prompt)
        loras = loras or [f"{lora['name']}:{lora['weight']}" for lora in record["loras"]]
        name = name or record["base"]["name"]
    fields = ("negative", "seed", "steps", "guidance", "dynamic_guidance", "scheduler", "frames", "strength")
    given = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    if args.size:
        given |= dict(zip(("width", "height"), _size(args.size), strict=True))
    if args.image:
        given["image"] = video.read_image(args.image)
    if args.video:
        given["video"] = video.read_video(args.video)[0]
    if args.output and args.output.suffix.lower() not in video.SUFFIXES:  # better said now than after the render
        raise UsageError(f"-o {args.output}: the name ends in one of {', '.join(video.SUFFIXES)}.")
    base = choose_base(host, **_base(args, name))
    clip = render(host, base, stack_loras(host, loras, anywhere=True), replace(shot, **given))
    path = save(host, clip, path=args.output)
    _Bar.clear()
    swap = clip.swap
    held = " + ".join(f"{name} {weight:g}" for name, weight in swap.after) if swap else ""
    print(f"base: {clip.record['base']['name']} ({clip.record['base']['dtype']} on {clip.record['base']['device']})")
    print(f"adapters: {held or 'none'}" + (f", put on in {swap.seconds * 1000:.1f} ms" if swap and held else ""))
    print(f"{len(clip.frames)} frames in {clip.seconds:.1f} s: {path}")
    return 0


def _models(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.model import download, list_bases

    if args.download:
        print(f"{args.download}: {download(host, args.download)}")
        return 0
    listed = list_bases(host)
    if args.json:
        rows = []
        for base in listed:
            frames, width, height = base.checkpoint.defaults() if base.checkpoint else (None, None, None)
            row = {
                "name": base.name,
                "title": base.title,
                "task": base.task,
                "state": base.state,
                "folder": base.folder,
            }
            rows.append(row | {"frames": frames, "width": width, "height": height})
        print(json.dumps(rows, indent=2))
        return 0
    for base in listed:
        print(f"{base.name:<40} {base.title:<34} {base.state}")
    print(f"\nyour own go into {host.model_folders[0]} (a folder in diffusers layout each)")
    return 0


def _loras(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.engine.lora_file import inspect
    from nodes.lora import inspect_adapter, list_adapters

    if args.action == "inspect":
        if not args.name:
            raise UsageError("Which adapter? `python app.py loras` lists them.")
        about = inspect_adapter(host, args.name, anywhere=True)
        if args.json:
            print(json.dumps(about, indent=2, ensure_ascii=False))
            return 0
        for key, value in about.items():
            print(f"{key:<14} {_short(value)}")
        return 0
    rows, broken = [], []
    for path in list_adapters(host):
        try:
            rows.append((path, inspect(path)))
        except CogLoomError as error:
            broken.append((path, str(error)))
    if args.json:
        data = [{"path": str(path), **about} for path, about in rows]
        print(json.dumps(data + [{"path": str(p), "error": e} for p, e in broken], indent=2, ensure_ascii=False))
        return 0
    for path, about in rows:
        words = ", ".join(about["trigger_words"]) or "-"
        print(f"{path.stem:<24} rank {_short(about['rank']):<6} width {_short(about['width']):<6} triggers: {words}")
        print(f"{'':<24} scale {about['scale_reason']}")
    for _, error in broken:
        print(textwrap.fill(error, _width(), subsequent_indent="  "))
    print(f"\n{len(rows)} adapters; your own go into {host.lora_folders[0]}")
    return 0


def _record(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.render import read_record

    print(json.dumps(read_record(args.clip), indent=2, ensure_ascii=False))
    return 0


def _doctor(host: LocalHost, args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from nodes.doctor import examine

    findings = examine(host)
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}[finding.state]
            print(textwrap.fill(f"{mark}  {finding.topic}: {finding.text}", _width(), subsequent_indent="      "))
            if finding.remedy:
                print(textwrap.fill(f"      {finding.remedy}", _width(), subsequent_indent="      "))
    return 1 if any(f.state == "fail" for f in findings) else 0


def _train(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.model import choose_base
    from nodes.train import settings_from, train

    base = choose_base(host, **_base(args, args.base))
    result = train(host, base, args.data, args.name, settings_from(args), out=args.out, fresh=args.fresh)
    _Bar.clear()
    print(f"{result.steps} steps in {result.seconds:.0f} s")
    if result.validation:
        (_, first), (_, last) = result.validation[0], result.validation[-1]
        print(f"validation loss {first:.4f} -> {last:.4f}")
    print(f'{result.path}\nuse it: python app.py render "…" --lora {result.path}')
    return 0


def _base(args: argparse.Namespace, name: str | None) -> dict[str, Any]:
    options = {k: getattr(args, k) for k in ("dtype", "device", "placement", "vae_tiling", "vae_slicing", "compile")}
    return options if name is None else options | {"name": name}


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdigit() or not height.isdigit():
        raise UsageError(f"--size {text!r} is not WIDTHxHEIGHT, such as 720x480.")
    return int(width), int(height)


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return textwrap.shorten(str(value), 200, placeholder=" …")


def _width() -> int:
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def _say_error(message: str) -> None:
    print(textwrap.fill(f"error: {message}", _width(), break_long_words=False, break_on_hyphens=False), file=sys.stderr)


def _stop_on_interrupt(host: LocalHost) -> Any:
    """The first Ctrl-C asks the work to stop within a step, so that nothing is left half done; a second one insists."""

    def stop(signum: int, frame: Any) -> None:
        if host.stop.is_set():
            raise KeyboardInterrupt
        host.stop.set()

    return signal.signal(signal.SIGINT, stop)


class _Bar:
    """One line of progress on stderr; on a terminal it redraws, elsewhere it keeps quiet."""

    def __init__(self) -> None:
        self._what = ""

    def __call__(self, done: int, total: int, what: str, preview: Any = None) -> None:
        if not sys.stderr.isatty():
            return
        share = done / total if total else 1.0
        filled = round(share * 24)
        line = f"{what:<28.60} {'█' * filled}{'░' * (24 - filled)} {done}/{total}"
        sys.stderr.write(f"\r\x1b[2K{line[: _width() - 1]}")
        sys.stderr.flush()

    def close(self) -> None:
        self.clear()

    @staticmethod
    def clear() -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not be UTF-8; a path with a strange name must print
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    raise SystemExit(main())
