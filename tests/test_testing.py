"""The contract suite can fail: a sound toy passes every check, and each planted fault is caught by name."""

from pathlib import Path

import pytest

import toys
from luthier import testing
from luthier.testing import Check, checks_for, run_check, run_method, transform
from luthier.testing.source import faults

IDS = {"transform": "merge.toy", "decode": "decode.toy", "measure": "eval.toy"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    workshop = toys.Toys(tmp_path, monkeypatch)
    yield workshop
    workshop.close()


def fails(entry, name):
    """Whether the check of this name raises; it must exist, and the toy must not simply be broken Python."""
    (check,) = [c for c in checks_for(entry) if c.name == name]
    try:
        check.run()
    except (NameError, SyntaxError, ImportError):
        raise
    except Exception:
        return True
    return False


@pytest.mark.parametrize("toy", IDS)
def test_a_sound_method_of_another_package_passes(made, toy):
    made.enrol(IDS[toy], toy)
    report = run_method(IDS[toy])
    assert not [o for o in report.outcomes if not o.passed]
    assert len(report.outcomes) > 15
    assert "golden" in report.notes[0]


ENGINE = ["streamed is in memory", "bytes of nothing else", "keeps dtype", "refuses other shapes"]
MEAN = "torch.lerp(tensors.base, total_N / len(tensors.experts), self.pull)"
VERB = "    def transform("
COUNT = "self.forwards += 1"
ROW, INDENT = "row = encode", " " * 24
LOOP = "for expert_N in tensors.experts:\n            total_N.add_(expert_N)"
FAULTS = [
    # what all shapes share
    ("transform", "card: summary", ("Toy mean: the average", "Averages")),
    ("transform", "card: summary", ("or a part of the way there.", "or a part of the way there")),
    ("transform", "card: paper", ("Paper: none (made for the tests).", "Made for the tests.")),
    ("transform", "card: paper", ("none (made for the tests)", "arXiv 23.1")),
    ("transform", "card: fields", ('    """share of the way from the base to the average"""\n', "")),
    ("transform", "card: departures", ("nobody 0.0.0: it is published nowhere (tests", "none (tests")),
    ("transform", "card: departures", ("test_a_sound_toy_passes", "a test")),
    ("transform", "card: class", ("class Toy(", "class Half(Transform): ...\n\n\nclass Toy(Half, ")),
    ("transform", "card: class", ("def transform(", "def transforms(")),
    ("transform", "card: reduction names", ('"mean", tol', '"median", tol')),
    ("transform", "card: reduction names", ('{"pull": 1.0}', '{"push": 1.0}')),
    ("transform", "card: values", (VERB, f"    __hash__ = object.__hash__\n\n{VERB}")),
    ("transform", "card: round trip", (VERB, f"    to_dict = lambda self: dict(use=self.id, set={{}})\n\n{VERB}")),
    ("transform", "card: errors", ("pull: Share", "pull: object")),
    ("transform", "reduction", ("len(tensors.experts), self.pull", "(len(tensors.experts) + 1e-4), self.pull")),
    ("transform", "reduction", ('reduces_to = Reduces({"pull": 1.0}, "mean", tolerance=1e-6)', "reduces_to = ()")),
    # transforms
    ("transform", "runs", (MEAN, f"{MEAN} * float('nan')")),
    ("transform", "runs", (MEAN, f"{MEAN}[:1]")),
    ("transform", "same bytes", (MEAN, f"{MEAN} + 1e-6 * torch.rand(())")),
    ("transform", "inputs untouched", (MEAN, MEAN.replace("torch.lerp(tensors.base, ", "tensors.base.lerp_("))),
    ("transform", "one expert", ("total_N / len(tensors.experts)", "total_N / (len(tensors.experts) - 1)")),
    ("transform", "expert order", (LOOP, LOOP.replace("total_N.add_(expert_N)", "total_N.mul_(0.99).add_(expert_N)"))),
    ("transform", "fields matter", (", self.pull)", ", 1.0)")),
    ("transform", "equal experts", (MEAN, f"{MEAN} + 1e-4")),
    # decoders
    ("decode", "reduction", ("logits_V.argmax()", "logits_V.argmin()")),
    ("decode", "runs", ("range(self.method.max_new_tokens)", "range(self.method.max_new_tokens + 1)")),
    ("decode", "runs", ('"eos" if 1 in m else "length"', '"done"')),
    ("decode", "runs", ("texts = tuple(self.tokenizer.decode(m,", "texts = tuple(self.tokenizer.decode(m[::-1],")),
    ("decode", "same seed", (", generator=draw", "")),
    ("decode", "seeds differ", ('ctx.rng("draw", i)', "torch.Generator().manual_seed(i)")),
    ("decode", "batch is single", ("attention_mask=mask_BT", "attention_mask=None")),
    ("decode", "text is ids", ("list(p) for p in prompts", "list(p)[:-1] for p in prompts")),
    ("decode", "steps stream", ("yield step\n            if", "pass\n            if")),
    ("decode", "forwards are counted", (COUNT, "self.forwards = 1")),
    ("decode", "forwards are counted", (COUNT, "self.forwards += 2\n        self.model(input_ids=ids_BT)")),
    ("decode", "replays", ("logits_V.argmax()", "logits_V.topk(2).indices[1]")),
    ("decode", "models unchanged", (COUNT, "self.forwards += 1\n        self.model.train()")),
    ("decode", "models unchanged", (COUNT, f"{COUNT}\n        next(self.model.parameters()).data += 1e-3")),
    # measures
    ("measure", "runs", ('"value": loss', '"value": loss / 0.0 if loss == 0 else float("inf")')),
    ("measure", "runs", ("for subject in models:", "for subject in list(models)[:1]:")),
    ("measure", "same seed", ('"value": loss', '"value": loss + float(torch.rand(()))')),
    ("measure", "models unchanged", (ROW, f"model.train()\n{INDENT}{ROW}")),
    ("measure", "models unchanged", (ROW, f"model.register_forward_hook(print)\n{INDENT}{ROW}")),
    ("measure", "twins agree", ('"value": loss', '"value": loss + 1e-6 * (subject.name == "twin")')),
    ("measure", "planted signal", ('"value": loss', '"value": 1.0 + 0 * loss')),
    ("measure", "planted signal", ('"value": loss', '"value": -loss')),
    ("measure", "order of models", ('"value": loss', '"value": loss + len(rows)')),
    ("measure", "reduction", ('"tokens": row.count', '"tokens": row.count + 1')),
]  # fmt: skip


@pytest.mark.parametrize(("toy", "check", "edit"), FAULTS, ids=[f"{t}-{c}-{i}" for i, (t, c, _) in enumerate(FAULTS)])
def test_a_planted_fault_is_caught(made, toy, check, edit):
    try:
        entry = made.enrol(IDS[toy], toy, edit)
    except Exception as fault:
        pytest.fail(f"the toy could not even be enrolled: {fault}")
    assert fails(entry, check)


def test_every_check_of_mine_has_a_planted_fault(made):
    """The list above leaves no check out but those whose faults lie in the engine, planted below."""
    for toy, id_ in IDS.items():
        entry = made.enrol(id_, toy)
        own = {c.name for c in checks_for(entry)}
        shared = {c.name for c in checks_for(entry) if c.name.startswith("card: ")}
        caught = {c for t, c, _ in FAULTS if t == toy} | {c for _, c, _ in FAULTS if c in shared}
        assert own - caught - {"card: source", *ENGINE} == set()


@pytest.mark.parametrize(
    "check", ["streamed is in memory", "bytes of nothing else", "keeps dtype", "refuses other shapes"]
)
def test_faults_of_the_engine_are_caught(made, monkeypatch, check):
    """A stream that depends on its options, rounds twice, or lets any shape pass."""
    entry = made.enrol("merge.toy", "transform")
    real = transform.run_transform

    def sloppy(method, base, experts, out, ctx, **options):
        if check == "refuses other shapes":
            return out
        if check == "bytes of nothing else" and options.get("threads") == 1 and "memory" not in options:
            return real(method, base, experts, out, ctx, **options)
        return real(method, base, experts[:-1], out, ctx, **options)

    assert not fails(entry, check)
    monkeypatch.setattr(transform, "run_transform", sloppy)
    assert fails(entry, check)


BAD_SOURCE = {
    "import luthier.merge.ties": "imports luthier.merge.ties",
    "from luthier.merge import ties": "imports luthier.merge.ties",
    "from luthier.engine.stream import run_transform": "imports luthier.engine",
    "import random": "imports random",
    "import numpy.random as r": "imports numpy.random",
    "def f():\n    from luthier.model import Spec": "imports luthier.model.Spec",
    "print(1)": "calls print()",
    "x = open('a')": "calls open()",
    "torch.manual_seed(0)": "touches the global generator",
    "x = torch.randn(3)": "randn() without generator=",
    "torch.nn.init.normal_(x)": "normal_() without generator=",
    "x = y.cuda()": "assumes a device",
    "def f(**options): ...": "takes **options",
    "def f():\n    global x": "keeps global state",
    "cache = {}": "module state cache",
    "x_BTQ = 1": "x_BTQ: no legend for Q",
    "def f(x_Q): ...": "x_Q: no legend for Q",
}


@pytest.mark.parametrize("line", BAD_SOURCE)
def test_the_rules_of_a_method_file(tmp_path, line):
    path = tmp_path / "toy.py"
    path.write_text(f'"""Toy: a file.\n\nB: rows, T: positions.\n"""\n\n{line}\n')
    assert any(BAD_SOURCE[line] in fault for fault in faults(path, "luthier.merge.toy")), faults(
        path, "luthier.merge.toy"
    )


def test_a_clean_file_has_no_faults(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(
        '"""Toy: a file.\n\nB rows, T positions, V words.\n"""\nimport torch\nfrom luthier.kit.top import x\n'
        "from luthier.shapes import Transform\nTABLE = {1: 2}\ng = torch.Generator().manual_seed(1)\n"
        "x_BT = torch.randn(3, generator=g)\ny_V = torch.randint(3, (2,), generator=g)\n"
    )
    assert faults(path, "luthier.merge.toy") == []


def test_a_known_failure_that_passes_fails(monkeypatch):
    passing, failing = Check("sound", lambda: None), Check("broken", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_check("toy.a", failing)
    known = {("toy.a", "sound"): "not yet", ("toy.a", "broken"): "not yet"}
    monkeypatch.setattr(testing, "KNOWN_FAILURES", known)
    run_check("toy.a", failing)
    with pytest.raises(AssertionError, match="take it out of KNOWN_FAILURES"):
        run_check("toy.a", passing)


def test_known_failures_name_what_exists():
    from luthier.catalogue import card

    for (id_, name), reason in testing.KNOWN_FAILURES.items():
        assert name in [c.name for c in checks_for(card(id_))]
        assert len(reason) > 10


def test_every_shape_with_methods_has_checks_and_a_test_file():
    from luthier.catalogue import cards

    for entry in cards().values():
        own = testing.shape_of(entry)
        assert own is not None, f"no checks of {entry.shape}"
        assert own.checks(entry)
        assert (Path(__file__).parent / "contracts" / f"test_{entry.shape.lower()}.py").exists()
