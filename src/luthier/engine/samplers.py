"""What a search tries next, as a function of the trials that are finished and a seed; nothing else is remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.errors import LuthierError
from luthier.flows import Scalar

SAMPLERS = ("tpe", "cmaes", "random")
SIGMA = 1 / 6
"""First spread of CMA-ES, of ranges that are all [0, 1] to it."""
INSTALL = "pip install 'luthier[search]'"
Source = Callable[[str, Any], Any]
"""(name, distribution) → a number."""


def optuna_() -> Any:
    """Optuna, quiet. Raises LuthierError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise LuthierError("a search needs optuna", do=INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def suggested(trial: Any, name: str, among: Any) -> Any:
    """The trial's number of this name."""
    if type(among).__name__ == "CategoricalDistribution":
        return trial.suggest_categorical(name, among.choices)
    whole = type(among).__name__ == "IntDistribution"
    return (trial.suggest_int if whole else trial.suggest_float)(name, among.low, among.high)


def independent(sampler: str, past: Sequence[tuple[Any, float, int | None]], seed: int) -> Source:
    """Optuna's "tpe", told of past trials and what they are worth, or "random".

    past: a trial, its worth, and after how many items it was stopped, None for one that saw them all. What stopped
    trials were worth compares with nobody's but those that stopped there.
    """
    optuna = optuna_()
    chosen = optuna.samplers.RandomSampler if sampler == "random" else optuna.samplers.TPESampler
    view = optuna.create_study(sampler=chosen(seed=seed))
    states = optuna.trial.TrialState
    for trial, value, stopped in past if sampler == "tpe" else ():
        worth = {"value": value} if stopped is None else {"intermediate_values": {stopped: value}}
        state = states.COMPLETE if stopped is None else states.PRUNED
        known = {"params": trial.params, "distributions": trial.distributions}
        view.add_trial(optuna.trial.create_trial(state=state, **known, **worth))
    trial = view.ask()
    return lambda name, among: suggested(trial, name, among)


class Evolving:
    """CMA-ES over `size` numbers, told of generations of `population`, or of 4 + 3 ln size.

    It holds what it was told, so that going on costs one generation and not all of them; told another past, it begins
    anew. What it gives is the same either way.
    """

    def __init__(self, size: int, population: int | None):
        try:
            import cmaes
        except ImportError:
            raise LuthierError("this search needs cmaes", do=INSTALL) from None
        self._make = lambda: _fresh(cmaes.CMA, size, population)
        self._strategy = self._make()
        self._told: list[list[tuple[int, int]]] = []

    def source(self, done: Sequence[Any], scalar: Scalar, seed: int) -> Source:
        """Numbers in the order asked, from the finished trials and a seed.

        A generation counts once all of its trials are finished and those of every one before it.
        """
        brood = self._strategy.population_size
        by_ordinal = {d.ordinal: d for d in done}
        generations = []
        while all(len(generations) * brood + i in by_ordinal for i in range(brood)):
            start = len(generations) * brood
            generations.append(_ranked([by_ordinal[start + i] for i in range(brood)], scalar))
        if generations[: len(self._told)] != self._told:
            self._strategy, self._told = self._make(), []
        vectors = {d.number: d.vector for d in done}
        for ranks in generations[len(self._told) :]:
            self._tell(ranks, vectors)
        self._strategy.reseed_rng(seed)
        drawn = iter(self._strategy.ask().tolist())
        return lambda name, among: among.low + next(drawn) * (among.high - among.low)

    def _tell(self, ranks: list[tuple[int, int]], vectors: Mapping[int, Sequence[float]]) -> None:
        import numpy as np

        self._strategy.tell([(np.array(vectors[number]), rank) for number, rank in ranks])
        self._told.append(ranks)


def _fresh(make: Any, size: int, population: int | None) -> Any:
    import numpy as np

    bounds = np.tile([0.0, 1.0], (size, 1))
    return make(mean=np.full(size, 0.5), sigma=SIGMA, bounds=bounds, seed=0, population_size=population)


def _ranked(trials: Sequence[Any], scalar: Scalar) -> list[tuple[int, int]]:
    """(number, rank) of each, the best first: CMA-ES looks at the order alone. What was stopped comes last, the sooner
    the later."""

    def worth(d: Any) -> tuple[float, float]:
        return (-d.items if d.stopped else -math.inf, scalar(d.values))

    return [(d.number, rank) for rank, d in enumerate(sorted(trials, key=worth))]
