"""MAP: the trade-offs that scales of experts allow, from a few judged merges and a quadratic through them.

Paper: arXiv 2406.07529.  Merges with a few vectors of scales, one number an expert, are judged by every objective; a
quadratic of the scales is fitted to each objective, behind a sigmoid where it is a share and behind softplus where it
is a loss; on these surrogates, which cost nothing, the scales are sought that no others beat in every objective.

Notable. The paper stops at the predicted front; here the last `verify` trials judge points all over it, so that
everything in the table is measured, with what was predicted beside it; they count among `search.trials`. The
surrogates are searched by quasi-random points and rounds of new ones between and beside the best (the paper: NSGA-III),
within the range of the samples (the released code: from -3 to 3).
The front and its hypervolume, which is what its points dominate of the space before the worst of the base and of each
expert alone, stand in the notes. Of the front one model is written: the one that `preference` picks. Not done: Nested
MAP (many experts, merged in pairs) and Bayesian MAP (more samples where the fit is worst).

Footguns. A quadratic in n scales has (n+1)(n+2)/2 coefficients: with fewer samples the smallest that fits is taken,
and a note says so. A trial that `search.first` stops early teaches the surrogates nothing: leave it away.
`preference` weighs the raw values, nats and shares of wrong answers alike.

P: points.  N: experts.  M: objectives.  K: coefficients.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.fields import Count, Examples, Positive, Range
from luthier.flows import Budget, Ctx, Evaluate, Space, Table
from luthier.kit.front import LINKS, fairest, fitted, front, hypervolume, quadratic, searched, spread
from luthier.kit.metrics import HIGHER
from luthier.shapes import Reduces, Study, Transform

Weight = Annotated[float, Range(0.0)]


class Map(Study):
    merge: Transform = "merge.task_arithmetic"  # type: ignore[assignment]
    """the merge whose `weights` are the scales"""
    low: float = 0.0
    """the least scale of an expert"""
    high: float = 1.0
    """the greatest scale of an expert"""
    isotropic: Annotated[float, Range(0.0, 1.0)] = 0.0
    """share of the samples, the experts alone apart, with one scale for all experts, half of them disturbed"""
    onehot: Annotated[float, Range(0.0, 1.0)] = 0.0
    """share of the samples that are one expert alone, disturbed"""
    disturb: Positive = 0.1
    """deviation of what disturbs a scale, as a share of the range"""
    rest: Literal["grid", "uniform"] = "grid"
    """other samples: drawn from a grid without diagonal, experts alone and scales that sum to `high`; or anywhere"""
    link: Literal["metric", "identity"] = "metric"
    """what lies behind a quadratic: what suits the metric, as in the paper, or nothing"""
    verify: Count = 8
    """trials, half of them at most, that judge points of the predicted front"""
    preference: Annotated[tuple[Weight, ...] | None, Examples((None, (0.25, 0.75)))] = None
    """weights of the objectives, whose sum picks the model; None picks the one whose largest regret is least"""

    roles = ("base", "experts*", "data*")
    reduces_to = (
        Reduces({"low": 0.0, "high": 0.0}, "base"),
        Reduces({"low": 1.0, "high": 1.0}, "merge.task_arithmetic"),
    )

    departures = (
        "luli-git/MAP 7d871dc: `fit_quadratic_functions` fits accuracies whatever --metric-type says; with `loss` it "
        "does so through softplus, and then looks for the scales with the lowest accuracies; ours fits what "
        "is measured (tests/golden/test_merge_map.py::test_released_code_fits_accuracies_for_losses)",
    )

    def check(self) -> None:
        if self.low > self.high:
            raise LuthierError(f"{self.low} is above {self.high}", where=f"{self.id}.low", do="low up to high")
        if self.isotropic + self.onehot > 1:
            raise LuthierError("isotropic and onehot are over 1 together", where=self.id)
        if not any(f.name == "weights" for f in dataclasses.fields(self.merge)):  # type: ignore[arg-type]
            raise LuthierError("has no weights", where=f"{self.id}.merge", do="use a merge with weights")

    def fits(self, space: Space, objectives: Sequence[str] = ()) -> None:
        if self.preference is not None and objectives and len(self.preference) != len(objectives):
            what = f"has {len(self.preference)} weights for {len(objectives)} objectives"
            raise LuthierError(what, where=f"{self.id}.preference", do=f"weigh {', '.join(objectives)}")

    def study(self, space: Space, evaluate: Evaluate, budget: Budget, ctx: Ctx) -> Table:
        names = evaluate.objectives
        size = len(space.experts)
        course = Course(self, size, budget.trials, evaluate, ctx)
        for proposal in budget.proposals("random", first=course):
            scales = [proposal.share(name, self.low, self.high) for name in course.names]
            evaluate(self.merge.replace(weights=tuple(scales)), proposal)
        done = [trial for trial in evaluate.finished if trial.ordinal >= 0]
        values = [trial.values for trial in done]
        best = front(values)
        chosen = done[best[self.pick([values[i] for i in best])]]
        fit, optimal = course.fit(), {done[i].ordinal for i in best}

        def beside(trial: Any) -> dict[str, Any]:
            predicted = fit(course.scales(trial)[None])[0].tolist()
            said: dict[str, Any] = {f"predicted {name}": v for name, v in zip(names, predicted, strict=True)}
            return said | {"front": trial.ordinal in optimal}

        return evaluate.table(Transform.from_value(json.loads(chosen.candidate)), course.notes(done, best), beside)

    def pick(self, values: Sequence[Sequence[float]]) -> int:
        """The place of the point of a front that is preferred."""
        if self.preference is None:
            return fairest(values)
        return min(
            range(len(values)),
            key=lambda i: math.fsum(w * v for w, v in zip(self.preference or (), values[i], strict=True)),
        )

    def samples(self, count: int, size: int, ctx: Ctx) -> Tensor:
        """`count` vectors of scales as shares of the range: each expert alone, then as the fields say."""
        generator = ctx.rng("samples")
        left = max(0, count - size)
        alike, alone = int(self.isotropic * left), int(self.onehot * left)
        plain_PN = _uniform(alike - alike // 2, 1, generator).expand(-1, size)
        beside_PN = plain_PN[torch.randint(max(1, len(plain_PN)), (alike // 2,), generator=generator)]
        near_PN = torch.eye(size, dtype=torch.float64)[torch.randint(size, (alone,), generator=generator)]
        disturbed_PN = torch.cat([beside_PN, near_PN])
        noise_PN = torch.randn(disturbed_PN.shape, generator=generator, dtype=torch.float64)
        found_PN = torch.cat([plain_PN, (disturbed_PN + self.disturb * noise_PN).clamp(0, 1)])
        if self.rest == "grid":
            found_PN = torch.cat([found_PN, _grid(left - len(found_PN), size, generator)])
        rest_PN = _uniform(left, size, generator)  # the grid may give fewer than asked for
        return torch.cat([torch.eye(size, dtype=torch.float64), found_PN, rest_PN])[:count]


class Course(Sequence):
    """The scales of every trial by its ordinal: samples, then points of the front that they predict.

    Nothing but finished trials decides, so that whoever goes on with a search goes on with this one.
    """

    def __init__(self, method: Map, size: int, trials: int, evaluate: Evaluate, ctx: Ctx):
        self.method, self.size, self.trials, self.evaluate, self.ctx = method, size, trials, evaluate, ctx
        self.names = [f"scale of expert {i}" for i in range(size)]
        self.sampled = trials - min(method.verify, trials // 2)
        wide = method.high - method.low
        self._samples_PN = method.low + wide * method.samples(self.sampled, size, ctx)
        self._predicted: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.trials

    def __getitem__(self, ordinal: Any) -> dict[str, float]:
        if ordinal < self.sampled or not self.told():  # whoever shares the search may have all samples in hand
            x_N = self._samples_PN[ordinal % self.sampled]
        else:
            x_PN, y_PM = self.predicted()
            places = spread(y_PM, self.trials - self.sampled, self.method.pick(y_PM.tolist()))
            x_N = x_PN[places[(ordinal - self.sampled) % len(places)]]
        return dict(zip(self.names, x_N.clamp(self.method.low, self.method.high).tolist(), strict=True))

    def scales(self, trial: Any) -> Tensor:
        return torch.tensor([trial.params[name] for name in self.names], dtype=torch.float64)

    def told(self) -> list[Any]:
        """The samples that have been judged."""
        return [t for t in self.evaluate.finished if 0 <= t.ordinal < self.sampled]

    def fit(self) -> Surrogate:
        told = self.told()
        x_PN = torch.stack([self.scales(t) for t in told])
        y_PM = torch.tensor([t.values for t in told], dtype=torch.float64)
        links = [self._link(name, y_P) for name, y_P in zip(self.evaluate.objectives, y_PM.T, strict=True)]
        pairs = zip(y_PM.T, links, strict=True)
        return Surrogate(links, torch.stack([fitted(x_PN, y_P, link) for y_P, link in pairs], dim=1))

    def _link(self, objective: str, y_P: Tensor) -> str:
        if self.method.link == "identity":
            return "identity"
        if objective.rpartition(" ")[2] in HIGHER:
            return "sigmoid"
        return "softplus" if y_P.min() >= 0 else "identity"

    def predicted(self) -> tuple[Tensor, Tensor]:
        """(scales, values) of the predicted front."""
        known = len(self.told())
        if self._predicted is None or self._predicted[0] != known:
            low, high = self.method.low, self.method.high
            self._predicted = (known, *searched(self.fit(), self.size, low, high, self.ctx.rng("front")))
        return self._predicted[1:]

    def notes(self, done: Sequence[Any], best: Sequence[int]) -> list[str]:
        """The front, its hypervolume, and how far the predictions were off."""
        alone = [t.values for t in done if t.ordinal < self.size]
        reference = [max(column) for column in zip(self.evaluate.base.values, *alone, strict=True)]
        volume = hypervolume([done[i].values for i in best], reference)
        hoped = hypervolume(self.predicted()[1].tolist(), reference)
        before = ", ".join(f"{name} {r:.4g}" for name, r in zip(self.evaluate.objectives, reference, strict=True))
        judged = "each expert" if len(alone) == self.size else f"{len(alone)} of {self.size} experts"
        said = [f"front: {len(best)} of {len(done)} merges, hypervolume {volume:.4g} (predicted {hoped:.4g}) before the"
                f" worst of the base and of {judged} alone ({before})"]  # fmt: skip
        checked = [t for t in done if t.ordinal >= self.sampled]
        if checked:
            foretold_PM = self.fit()(torch.stack([self.scales(t) for t in checked]))
            off_M = (foretold_PM - torch.tensor([t.values for t in checked], dtype=torch.float64)).abs().mean(0)
            pairs = zip(self.evaluate.objectives, off_M.tolist(), strict=True)
            errors = ", ".join(f"{name} {value:.3g}" for name, value in pairs)
            said.append(f"off by, on {len(checked)} points of the predicted front: {errors}")
        needed, told = (self.size + 1) * (self.size + 2) // 2, len(self.told())
        if told < needed:
            said.append(f"{told} samples are fewer than the {needed} coefficients of a quadratic")
        return said


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """Every objective as a quadratic behind its link."""

    links: Sequence[str]
    q_KM: Tensor

    def __call__(self, x_PN: Tensor) -> Tensor:
        plain_PM = quadratic(x_PN) @ self.q_KM
        return torch.stack([LINKS[link][0](y_P) for link, y_P in zip(self.links, plain_PM.T, strict=True)], dim=1)


def _uniform(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, size, generator=generator, dtype=torch.float64)


def _grid(count: int, size: int, generator: torch.Generator) -> Tensor:
    """As the released code has it: of a grid of about twice as many points, without those that sum to 1 and those
    with one number throughout, `count` at random, or all if there are fewer."""
    steps = max(2, math.ceil((count / 0.5) ** (1 / size)))
    places_PN = torch.cartesian_prod(*[torch.arange(steps)] * size).view(-1, size)
    usable_P = (places_PN.sum(1) != steps - 1) & (places_PN != places_PN[:, :1]).any(1)
    points_PN = places_PN[usable_P].double() / (steps - 1)
    return points_PN[torch.randperm(len(points_PN), generator=generator)[:count]]
