"""Trials of a search, in an Optuna storage that several processes or machines may share.

The storage holds every trial with its numbers and what came of it; nothing else is remembered. Whoever asks for the
next trial gets its place in the order (`ordinal`), which nobody else has, and numbers that follow from the trials that
are finished and a seed of that place: so a killed search goes on as if nothing had happened, and no sampler's state is
ever unpickled.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luthier.engine.finished import Body, Done, finite
from luthier.engine.process import dead, process
from luthier.engine.samplers import SAMPLERS, Evolving, independent, optuna_, suggested
from luthier.engine.storages import begun, kept
from luthier.errors import LuthierError, unknown
from luthier.flows import Ctx, Scalar

PATIENCE = 3600.0
"""Seconds after which a trial of somebody else's counts as dead, since it was last heard of."""
MOMENT = 30.0
"""Seconds after which a trial that somebody else began and that has no place in the order yet counts as dead."""
RUNNING, FINISHED = "RUNNING", ("COMPLETE", "PRUNED")


class Proposal:
    """A trial that is being put together: a `flows.Proposal`.

    shown: its numbers are Optuna's parameters, each a write of its own; else they are written with the result.
    """

    def __init__(
        self, trials: Trials, trial: Any, ordinal: int, given: Mapping[str, Any], source: Any, scalar: Scalar,
        shown: bool,
    ):  # fmt: skip
        self.ordinal, self.scalar = ordinal, scalar
        self._trials, self._trial, self._given, self._source, self._shown = trials, trial, given, source, shown
        self._params: dict[str, Any] = {}
        self.vector: list[float] = []

    @property
    def number(self) -> int:
        return self._trial.number

    def choice(self, name: str, options: int) -> int:
        """One of 0 ... options - 1."""
        return self._ask(name, self._trials.optuna.distributions.CategoricalDistribution(list(range(options))))

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high], of which neighbours are alike."""
        return self._ask(name, self._trials.optuna.distributions.IntDistribution(low, high))

    def share(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high]."""
        return self._ask(name, self._trials.optuna.distributions.FloatDistribution(low, high))

    def _ask(self, name: str, among: Any) -> Any:
        drawn = self._source(name, among)  # even where a number is given: the next name's comes after it
        made = self._trials.asked = self._given.get(name, drawn)
        if self._shown:
            made = suggested(self._trial, name, among)
        else:
            self._params[name] = made
        low, high = getattr(among, "low", 0), getattr(among, "high", 1)
        self.vector.append((made - low) / (high - low) if high > low else 0.5)
        return made

    def alive(self) -> None:
        """Say that it is still being looked at, lest somebody gives it up for dead."""
        self._trials.alive(self._trial)

    def tell(
        self, candidate: str, rungs: Mapping[int, tuple[float, ...]], stopped: bool, seconds: float, parameters: int
    ) -> Done:
        """Write down what came of it."""
        body = Body(
            self.ordinal, tuple(self.vector), candidate, finite(rungs), stopped, seconds, parameters, self._params
        )
        return self._trials.put(self._trial, body, self.scalar)


class Trials:
    """The trials of one study.

    storage: a folder's journal (a Path), "journal:PATH", or an SQL address such as "sqlite:///trials.db".
    name: of the study in there; whoever gives the same name shares it.  owner: who asks, on which machine; trials
    that this owner left unfinished are given up.
    """

    def __init__(self, storage: Path | str, name: str, owner: str):
        self.optuna = optuna_()
        self.owner = owner
        self.asked: Any = None
        self._seen: dict[int, tuple[Done | None, Any]] = {}
        self._evolving: dict[tuple[int, int | None], Evolving] = {}
        trials = self

        class Asked(self.optuna.samplers.BaseSampler):
            """Passes on what a Proposal has decided."""

            def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
                return {}

            def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
                return {}

            def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
                return trials.asked

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.study = begun(storage, name, Asked())
        for trial in self._in(RUNNING):
            if trial.user_attrs.get("owner", {}).get("name") == owner:
                self._give_up(trial.number)

    def finished(self) -> list[Done]:
        """All finished trials, in the order in which they were proposed."""
        return sorted((d for d, _ in self._finished()), key=lambda d: (d.ordinal, d.number))

    def proposals(
        self, count: int, sampler: str, ctx: Ctx, first: Sequence[Mapping[str, Any]] = (), scalar: Any = None,
        size: int | None = None, population: int | None = None,
    ) -> Iterator[Proposal]:  # fmt: skip
        """Trials to carry out, until `count` are finished, by whomever. See `flows.Budget.proposals`."""
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        waited = False
        while True:
            done = sum(d.ordinal >= 0 for d, _ in self._finished())
            ctx.emit("progress", what="trials", done=min(done, count), total=count)
            if done >= count:
                return
            others = self._others()
            begun = self._begun(count) if done + others < count else None
            if begun is None:  # somebody else has the last ones in hand
                if not waited:
                    many = f"waiting for {others} trial{'s' * (others != 1)} that others have in hand"
                    silent = f"one that is silent for {PATIENCE / 60:.0f} minutes counts as dead"
                    ctx.emit("log", text=f"{many}; {silent}")
                waited = True
                time.sleep(1.0)
                continue
            trial, ordinal = begun
            rule: Scalar = scalar(ordinal) if scalar is not None else mean
            given = first[ordinal] if ordinal < len(first) else {}
            seed = ctx.key("trial", ordinal) % 2**31
            source = self._source(sampler, rule, seed, size or 1, population)
            yield Proposal(self, trial, ordinal, given, source, rule, shown=sampler != "cmaes")
            if any(other.number == trial.number for other in self._in(RUNNING)):  # it would be waited for without end
                what = f"trial {ordinal} was proposed, but not judged"
                raise LuthierError(what, do="have the method call evaluate(candidate, proposal) for every proposal")

    @kept
    def alive(self, trial: Any) -> None:
        """Write down when a trial of ours was last heard of."""
        with suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("owner", self._ours())

    @kept
    def note(self, candidate: str, rungs: Mapping[int, tuple[float, ...]], seconds: float, parameters: int) -> Done:
        """Write down a trial that nobody proposed."""
        body = Body(-1, (), candidate, finite(rungs), False, seconds, parameters, {})
        steps = {step: mean(values) for step, values in body.rungs.items()}
        attrs = {"luthier": body.plain()}
        made = self.optuna.trial.create_trial(value=steps[max(steps)], user_attrs=attrs, intermediate_values=steps)
        self.study.add_trial(made)
        return max(
            (d for d, _ in self._finished() if (d.ordinal, d.candidate) == (-1, candidate)), key=lambda d: d.number
        )

    @kept
    def put(self, trial: Any, body: Body, scalar: Scalar) -> Done:
        """Finish a trial in the storage. One that somebody gave up for dead meanwhile stays given up."""
        done = body.done(trial.number, trial.params)
        state = self.optuna.trial.TrialState.PRUNED if body.stopped else self.optuna.trial.TrialState.COMPLETE
        try:
            trial.set_user_attr("luthier", body.plain())
            for step, values in body.rungs.items():
                trial.report(scalar(values), step)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return done
        value = None if body.stopped else scalar(done.values)
        self.study.tell(trial, value, state=state, skip_if_finished=True)
        return done

    def _ours(self) -> dict[str, Any]:
        return {"name": self.owner, "since": time.time(), "process": process()}

    @kept
    def _in(self, *states: str) -> list[Any]:
        known = self.optuna.trial.TrialState
        return self.study.get_trials(deepcopy=False, states=tuple(known[state] for state in states))

    def _finished(self) -> list[tuple[Done, Any]]:
        """Finished trials, ours and as Optuna has them; each is read once, since it changes no more."""
        for trial in self._in(*FINISHED):
            if trial.number not in self._seen:
                body = trial.user_attrs.get("luthier")
                self._seen[trial.number] = (Body.of(body).done(trial.number, trial.params) if body else None, trial)
        return [(done, trial) for done, trial in self._seen.values() if done is not None]

    def _others(self) -> int:
        """Trials that somebody else has in hand; those too old to be alive are given up."""
        alive = 0
        for trial in self._in(RUNNING):
            if "ordinal" not in trial.user_attrs:  # it may have died before it got so far: see `_place`
                continue
            owner = trial.user_attrs["owner"]
            if time.time() - owner["since"] > PATIENCE or dead(owner.get("process", "")):
                self._give_up(trial.number)
            else:
                alive += 1
        return alive

    @kept
    def _begun(self, count: int) -> tuple[Any, int] | None:
        """A new trial and its place; None if others have all there are."""
        trial = self.study.ask()
        try:
            trial.set_user_attr("owner", self._ours())
            ordinal = self._place(trial.number)
            trial.set_user_attr("ordinal", ordinal)
        except self.optuna.exceptions.UpdateFinishedTrialError:  # we took so long that we were given up for dead
            return None
        if ordinal < count:
            return trial, ordinal
        self._give_up(trial.number)
        return None

    def _place(self, number: int) -> int:
        """The first place that no earlier trial has. Trials take places in the order of their numbers."""
        began = time.monotonic()
        while True:
            begun = [trial for trial in self._in(RUNNING) if trial.number < number]
            placeless = [trial.number for trial in begun if "ordinal" not in trial.user_attrs]
            if not placeless:
                taken = {trial.user_attrs["ordinal"] for trial in begun}
                taken |= {done.ordinal for done, trial in self._finished() if trial.number < number}
                return next(place for place in range(len(taken) + 1) if place not in taken)
            if time.monotonic() - began > MOMENT:
                for one in placeless:
                    self._give_up(one)
            time.sleep(0.01)

    @kept
    def _give_up(self, number: int) -> None:
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def _source(self, sampler: str, scalar: Scalar, seed: int, size: int, population: int | None) -> Any:
        """(name, distribution) → the number the sampler would try next."""
        past = [(done, trial) for done, trial in self._finished() if done.ordinal >= 0]
        if sampler == "cmaes":
            if (size, population) not in self._evolving:
                self._evolving[size, population] = Evolving(size, population)
            return self._evolving[size, population].source([done for done, _ in past], scalar, seed)
        past.sort(key=lambda one: one[0].ordinal)
        told = [(trial, scalar(done.values), done.items if done.stopped else None) for done, trial in past]
        return independent(sampler, told, seed)


def mean(values: Sequence[float]) -> float:
    """The plain mean of the objectives."""
    return math.fsum(values) / len(values)


def text_of(candidate: Any) -> str:
    """A candidate as text, equal for equal ones."""
    return json.dumps(candidate.to_dict(), sort_keys=True)
