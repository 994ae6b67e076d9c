"""Processes for the tests of the trainer: `python trainer_lives.py kill|ranks FOLDER [SEED]`. One import, then forks.

kill: trains once undisturbed and once through ten deaths by SIGKILL; writes what each has learned, and saved last.
ranks: trains alone, and as two gloo processes; writes what each has learned and sent.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dying import at_lines, die, ended, fork, kill_after
from luthier.engine import ddp, saved
from luthier.engine.trainer import Interrupted, TrainSpec, train
from luthier.errors import LuthierError
from luthier.flows import Loss
from luthier.kit.context import Context
from luthier.model.build import build_model
from luthier.objective.next_token import NextToken
from luthier.optim.adamw import AdamW
from luthier.shapes import Objective, Optim, Tune
from luthier.testing import tiny
from luthier.tune.full import Full
from luthier.tune.lift import Lift
from luthier.tune.random import Random

TOKENIZER = tiny.tokenizer()


def keep(result, out: Path) -> None:
    """Everything a training has learned, in one file."""
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.history]
    model = result.model
    tensors = {name: p.detach().contiguous() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    save_file(tensors, out, {"history": json.dumps(history)})


# -- killed at random moments

LIVES = {
    "full": (Full(), AdamW(weight_decay=0.1)),
    "lift": (Lift(share=0.1, every=3, rank=2, count="entry"), AdamW()),
}


def live(name: str, folder: Path, out: Path, say: Callable[[], None]) -> None:
    def watch(event):
        if event["kind"] == "metrics":
            say()

    tune, optim = LIVES[name]
    spec = TrainSpec(steps=30, batch=2, accumulate=2, lr=1e-2, schedule="cosine", save_every=2)
    model = tiny.llama(attention_dropout=0.1)
    ctx = Context(seed=5, step=name, watch=watch)
    keep(
        train(model, TOKENIZER, [tiny.text_data(), tiny.task_data()], tune, NextToken(), optim, spec, ctx, folder), out
    )


def die_half_written() -> None:
    """The next save writes half of its tensors, and the process dies."""
    whole = saved.save_file

    def half(tensors, path):
        whole(tensors, path)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
        die()

    saved.save_file = half


def die_from_outside(pid: int, heard: int, steps: int, pause: float) -> None:
    """Kill a child a moment after it has made so many steps."""
    for _ in range(steps):
        os.read(heard, 1)
    kill_after(pid, pause)


def at_line_of_a_save(number: int) -> list[int]:
    """From now on the process dies as it comes to the number-th line that `saved.save` runs, or counts them."""
    run = [0]

    def count(place):
        run[0] += 1
        if run[0] == number:
            die()

    at_lines({saved.__file__}, count, inside=saved.save.__code__)
    return run


def lines_of_a_save(name: str, folder: Path) -> int:
    """Measured in a short life."""
    run = at_line_of_a_save(0)
    try:
        live(name, folder, folder / "none", lambda: int(run[0] > 0 and sys.exit()))
    except SystemExit:
        sys.settrace(None)
    return run[0]


def one_death(name: str, folder: Path, turn: str, lines: int, dice: random.Random) -> int:
    """Ends a life: at a random time after a step, at a random line of a save, near a save's end, or half written."""
    heard, said = os.pipe()
    line = dice.randrange(lines - 20, lines) if turn == "end" else dice.randrange(1, 2 * lines)
    steps, pause = dice.randrange(2, 5), dice.random() * 0.02

    def body():
        if turn in ("line", "end"):
            at_line_of_a_save(line)
        elif turn == "half":
            die_half_written()
        live(name, folder / f"{name}-killed", folder / "none", lambda: os.write(said, b"."))

    pid = fork(body)
    if turn == "out":
        die_from_outside(pid, heard, steps, pause)
    code = ended(pid)
    os.close(heard)
    os.close(said)
    return code


def kill(folder: Path, seed: int) -> None:
    dice = random.Random(seed)
    for name in LIVES:
        lines = lines_of_a_save(name, folder / f"{name}-lines")
        deaths, leftovers = [], 0
        for turn in ["out", "end", "line", "out", "half", "end", "out", "line", "end", "out"]:
            deaths.append(one_death(name, folder, turn, lines, dice))
            leftovers += any((folder / f"{name}-killed").glob(".*.part"))
        last, _ = saved.newest(folder / f"{name}-killed")
        for kind in ("calm", "killed"):
            live(name, folder / f"{name}-{kind}", folder / f"{name}-{kind}.out", int)
            last_save = saved.newest(folder / f"{name}-{kind}")[0]
            assert last_save and last_save.name == "step-00000030"
            (last_save / saved.TENSORS).rename(folder / f"{name}-{kind}.save")
        told = {"deaths": deaths, "leftovers": leftovers, "reached": last.name if last else None, "lines": lines}
        (folder / f"{name}.json").write_text(json.dumps(told))


# -- several processes


class SGD(Optim):
    def make(self, leaves, groups):
        return torch.optim.SGD(list(groups), weight_decay=0.1)


class Odd(Objective):
    """NextToken, and for batches whose first item is of one kind a term over a parameter of its own."""

    def loss(self, model, batch, ctx):
        loss = NextToken().loss(model, batch, ctx)
        touched = int(batch["attention_mask"][0].sum()) % 3 == 0
        TOUCHED.append(touched)
        if touched:
            return Loss(loss.total + model.odd.square().sum(), {}, loss.count)
        return Loss(loss.total, {}, loss.count)


class Poisoned(Objective):
    """NextToken; on the second process the loss of the second step is not a number."""

    def loss(self, model, batch, ctx):
        loss = NextToken().loss(model, batch, ctx)
        ASKED.append(1)
        bad = len(ASKED) == 2 and os.environ.get("RANK") == "1"
        return Loss(loss.total * float("nan"), loss.terms, loss.count) if bad else loss


ASKED: list[int] = []
SENT: list[int] = []
TOUCHED: list[bool] = []
CASES: dict[str, tuple[Tune, Objective, Optim]] = {
    "full": (Full(), NextToken(), SGD()),
    "full adam": (Full(), NextToken(), AdamW(eps=1e-4)),
    "random": (Random(share=0.05, every=2), NextToken(), SGD()),
    "lift": (Lift(share=0.05, every=2, rank=2), NextToken(), AdamW(eps=1e-4)),
    "odd": (Full(), Odd(), SGD()),
    "moe": (Full(), NextToken(), SGD()),
}


def model_for(case: str, rank: int):
    """The first process has the right weights; the others must be given them."""
    if case == "moe":  # balanced by a bias only, as losses over micro-batches differ by their size
        part = {"use": "block.moe", "set": {"experts": 4, "bias_rate": 0.05, "balance_weight": 0.0}}
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        return build_model({"vocab_size": tiny.VOCAB, **sizes, "slots": {"ffn": part}}, seed=rank)
    model = tiny.llama(rank)
    model.odd, model.never = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    return model


def fit(case: str, folder: Path, rank: int, watch=None, objective=None, **more):
    tune, usual, optim = CASES[case]
    spec = TrainSpec.of({"steps": 5, "batch": 2, "accumulate": 2, "lr": 0.05} | more)
    methods = (tune, objective or usual, optim)
    ctx = Context(seed=1, watch=watch)
    return train(model_for(case, rank), TOKENIZER, tiny.text_data(), *methods, spec, ctx, folder)


def count_what_is_sent() -> None:
    whole = dist.all_reduce

    def counted(tensor, *rest, **more):
        SENT.append(tensor.numel())
        return whole(tensor, *rest, **more)

    dist.all_reduce = counted


def one_rank(folder: Path, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    ddp.BUCKET = 1 << 12  # tiny models would fit into one
    count_what_is_sent()
    TOUCHED.clear()  # of what ran before the fork
    told = {"sent": {}}
    for case in CASES:
        SENT.clear()
        keep(fit(case, folder / case, rank), folder / f"{case}-{rank}.out")
        told["sent"][case] = sum(SENT)
    told["touched"] = [any(TOUCHED[i : i + 2]) for i in range(0, 10, 2)]  # by step
    told["interrupted"] = interrupted(folder, rank)
    keep(fit("random", folder / "stop", rank), folder / f"resumed-{rank}.out")
    ASKED.clear()
    try:
        fit("full", folder / "nan", rank, objective=Poisoned(), accumulate=1, batch=4)
    except LuthierError as fault:
        told["poisoned"] = str(fault)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def interrupted(folder: Path, rank: int) -> str:
    """Ctrl-C reaches the second process only."""

    def watch(event):
        if rank == 1 and event["kind"] == "progress" and event["done"] == 2:
            signal.raise_signal(signal.SIGINT)

    try:
        fit("random", folder / "stop", rank, watch)
    except Interrupted as stop:
        return str(stop)
    return "went on"


def ranks(folder: Path) -> None:
    for case in CASES:
        size = {"batch": 2, "accumulate": 4} if case == "odd" else {"batch": 8, "accumulate": 1}
        keep(fit(case, folder / f"{case}-alone", 0, **size), folder / f"{case}-alone.out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(partial(one_rank, folder, rank, port)) for rank in range(2)]
    assert [ended(pid) for pid in children] == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        ranks(Path(sys.argv[2]))
