"""`luthier merge`, `eval`, `compare`, `generate` and `chat`: one method on models, without a recipe of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, unknown


def options_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a recipe with one merge, or a mergekit YAML")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--set", action="append", default=[], metavar="STEP.KEY=VALUE", help="change one value")


def do_merge(args: argparse.Namespace) -> None:
    from luthier.cli_run import quiet
    from luthier.engine import runner
    from luthier.recipe_inputs import Inputs

    kind = args.out.suffix.lower()
    if kind in (".gguf", ".safetensors"):
        do = "name a folder; luthier export makes a GGUF of it" if kind == ".gguf" else "name a folder"
        raise LuthierError("a merge writes a folder, not a file", where=str(args.out), do=do)
    recipe = merge_recipe(args.config, args.set)
    merges = [s for s in recipe.steps.values() if s.shape == "Transform"]
    if len(merges) != 1 or len(recipe.steps) != 1:
        what = f"holds {len(recipe.steps)} steps, and merge does one" if len(recipe.steps) > 1 else "holds no merge"
        raise LuthierError(what, where=recipe.marked.name, do=f"run it whole: luthier run {args.config}")
    step = merges[0]
    if step.names("data"):  # models are run, by a library with bars of its own
        quiet()
    with bar(step.use) as watch:
        inputs = Inputs(recipe, None, watch)
        inputs.open()
        try:
            runner.execute(replace(inputs.job(step, ""), out=args.out), inputs.context(step))
        except LuthierError as fault:
            raise step.placed(recipe.marked, fault) from None
    print(args.out)


def merge_recipe(config: str, sets: Sequence[str]) -> Any:
    """The recipe of a file in our grammar or in mergekit's."""
    from luthier.recipe import find, load
    from luthier.recipe_text import read

    path = find(config)
    marked = read(path)
    if isinstance(marked.value, dict) and "merge_method" in marked.value:
        from luthier.engine.mergekit import to_recipe

        return load(to_recipe(marked), sets, name=path.stem)
    return load(path, sets)


def _measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="folders, bundled names or Hub ids")
    sources = "gym:FAMILY, text:PATH, text:stdlib, jsonl:PATH or a file"
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE", help=sources)
    parser.add_argument("--items", type=int, default=256, help="test items of each source (256)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), fp32 or bf16")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")


def options_eval(parser: argparse.ArgumentParser) -> None:
    _measuring(parser)
    parser.add_argument("--use", default="eval.compare", help="the measure; luthier list --stage eval shows them")


def do_eval(args: argparse.Namespace) -> None:
    _measure(args, args.use, {})


def options_compare(parser: argparse.ArgumentParser) -> None:
    _measuring(parser)
    parser.add_argument("--paired-to", help="the model that the others are compared with (the first one)")


def do_compare(args: argparse.Namespace) -> None:
    if len(args.models) < 2:
        raise LuthierError("compare takes two models or more", do="luthier eval measures one")
    pair = args.paired_to or args.models[0]
    if pair not in args.models:
        raise unknown("model", pair, args.models, where="--paired-to")
    _measure(args, "eval.compare", {"paired_to": pair})


def _measure(args: argparse.Namespace, use: str, extra: Mapping[str, Any]) -> None:
    """Through the recipe grammar, so that names and fields are checked as anywhere else."""
    from luthier.cli_run import quiet
    from luthier.recipe import parse
    from luthier.recipe_set import assign
    from luthier.recipe_text import mark

    if args.items < 1:
        raise LuthierError(f"{args.items} is no number of items", where="--items", do="give a whole number from 1")
    quiet()
    names = {f"data{i}": source for i, source in enumerate(args.data)}
    data = {name: {"source": s, "split": _whole(s, args.items)} for name, s in names.items()}
    step = {"use": use, "models": args.models, "data": list(names), "dtype": args.dtype, **extra}
    value = {"luthier": 1, "seed": args.seed, "hardware": {"device": args.device}, "data": data}
    marked = mark(value | {"steps": {"table": step}}, "command line", dotted=False)
    for assignment in args.set:
        assign(marked, f"table.{assignment}")
    recipe = parse(marked, "eval")
    table = _looked(recipe, names, args.items)
    print(json.dumps(table.dicts(), indent=1) if args.json else "", end="\n" if args.json else "")
    if not args.json:
        _show(table)


def _whole(source: str, items: int) -> dict[str, Any]:
    """For files everything may be measured; a generator makes what is asked for."""
    return {"test": items} if source.startswith("gym:") else {"test": 1.0}


def _looked(recipe: Any, names: Mapping[str, str], items: int) -> Any:
    from luthier.engine import runner
    from luthier.recipe_inputs import Inputs

    with bar("measure") as watch:
        inputs = Inputs(recipe, None, watch)
        inputs.open()
        for name, source in names.items():
            inputs.data[name] = _Some(source, inputs.data[name], items)
        step = recipe.steps["table"]
        table = runner.measured(inputs.job(step, ""), inputs.context(step))
        return replace(table, notes=(*table.notes, *inputs.notes(step)))


class _Some:
    """The first test items of a source, under the name the user gave."""

    def __init__(self, name: str, data: Any, items: int):
        self.name, self.train, self.test = name, data.train, data.test[:items]
        self.scored, self.score = data.scored, data.score


def _show(table: Any) -> None:
    from rich.markup import escape
    from rich.table import Table as Grid

    from luthier.cli_run import console

    grid = Grid(box=None, pad_edge=False, header_style="bold")
    columns = [c for i, c in enumerate(table.columns) if any(row[i] is not None for row in table.rows)]
    for column in columns:
        grid.add_column(column, overflow="fold", justify="left" if column in ("model", "data", "metric") else "right")
    for row in table.dicts():
        cells = (
            "" if row[c] is None else f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns
        )
        grid.add_row(*map(escape, cells))
    screen = console()
    screen.print(grid)
    for note in table.notes:
        screen.print(note, markup=False, soft_wrap=True)


def _decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--use", default="decode.sample", help="how to decode; luthier list --shape Decode")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as temperature=0.7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), fp32 or bf16")


def options_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a bundled name or a Hub id")
    parser.add_argument("prompts", nargs="+", help="one or more; - reads one a line from standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template")
    parser.add_argument("--json", action="store_true", help="prompt, text and tokens as JSON, one line a prompt")
    _decoding(parser)


def do_generate(args: argparse.Namespace) -> None:
    from luthier.flows import Item
    from luthier.kit.encode import prompt_ids

    prompts = [p for word in args.prompts for p in (sys.stdin.read().splitlines() if word == "-" else [word])]
    method, subject, ctx = _talker(args)
    with subject.open() as (model, tokenizer):
        raw = args.raw or not getattr(tokenizer, "chat_template", None)
        ids = [p if raw else prompt_ids(Item(id="", prompt=p), tokenizer) for p in prompts]
        decoding = method.steps([(model, tokenizer)], ids, ctx)
        stream = len(prompts) == 1 and not args.json
        _drain(decoding, stream)
        trace = decoding.trace()
    for prompt, text, tokens in zip(prompts, trace.texts, trace.tokens, strict=True):
        if args.json:
            print(json.dumps({"prompt": prompt, "text": text, "tokens": tokens}))
        elif not stream:
            print(f"{prompt}\n  {text.strip()}\n")


def _drain(decoding: Any, stream: bool) -> None:
    for step in decoding:
        if stream and step.texts:
            print(step.texts[0], end="", flush=True)
    if stream:
        print()


def options_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a bundled name or a Hub id")
    parser.add_argument("--system", help="a system prompt")
    _decoding(parser)


def do_chat(args: argparse.Namespace) -> None:
    from luthier.flows import Item
    from luthier.kit.encode import prompt_ids

    method, subject, ctx = _talker(args)
    turns: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    with subject.open() as (model, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise LuthierError("the tokenizer has no chat template", where=args.model, do="use luthier generate --raw")
        print("Empty line or Ctrl-D ends.")
        while said := _ask():
            turns.append({"role": "user", "content": said})
            ids = prompt_ids(Item(id="", messages=tuple(turns)), tokenizer)
            room = getattr(model.config, "max_position_embeddings", None)
            if room is not None and len(ids) >= room:
                what = f"the conversation has {len(ids)} tokens, the model's context {room}"
                raise LuthierError(what, where=args.model, do="begin a new one")
            decoding = method.steps([(model, tokenizer)], [ids], ctx.with_(step=f"chat {len(turns)}"))
            _drain(decoding, stream=True)
            turns.append({"role": "assistant", "content": decoding.trace().texts[0]})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _talker(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(method, subject, context) of a command that decodes."""
    from luthier.checkpoint.resolve import resolve
    from luthier.cli_run import quiet
    from luthier.engine import runner
    from luthier.engine.subject import Subject_
    from luthier.kit.context import Context
    from luthier.recipe_check import DTYPES, known_method, method
    from luthier.recipe_set import value_of
    from luthier.recipe_text import mark

    marked = mark({}, "command line", dotted=False)
    known_method(marked, ("--use",), args.use, "Decode")
    fields = {}
    for assignment in args.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise LuthierError("expected FIELD=VALUE", where=f"--set {assignment}")
        fields[name] = value_of(text, f"--set {assignment}")
        marked.lines[("set", name)] = f"--set {assignment}"
    made = method(marked, (), args.use, fields, "Decode")
    if args.dtype not in DTYPES:
        raise unknown("dtype", args.dtype, DTYPES, where="--dtype")
    quiet()
    device = runner.device_of(args.device)
    subject = Subject_(args.model, resolve(args.model), device=device, dtype=runner.DTYPES.get(args.dtype))
    return made, subject, Context(seed=args.seed, step="generate", device=device)


def bar(what: str) -> Any:
    """A context that gives a `watch`, which draws one progress bar on standard error and prints what is logged."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def drawn() -> Any:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(what, total=None)

            def watch(event: Mapping[str, Any]) -> None:
                if event["kind"] == "progress" and not bars.disable:
                    bars.update(task, completed=event["done"], total=event["total"], description=event["what"] or what)
                elif event["kind"] == "log":
                    console.print(str(event["text"]), markup=False, highlight=False, soft_wrap=True)

            yield watch

    return drawn()
