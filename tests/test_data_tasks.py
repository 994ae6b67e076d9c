"""Answers taken out of what models say, for every family; and that no scorer is handed a program."""

import pytest

from luthier.engine import tasks
from luthier.errors import LuthierError
from luthier.flows import Item

FAST = [name for name in tasks.families() if name not in tasks.SLOW]


@pytest.mark.parametrize(
    ("said", "answer", "found"),
    [
        ("57 + 87 + 70 = 214", "1", "214"), ("The answer is 1,234.", "1", "1234"), ("It is -5", "1", "-5"),
        ("12-5", "1", "5"), ("so 3.50 in all", "1", "3.50"), ("\\boxed{42}$ as 6*7", "1", "7"),
        ("Answer: 12\nbecause 5 + 7 is it", "1", "12"), ("The answer is: 3 + 4 = 7", "1", "7"),
        ("+8", "1", "8"), ("1e-3", "1", "1e-3"), ("no idea", "1", None), ("The answer is clear. 4", "1", "4"),
        ("Yes, because no one is", "Yes", "Yes"), ("I think the answer is no", "Yes", "No"), ("true", "False", "True"),
        ("hard to say", "Yes", None), ("<b>\n", "Tuesday", "<b>"),
        ("Let me see.\n\nTuesday.", "Monday", "Tuesday"), ("The answer is: 'Monday'", "x", "Monday"),
        ("```\n1 2\n3 4\n```", "1 0\n0 1", "1 2\n3 4"), ("", "1", None), ("", "x", None),
    ],
)  # fmt: skip
def test_extraction(said, answer, found):
    assert tasks.extract(said, answer) == found


@pytest.mark.parametrize(
    ("family", "said", "found"),
    [
        ("countdown", "We get (82 + 20) * 67 - 50 = 6784", "(82 + 20) * 67 - 50"),
        ("countdown", "The answer is 1 + 2", "1 + 2"), ("countdown", "9**9**9**9", None), ("countdown", "42", None),
        ("countdown", "__import__('os').system('x')", None),
        ("simple_integration", "The answer is -2*X**9 + 7*X**8 + C", "-2*X**9 + 7*X**8 + C"),
        ("simple_integration", "2*sin(x)/3 + sqrt(x) + C", "2*sin(x)/3 + sqrt(x) + C"),
        ("simple_integration", "exec(x)", None), ("simple_integration", "x.real", None),
        ("simple_integration", "9**9**9", None), ("simple_integration", "2**(999999999)", None),
        ("simple_integration", "lambda: x", None), ("simple_integration", "x**9999", None),
        ("simple_integration", "2**(9*(9*(9**9)))", None),
        ("string_insertion", "It becomes ABCDE then", "ABCDE"), ("string_insertion", "exit()", None),
        ("spiral_matrix", "1 2 3", "1 2 3"), ("spiral_matrix", "[9**9]", None), ("n_queens", "_ Q\nQ _", "_ Q\nQ _"),
        ("n_queens", "__import__('os')", None), ("bitwise_arithmetic", "it is 0x3D2d", "0x3D2d"),
        ("time_intervals", "It took 03:22:03.", "03:22:03"),
    ],
)  # fmt: skip
def test_extraction_by_family(family, said, found):
    assert tasks.extract(said, "anything", family) == found


@pytest.mark.parametrize("family", FAST)
def test_true_answers_score_full_marks(family):
    """The true answer alone, and after a line of talk, of every family that states one."""
    dataset = tasks.generator(family, 7, 3, {})
    for item in tasks.items(dataset, family):
        assert len(item.id) == 16 and item.prompt
        if item.answer is not None:
            assert tasks.score(dataset, item, item.answer) == 1.0
            assert tasks.score(dataset, item, f"Let me think.\n\n{item.answer}") == 1.0 or "\n" in item.answer
            assert tasks.score(dataset, item, "I do not know.") < 1.0


def test_items_repeat_with_their_seed():
    for family in ("gcd", "countdown"):
        first, again = (list(tasks.items(tasks.generator(family, 3, 3, {}), family)) for _ in range(2))
        assert first == again != list(tasks.items(tasks.generator(family, 9, 3, {}), family))


def test_a_missing_answer_is_no_answer():
    item = next(tasks.items(tasks.generator("graph_color", 1, 1, {}), "graph_color"))
    assert item.answer is None


def test_unstable_families_are_not_offered():
    assert not set(tasks.families()) & tasks.UNSTABLE and "chain_sum" in tasks.families()
    with pytest.raises(LuthierError, match="jsonl:PATH"):
        tasks.generator("knight_swap", 0, 1, {})


def test_kinds_name_families_that_are():
    assert not (set(tasks.KINDS) | tasks.SLOW) - set(tasks.families())


def test_a_score_stays_between_0_and_1():
    class Odd:
        def __getitem__(self, index):
            return {"answer": "1"}

        def score_answer(self, answer, entry):
            return {"1": 1.5, "2": -0.5}[answer]

    item = Item(id="i", prompt="?", meta={"index": 0, "family": "odd"})
    assert tasks.score(Odd(), item, "1") == 1.0 and tasks.score(Odd(), item, "2") == 0.0
    assert tasks.score(Odd(), item, "none") == 0.0


def test_the_missing_solver_is_named() -> None:
    with pytest.raises(LuthierError, match="pycosat"):
        tasks._NoSolver("pycosat").itersolve  # noqa: B018
