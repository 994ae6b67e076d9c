"""The command line: one verb, its words, one line for every error.

Each verb lives in a module that is imported only when it is asked for, so that `luthier list` and every
`--help` answer at once, without torch. Exit codes: 0 done, 1 checked and found wanting (or a fault of ours),
2 a fault the user can mend, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from luthier.errors import LuthierError, said, unknown

VERBS = {
    "list": ("cli_show", "the methods there are"),
    "show": ("cli_show", "one method: paper, fields, what it reduces to"),
    "plan": ("cli_run", "what a recipe would do and need; runs nothing"),
    "run": ("cli_run", "run a recipe; what is done is not repeated"),
    "report": ("cli_run", "build the report of a run"),
    "merge": ("cli_models", "merge models by a recipe or a mergekit file"),
    "eval": ("cli_models", "measure models on data"),
    "compare": ("cli_models", "measure models against the first one, paired"),
    "export": ("cli_convert", "write a model as GGUF, for llama.cpp and its kin"),
    "extract": ("cli_convert", "a LoRA adapter from the difference of two models"),
    "diff": ("cli_diff", "what changed between two checkpoints, by role and layer"),
    "generate": ("cli_models", "continue prompts"),
    "chat": ("cli_models", "talk to a model"),
    "certify": ("cli_certify", "prove that a polynomial is nowhere negative, or a file of many; bounds, constraints"),
    "demo": ("cli_checks", "some seconds of a method beside what it reduces to, on a tiny model"),
    "test": ("cli_checks", "check a method against its contract"),
    "reproduce": ("cli_checks", "run the claims of methods and rebuild the table of verdicts"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        raise LuthierError(message, where=self.prog, do=f"see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        found, left = self.parse_known_args(words)
        if left:
            known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            option = next((w for w in left if w.startswith("-")), None)
            if option and re.match(r"-[^-]*[0-9^*+(]", option):
                raise LuthierError(f"unknown option {said(option)}", where=self.prog,
                                   do="put -- before a word that begins with a minus")  # fmt: skip
            if option:
                raise unknown("option", option.split("=")[0], known, where=self.prog)
            raise LuthierError(f"unexpected {left[0]!r}", where=self.prog, do=f"see {self.prog} --help")
        return found


BRIEF = ("merge",)
"""Verbs that take seconds and leave nothing running."""


def command() -> NoReturn:
    """`main` as a process, which ends as cleanly by SIGTERM or SIGHUP as by Ctrl-C. To collect garbage while torch is
    imported, and to take all of torch down object by object, would cost a small merge a third of its time."""
    for number in filter(None, (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _ended)
    if sys.argv[1:2] and sys.argv[1] in BRIEF:
        gc.set_threshold(1_000_000, 20, 20)
        code = main()
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(main())


def _ended(*_: Any) -> None:
    """As if by Ctrl-C, also where that is ignored, as in a shell's background."""
    if not callable(signal.getsignal(signal.SIGINT)):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    for name in ("stdout", "stderr"):  # closed by whoever called us
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    words = [w for w in words if w != "--debug"]
    try:
        code = _verb(words)
        sys.stdout.flush()  # a full disk shows here, not at the interpreter's end
        return code
    except LuthierError as fault:
        if debug:
            raise
        _say(str(fault))
        return 2
    except KeyboardInterrupt as stop:
        if debug:
            raise
        print(file=sys.stderr)
        _say(str(stop) or "stopped; run again to go on")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `luthier list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as fault:
        if debug:
            raise
        if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_space(fault)
        if isinstance(fault, MemoryError) or "can't allocate memory" in str(fault):
            _say("memory ran out; close what else is running, or take a smaller model, batch or text")
            return 2
        _say(f"{f'{type(fault).__name__}: {fault}'[:400]}; --debug shows where it came from")
        return 1


def _no_space(fault: OSError) -> int:
    where = fault.filename or "output"
    print(f"luthier: {where}: the disk is full; free some space, try again", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # what it still holds can never be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


def _say(text: str) -> None:
    """One line on standard error. A name in a file may hold what a terminal would obey: that is not sent."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    print(f"luthier: {line}", file=sys.stderr)


def _verb(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from luthier import __version__

        print(f"luthier {__version__}")
        return 0
    name = words[0]
    if name not in VERBS:
        kind = "option" if name.startswith("-") else "command"
        raise unknown(kind, name, VERBS if kind == "command" else ("--help", "--version", "--debug"))
    module = importlib.import_module(f"luthier.{VERBS[name][0]}")
    parser = Parser(prog=f"luthier {name}", description=VERBS[name][1], allow_abbrev=False)
    getattr(module, f"options_{name}")(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return getattr(module, f"do_{name}")(parser.read(words[1:])) or 0


def usage() -> str:
    """What `luthier --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items()]
    head = "usage: luthier COMMAND ...\n\nPublished ways to shape a language model's weights, one file each."
    return "\n".join([head, "", *lines, "", "luthier COMMAND --help says more; luthier list shows the methods."])


if __name__ == "__main__":
    sys.exit(main())
