"""The grammar: ten shapes. A method is one file with one frozen dataclass that subclasses one shape.

A shape says what a method does to what; the folder of its file says where in a model's life it
stands; the id is the path: `luthier/merge/ties.py` is `merge.ties`. The fields of the dataclass are
its configuration, its YAML schema and its card. Every method is used the same way:

    Ties(density=0.5).apply(base="a", experts=["b", "c"]).save("out")

Class attributes every method may set, as plain literals, since the catalogue reads them from source:

    reduces_to   the settings under which it must equal a known method (`Reduces`)
    departures   one line for each place where published code contradicts its paper
    roles        the inputs it takes by name; `*` marks a list, `?` an optional one
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

from luthier.errors import LuthierError, unknown
from luthier.fields import coerce, freeze, hints, thaw

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from luthier.flows import Certificate, Ctx, Data, Loss, Param, Remap, Scaling, Subject, Table, Trace
    from luthier.trials import Budget, Evaluate, Space

__all__ = [
    "Certify", "Decode", "Measure", "Method", "Objective", "Optim", "Part", "Reduces", "Rule",
    "Study", "Transform", "Tune", "Tuned", "Decoding",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reduces:
    """With `fields` set, the method equals `to` (a method id, or a name the contract suite knows).

    given: what must hold of the inputs, such as {"experts": 1}.  tolerance: 0 means bit for bit.
    """

    fields: Mapping[str, Any]
    to: str
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 0.0


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Method:
    """What all shapes share: a frozen, keyword-only, hashable record with one verb."""

    reduces_to: ClassVar[Reduces | tuple[Reduces, ...]] = ()
    departures: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, shape: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._is_shape = shape
        if shape:
            return
        for name, default in list(vars(cls).items()):
            if isinstance(default, (dict, list)) and "ClassVar" not in str(cls.__annotations__.get(name, "ClassVar")):
                setattr(cls, name, freeze(default))
        if not all(vars(base).get("_is_shape", True) for base in cls.__mro__[1:] if base is not object):
            raise TypeError(f"{cls.__name__}: methods are final; put what two share into kit/ and compose by fields")
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.__init__ = _named_only(cls.__init__, cls)

    def __post_init__(self) -> None:
        for name, kind in hints(type(self)).items():
            try:
                object.__setattr__(self, name, coerce(getattr(self, name), kind))
            except LuthierError as fault:
                raise fault.at(f"{self.id}.{name}") from None
        self.check()

    def check(self) -> None:
        """Raise LuthierError where fields contradict each other. Nothing else happens at construction."""

    @property
    def id(self) -> str:
        """The stage and the name, from the file's path: `merge.ties`."""
        return vars(type(self)).get("_id") or type(self).__module__.removeprefix("luthier.")

    def replace(self, **fields: Any) -> Any:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """{use: id, set: {every field}}, in plain lists, dicts and scalars."""
        values = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"use": self.id, "set": values}

    @classmethod
    def from_value(cls, value: Any) -> Any:
        """An instance of this shape from an id, a {use, set} map, or an instance."""
        if isinstance(value, str):
            value = {"use": value}
        if isinstance(value, Mapping):
            from luthier.catalogue import load

            extra = set(value) - {"use", "set"}
            if "use" not in value or extra:
                raise LuthierError(f"expected a method, got {thaw(value)!r}", do="write {use: ID, set: {...}}")
            value = load(value["use"], **dict(value.get("set") or {}))
        if not isinstance(value, cls):
            raise LuthierError(f"expected a method of shape {cls.__name__}, got {value!r}")
        return value

    def apply(self, **roles: Any) -> Any:
        """Use the method: roles by name (`model`, `base`, `experts`, `data`), paths or objects.

        A Transform gives a lazy result with `.save(folder)`; a Tune a result with `.model`, `.delta`,
        `.save`; a Measure a Table; a Decode a Trace; a Certify a Certificate.
        """
        import importlib  # the one door from left to right, opened only when a method is used

        return importlib.import_module("luthier.engine.apply").apply(self, roles)


def _named_only(init: Any, cls: type) -> Any:
    @wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in fields:
            if name not in known:
                raise unknown("field", name, known, where=self.id)
        if args:
            raise LuthierError("fields are given by name", where=self.id, do=f"known: {', '.join(known)}")
        missing = [
            f.name for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.name not in fields and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]  # fmt: skip
        if missing:
            raise LuthierError(f"field {missing[0]!r} is required", where=self.id)
        init(self, **{k: freeze(v) for k, v in fields.items()})

    return checked


class Part(Method, ABC, shape=True):
    """Fills a slot of the decoder. `build` returns a module whose forward gives `(y, aux)`."""

    slots: ClassVar[tuple[str, ...]] = ()
    """which of mixer, ffn, norm, linear, head, layer, stack it can fill"""
    roles = ("model",)

    @abstractmethod
    def build(self, spec: Any) -> nn.Module:
        """A module for one place of the decoder.

        spec (`model.spec.Spec`): `spec.config` the sizes, `spec.layer` the layer's index, `spec.slot`
        the slot's name, `spec.part(slot)` builds the Part of a nested slot, `spec.shared(key, make)`
        gives a module that several layers share. aux maps "loss/NAME" to scalars that are added to
        the loss once, and "metric/NAME" to detached values for the log. A linear or a head stands in
        for nn.Linear: it is called with x alone and gives y alone.
        """


class Objective(Method, ABC, shape=True):
    """A scalar to go down."""

    needs: ClassVar[tuple[str, ...]] = ()
    """what the batch, model or run must supply: teacher, reference, rollouts, mask_token, bidirectional"""
    roles = ("model", "data*")

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], ctx: Ctx) -> Loss:
        """batch: input_ids, attention_mask, labels, each (B, T) int64; label -100 is no label."""


class Optim(Method, ABC, shape=True):
    """Makes a torch optimizer; at zero strength it is AdamW."""

    roles = ("model", "data*")

    @abstractmethod
    def make(self, leaves: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> Optimizer:
        """leaves: all parameters to move.  groups: torch parameter groups (`params`, `lr`, and what a
        Tune adds, such as `per_entry`), which together hold exactly the leaves."""


class Rule(Method, ABC, shape=True):
    """Init, multiplier, learning rate, decay and epsilon of a parameter, from role, shape and depth."""

    roles = ("model",)

    @abstractmethod
    def rule(self, param: Param) -> Scaling:
        """Pure: the same parameter always gets the same scaling."""


class Tune(Method, ABC, shape=True):
    """Says which numbers may move, or which small modules are added."""

    roles = ("model", "data*")

    @abstractmethod
    def bind(self, model: nn.Module, ctx: Ctx) -> Tuned:
        """Ready the model for training. Its weights are unchanged until the first step."""


class Tuned(ABC):
    """A model in training under a Tune."""

    @abstractmethod
    def leaves(self) -> list[Tensor]:
        """The only parameters an optimizer sees; their `.grad` is filled by backward, summed over
        micro-batches. Whoever steps also zeroes them."""

    def groups(self) -> list[dict[str, Any]]:
        """Torch parameter groups over the leaves, without learning rates."""
        return [{"params": self.leaves()}]

    @abstractmethod
    def after_step(self, step: int) -> Sequence[Remap]:
        """Called after optimizer step number `step` (from 1): bring the model up to date with the
        leaves, choose anew if due, and say which entries of the leaves have moved."""

    @abstractmethod
    def delta(self) -> Any:
        """What has changed since `bind`, a `checkpoint.delta.Delta`."""

    @abstractmethod
    def bake(self) -> nn.Module:
        """The plain model, without hooks, wrappers or parametrizations."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the base weights, as plain tensors."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state()` was taken. Called right after `bind` on the base weights."""


class Transform(Method, ABC, shape=True):
    """Weights to weights, streamed: never more than a stretch of one tensor in memory."""

    granularity: ClassVar[str] = "element"
    """element (flat stretches), row (64 rows), tensor (whole), group (the tensors of a `unit`, whole)"""
    unit: ClassVar[str] = "layer"
    """of granularity group: attention, mlp or layer"""
    takes: ClassVar[int | None] = None
    """how many experts, exactly; None: any number"""
    ordered: ClassVar[bool] = False
    """whether the order of the experts matters"""
    experts_are: ClassVar[str] = "models"
    """models, or adapters: LoRA adapters, whose factors it merges; with a base the output is the base with the merged
    adapter on it, else the merged adapter"""
    partial: ClassVar[bool] = False
    """whether an output may be made from some of the experts, as slices of layers may ask"""
    kept: ClassVar[float] = 0.0
    """what the survey leaves in `ctx.scratch` for each expert, in fp32 numbers a parameter, for the plan"""
    roles = ("base", "experts*")

    def keeps(self, inputs: Any) -> int:
        """Bytes that it keeps on disk while it runs, for the plan."""
        return 0

    def cubic(self, experts: int) -> float:
        """Of a method that decomposes or solves matrices: what each costs beside reading it, in Gram matrices of its
        short side and their eigendecompositions, for the plan."""
        return 0.0

    def passes(self, experts: int) -> float:
        """Of a method with data: how often an item goes through some expert, for the plan; backward counts twice."""
        return 0.0

    def plan(self, inputs: Any) -> Any:
        """Names, shapes and config of the output, from those of the inputs; unchanged by default.

        `inputs.giving({name: made from})` takes layers away, moves or joins them; a shape of `inputs.tensors`
        may change where whole tensors are shown. What several layers share is written once, and config says so.
        `inputs.roles` has what is no model, such as a key; what is added to `inputs.notes` stands in the card and
        the report.
        """
        return inputs

    def survey(self, inputs: Any, ctx: Ctx) -> Any:
        """One look at everything before the stream starts; the result is `ctx.survey`.

        inputs.pieces() gives Pieces of all tensors in the canonical order, as often as wanted. With the role
        `data*` there are also the experts as Subjects, `ctx.role("subjects")`, the base as one, `ctx.role("base")`,
        and a source for each expert, `ctx.role("data")`; what is as large as a model goes to `ctx.scratch`.
        """
        return None

    @abstractmethod
    def transform(self, tensors: Any, ctx: Ctx) -> Any:
        """The output's values for one Piece, fp32, same shape; for a Group, such values by name.

        Sums run over the experts in order.
        """


class Decoding(ABC):
    """A decode in progress: iterate for the steps, then ask for the trace."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    @abstractmethod
    def trace(self) -> Trace: ...


class Decode(Method, ABC, shape=True):
    """From prompts to tokens, as steps that a user of the host may watch, fill or stop."""

    needs: ClassVar[tuple[str, ...]] = ()
    """what the model must have: mask_token, bidirectional (it sees what comes later)"""
    roles = ("models*", "prompts*")

    @abstractmethod
    def steps(self, models: Sequence[tuple[nn.Module, Any]], prompts: Sequence[Any], ctx: Ctx) -> Decoding:
        """models: (model, tokenizer) pairs.  prompts: texts or lists of token ids.  Draining the
        iterator decodes everything; each step tells what was decided at it."""


class Measure(Method, ABC, shape=True):
    """Numbers about models, which are unchanged afterwards."""

    roles = ("models*", "data*")

    @abstractmethod
    def measure(self, models: Sequence[Subject], data: Sequence[Data], ctx: Ctx) -> Table:
        """One row an observation or a summary; the head of the file says which columns."""

    def passes(self, layers: int) -> float:
        """How often an item goes through a model of so many layers, for the plan; backward counts twice."""
        return 1.0


class Study(Method, ABC, shape=True):
    """Drives other methods over trials or rounds, and leaves the best model it found."""

    makes: ClassVar[tuple[str, ...]] = ()
    """ids of the Transforms that its candidates are, beside those in its fields"""
    proposes: ClassVar[bool] = True
    """whether it asks for trials up to the budget, rather than going through a list of its own"""
    roles = ("base", "experts*", "data*")

    @abstractmethod
    def study(self, space: Space, evaluate: Evaluate, budget: Budget, ctx: Ctx) -> Table:
        """One row a trial: `evaluate.table(chosen)`. The chosen candidate is carried out as a step of its own.

        A candidate is a Transform, usually a field's with some of its own fields filled in. What is to be looked
        at beside the objectives is in `ctx.role("data")`; nothing but training items is used.
        """

    def fits(self, space: Space, objectives: Sequence[str] = ()) -> None:
        """LuthierError where its fields do not suit the models or what is measured; asked by the plan, and before
        anything is judged. objectives: none while they are not known."""

    def least(self, layers: int) -> int:
        """How many candidates of so many layers it looks at beside those of the budget, for the plan."""
        return 0

    def leaves(self, layers: int) -> int:
        """How many of so many layers the model will have, as far as the fields tell; for the plan."""
        return layers


class Certify(Method, ABC, shape=True):
    """An answer that an exact verifier accepts, which shares no code with the solver."""

    roles = ("problem",)
    complete: ClassVar[bool] = True
    """whether it decides all but what lies on the boundary of the sums of squares, as far as sizes allow"""

    @abstractmethod
    def certify(self, problem: Any, ctx: Ctx) -> Certificate:
        """A certificate, or an honest verdict why there is none."""

    def ahead(self) -> tuple[Any, float]:
        """What is made once for all problems of a run, as a key, and a core's seconds for it; for the plan."""
        return None, 0.0
