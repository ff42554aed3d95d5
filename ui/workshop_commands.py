"""What the command line says of the workshop: adapters taken out, extracted, merged, baked, resized and converted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.engine.errors import UsageError
from nodes.engine.files import in_megabytes
from ui.terminal import print_json, say

if TYPE_CHECKING:
    from nodes.engine.lowrank import Fidelity
    from nodes.host import LocalHost

Command = Callable[[str, Callable[..., int], str], argparse.ArgumentParser]


def add_commands(command: Command, base_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """`command(name, run, help)` makes a parser. `base_options` is not asked: no base is loaded here."""
    workshop = command("workshop", _workshop, "make adapters from models and from adapters; write them for other tools")
    actions = workshop.add_subparsers(metavar="action")
    workshop.set_defaults(actions=actions)

    def action(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help, formatter_class=workshop.formatter_class)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print what was done as data")
        sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return sub

    take = action("take", _take, "the adapter alone out of what training left behind, with a record")
    take.add_argument("source", type=Path, help="a training run's folder, a PEFT folder, a SAT or DeepSpeed "
                      "checkpoint, an accelerate state, or a file; a model that was trained in full is "
                      "extracted")  # fmt: skip
    _output(take, "FILE")
    take.add_argument("--step", default="newest", metavar="N", help="which checkpoint: newest (the default), best (by "
                      "validation), or a step")  # fmt: skip
    take.add_argument("--alpha", type=float, metavar="N", help="the scale is alpha/rank, where the source does not say")
    take.add_argument("--base", metavar="NAME", help="of a model trained in full; default: the embedded demo")
    _cut(take, "; default 64 of a model trained in full")
    _numbers(take, "auto")

    tree = action("tree", _tree, "where an adapter comes from, each of its ancestors compared with what is here")
    tree.add_argument("name", help="an adapter's name, as `loras` lists it, or a file")
    tree.add_argument("--base", metavar="NAME", help="one more base to compare with")

    extract = action("extract", _extract, "a fine-tuned model minus its base, as an adapter")
    extract.add_argument("finetuned", help="a checkpoint's folder or name, a transformer's folder, or one file")
    _output(extract, "FILE")
    extract.add_argument("--base", metavar="NAME", help="it was trained from; default: the embedded demo")
    _cut(extract, "; default 64")
    extract.add_argument("--loss", type=Path, metavar="DATASET", help="a folder of clips with captions that were not "
                         "trained on: measure the denoising loss of base, fine-tune and base with the adapter on "
                         "them")  # fmt: skip
    extract.add_argument("--draws", type=int, default=4, metavar="N", help="noises for each clip of --loss; default 4")
    extract.add_argument("--keep-norms", action="store_true", dest="norms", default=True,
                         help="differences of norms and biases in full (the default); diffusers cannot read "
                         "them")  # fmt: skip
    extract.add_argument("--drop-norms", action="store_false", dest="norms", help="matrices alone")
    extract.add_argument("--as-trained", action="store_true",
                         help="where the fine-tune is stored more coarsely than its base: the difference to the base "
                         "as rounded")  # fmt: skip
    _numbers(extract, "bf16")

    merge = action("merge", _merge, "several adapters as one")
    merge.add_argument("entries", nargs="+", metavar="NAME[:WEIGHT]", help="as for render --lora")
    _output(merge, "FILE")
    merge.add_argument("--method", default="concat", metavar="METHOD",
                       help="concat (exact, the default), svd, linear, ties, dare_linear, dare_ties, magnitude_prune: "
                       "as PEFT has them, on A and B; with _svd at the end on what they add. dare is "
                       "dare_linear")  # fmt: skip
    merge.add_argument(
        "--density", type=float, default=0.5, help="share of values that ties and dare keep; default 0.5"
    )
    merge.add_argument("--majority", choices=("total", "frequency"), default="total", help="what elects ties' signs")
    merge.add_argument("--seed", type=int, default=0, help="of dare's choice; default 0")
    _cut(merge)
    _numbers(merge, "auto")

    bake = action("bake", _bake, "a base's transformer with adapters inside it, for programs that have no LoRA")
    bake.add_argument("entries", nargs="+", metavar="NAME[:WEIGHT]", help="as for render --lora")
    bake.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="that is not there yet")
    bake.add_argument("--base", metavar="NAME", help="as `models` lists them; default: the embedded demo")
    bake.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: the base's")

    resize = action("resize", _resize, "an adapter with fewer ranks")
    resize.add_argument("name", help="an adapter's name, as `loras` lists it, or a file")
    resize.add_argument("--base", metavar="NAME", help="to tell the effect before and after on it; default: the one "
                        "that it was trained on, if that is here")  # fmt: skip
    _output(resize, "FILE")
    _cut(resize)
    _numbers(resize, "auto")

    spectrum = action("spectrum", _spectrum, "the singular values of each layer: how many ranks are worth keeping")
    spectrum.add_argument("name", help="an adapter's name, as `loras` lists it, or a file")
    spectrum.add_argument("-o", "--output", type=Path, metavar="FILE.svg", help="draw it, as an SVG picture")
    spectrum.add_argument("--force", action="store_true", help="replace the file that is there")
    spectrum.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="that takes them apart")
    _cut(spectrum, "; draw what a resize to it keeps")

    convert = action("convert", _convert, "the same adapter with another program's names")
    convert.add_argument("name", help="an adapter's name, as `loras` lists it, or a file")
    _output(convert, "TARGET")
    convert.add_argument("--to", required=True, choices=("diffusers", "peft", "kohya", "comfyui", "sat"),
                         help="peft writes a folder")  # fmt: skip


def _output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=what)
    parser.add_argument("--force", action="store_true", help="replace the file that is there")


def _cut(parser: argparse.ArgumentParser, more: str = "") -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rank", type=int, metavar="N", help=f"of every layer{more}")
    how.add_argument("--energy", type=float, metavar="SHARE", help="of each layer's squares to keep, such as 0.99")
    how.add_argument("--size-mb", type=float, metavar="MB", help="of the file, shared out where it helps most")


def _numbers(parser: argparse.ArgumentParser, dtype: str) -> None:
    kinds = ("auto", "fp32", "bf16", "fp16") if dtype == "auto" else ("fp32", "bf16", "fp16")
    parser.add_argument("--dtype", choices=kinds, default=dtype, help=f"of the matrices; default {dtype}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="that takes them apart")


def _workshop(host: LocalHost, args: argparse.Namespace) -> int:
    raise UsageError(f"What? One of {', '.join(args.actions.choices)}; `workshop ACTION --help` tells more.")


def _take(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.take import take_adapter
    from nodes.workshop import cut_from

    cut = cut_from(args.rank, args.energy, args.size_mb)
    said: dict[str, Any] = {"base": args.base} if args.base else {}
    said |= {"cut": cut} if cut.to_json() else {}
    done = take_adapter(host, args.source, args.output, dtype=args.dtype, device=args.device, force=args.force,
                        which=args.step, alpha=args.alpha, **said)  # fmt: skip
    if args.json:
        print_json(done.to_json())
        return 0
    say(done.sentence())
    for note in done.notes:
        say(note)
    say(str(done.path))
    return 0


def _tree(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.lineage import lineage

    found = lineage(host, args.name, args.base, anywhere=True)
    if args.json:
        print_json(found.as_dict())
        return 0
    for line in found.lines():
        say(line)
    return 0


def _extract(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.workshop import cut_from, extract_adapter

    cut = cut_from(args.rank, args.energy, args.size_mb)
    said = {"base": args.base} if args.base else {}
    said |= {"cut": cut} if cut.to_json() else {}
    done = extract_adapter(host, args.finetuned, args.output, keep_norms=args.norms, as_trained=args.as_trained,
                           dtype=args.dtype, device=args.device, force=args.force, losses=args.loss, draws=args.draws,
                           **said)  # fmt: skip
    if args.json:
        print_json(done.to_json())
        return 0
    say(f"{in_megabytes(done.source_bytes)} -> {in_megabytes(done.target_bytes)}, layout {done.layout}")
    _say_fidelity(done.fidelity)
    if done.cast > 0.01:
        say(f"{min(done.cast, 1):.1%} of the difference is the base as rounded to the fine-tune's precision and no "
            "training; --as-trained leaves it out")  # fmt: skip
    if done.unchanged:
        say(f"{len(done.unchanged)} parameters are the base's to the bit")
    for line in done.losses.words() if done.losses else ():
        say(line)
    say(str(done.path))
    return 0


def _merge(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.engine.merge import EXACT, Rule
    from nodes.lora import stack_loras
    from nodes.workshop import cut_from, merge_adapters

    aliases = {"concat": EXACT, "cat": EXACT, "dare": "dare_linear"}
    method = aliases.get(args.method, str(args.method))
    rule = Rule(method, args.density, args.majority, args.seed)
    stack = stack_loras(host, args.entries, anywhere=True)
    cut = cut_from(args.rank, args.energy, args.size_mb)
    return _say_merged(args, merge_adapters(host, stack, args.output, rule, cut, args.dtype, args.device, args.force))


def _resize(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.lora import find_adapter
    from nodes.workshop import cut_from, effects, resize_adapter

    cut = cut_from(args.rank, args.energy, args.size_mb)
    if args.base:
        from nodes.model import choose_base

        choose_base(host, args.base)  # before anything is written
    before = find_adapter(host, args.name, anywhere=True)
    done = resize_adapter(host, args.name, args.output, cut, args.dtype, args.device, anywhere=True, force=args.force)
    return _say_merged(args, done, effects(host, before, done.path, args.base))


def _say_merged(args: argparse.Namespace, done: Any, effect: Any = None) -> int:
    if args.json:
        print_json({**done.to_json(), **({} if effect is None else {"effect": effect._asdict()})})
        return 0
    say(
        f"{in_megabytes(done.source_bytes)} -> {in_megabytes(done.target_bytes)}, {done.before:,} -> {done.after:,} "
        f"ranks in all, layout {done.layout}"
    )
    if done.fidelity.kept:
        _say_fidelity(done.fidelity)
    if effect is not None:
        share = effect.apart / effect.before if effect.before else 0.0
        say(f"effect on {effect.base}: {effect.before:.3g} before and {effect.after:.3g} after, of the base's norm; "
            f"what is between them is {share:.2%} of it")  # fmt: skip
    say(str(done.path))
    return 0


def _bake(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.lora import stack_loras
    from nodes.workshop import bake_adapters

    stack = stack_loras(host, args.entries, anywhere=True)
    done = bake_adapters(host, stack, args.output, dtype=args.dtype, **({"base": args.base} if args.base else {}))
    if args.json:
        print_json(done.to_json())
        return 0
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    say(f"{len(done.changed)} parameters have the adapters in them; {in_megabytes(done.target_bytes)} in {files}")
    say(str(done.folder))
    return 0


def _spectrum(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.engine.lowrank import share_of_ranks
    from nodes.workshop import cut_from, spectrum, write_spectrum

    cut = cut_from(args.rank, args.energy, args.size_mb)
    if args.output is not None:
        path = write_spectrum(host, args.name, args.output, cut, args.device, anywhere=True, force=args.force)
        if args.json:
            print_json({"target": str(path)})
        else:
            say(str(path))
        return 0
    if cut.to_json():
        raise UsageError("A cut is for the picture: say where to draw it with -o, or resize with `workshop resize`.")
    found = spectrum(host, args.name, args.device, anywhere=True)
    if args.json:
        print_json({name: list(values) for name, values in found.items()})
        return 0
    say("ranks for 90 %, 99 % and 99.9 % of each layer's squares, of all it has:")
    for name, values in found.items():
        ranks = [share_of_ranks(values, share) for share in (0.9, 0.99, 0.999)]
        say(f"{name.removesuffix('.weight')}: {', '.join(map(str, ranks))} of {len(values)}")
    return 0


def _convert(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.workshop import convert_layout

    done = convert_layout(host, args.name, args.output, args.to, anywhere=True, force=args.force)
    if args.json:
        print_json(done.to_json())
        return 0
    for note in done.notes:
        say(note)
    say(f"{in_megabytes(done.source_bytes)} -> {in_megabytes(done.target_bytes)}")
    say(str(done.path))
    return 0


def _say_fidelity(fidelity: Fidelity) -> None:
    low, full, dropped = (fidelity.of(how) for how in ("low rank", "full", "dropped"))
    ranks = [one.rank for one in low]
    said = f"{fidelity.energy:.3%} of the difference is kept, relative error {fidelity.error:.3g}"
    if ranks:
        said += f"; {len(low)} layers of rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) != max(ranks) else "")
    say(said + (f", {len(full)} differences in full" if full else ""))
    if dropped:
        share = fidelity.to_json(layers=False)["dropped_energy"]
        names = ", ".join(one.name for one in dropped[:3])
        say(f"dropped: {len(dropped)}, which is {share:.2%} of the difference, such as {names}")
    blocks = fidelity.by_block()
    worst = sorted(blocks, key=lambda block: -blocks[block])[:3]
    say("largest relative errors: " + ", ".join(
        f"{block if block == 'other' else f'block {block}'} {blocks[block]:.3g}" for block in worst
    ))  # fmt: skip
