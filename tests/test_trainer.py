"""The trainer against a hand-written loop, and its promises: accumulation, clipping, order, failures, resuming."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path

import pytest
import torch

from luthier.engine import saved
from luthier.engine.feed import Feed
from luthier.engine.moments import load_optimizer, optimizer_state, remap
from luthier.engine.trainer import Interrupted, TrainSpec, train
from luthier.errors import LuthierError
from luthier.flows import Loss, Remap
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode
from luthier.model.build import build_model
from luthier.objective.next_token import NextToken
from luthier.optim.adamw import AdamW
from luthier.shapes import Objective, Optim, Tune, Tuned
from luthier.testing import tiny
from luthier.tune.full import Full
from luthier.tune.lift import Lift
from luthier.tune.random import Random

TOKENIZER = tiny.tokenizer()
PLAIN = AdamW(fused=False)


def fit(folder: Path, tune=None, model=None, data=None, objective=None, optim=PLAIN, ctx=None, **spec):
    spec = {"steps": 4, "batch": 4, "lr": 1e-2} | spec
    model = tiny.llama() if model is None else model
    data = tiny.text_data() if data is None else data
    methods = (tune or Full(), objective or NextToken(), optim)
    return train(model, TOKENIZER, data, *methods, TrainSpec.of(spec), ctx or Context(seed=3), folder)


def weights(result) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in result.model.named_parameters()}


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def same_bytes(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def untimed(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


class SGD(Optim):
    def make(self, leaves, groups):
        return torch.optim.SGD(list(groups))


class Sour(Objective):
    """NextToken until it has been asked `at` times, then a loss or a gradient that is not finite."""

    at: int = 3
    where: str = "loss"

    def loss(self, model, batch, ctx):
        loss = NextToken().loss(model, batch, ctx)
        ASKED.append(1)
        if len(ASKED) < self.at:
            return loss
        if self.where == "loss":
            return Loss(loss.total * math.inf, loss.terms, loss.count)
        return Loss(loss.total + (model.lm_head.weight.sum() * 0.0 + 1e-300).sqrt() * 0.0, {}, loss.count)


ASKED: list[int] = []


# -- the loop itself


def bare_loop(steps: int, batch: int, clip: float, ctx: Context, data) -> dict[str, torch.Tensor]:
    """The same training written out with stock torch: whole batches, mean loss, clipping, AdamW."""
    model = tiny.llama().train()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0, foreach=False)
    feed = Feed([data], TOKENIZER, TrainSpec(steps=steps, batch=batch), ctx)
    for step in range(steps):
        items = [data.train[feed.place(step * batch + i)[1]] for i in range(batch)]
        rows = collate([encode(item, TOKENIZER) for item in items], TOKENIZER.pad_token_id)
        model(**rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_equals_a_loop_written_with_stock_torch(tmp_path):
    data = tiny.text_data()
    expected = bare_loop(8, 4, 0.5, Context(seed=3), data)
    ours = weights(fit(tmp_path, steps=8, clip=0.5))
    start = dict(tiny.llama().named_parameters())
    for name, p in expected.items():
        assert (p - start[name]).abs().max() > 1e-3, name
        assert torch.allclose(ours[name], p, atol=2e-6), name


@pytest.mark.parametrize(
    "tune", [Full(), Random(share=0.1, every=2), Lift(share=0.1, every=2, rank=2)], ids=lambda t: t.id
)
def test_accumulation_is_one_big_batch(tmp_path, tune):
    """Answers of unequal length: micro-batches hold unequal numbers of labels."""
    whole = fit(tmp_path / "a", tune, data=tiny.text_data(), batch=8, optim=SGD(), lr=0.1, steps=5)
    parts = fit(tmp_path / "b", tune, data=tiny.text_data(), batch=2, accumulate=4, optim=SGD(), lr=0.1, steps=5)
    assert gap(whole, parts) < 1e-6
    assert gap(whole, fit(tmp_path / "c", tune, batch=2, accumulate=3, optim=SGD(), lr=0.1, steps=5)) > 1e-4
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_clips_the_norm_over_the_leaves(tmp_path):
    """With plain gradient descent at rate 1 the leaves move by exactly the clipped norm, nothing else moves."""
    tune = Random(share=0.05, every=None)
    start = weights_of(tiny.llama())
    result = fit(tmp_path, tune, optim=SGD(), lr=1.0, steps=1, clip=0.01)
    moved = {n: p - start[n] for n, p in weights(result).items()}
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in moved.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    free = fit(tmp_path / "b", tune, optim=SGD(), lr=1.0, steps=1, clip=None)
    moved = {n: p - start[n] for n, p in weights(free).items()}
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in moved.values()))
    assert norm == pytest.approx(result.history[0]["grad_norm"], rel=1e-3)
    assert norm > 0.02


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_leaves_nothing_behind(tmp_path):
    """No hooks, gradients, frozen weights or training mode; the global generators as they were."""
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    model = tiny.llama()
    result = fit(tmp_path, Random(share=0.1), model)
    assert torch.equal(torch.rand(3), expected)
    assert result.model is model and not model.training
    assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not list(tmp_path.iterdir())


def test_stats_count_what_trained(tmp_path):
    result = fit(tmp_path, Random(share=0.05, every=None), log_every=3)
    n = sum(p.numel() for p in result.model.parameters())
    assert result.stats["trainable_share"] == result.stats["trainable"] / n < 0.05
    state = result.stats["optimizer_state_bytes"]
    assert 8 * result.stats["trainable"] <= state <= 8 * result.stats["trainable"] + 4 * 14  # two moments, a step each
    assert [h["step"] for h in result.history] == [3, 4]
    assert result.stats["steps"] == 4 and result.stats["tokens"] == result.history[-1]["tokens"]
    assert result.stats["peak_rss"] > 50 << 20
    assert set(result.history[0]) == {"step", "loss", "terms", "lr", "grad_norm", "tokens", "seconds"}
    assert result.history[0]["terms"]["nll"] == pytest.approx(result.history[0]["loss"])


def test_precisions(tmp_path):
    mixed = fit(tmp_path / "a", dtype="bf16-mixed", steps=2)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    assert 0 < abs(mixed.history[0]["loss"] - fit(tmp_path / "b", steps=2).history[0]["loss"]) < 0.1
    pure = fit(tmp_path / "c", Random(share=0.1), dtype="bf16", steps=2)
    assert all(p.dtype == torch.bfloat16 for p in pure.model.parameters())
    assert pure.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert fit(tmp_path / "d", model=tiny.llama().bfloat16(), steps=1, dtype="fp32").model.dtype == torch.float32


def test_small_steps_survive_bf16_in_selected_leaves(tmp_path):
    """Steps far below half a unit in the last place of a bf16 weight add up in the fp32 leaf."""
    moved = []
    for steps in (1, 40):
        start = weights_of(tiny.llama().bfloat16())
        tune = Random(share=0.1, every=None)
        result = fit(tmp_path / str(steps), tune, tiny.llama(), dtype="bf16", steps=steps, lr=2e-5)
        moved.append(sum(int((p != start[n]).sum()) for n, p in weights(result).items()))
    assert moved[1] > 4 * moved[0]


def test_recomputing_activations_changes_nothing_and_is_switched_off(tmp_path):
    on = []

    class Watched(Objective):
        def loss(self, model, batch, ctx):
            on.append(model.model.gradient_checkpointing)
            return NextToken().loss(model, batch, ctx)

    kept = fit(tmp_path / "a")
    again = fit(tmp_path / "b", checkpointing=True, objective=Watched())
    assert all(on) and gap(kept, again) < 1e-6
    assert not any(getattr(m, "gradient_checkpointing", False) or m._forward_hooks for m in again.model.modules())


# -- the length, and the learning rate


def test_lengths(tmp_path):
    seen = fit(tmp_path / "a", steps=None, tokens=700, log_every=1)
    assert seen.history[-2]["tokens"] < 700 <= seen.history[-1]["tokens"]
    passes = fit(tmp_path / "b", steps=None, epochs=1.5, batch=5)  # 24 items: 36 sequences, 8 steps of 5
    assert passes.stats["steps"] == 8


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"steps": 4}, [1.0, 1.0, 1.0, 1.0]),
        ({"steps": 4, "schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"steps": 4, "schedule": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"steps": 6, "schedule": "linear", "warmup": 2}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"steps": 6, "schedule": "linear", "warmup": 1 / 3}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"steps": 4, "warmup": 0.5}, [0.5, 1.0, 1.0, 1.0]),
        ({"steps": 3, "warmup": 6}, [1 / 6, 1 / 3, 0.5]),
    ],
)
def test_learning_rates(spec, expected):
    spec = TrainSpec.of({"lr": 1.0} | spec)
    rates = [spec.rate(s, (s - 1) / spec.steps, s / spec.steps) for s in range(1, spec.steps + 1)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_the_rate_reaches_the_optimizer(tmp_path):
    result = fit(tmp_path, optim=SGD(), lr=0.5, schedule="linear", steps=2, clip=None)
    assert [h["lr"] for h in result.history] == [0.5, 0.25]
    one = weights(fit(tmp_path / "b", optim=SGD(), lr=0.5, steps=1, clip=None))
    two = weights(result)
    start = weights_of(tiny.llama())
    first = sum(float((one[n] - start[n]).double().square().sum()) for n in one) ** 0.5
    second = sum(float((two[n] - one[n]).double().square().sum()) for n in one) ** 0.5
    assert first == pytest.approx(0.5 * result.history[0]["grad_norm"], rel=1e-3)
    assert second == pytest.approx(0.25 * result.history[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"stepz": 3}, "train: unknown field 'stepz'; did you mean 'steps'?"),
        ({}, "train: no length given; give exactly one of steps, tokens, epochs"),
        ({"steps": 3, "tokens": 5}, "steps and tokens given"),
        ({"steps": 0}, "train.steps: 0 is out of range"),
        ({"steps": 3, "schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"steps": 3, "warmup": 1.5}, "train.warmup: 1.5 is out of range"),
        ({"steps": 3, "clip": 0}, "train.clip: 0.0 is out of range"),
    ],
)
def test_specs_are_checked(spec, text):
    with pytest.raises(LuthierError) as fault:
        TrainSpec.of(spec)
    assert text in str(fault.value)


# -- the order of the data


def test_every_pass_visits_every_item_once_in_a_new_order():
    feed = Feed([tiny.text_data(10)], TOKENIZER, TrainSpec(steps=1), Context(seed=1))
    passes = [[feed.place(lap * 10 + i)[1] for i in range(10)] for lap in range(3)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    other = Feed([tiny.text_data(10)], TOKENIZER, TrainSpec(steps=1), Context(seed=2))
    assert [other.place(i)[1] for i in range(10)] != passes[0]


def test_several_data_take_equal_turns():
    data = [tiny.text_data(7, name="a"), tiny.text_data(24, name="b"), tiny.text_data(9, name="c")]
    feed = Feed(data, TOKENIZER, TrainSpec(steps=1), Context(seed=1))
    line = [feed.place(i) for i in range(63)]
    for at in range(0, 63, 3):
        assert sorted(which for which, _ in line[at : at + 3]) == [0, 1, 2]
    assert len({tuple(w for w, _ in line[at : at + 3]) for at in range(0, 63, 3)}) > 3
    assert sorted(i for w, i in line if w == 0) == sorted([*range(7)] * 3)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_rows_of_a_step(world):
    ctx, data = Context(seed=1), [tiny.text_data()]
    alone = Feed(data, TOKENIZER, TrainSpec(steps=1, batch=8), ctx).batches(3)
    spec = TrainSpec(steps=1, batch=4 // world, accumulate=2)
    shares = [Feed(data, TOKENIZER, spec, ctx, rank, world).batches(3) for rank in range(world)]

    def rows(batches):
        return sorted(tuple(i for i in row.tolist() if i) for b in batches for row in b["input_ids"])

    assert rows(alone) == rows([b for share in shares for b in share])


def test_readying_rows_ahead_changes_nothing():
    data, ctx = [tiny.text_data(10)], Context(seed=1)
    streams = [Feed(data, TOKENIZER, TrainSpec(steps=1, workers=w), ctx).stream(2) for w in (0, 3)]
    for _ in range(6):
        for a, b in zip(*map(next, streams), strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)
    for stream in streams:
        stream.close()


def test_packed_text_fills_its_rows(tmp_path):
    feed = Feed(
        [tiny.text_data(), tiny.task_data()], TOKENIZER, TrainSpec(steps=1, max_length=32, pack=True), Context()
    )
    lengths = {len(feed.row(i).input_ids) for i in range(20) if feed.place(i)[0] == 0}
    assert lengths == {32}
    assert any(len(feed.row(i).input_ids) < 32 for i in range(20))


# -- failures


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_it_does_harm(tmp_path, where):
    ASKED.clear()
    model = tiny.llama()
    with pytest.raises(LuthierError) as fault:
        fit(tmp_path, model=model, objective=Sour(at=4, where=where), save_every=1, steps=9, ctx=Context(step="sums"))
    assert "at training step 4" in str(fault.value) and "step sums" in str(fault.value)
    assert str(tmp_path / "step-00000003") in str(fault.value) and "\n" not in str(fault.value)
    place, broken = saved.newest(tmp_path)
    assert place is not None and place.name == "step-00000003" and not broken
    good = saved.read(place, torch.device("cpu"))["tuned"]
    assert all(torch.equal(good[n], p) and p.isfinite().all() for n, p in model.named_parameters())


def test_ctrl_c_finishes_the_step_saves_and_resumes(tmp_path, terminal):

    def watch(event):
        if event["kind"] == "progress" and event["done"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped after step 4, saved in .*step-00000004; run again to go on"):
        fit(tmp_path / "a", steps=8, ctx=Context(seed=3, watch=watch))
    assert signal.getsignal(signal.SIGINT) is terminal
    resumed, whole = fit(tmp_path / "a", steps=8), fit(tmp_path / "b", steps=8)
    assert same_bytes(resumed, whole)
    assert untimed(resumed.history) == untimed(whole.history)


def test_a_second_ctrl_c_stops_at_once(tmp_path, terminal):
    class Impatient(Objective):
        def loss(self, model, batch, ctx):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as fault:
        fit(tmp_path, objective=Impatient())
    assert not isinstance(fault.value, Interrupted)


def test_data_without_items_or_labels_is_refused(tmp_path):
    with pytest.raises(LuthierError, match="data sums: no training items"):
        fit(tmp_path, data=tiny.task_data(0))
    with pytest.raises(LuthierError, match="step 1 has no label"):
        fit(tmp_path, data=tiny.text_data(), max_length=1)


# -- resuming (killing is in test_trainer_kill.py)


@pytest.mark.parametrize(
    "tune",
    [Full(), Random(share=0.1, every=3, count="entry"), Lift(share=0.1, every=3, rank=2), Lift(share=0.1, block=4)],
    ids=["full", "random", "lift", "lift blocks"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tune):
    """With dropout, accumulation, a schedule, and masks that move before and after the save."""
    spec = {"steps": 9, "accumulate": 2, "schedule": "cosine", "warmup": 2, "save_every": 4}
    model = tiny.llama(attention_dropout=0.2)

    def once(folder, watch=None):
        return fit(folder, tune, copy.deepcopy(model), optim=AdamW(weight_decay=0.1), ctx=Context(watch=watch), **spec)

    def stop(event):
        if event["kind"] == "metrics" and event["train"]["step"] == 6:
            raise RuntimeError("killed")

    whole = once(tmp_path / "a")
    with pytest.raises(RuntimeError):
        once(tmp_path / "b", stop)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["step-00000004"]
    resumed = once(tmp_path / "b")
    assert same_bytes(resumed, whole)
    assert untimed(resumed.history) == untimed(whole.history)


def moe():
    """A tiny mixture of experts of ours whose router biases move after each step."""
    part = {"use": "block.moe", "set": {"experts": 4, "bias_rate": 0.05}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return build_model({"vocab_size": tiny.VOCAB, **sizes, "slots": {"ffn": part}}, seed=2)


def biases(result) -> list[torch.Tensor]:
    return [b for name, b in result.model.named_buffers() if name.endswith("e_score_correction_bias")]


def test_expert_balance_is_trained_and_resumed(tmp_path):
    """The router's biases are no leaves: the trainer moves them after each step and saves them."""
    whole = fit(tmp_path / "a", model=moe(), steps=5)  # odd numbers: steps up and down may cancel
    assert "aux" in whole.history[0]["terms"]
    assert len(biases(whole)) == 2 and all(b.abs().max() > 0.04 for b in biases(whole))
    fit(tmp_path / "b", model=moe(), steps=5, save_every=3)
    resumed = fit(tmp_path / "b", model=moe(), steps=5)
    assert same_bytes(whole, resumed)
    assert all(torch.equal(a, b) for a, b in zip(biases(whole), biases(resumed), strict=True))


def test_saves_of_other_settings_are_refused(tmp_path):
    fit(tmp_path, save_every=2)
    fit(tmp_path, save_every=3, batch=2, accumulate=2, workers=1)  # the same numbers, otherwise reached
    for change, name in [({"lr": 0.5}, "lr"), ({"batch": 8}, "sequences of a step"), ({"tune": Random()}, "tune"),
                         ({"model": tiny.llama(1)}, "model"), ({"data": tiny.task_data()}, "data")]:  # fmt: skip
        with pytest.raises(LuthierError, match=f"another {name} "):
            fit(tmp_path, **change)


class Turning(Tuned):
    """Trains the head's weights as one leaf, whose entries change places after every step."""

    def __init__(self, model, ctx):
        self.model, self.ctx, self.weight = model, ctx, model.lm_head.weight
        for p in model.parameters():
            p.requires_grad_(p is self.weight)
        self.order = torch.arange(self.weight.numel())
        self.leaf = self.weight.detach().reshape(-1).clone().requires_grad_(True)
        self.hook = self.weight.register_post_accumulate_grad_hook(self.gather)

    def gather(self, weight):
        self.leaf.grad, weight.grad = weight.grad.reshape(-1)[self.order], None

    def leaves(self):
        return [self.leaf]

    @torch.no_grad()
    def after_step(self, step):
        flat, old = self.weight.data.view(-1), self.order
        flat[old] = self.leaf.detach()
        self.order = torch.randperm(len(old), generator=self.ctx.rng("turn", step))
        self.leaf.data.copy_(flat[self.order])
        return [Remap(self.leaf, old.argsort()[self.order])]

    def bake(self):
        self.hook.remove()
        return self.model

    def delta(self):
        return None

    def state(self):
        return {}

    def load_state(self, state):
        raise NotImplementedError


class Turn(Tune):
    def bind(self, model, ctx):
        return Turning(model, ctx)


def test_leaves_whose_entries_change_places_train_as_if_they_stayed(tmp_path):
    """Moments and steps follow their entries: plain tuning of the same weights is no different."""
    turned = fit(tmp_path / "a", Turn(), steps=6)
    still = fit(tmp_path / "b", Full(targets=("lm_head.weight",)), steps=6)
    assert gap(turned, still) < 1e-6
    assert gap(turned, fit(tmp_path / "c", Full(targets=("lm_head.weight",)), steps=5)) > 1e-3


def test_an_objective_draws_anew_for_each_micro_batch_and_alike_in_a_resumed_run(tmp_path):
    drawn = []

    class Drawing(Objective):
        def loss(self, model, batch, ctx):
            drawn.append(float(torch.rand((), generator=ctx.rng("mask"))))
            return NextToken().loss(model, batch, ctx)

    fit(tmp_path, objective=Drawing(), accumulate=2, save_every=3)
    assert len(set(drawn)) == len(drawn) == 8
    fit(tmp_path, objective=Drawing(), accumulate=2, save_every=3)
    assert drawn[8:] == drawn[6:8]


def test_what_an_optimizer_keeps_in_its_groups_comes_back():
    def made():
        return torch.optim.SGD([{"params": [torch.zeros(2)]}, {"params": [torch.ones(3)]}], lr=0.1)

    one, two = made(), made()
    one.param_groups[1] |= {"weight_sum": 3.5, "betas": (0.5, 0.25)}
    load_optimizer(two, optimizer_state(one))
    assert two.param_groups[1]["weight_sum"] == 3.5 and two.param_groups[1]["betas"] == (0.5, 0.25)
    assert two.param_groups[1]["params"][0].shape == (3,)


def test_moved_entries_take_their_state_along():
    leaf = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.AdamW([leaf])
    optimizer.state[leaf] = {"step": torch.tensor(5.0), "exp_avg": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    remap(optimizer, [Remap(leaf, torch.tensor([3, -1, 0, -1]))])
    assert optimizer.state[leaf]["exp_avg"].tolist() == [4.0, 0.0, 1.0, 0.0]
    assert optimizer.state[leaf]["step"] == 5.0
