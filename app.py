"""CogLoom: CogVideoX with LoRA adapters, stacked on a base that is loaded once. Without a command, the app opens.

Every command is a thin face of a node function in `nodes/`.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # what imports make stays; to look through it again and again is a quarter of the start

import argparse
import json
import os
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
from ui.terminal import Bar, plain, print_json, say_error, width

EPILOG = """
examples:
  python app.py                                 the app, in your browser
  python app.py demo
  python app.py render "a large cyan circle moving right on a navy background" --lora neon:0.8 --lora bounce -o clip.mp4
  python app.py render "the same again" --like clip.mp4 --seed 7
  python app.py run workflow.json --set CogLoomSampler.seed=7   a ComfyUI workflow without ComfyUI
  python app.py models                          what is here, what could be downloaded
  python app.py loras                           the adapters, what they fit, their scale and why
  python app.py loras inspect neon              all there is to know of one
  python app.py loras effect neon:0.8 bounce    how strong each is, per block, and how they overlap
  python app.py loras scale mine 1/256          settle a scale that the file does not say
  python app.py loras convert mp_rank_00_model_states.pt   a SAT checkpoint's adapter as safetensors
  python app.py train my_clips --name mine      an adapter from a folder of clips and stills
  python app.py compare neon bounce --weights 0.5,1 --prompt "…" --seeds 0-3   which is better, with evidence
  python app.py vote STUDY                      judge its clips without knowing which is which
  python app.py checkpoints list mine           what that training kept; verify, restore, prune
  python app.py workshop extract my_finetune -o mine.safetensors --rank 64   a fine-tuned model as an adapter
  python app.py workshop take my_run -o mine.safetensors   the adapter alone out of a run or another trainer's state
  python app.py workshop tree mine              what it was made of, checked by hash
  python app.py doctor                          what works on this machine, and what to do about the rest

exit codes: 0 done, 1 failed (one paragraph on stderr says why), 2 wrong arguments, 130 stopped
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command is None:  # at most with --traceback
        args = parser.parse_args([*(sys.argv[1:] if arguments is None else arguments), "ui"])
    host = LocalHost()
    bar = Bar()
    host.on_progress = bar
    previous = _stop_on_interrupt(host)
    if not gc.isenabled():  # and not where a program calls this: what it may throw away would be kept for good
        gc.freeze()
        gc.enable()
    try:
        return args.run(host, args)
    except CogLoomError as error:
        bar.close()
        if args.traceback:
            raise
        say_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        bar.close()
        say_error("Stopped.")
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        bar.close()
        if args.traceback:
            raise
        say_error(
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
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=min(width(), 110))

    parser = argparse.ArgumentParser(
        prog="python app.py", description=__doc__, epilog=EPILOG, formatter_class=form, parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"CogLoom {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, run: Callable[[LocalHost, argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=form, parents=[common])
        sub.set_defaults(run=run)
        return sub

    ui = command("ui", _ui, "open the app in a browser; the same as no command")
    ui.add_argument("--port", type=int, default=7860, help="default 7860")
    ui.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS",
                    help="where others may reach it, such as 0.0.0.0; needs --auth")  # fmt: skip
    ui.add_argument("--auth", metavar="USER:PASSWORD", help="who may use it; better in COGLOOM_AUTH, which no list of "
                    "processes shows")  # fmt: skip
    ui.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                    help="a name by which this machine is reached besides its own, such as a proxy's")  # fmt: skip
    ui.add_argument("--mcp", action="store_true", help="offer the API as tools over MCP, too; needs gradio[mcp]")
    ui.add_argument("--queue", type=int, default=16, metavar="N", help="how many may wait for their turn; default 16")
    ui.add_argument("--open", action=argparse.BooleanOptionalAction, default=None,
                    help="open the browser; by default when started from a terminal")  # fmt: skip

    demo = command("demo", _demo, "render the demo: one base, its adapters alone, stacked, and at several weights")
    demo.add_argument("--prompt", help="what to show; the toy world knows sizes, colours, shapes, motions, backgrounds")
    demo.add_argument("--seed", type=int, default=3)
    demo.add_argument("--json", type=Path, metavar="FILE", help="write what was done as data, too")

    render = command("render", _render, "render one clip")
    render.add_argument("prompt", nargs="?", help="what to show; with --like the record's, if not said")
    render.add_argument("-o", "--output", type=Path, metavar="FILE",
                        help=".mp4, .webm, .gif, or .mkv (lossless); default: output/<prompt>-001.mp4")  # fmt: skip
    render.add_argument("--lora", action="append", default=[], metavar="NAME[:WEIGHT][OPTIONS]",
                        help="an adapter and its weight (1 if not said, may be negative); again for more. Options: "
                        "[blocks=0-9:0.5,10-29:1], [blocks=attn:1], [steps=0@0 1@0.3], [steps=held 1@0.4], "
                        "[partial]")  # fmt: skip
    render.add_argument(
        "--hold",
        choices=("auto", "fused", "stacked"),
        help="how adapters are held: fused into the weights, stacked beside them, or auto",
    )
    render.add_argument(
        "--verify",
        action="store_true",
        help="prove afterwards that every weight is what base and adapters make of it, to the bit",
    )
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

    run = command("run", _run, "run a workflow of ComfyUI's without it: a .json, or a clip or picture that carries one")
    run.add_argument("workflow", type=Path, metavar="FILE")
    run.add_argument("--set", action="append", default=[], dest="changes", metavar="NODE.INPUT=VALUE",
                     help="change a value; the node by its number, title or class; again for more")  # fmt: skip
    run.add_argument("--json", action="store_true", help="print what the output nodes show, as data")

    models = command("models", _models, "list the bases on this machine and those that could be downloaded")
    models.add_argument("--download", metavar="ID", help="fetch a base from Hugging Face, such as zai-org/CogVideoX-2b")
    models.add_argument("--json", action="store_true", help="print data")

    loras = command("loras", _loras, "list the adapters found, inspect one, settle its scale, convert a file")
    loras.add_argument("--json", action="store_true", help="print data")
    actions = loras.add_subparsers(metavar="action")

    def action(name: str, run: Callable[[LocalHost, argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help, formatter_class=form, parents=[common])
        sub.set_defaults(run=run)
        # Suppressed: a default of its own would undo `loras --json list`.
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print data")
        return sub

    action("list", _loras, "list the adapters found (the default)")
    inspect = action("inspect", _inspect, "what is in a file, which base it fits, its scale and why")
    inspect.add_argument("name", nargs="?", help="an adapter's name, as listed, or a file")
    scale = action("scale", _scale, "say an adapter's true scale, trigger words or notes once, in a sidecar beside it")
    scale.add_argument("name", nargs="?", help="an adapter's name, as listed, or a file")
    scale.add_argument("value", nargs="?",
                       help="a number such as 0.5, a fraction such as 1/256, or auto: as the file says")  # fmt: skip
    scale.add_argument("--trigger-words", metavar="WORDS", help='with commas between them; "" says that it has none')
    scale.add_argument("--notes", metavar="TEXT", help='"" takes them out')
    effect = action("effect", _effect, "how strong adapters are on a base, per block, and how they overlap")
    effect.add_argument("entries", nargs="*", metavar="NAME[:WEIGHT][OPTIONS]", help="as for render --lora")
    effect.add_argument("--base", metavar="NAME", help="as `models` lists them; default: the embedded demo")
    convert = action("convert", _convert, "write a SAT checkpoint, a .bin or any layout in the diffusers format")
    convert.add_argument("source", nargs="?", help="a file; a pickle is opened as weights alone and in a process apart")
    convert.add_argument("-o", "--output", type=Path, metavar="FILE",
                         help="default: beside the source, with .safetensors")  # fmt: skip
    convert.add_argument("--alpha", type=float, help="as it was trained; default: what the file says, for SAT 1")
    convert.add_argument("--force", action="store_true", help="replace the file that is there")

    record = command("record", _record, "print the record inside a clip: every setting, hash and version")
    record.add_argument("clip", type=Path)

    doctor = command("doctor", _doctor, "check device, memory, FFmpeg, versions, bases and adapters")
    doctor.add_argument("--json", action="store_true", help="print data")

    train = command("train", _train, "fine-tune an adapter on a folder of clips and stills with captions")
    train.add_argument("data", type=Path, help="x.mp4 or x.png beside x.txt, or prompts.txt with videos.txt")
    train.add_argument("--name", required=True, help="the adapter's name")
    train.add_argument("--out", type=Path, help="run folder; default: output/training/<name>")
    train.add_argument("--fresh", action="store_true", help="start over instead of going on from the last checkpoint")
    train.add_argument("--start-from", default="", metavar="NAME",
                       help="an adapter to begin with; it is recorded as the parent")  # fmt: skip
    from nodes.train import add_settings

    add_settings(train)
    _base_options(train)

    from ui import checkpoint_commands as checkpoints
    from ui import commands as studies
    from ui import workshop_commands as workshop

    checkpoints.add_commands(command)
    studies.add_commands(command, _base_options)
    workshop.add_commands(command, _base_options)
    return parser


def _base_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base")
    group.add_argument("--base", metavar="NAME", help="as `models` lists them; default: the embedded demo")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    group.add_argument("--placement", choices=("auto", "resident", "model", "group", "sequential"), default="auto",
                       help="what stays on the GPU; auto chooses by the memory that is free, and says why")  # fmt: skip
    group.add_argument("--attention", choices=("auto", "flash", "efficient", "cudnn", "math"), default="auto",
                       help="which of PyTorch's attention kernels")  # fmt: skip
    group.add_argument("--vae-tiling", action="store_true", help="decode in tiles: less memory, slower")
    group.add_argument("--vae-slicing", action="store_true", help="decode clips of a batch one by one")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's block")
    group.add_argument(
        "--quantise",
        choices=("none", "int8", "fp8"),
        default="none",
        help="half the memory: int8 by torchao, fp8 by casting; adapters are then held at run time",
    )
    group.add_argument(
        "--rank-budget",
        type=int,
        default=128,
        metavar="R",
        help="with --compile and --quantise: ranks of a stack that never compile anew; default 128",
    )


def _ui(host: LocalHost, args: argparse.Namespace) -> int:
    from ui.app import serve

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server has its own way to end
    opens = sys.stdout.isatty() if args.open is None else args.open
    auth = args.auth or os.environ.get("COGLOOM_AUTH")
    return serve(host, args.port, args.listen, auth, args.mcp, opens, args.queue, args.allow_host)


def _demo(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.showcase import PROMPT, showcase

    prompt = args.prompt or PROMPT
    print(f"“{prompt}”, seed {args.seed}\n")
    shown = showcase(host, prompt, args.seed)
    Bar.clear()
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
    from nodes.engine.lora_stack import LoraStack
    from nodes.lora import stack_loras
    from nodes.model import choose_base
    from nodes.render import Shot, departures, entries_from, render, save, shot_from
    from nodes.render import read_record as read

    shot, loras, name, like = Shot(prompt=args.prompt or ""), list(args.lora), args.base, None
    if args.like:
        like = read(args.like)
        shot = shot_from(like) if args.prompt is None else replace(shot_from(like), prompt=args.prompt)
        if args.prompt is None and "prompt_encoding" in like:
            raise UsageError(f"{args.like}: its prompt was encoded elsewhere and is not in the record; say a prompt.")
        if like["base"].get("file") and not name:
            raise UsageError(
                f"{args.like}: its transformer was the single file {like['base']['file']}; say with --base which base "
                "to use instead, or run the clip as a workflow: python app.py run FILE."
            )
        loras = loras or entries_from(like)
        name = name or like["base"]["name"]
        _as_recorded(args, like)
    elif args.prompt is None:
        raise UsageError("Say what to show: python app.py render PROMPT (or --like CLIP for a clip's own settings).")
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
    stack = stack_loras(host, loras, LoraStack(hold=args.hold or "auto"), anywhere=True)
    clip = render(host, base, stack, replace(shot, **given), args.verify)
    differs = departures(clip.record, like) if like else []
    path = save(host, clip, path=args.output)
    Bar.clear()
    record, swap = clip.record, clip.swap
    about = record["base"]
    quantised = "" if about["quantise"] == "none" else f", {about['quantise']}"
    print(plain(f"base: {about['name']} ({about['dtype']}{quantised} on {about['device']})"))
    for lora in record["loras"]:
        how = "".join(f" [{key} {lora[key]}]" for key in ("blocks", "steps") if lora[key])
        print(plain(f"adapter: {lora['name']} {lora['weight']:g}{how}, used {lora['tensors']} tensors, scale "
                     f"{lora['scale']}; {lora['hold']}, {lora['hold_reason']}"))  # fmt: skip
    if record["loras"] and swap:
        print(f"put on in {swap.seconds * 1000:.1f} ms")
    for note in [*record["notes"], *(f"unlike {args.like.name}: {what}" for what in differs)]:
        print(textwrap.fill(plain(f"note: {note}"), width(), subsequent_indent="  ", break_on_hyphens=False))
    if record["verified"]:
        print(record["verified"])
    print(f"{len(clip.frames)} frames in {clip.seconds:.1f} s: {path}")
    return 0


def _run(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.workflow import read_workflow, run_workflow

    graph, workflow = read_workflow(args.workflow)
    shown = run_workflow(host, graph, workflow, args.changes)
    Bar.clear()
    if args.json:
        print_json([done._asdict() for done in shown])
        return 0
    for done in shown:
        for item in (*done.ui.get("images", ()), *done.ui.get("cogloom_clips", ())):
            print(plain(f"{done.title}: {Path(item['subfolder'], item['filename'])}"))
        for text in done.ui.get("text", ()):
            print(plain(f"{done.title}: {text}"))
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
    from nodes.lora import describe_adapters

    rows = describe_adapters(host)
    if args.json:
        print_json([{"path": str(row.path), **(row.about or {"error": row.error})} for row in rows])
        return 0
    for about in (row.about for row in rows if row.about):
        rank = "" if about["rank"] == [] else f" rank {_range(about['rank'])}"
        fits = ", ".join(about["fits"]) or f"no base that is known (width {about['width']})"
        print(plain(f"{about['name']:<24} {about['kind'] + rank:<16} fits {fits}"))
        print(plain(f"{'':<24} scale {about['scale_reason']}"))
        if about["trigger_words"]:
            print(plain(f"{'':<24} triggers: {', '.join(about['trigger_words'])}"))
    broken = [row for row in rows if row.error]
    for row in broken:
        print(textwrap.fill(plain(f"not read: {row.error}"), width(), subsequent_indent="  "))
    of_them = f", {len(broken)} more not read" if broken else ""
    print(plain(f"\n{len(rows) - len(broken)} adapters{of_them}; your own go into {host.lora_folders[0]}"))
    return 0


def _inspect(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.lineage import lineage
    from nodes.lora import inspect_adapter

    about = inspect_adapter(host, _named(args.name), anywhere=True)
    if args.json:
        print_json(about)
        return 0
    number, _, reason = about["scale_reason"].partition(": ")
    rank = "" if about["rank"] == [] else f" rank {_range(about['rank'])},"
    words = [f"used {about['tensors_used']}/{about['tensors_total']} tensors,{rank} scale {number} ({reason})"]
    words += about["hints"]
    if about["unused"]:
        words.append(f"not used: {_short(', '.join(about['unused']))}")
    for text in words:
        print(textwrap.fill(plain(text), width(), subsequent_indent="  ", break_on_hyphens=False))
    blocks = "" if about["blocks"] is None else f", {about['blocks']} blocks"
    told = {
        "name": about["name"],
        "layout": f"{about['layout']}, {about['kind']}, {about['modules']} layers",
        "fits": f"{', '.join(about['fits']) or 'no base that is known'} (width {about['width']}{blocks})",
        "trigger words": ", ".join(about["trigger_words"]) or "-",
        "notes": about["notes"] or "-",
        "size": f"{about['size_bytes']:,} bytes",
        "sha256": about["sha256"],
    }
    print()
    for key, value in told.items():
        print(plain(f"{key:<14} {_short(value)}"))
    for key, value in about["metadata"].items():
        print(plain(f"{'metadata':<14} {_short(key)} = {_short(value)}"))
    print()
    for line in lineage(host, _named(args.name), anywhere=True).lines():
        print(plain(line))
    return 0


def _scale(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.lora import settle_adapter

    if args.value is None and args.trigger_words is None and args.notes is None:
        raise UsageError("Nothing to say: give a scale (0.5, 1/256, auto), --trigger-words or --notes.")
    words = None if args.trigger_words is None else args.trigger_words.split(",")
    settled = settle_adapter(host, _named(args.name), args.value, words, args.notes, anywhere=True)
    after = settled.about["scale_reason"]
    if args.json:
        print_json({"path": str(settled.path), "before": settled.before, "after": after, "about": settled.about})
        return 0
    same = after == settled.before
    print(plain(f"{settled.path.name}: scale {after}" + (", as before" if same else "")))
    if not same:
        print(textwrap.fill(plain(f"before: {settled.before}"), width(), subsequent_indent="  "))
    for what in ("trigger_words", "notes"):
        if said := settled.about[what]:
            print(plain(f"{what.replace('_', ' ')}: {_short(', '.join(said) if isinstance(said, list) else said)}"))
    return 0


def _effect(host: LocalHost, args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from nodes.lora import measure_stack, stack_loras
    from nodes.model import choose_base

    if not args.entries:
        raise UsageError("Which adapters? `python app.py loras` lists them.")
    stack = stack_loras(host, args.entries, anywhere=True).active()
    found = measure_stack(host, choose_base(host, **({"name": args.base} if args.base else {})), stack)
    names = [entry.name for entry in stack]
    if args.json:
        data = asdict(found)
        for one in (data, *data["each"]):
            one["cells"] = [[block, part, size] for (block, part), size in one["cells"].items()]
        print_json({"adapters": names, **data})
        return 0
    rows = [*zip(names, found.each, strict=True), *([("together", found)] if len(names) > 1 else [])]
    for name, one in rows:
        parts = ", ".join(f"{part} {size:.3g}" for part, size in one.parts.items())
        print(plain(f"{name:<24} {one.overall:<8.3g} of its layers' size ({parts})"))
        peak = max(one.blocks.values(), default=0.0) or 1.0
        for block, size in one.blocks.items():
            print(f"  block {block!s:<6} {size:<10.3g} {'█' * round(40 * size / peak)}")
        if one.warning:
            print(textwrap.fill(plain(one.warning), width(), initial_indent="  ", subsequent_indent="  "))
    for pair in found.overlap:
        first, second = names[pair.first], names[pair.second]
        print(plain(f"{first} and {second}: cosine {pair.overall:+.3f} (1 the same, -1 one undoes the other)"))
    return 0


def _convert(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.lora import convert_adapter

    if not args.source:
        raise UsageError("Which file? Name a SAT checkpoint, a .pt or .bin, or a safetensors adapter.")
    report = convert_adapter(host, args.source, args.output, args.alpha, args.force)
    Bar.clear()
    if args.json:
        print_json(report)
        return 0
    used, total = report["tensors_used"], report["tensors_total"]
    print(plain(f"{report['layout']}: used {used:,}/{total:,} tensors, rank {_range(report['rank'])}"))
    if report["unused"]:
        print(plain(f"not used: {total - used:,}, such as {report['unused'][0]}"))
    print(plain(f"scale {report['scale_reason']}"))
    sizes = (f"{report[key] / 1e6:,.{0 if report[key] > 1e7 else 3}f} MB" for key in ("source_bytes", "target_bytes"))
    print(" -> ".join(sizes))
    print(plain(report["target"]))
    return 0


def _named(name: str | None) -> str:
    if not name:
        raise UsageError("Which adapter? `python app.py loras` lists them.")
    return name


def _range(value: int | float | list[int] | list[float]) -> str:
    return f"{min(value):g} to {max(value):g}" if isinstance(value, list) else f"{value:g}"


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
            text = plain(f"{mark}  {finding.topic}: {finding.text}")
            print(textwrap.fill(text, width(), subsequent_indent="      "))
            if finding.remedy:
                print(textwrap.fill(plain(f"      {finding.remedy}"), width(), subsequent_indent="      "))
    return 1 if any(f.state == "fail" for f in findings) else 0


def _train(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.model import choose_base
    from nodes.train import estimate, settings_from, train

    base = choose_base(host, **_base(args, args.base))
    if args.estimate:
        print(textwrap.fill(plain(estimate(host, base, settings_from(args)).sentence()), width()))
        return 0
    result = train(host, base, args.data, args.name, settings_from(args), args.out, args.fresh,
                   start_from=args.start_from, force=args.anyway)  # fmt: skip
    Bar.clear()
    print(f"{result.steps} steps in {result.seconds:.0f} s")
    if result.validation:
        (_, first), (_, last) = result.validation[0], result.validation[-1]
        print(f"validation loss {first:.4f} -> {last:.4f}")
    print(f'{result.path}\nuse it: python app.py render "…" --lora {result.path}')
    return 0


def _as_recorded(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """How the base and the stack were held decides bits as well: the record's, where nothing else was said."""
    for name, unsaid in (("dtype", "auto"), ("quantise", "none"), ("attention", "auto"), ("vae_tiling", False),
                         ("vae_slicing", False)):  # fmt: skip
        if getattr(args, name) == unsaid:
            setattr(args, name, record["base"].get(name, unsaid))
    args.hold = args.hold or record.get("hold")


def _base(args: argparse.Namespace, name: str | None) -> dict[str, Any]:
    names = ("dtype", "device", "placement", "vae_tiling", "vae_slicing", "compile", "quantise", "rank_budget",
             "attention")  # fmt: skip
    options = {name: getattr(args, name) for name in names}
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


def _stop_on_interrupt(host: LocalHost) -> Any:
    """The first Ctrl-C asks the work to stop within a step, so that nothing is left half done; a second one insists."""

    def stop(signum: int, frame: Any) -> None:
        if host.stop.is_set():
            raise KeyboardInterrupt
        host.stop.set()

    return signal.signal(signal.SIGINT, stop)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a Windows console may not be UTF-8; a path with a strange name must print
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    raise SystemExit(main())
