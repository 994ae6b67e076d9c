"""What a recipe will do and need: models, trainable numbers, memory, disk, minutes, and what cannot work.

Nothing is run. Minutes are a guess: floating-point operations over the speed that this machine showed
for the same method in earlier runs beside this one, else over a round number per core.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.engine.room import free_memory, size_of_proof
from luthier.errors import LuthierError
from luthier.ledger import Record
from luthier.recipe import Recipe
from luthier.recipe_grid import SHAPES
from luthier.recipe_inputs import is_change, layout_of
from luthier.recipe_planned import Plan, PlannedData, PlannedStep
from luthier.recipe_rate import WIDE, rate
from luthier.recipe_size import Size, size_of, size_of_new, size_of_output, trainable
from luthier.recipe_steps import Step
from luthier.shapes import Measure
from luthier.trials import Space

CHARS_PER_TOKEN = 3.5
START_SECONDS, OPEN_SECONDS = 3.0, 1.2
"""loading a model into torch and writing it, and a merge's start, which loads none"""
LIBRARIES = 300 << 20
"""bytes that torch and transformers take"""


def plan(recipe: Recipe, inputs: Any) -> Plan:
    """The plan of a recipe whose outside inputs are open (`recipe_run.Inputs`)."""
    return _Planning(recipe, inputs).plan()


class _Planning:
    def __init__(self, recipe: Recipe, inputs: Any):
        self.recipe, self.inputs, self.folder = recipe, inputs, inputs.folder
        self.sizes: dict[str, Size | None] = {}
        self.problems: list[str] = []
        self.pending: set[str] = set()
        self.ahead: set[Any] = set()

    def plan(self) -> Plan:
        data = tuple(self._data(name) for name in self.recipe.data)
        steps = tuple(self._step(step) for step in self.recipe.steps.values())
        free = shutil.disk_usage(next(f for f in (self.folder, *self.folder.absolute().parents) if f.exists())).free
        needed = sum(s.disk for s in steps)
        if needed > free:
            unit, scale = ("GiB", 2**30) if needed >= 2**30 else ("MiB", 2**20)
            word = f"needs {needed / scale:.1f} {unit} of disk, {free / scale:.1f} are free"
            self.problems.append(f"{self.folder}: {word}; free some, or give another folder")
        return Plan(steps, data, str(self.inputs.device), free, free_memory(), tuple(self.problems))

    def _data(self, name: str) -> PlannedData:
        data, source = self.inputs.data[name], self.recipe.data[name]["source"]
        try:
            leaked = data.overlap()
        except LuthierError as fault:
            self.problems.append(str(fault.at(self.recipe.marked.where("data", name))))
            return PlannedData(name, source, 0, 0, 0)
        if leaked:
            where = self.recipe.marked.where("data", name)
            self.problems.append(f"{where}: {leaked} test items of {name!r} are also in train")
        return PlannedData(name, source, len(data.train), len(data.test), leaked)

    def _step(self, step: Step) -> PlannedStep:
        waits = any(name in self.pending for name in self.recipe.needs(step))
        kept = None
        if not waits and recorded(self.folder, step.name):  # a hash reads every byte of the inputs
            kept = done(self.folder, step.name, self.inputs.hash(step))
        if kept:
            self.inputs.finished(step.name, kept)
        else:
            self.pending.add(step.name)
        try:
            work = {"Tune": self._tune, "Transform": self._transform, "Certify": self._certify, "Study": self._study}
            guess = work.get(step.shape, self._look)(step)
        except LuthierError as fault:
            self.problems.append(str(fault.at(f"{step.where} (step {step.name})")))
            guess = {}
        if kept:
            guess |= {"seconds": 0.0, "disk": 0}
        gives = SHAPES[step.shape].split()[-1]
        takes = tuple(dict.fromkeys([*step.names("model"), *step.names("data")]))
        return PlannedStep(step.name, step.use, takes, gives, kept is not None, **guess)

    def _tune(self, step: Step) -> dict[str, Any]:
        size = self._size_of_role(step, "model")
        self.sizes[step.name] = size
        for name in step.names("data"):
            if name in step.roles["data"] and not len(self.inputs.data[name].train):
                raise LuthierError(f"data {name!r} has no training items", do="give its split a train count")
        if size is None:
            return {}
        spec: Any = step.train
        length = statistics.fmean(self._length(n, spec.max_length) for n in step.roles["data"])
        items = sum(len(self.inputs.data[n].train) for n in step.roles["data"])
        steps = spec.planned(items)
        tokens = spec.tokens or steps * spec.sequences() * length
        item = 2 if spec.dtype == "bf16" or (spec.dtype == "auto" and size.nbytes < 3 * size.params) else 4
        train = trainable(step.method, size)
        held = size.params * item + (size.params * item if train == size.params else 0) + 16 * train
        rows = spec.batch * spec.max_length
        active = rows * size.width * size.layers * (4 if spec.checkpointing else 40) * item // 2
        flops = 6.0 * size.params * tokens
        seconds = self._seconds(step, flops, item, size.width)
        return {
            "params": size.params, "trainable": train, "flops": flops, "disk": size.params * item + 8 * train,
            "memory": held + active + 2 * rows * size.vocab * 4 // 2, "seconds": seconds,
        }  # fmt: skip

    def _transform(self, step: Step) -> dict[str, Any]:
        names = step.names("model")
        known = [self._size(name, step) for name in names]
        size = self._size_of_role(step, "base") or next(filter(None, known), None)
        self.sizes[step.name] = size
        if size is None:
            return {}
        ready = not any(name in self.pending for name in names)
        memory, seconds, disk, notes = self.recipe.hardware.memory, 0.0, size.nbytes, ()
        if ready:
            from luthier.engine.runner import DTYPES
            from luthier.engine.stream import plan_transform

            base = step.roles.get("base", step.roles.get("model"))
            made = plan_transform(
                step.method, self.inputs.model(base, step) if base else None,  # type: ignore[arg-type]
                [self.inputs.model(n, step) for n in step.roles.get("experts", ())], memory=memory,
                threads=self.recipe.hardware.threads, dtype=DTYPES.get(step.dtype), layout=layout_of(step),
                roles=self.inputs.secrets(step),
            )  # fmt: skip
            memory, seconds, notes = made.memory_bytes, made.seconds, made.notes
            disk = made.write_bytes + made.kept_bytes
            self.sizes[step.name] = size = size_of_output(size, made)
        else:
            if step.method.experts_are == "adapters":  # type: ignore[attr-defined]
                known = [self._size(name, step) for name in step.roles["experts"]]  # a base is of another shape
            shapes = {(s.params, s.matrices) for s in known if s}
            picks = step.slices or "experts*?" in step.method.roles  # what it takes from each need not be all
            if len(shapes) > 1 and not picks:
                raise LuthierError("the models have different shapes", do="merge models of one architecture")
            seconds = size.params * len(names) * 6e-9
        flops, kept, held = self._calibration(step, size)
        seconds += self._seconds(step, flops, 4, size.width) if flops else OPEN_SECONDS
        return {
            "params": size.params, "memory": max(memory, held), "disk": disk + kept, "seconds": seconds, "flops": flops,
            "notes": notes,
        }  # fmt: skip

    def _calibration(self, step: Step, size: Size) -> tuple[float, int, int]:
        """Operations, bytes on disk and bytes in memory of what a Transform looks at with data."""
        names = step.names("data")
        if not names:
            return 0.0, 0, 0
        method: Any = step.method
        for name in names:
            if not len(self.inputs.data[name].train):
                raise LuthierError(f"data {name!r} has no training items", do="give its split a train count")
        experts = len(step.roles["experts"])
        most, length = getattr(method, "examples", None), getattr(method, "max_length", None) or 512
        items = [min(most or len(self.inputs.data[n].train), len(self.inputs.data[n].train)) for n in names]
        tokens = [count * self._length(n, length) for count, n in zip(items, names, strict=True)]
        flops = 2.0 * size.params * statistics.fmean(tokens) * method.passes(experts) * experts
        return flops, int(4 * size.params * method.kept * experts), 8 * size.params + LIBRARIES

    def _study(self, step: Step) -> dict[str, Any]:
        size = self._size_of_role(step, "base")
        self.sizes[step.name] = size
        for name in step.names("data"):
            if not len(self.inputs.data[name].train):
                raise LuthierError(f"data {name!r} has no training items", do="give its split a train count")
        if size is None:
            return {}
        method: Any = step.method
        experts = [self._size(name, step) for name in step.roles.get("experts", ())]
        if all(experts):
            sources = [self.inputs.data[name] for name in step.names("data")]
            space = Space(size.layers, tuple(e.layers for e in experts if e))
            method.fits(space, step.search.objectives(sources))
        self.sizes[step.name] = left = size.cut(method.leaves(size.layers))
        looks = step.search.trials * method.proposes + 1 + method.least(size.layers)
        tokens = sum(self._judged(step, name, size.layers) for name in step.names("data"))
        flops = 2.0 * size.params * tokens * looks
        models = 2 + len(step.roles.get("experts", ()))
        return {
            "params": left.params, "flops": flops, "memory": 4 * size.params * models, "disk": left.nbytes,
            "seconds": self._seconds(step, flops, 4, size.width) + looks * size.params * 4e-9,
        }  # fmt: skip

    def _judged(self, step: Step, name: str, layers: int) -> float:
        """Tokens of the items of one data that a candidate is judged by, for each measure."""
        data, total = self.inputs.data[name], 0.0
        items = min(step.search.items, len(data.train))
        for method in step.search.measures:
            length = self._length(name, getattr(method, "max_length", None) or 512)
            answer = getattr(method, "max_new_tokens", 0) / 2
            total += items * (length + answer) * method.passes(layers) * (data.scored or not answer)
        return total

    def _certify(self, step: Step) -> dict[str, Any]:
        flops, memory = size_of_proof(step.roles["problem"], step.method)
        seconds = self._seconds(step, flops, 8) - START_SECONDS + 0.5  # there is no model to open
        made, took = step.method.ahead()  # type: ignore[attr-defined]
        seconds += 0.0 if made in self.ahead else took
        self.ahead.add(made)
        return {"flops": flops, "memory": memory, "disk": 1 << 16, "seconds": seconds}

    def _look(self, step: Step) -> dict[str, Any]:
        sizes = [s for s in (self._size(n, step) for n in step.roles.get("models", ())) if s]
        if not sizes:
            return {}
        largest = max(sizes, key=lambda s: s.params)
        asked = 200 * len(step.roles.get("prompts", ()))
        tokens = [sum(self._looked_at(step, n, s.layers) for n in step.names("data")) or asked for s in sizes]
        flops = sum(2.0 * t * s.params for t, s in zip(tokens, sizes, strict=True))
        item = 4 if step.dtype == "fp32" else 2
        rows = 8 * 512 * largest.vocab * 4
        return {
            "params": largest.params, "flops": flops, "memory": largest.params * item + rows,
            "seconds": self._seconds(step, flops, item, largest.width) + START_SECONDS * len(sizes), "disk": 1 << 16,
        }  # fmt: skip

    def _looked_at(self, step: Step, name: str, layers: int) -> float:
        """Tokens through a model, for each measure the step makes; of an answer half of what is allowed."""
        data, total = self.inputs.data[name], 0.0
        for method in step.methods():
            most = getattr(method, "max_items", None) or len(data.test)
            length = self._length(name, getattr(method, "max_length", None) or 512)
            if method.id == "eval.accuracy" and data.scored:
                total += min(most, len(data.test)) * (length + getattr(method, "max_new_tokens", 32) / 2)
            elif isinstance(method, Measure) and hasattr(method, "max_items"):
                total += min(most, len(data.test)) * length * method.passes(layers)
        return total or len(data.test) * self._length(name, 512)

    def _length(self, name: str, most: int) -> float:
        """Tokens of an item, from the letters of a few."""
        data = self.inputs.data[name]
        items = [*data.train[:16], *data.test[:16]]
        letters = [sum(len(t) for t in (i.text, i.prompt, i.answer) if t) for i in items]
        letters = [n + sum(len(m["content"]) for m in i.messages or ()) for n, i in zip(letters, items, strict=True)]
        return min(most, statistics.fmean(letters or [0]) / CHARS_PER_TOKEN + 8)

    def _size_of_role(self, step: Step, role: str) -> Size | None:
        value = step.roles.get(role)
        if isinstance(value, Mapping):
            return size_of_new(value)
        return self._size(value, step) if value else None

    def _size(self, name: str, step: Step) -> Size | None:
        base = step.roles.get("base")
        if name in self.recipe.steps:
            return self.sizes.get(name)
        if base in self.recipe.steps and is_change(Path(name).expanduser()):
            return self.sizes.get(str(base))  # as large as what it changes
        if name not in self.sizes:
            self.sizes[name] = size_of(self.inputs.model(name, step))
        return self.sizes[name]

    def _seconds(self, step: Step, flops: float, item: int, width: int = WIDE) -> float:
        threads = self.recipe.hardware.threads
        return flops / rate(self.folder.parent, step.use, self.inputs.device, threads, item, width) + START_SECONDS


def done(folder: Path, step: str, digest: str) -> Record | None:
    """The record of a step that is done with this hash and whose results are still there."""
    record = recorded(folder, step)
    return record if record and record.hash == digest else None


def recorded(folder: Path, step: str) -> Record | None:
    """The record of a step that is done, with whatever hash, and whose results are still there."""
    try:
        record = Record.from_dict(json.loads((folder / "steps" / step / "record.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    there = all((folder / path).exists() for path in record.artefacts.values())
    return record if record.status == "done" and there else None
