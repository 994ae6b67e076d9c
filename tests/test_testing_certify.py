"""The contract of Certifies can fail: each planted fault in a copy of sos.certify is caught by name."""

import dataclasses

import pytest

import toys
from luthier import verifier
from luthier.flows import Certificate
from luthier.testing import checks_for


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


MADE = "made = early or proof.over(p, basis, self._settings(), ctx, complete=True)"
CHANGED = "import dataclasses; " + MADE + "; made = dataclasses.replace(made, "
FAULTS = [
    ("runs", (MADE, CHANGED + "status='maybe' if made.status == 'numeric' else made.status)")),
    ("runs", (MADE, CHANGED + "reason='')")),
    ("proofs hold", (MADE, CHANGED + "status='exact' if made.status == 'numeric' else made.status)")),
    ("proofs hold", ("asked = read(problem)", "asked = read(f'{problem} + 1')")),
    ("proves what is inside", ("if basis is None:", "if basis is None or len(basis) > 3:")),
    ("same bytes", (MADE, CHANGED + "numbers={'at': id(p)})")),
    ("problems unchanged", ("        if not p.terms:", "        _ = hasattr(problem, 'clear') and problem.clear()\n"
     "        if not p.terms:")),
    ("reduction", (MADE, CHANGED + "squares=made.squares[::-1])")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "edits"), [(c, e) for c, *e in FAULTS], ids=[f"{c}-{i}" for i, (c, *_) in enumerate(FAULTS)]
)
def test_each_fault_is_caught(made, check, edits):
    assert fails(made.copy("sos.toy", "sos.certify", *edits), check)


def test_a_copy_passes(made):
    entry = made.copy("sos.toy", "sos.certify")
    assert [c.name for c in checks_for(entry) if fails(entry, c.name)] == []


def test_a_verifier_that_accepts_everything_is_caught(made, monkeypatch):
    monkeypatch.setattr(verifier, "refusal", lambda certificate: None)
    entry = made.copy("sos.toy", "sos.certify")
    assert fails(entry, "corrupted") and fails(entry, "proofs hold")


def test_one_kind_of_damage_is_enough(made, monkeypatch):
    """A verifier that forgets to look at the weights of squares."""
    real = verifier.refusal

    def blind(raw):
        made_ = Certificate(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
        squares = tuple((weight.lstrip("-"), terms) for weight, terms in made_.squares)
        return real(dataclasses.asdict(dataclasses.replace(made_, squares=squares)))

    monkeypatch.setattr(verifier, "refusal", blind)
    assert fails(made.copy("sos.toy", "sos.certify"), "corrupted")
