"""Checks of Parts, Objectives, Optims and Tunes can fail: faults planted in copies of our own methods are caught."""

import pytest

import toys
from luthier.testing import checks_for

COPIES = {
    "norm.copy": "norm.rms", "optim.copy": "optim.adamw", "objective.copy": "objective.next_token",
    "tune.copy": "tune.full", "tune.draw": "tune.random",
}  # fmt: skip

ONES = "torch.ones(width)"
UNIT = "rms_unit(x_BTD, self.eps, self.center)"
OWNED = "owned = [dict(group) for group in groups]"
BIND = "        chosen = set(weights.values())"
STEP = "    def after_step(self, step: int) -> Sequence[Remap]:\n        return ()"
MOVE = "Remap(p, torch.zeros_like(p).long())"
BACK = "        return"
CLAMP = """        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-1e-3, 1e-3))
"""
LEAVES = "return list(self.weights.values())"
FAULTS = [
    # parts
    ("norm.copy", "runs quickly", ("return self.weight *", "return float('nan') * self.weight *")),
    ("norm.copy", "same seed same bytes", (ONES, "torch.rand(width)")),
    ("norm.copy", "input untouched", (UNIT, UNIT.replace("x_BTD", "x_BTD.mul_(2)"))),
    ("norm.copy", "gradients reach every parameter", ("return self.weight *", "return self.weight.detach() *")),
    ("norm.copy", "gradients are right", (UNIT, f"{UNIT} * x_BTD.detach().square().mean(-1, keepdim=True)")),
    ("norm.copy", "causality", (UNIT, f"{UNIT} * x_BTD.square().mean((1, -1), keepdim=True)")),
    ("norm.copy", "causality", (UNIT, f"{UNIT}.roll(1, 1)")),
    ("norm.copy", "padding invariance", (UNIT, f"{UNIT} * x_BTD.square().mean((0, -1), keepdim=True)")),
    ("norm.copy", "cached is uncached", (UNIT, f"{UNIT} * x_BTD.square().mean((1, -1), keepdim=True)")),
    ("norm.copy", "reload is equal", (UNIT, f"{UNIT} * (1 + 1e-3 * (id(self) % 9973))")),
    ("norm.copy", "finite in bf16", (f"{UNIT}, {{}}", f"{UNIT} * float('inf'), {{}}")),
    ("norm.copy", "aux is summed once", (f"{UNIT}, {{}}", f"{UNIT}, {{'metric/size': x_BTD.mean()}}")),
    ("norm.copy", "aux is summed once", (f"{UNIT}, {{}}", f"{UNIT}, {{'size': x_BTD.mean()}}")),
    ("norm.copy", "builds on meta", (ONES, "torch.ones(width, device='cpu')")),
    ("norm.copy", "reduction", (UNIT, UNIT.replace("self.eps", "self.eps + 1e-3"))),
    # optimizers
    ("optim.copy", "descends", (OWNED, "owned = [{**group, 'lr': -0.05} for group in groups]")),
    ("optim.copy", "descends", (OWNED, "owned = [{**group, 'lr': 1e-6} for group in groups]")),
    ("optim.copy", "resumes", ("self.state[leaf], group", "self.__dict__.setdefault(id(leaf), {}), group")),
    ("optim.copy", "same bytes", (OWNED, OWNED.replace("dict(group)", "{**group, 'lr': float(torch.rand(()))}"))),
    ("optim.copy", "learning rates count", (OWNED, "owned = [{**group, 'lr': 0.05} for group in groups]")),
    ("optim.copy", "state can move", ("shape = leaf.shape if", "shape = (1,) if")),
    ("optim.copy", "entries count for themselves", ("shape = leaf.shape if group", "shape = () if group")),
    ("optim.copy", "half precision", (OWNED, f"{OWNED}\n        leaves[0].data = leaves[0].data.float()")),
    ("optim.copy", "reduction", ("eps=self.eps, weight_decay=self", "eps=1e-4, weight_decay=self")),
    # objectives
    ("objective.copy", "a scalar with terms", ('{"nll": nll.detach()}, count)', '{"nll": nll}, count)')),
    ("objective.copy", "a scalar with terms", ('{"nll": nll.detach()}, count)', '{"nll": nll.detach()}, count + 1)')),
    ("objective.copy", "gradients arrive", ("(seen.head, seen.h_ND,", "(seen.head, seen.h_ND.detach(),")),
    ("objective.copy", "padding does not count", ("/ max(count, 1)", '/ batch["labels"].numel()')),
    ("objective.copy", "batches join by count", ("/ max(count, 1)", "/ max(count, 1) ** 0.5")),
    ("objective.copy", "only labels matter", ("(model, batch", "(model, {**batch, 'labels': batch['input_ids']}")),
    ("objective.copy", "no labels no loss", ("/ max(count, 1)", "/ max(count, 1) + 1.0")),
    ("objective.copy", "leaves no trace", ("count = seen.y_N.numel()", "count = model.seen = seen.y_N.numel()")),
    ("objective.copy", "half precision", ("head(h_ND).float()", "head(h_ND)")),
    ("objective.copy", "reduction", ("/ max(count, 1)", "/ (max(count, 1) + 1)")),
    # tunes
    ("tune.copy", "descends", (LEAVES, "return [p.detach().clone().requires_grad_() for p in self.weights.values()]")),
    ("tune.copy", "untouched by bind", (BIND, f"        next(model.parameters()).data += 1e-3\n{BIND}")),
    ("tune.draw", "budget honoured", ("self.share, self.lora_rank), self.block", "0.06, None), self.block")),
    ("tune.copy", "frozen stay", (STEP, STEP.replace(BACK, "        self.model.lm_head.weight.data += 1\n" + BACK))),
    ("tune.copy", "same seed", (STEP, STEP.replace(BACK, "        self.leaves()[0].data += torch.rand(())\n" + BACK))),
    ("tune.draw", "same seed", ("generator=ctx.rng(\"mask\", *item)", "generator=None")),
    ("tune.copy", "nothing dense stays", (LEAVES, f"{LEAVES}[1:]")),
    ("tune.copy", "accumulates", (BIND, CLAMP + BIND)),
    ("tune.copy", "resumes", ("p.copy_(state[name])", "p.copy_(state[name] * (1 + 1e-6))")),
    ("tune.copy", "moves are sound", (STEP, STEP.replace("()", f"[{MOVE} for p in self.leaves()]"))),
    ("tune.copy", "delta reverts", ("p.to(\"cpu\", copy=True)", "p.to(\"cpu\")")),
    ("tune.copy", "bakes plain", ("p.requires_grad_(required)", "p.requires_grad_(True)")),
    ("tune.copy", "bakes plain", ("            p.grad = None\n", "")),
    ("tune.copy", "half precision", (BIND, f"        model.float()\n{BIND}")),
    ("tune.copy", "reduction", (LEAVES, f"{LEAVES}[1:]")),
]  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    workshop = toys.Toys(tmp_path, monkeypatch)
    yield workshop
    workshop.close()


def fails(entry, name):
    (check,) = [c for c in checks_for(entry) if c.name == name]
    try:
        check.run()
    except (NameError, SyntaxError, ImportError):
        raise
    except Exception:
        return True
    return False


@pytest.mark.parametrize(("id_", "name", "edit"), FAULTS, ids=[f"{c}-{n}-{i}" for i, (c, n, _) in enumerate(FAULTS)])
def test_a_planted_fault_is_caught(made, id_, name, edit):
    assert fails(made.copy(id_, COPIES[id_], edit), name)


@pytest.mark.parametrize("id_", COPIES)
def test_without_a_fault_they_pass(made, id_):
    entry = made.copy(id_, COPIES[id_])
    assert [name for name in {n for other, n, _ in FAULTS if other == id_} if fails(entry, name)] == []


@pytest.mark.parametrize("id_", COPIES)
def test_every_check_has_a_planted_fault(made, id_):
    own = {c.name for c in checks_for(made.copy(id_, COPIES[id_])) if not c.name.startswith("card: ")}
    assert own - {name for other, name, _ in FAULTS if other.split(".")[0] == id_.split(".")[0]} == set()
