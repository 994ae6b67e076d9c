"""`luthier export` and `extract`: a model in another form, or the way from one model to another as an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def options_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a bundled name or a Hub id, of a Llama- or Qwen-type model")
    parser.add_argument("out", type=Path, help="the .gguf file to write")
    parser.add_argument("--type", default="q8_0", help="f16, bf16, q8_0 or q4_0 (q8_0)")


def do_export(args: argparse.Namespace) -> None:
    from luthier.checkpoint.gguf_write import to_gguf
    from luthier.checkpoint.resolve import resolve
    from luthier.cli_models import bar
    from luthier.cli_run import quiet
    from luthier.errors import LuthierError

    if args.out.suffix != ".gguf":
        raise LuthierError("the name of a GGUF ends in .gguf", where=str(args.out), do=f"write {args.out}.gguf")
    quiet()
    with bar("export") as watch:
        to_gguf(resolve(args.model), args.out, args.type, _counted(watch, "export"))
    print(args.out)


def options_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fine", help="the tuned model: a folder, a bundled name or a Hub id")
    parser.add_argument("base", help="what it was tuned from")
    parser.add_argument("out", type=Path, help="the adapter folder to write, in PEFT's form")
    parser.add_argument("--rank", type=int, help="of every matrix, at most (16, or no limit with --energy)")
    parser.add_argument("--energy", type=float, help="the smallest rank that keeps this share of a squared change")
    parser.add_argument(
        "--rest", default="leave", help="embeddings, head and norms: leave (the base's) or full (whole)"
    )


def do_extract(args: argparse.Namespace) -> None:
    from luthier.checkpoint.expert import open_expert
    from luthier.checkpoint.extract import extract
    from luthier.checkpoint.resolve import resolve
    from luthier.cli_models import bar
    from luthier.cli_run import quiet
    from luthier.errors import unknown

    if args.rest not in ("leave", "full"):
        raise unknown("way with the rest", args.rest, ("leave", "full"), where="--rest")
    quiet()
    base = resolve(args.base)
    rank = 16 if args.rank is args.energy is None else args.rank
    with bar("extract") as watch:
        made = extract(
            open_expert(args.fine, base), base, rank, args.energy, args.rest, args.base, _counted(watch, "extract")
        )
        made.delta.save(args.out)
    _tell(made)
    print(args.out)


def _tell(made: Any) -> None:
    """What the adapter holds of the change, and what it leaves behind, the most first."""
    least = min(made.kept, key=made.kept.get)
    print(f"{len(made.kept)} tensors, {made.total:.1%} of the squared change; least of {least}: {made.kept[least]:.1%}")
    shown = sorted(made.left, key=lambda name: -1 if made.left[name] is None else -made.left[name])
    for name in shown[:8]:
        share = made.left[name]
        why = "rows the base has not" if share is None else f"{share:.1%} of the squared change"
        print(f"left out: {name} ({why})")
    if len(shown) > 8:
        print(f"left out: {len(shown) - 8} more, {sum(made.left[n] or 0 for n in shown[8:]):.1%} together")


def _counted(watch: Any, what: str) -> Any:
    return lambda done, total: watch({"kind": "progress", "done": done, "total": total, "what": what})
