"""`luthier export`: a model in another form."""

from __future__ import annotations

import argparse
from pathlib import Path


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
        to_gguf(
            resolve(args.model), args.out, args.type,
            lambda done, total: watch({"kind": "progress", "done": done, "total": total, "what": "export"}),
        )  # fmt: skip
    print(args.out)
