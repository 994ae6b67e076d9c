"""Trials in their storages: shared by processes, killed, given up, torn, refused; nothing but numbers is remembered."""

import json
import math
import os
import pickle
import signal
import sqlite3
import sys
import time

import numpy as np
import pytest

from dying import ended, fork
from luthier.engine import process, search, storages
from luthier.engine.finished import BROKEN
from luthier.engine.search import Trials
from luthier.errors import LuthierError
from luthier.kit.context import Context

CTX = Context(seed=4, step="search")
KINDS = ("journal", "sqlite")


def place(kind, folder):
    return {
        "journal": f"journal:{folder}/trials.log",
        "sqlite": f"sqlite:///{folder}/trials.db",
        "own": folder / "log",
    }[kind]


def bowl(numbers):
    return sum((number - 0.3) ** 2 for number in numbers)


def numbers_of(proposal, size=3):
    return [proposal.share(f"n{i}") for i in range(size)]


def finish(proposal, numbers, stopped=False):
    rungs = {2: (bowl(numbers),)} if stopped else {2: (bowl(numbers),), 4: (bowl(numbers),)}
    return proposal.tell(json.dumps(numbers), rungs, stopped, 0.5, 7)


def go(trials, count, sampler="cmaes", upto=None, **more):
    """Carry trials out; stop with one in hand after `upto` were finished here. Returns that one."""
    for done, proposal in enumerate(trials.proposals(count, sampler, CTX, size=3, **more)):
        numbers = numbers_of(proposal)
        if done == upto:
            return proposal
        finish(proposal, numbers)
    return None


def candidates(trials):
    return [done.candidate for done in trials.finished()]


def alone(folder, count, sampler="cmaes", **more):
    """What one process that nothing happens to would find."""
    folder.mkdir()
    trials = Trials(folder / "log", "s", "me")
    go(trials, count, sampler, **more)
    return candidates(trials)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_share_a_study_finish_it_together(kind, tmp_path):
    children = [fork(lambda i=i: go(Trials(place(kind, tmp_path), "s", f"owner {i}"), 8)) for i in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    found = Trials(place(kind, tmp_path), "s", "me").finished()
    assert [done.ordinal for done in found] == list(range(8))
    assert len({done.candidate for done in found}) == 8
    assert candidates(Trials(place(kind, tmp_path), "another", "me")) == []


@pytest.mark.parametrize(
    ("kind", "sampler"), [("own", "cmaes"), ("own", "tpe"), ("own", "random"), ("sqlite", "cmaes")]
)
def test_a_killed_search_proposes_the_same_as_if_it_had_lived(kind, sampler, tmp_path):
    whole = alone(tmp_path / "whole", 14, sampler)

    def dies():
        go(Trials(place(kind, tmp_path), "s", "me"), 14, sampler, upto=9)
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(fork(dies)) == -signal.SIGKILL
    trials = Trials(place(kind, tmp_path), "s", "me")
    assert candidates(trials) == whole[:9]
    go(trials, 14, sampler)
    assert candidates(trials) == whole
    assert len(set(whole)) == 14


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_unpickled(kind, tmp_path, monkeypatch):
    go(Trials(place(kind, tmp_path), "s", "me"), 8, "tpe")

    def refused(*args, **more):
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    again = Trials(place(kind, tmp_path), "s", "me")
    assert len(again.finished()) == 8
    go(again, 9, "tpe")
    go(again, 10)
    if kind == "journal":
        assert all(json.loads(line) for line in (tmp_path / "trials.log").read_text().splitlines())
    else:
        with sqlite3.connect(tmp_path / "trials.db") as base:
            names = [n for (n,) in base.execute("select name from sqlite_master where type = 'table'")]
            cells = [c for n in names for row in base.execute(f"select * from {n}") for c in row]
        assert cells and not any(isinstance(cell, bytes) for cell in cells)


def test_what_an_owner_left_is_begun_again_and_what_others_have_in_hand_is_not(tmp_path):
    """Trial 3 is a's, trial 4 b's; a comes back: it gets the third place with the same numbers, not b's fifth."""
    a, b = (Trials(tmp_path / "log", "s", owner) for owner in "ab")
    mine = go(a, 10, upto=3)
    theirs = go(b, 10, upto=0)
    assert (mine.ordinal, theirs.ordinal) == (3, 4)
    back = next(Trials(tmp_path / "log", "s", "a").proposals(10, "cmaes", CTX, size=3))
    assert back.ordinal == 3 and numbers_of(back) == mine.vector
    third = next(Trials(tmp_path / "log", "s", "c").proposals(10, "cmaes", CTX, size=3))
    assert third.ordinal == 5
    finish(theirs, theirs.vector)
    assert [done.ordinal for done in b.finished()] == [0, 1, 2, 4]


def test_a_trial_too_old_is_given_up(tmp_path, monkeypatch):
    lost = go(Trials(tmp_path / "log", "s", "lost"), 4, upto=1)
    assert lost.ordinal == 1
    monkeypatch.setattr(search, "PATIENCE", -1.0)
    trials = Trials(tmp_path / "log", "s", "me")
    go(trials, 4)
    assert [done.ordinal for done in trials.finished()] == [0, 1, 2, 3]
    assert candidates(trials)[1] == json.dumps(lost.vector)
    late = finish(lost, [9.0, 9.0, 9.0])  # it was alive after all
    assert late.values == (bowl([9.0, 9.0, 9.0]),)
    assert len(trials.finished()) == 4 and candidates(Trials(tmp_path / "log", "s", "lost")) == candidates(trials)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_of_a_process_that_is_gone_is_begun_again_at_once(kind, tmp_path):
    """By whoever is left, on the same machine; of another machine's process nobody knows."""

    def dies():
        go(Trials(place(kind, tmp_path), "s", "other"), 4, upto=2)
        os._exit(9)

    child = fork(dies)
    assert ended(child) != 0
    began = time.monotonic()
    trials = Trials(place(kind, tmp_path), "s", "me")
    go(trials, 4)
    assert [done.ordinal for done in trials.finished()] == [0, 1, 2, 3] and time.monotonic() - began < 60
    assert process.dead(f"{process.process().rpartition(' ')[0]} {child}") and not process.dead(process.process())
    assert not any(process.dead(owner) for owner in ("", f"elsewhere 1 2 {child}", f" {child}", "here"))


def test_one_that_died_before_it_had_a_place_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MOMENT", 0.05)
    dead = Trials(tmp_path / "log", "s", "dead").study.ask()
    trials = Trials(tmp_path / "log", "s", "me")
    assert go(trials, 2, upto=0).ordinal == 0
    assert trials.study.trials[dead.number].state.name == "FAIL"
    go(trials, 2, upto=0)
    trials.study.ask()
    go(Trials(tmp_path / "log", "s", "me"), 2)
    assert len(trials.finished()) == 2


def test_places_beyond_the_last_are_given_back(tmp_path):
    """Two processes that both saw room for one."""
    a, b = (Trials(tmp_path / "log", "s", owner) for owner in "ab")
    held = go(a, 3, upto=2)
    assert held.ordinal == 2 and b._begun(3) is None
    finish(held, held.vector)
    assert list(b.proposals(3, "cmaes", CTX, size=3)) == []
    assert [trial.state.name for trial in a.study.trials] == ["COMPLETE"] * 3 + ["FAIL"]


# what is proposed


def by_hand(told, ordinal, population=None):
    """The numbers that the cmaes package draws at this place after generations of (numbers, value)."""
    from cmaes import CMA

    twin = CMA(mean=np.full(3, 0.5), sigma=1 / 6, bounds=np.tile([0.0, 1.0], (3, 1)), population_size=population)
    for generation in told:
        twin.tell([(np.array(x), value) for x, value in generation])
    twin.reseed_rng(CTX.key("trial", ordinal) % 2**31)
    return twin.ask().tolist()


@pytest.mark.parametrize("population", [None, 4])
def test_cmaes_as_the_package_has_it(population, tmp_path):
    brood = population or 4 + int(3 * math.log(3))
    found = [json.loads(text) for text in alone(tmp_path / "whole", 2 * brood + 2, population=population)]
    for ordinal, numbers in enumerate(found):
        whole = [found[start : start + brood] for start in range(0, ordinal - brood + 1, brood)]
        told = [[(x, bowl(x)) for x in generation] for generation in whole]
        assert numbers == pytest.approx(by_hand(told, ordinal, population), abs=1e-12)


def test_cmaes_is_told_whole_generations_in_order(tmp_path):
    """While the third place is in somebody's hands, nobody is told anything; then all that is complete."""
    a, b = (Trials(tmp_path / "log", "s", owner) for owner in "ab")
    held = go(a, 30, upto=2, population=4)
    other = go(b, 30, upto=8, population=4)
    assert other.ordinal == 11
    assert other.vector == pytest.approx(by_hand([], 11, 4), abs=1e-12)
    finish(held, held.vector)
    finish(other, other.vector)
    proposal = next(b.proposals(30, "cmaes", CTX, size=3, population=4))
    vectors = [json.loads(text) for text in candidates(b)]
    told = [[(x, bowl(x)) for x in vectors[start : start + 4]] for start in (0, 4, 8)]
    assert numbers_of(proposal) == pytest.approx(by_hand(told, 12, 4), abs=1e-12)


def test_what_was_stopped_ranks_behind_what_was_not(tmp_path):
    trials, told = Trials(tmp_path / "log", "s", "me"), []
    for proposal in trials.proposals(5, "cmaes", CTX, size=3, population=4):
        numbers = numbers_of(proposal)
        if proposal.ordinal == 4:
            assert numbers == pytest.approx(by_hand([told], 4, 4), abs=1e-12)
        stopped = proposal.ordinal == 1
        told.append((numbers, 100.0 if stopped else bowl(numbers)))
        finish(proposal, numbers, stopped)
    assert [done.stopped for done in trials.finished()] == [False, True, False, False, False]
    assert [trial.state.name for trial in trials.study.trials][:2] == ["COMPLETE", "PRUNED"]


def test_another_scalar_is_another_past(tmp_path):
    trials = Trials(tmp_path / "log", "s", "me")
    go(trials, 8, population=4)
    turned = {"scalar": lambda ordinal: lambda values: -values[0]}
    proposal = next(trials.proposals(9, "cmaes", CTX, size=3, population=4, **turned))
    vectors = [json.loads(text) for text in candidates(trials)]
    told = [[(x, -bowl(x)) for x in vectors[start : start + 4]] for start in (0, 4)]
    assert numbers_of(proposal) == pytest.approx(by_hand(told, 8, 4), abs=1e-12)


def test_numbers_that_are_given_leave_the_others_as_they_were(tmp_path):
    free = go(Trials(tmp_path / "a", "s", "me"), 3, upto=0).vector
    given = go(Trials(tmp_path / "b", "s", "me"), 3, upto=0, first=[{"n0": 0.125}])
    assert given.vector == [0.125, *free[1:]]
    one = next(Trials(tmp_path / "c", "s", "me").proposals(3, "cmaes", CTX, size=3))
    assert [one.share("x", 2.0, 4.0), one.share("fixed", 5.0, 5.0), one.share("z", -1.0, 0.0)] == pytest.approx(
        [2 + 2 * free[0], 5.0, free[2] - 1]
    )
    assert one.vector == pytest.approx([free[0], 0.5, free[2]])


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_choices_whole_numbers_and_shares(sampler, tmp_path):
    trials = Trials(tmp_path / "log", "s", "me")
    for proposal in trials.proposals(12, sampler, CTX):
        drawn = (proposal.choice("kind", 3), proposal.whole("count", 2, 5), proposal.share("part", 0.25, 0.5))
        proposal.tell(json.dumps(drawn), {1: (float(drawn[0]),)}, False, 0.0, 1)
    kinds, counts, parts = zip(*(json.loads(text) for text in candidates(trials)), strict=True)
    assert set(kinds) <= {0, 1, 2} and len(set(kinds)) > 1
    assert set(counts) <= {2, 3, 4, 5} and len(set(counts)) > 1
    assert all(0.25 <= part <= 0.5 for part in parts) and len(set(parts)) == 12
    read = Trials(tmp_path / "log", "s", "me").finished()
    assert [(d.params["kind"], d.params["count"], d.params["part"]) for d in read] == list(
        zip(kinds, counts, parts, strict=True)
    )


def test_tpe_is_told_what_the_scalar_makes_of_the_values(tmp_path):
    """With the bowl turned upside down, it looks elsewhere from the first trial on that it has a model for."""
    up = alone(tmp_path / "up", 14, "tpe")
    down = alone(tmp_path / "down", 14, "tpe", scalar=lambda ordinal: lambda values: -values[0])
    assert up[:10] == down[:10] and up[10:] != down[10:]


# what is written down


def test_tpe_compares_stopped_trials_with_no_whole_one(tmp_path):
    """How easy the first items happen to be changes no proposal."""
    found = []
    for shift in (0.0, -5.0, 5.0):
        trials = Trials(tmp_path / f"shift{shift}", "a", "one")
        for done, proposal in enumerate(trials.proposals(24, "tpe", CTX, size=3)):
            numbers = numbers_of(proposal)
            first = {2: (bowl(numbers) + shift,)}
            stopped = done % 3 > 0
            proposal.tell(json.dumps(numbers), first if stopped else {**first, 4: (bowl(numbers),)}, stopped, 0.5, 7)
        found.append(candidates(trials))
    assert found[0] == found[1] == found[2]


def test_a_trial_that_is_heard_of_is_not_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PATIENCE", 1.0)
    trials, others = (Trials(tmp_path / "log", "a", owner) for owner in ("one", "two"))
    mine = go(trials, 1, upto=0)
    for _ in range(4):
        time.sleep(0.4)
        mine.alive()
        assert others._others() == 1
    finish(mine, [0.1, 0.2, 0.3])
    assert candidates(others) == ["[0.1, 0.2, 0.3]"]


def test_who_waits_for_others_says_so(tmp_path):
    trials, others = (Trials(tmp_path / "log", "a", owner) for owner in ("one", "two"))
    mine, events = go(trials, 1, upto=0), []

    def heard(event):
        events.append(event)
        if event["kind"] == "log":
            finish(mine, [0.1, 0.2, 0.3])

    assert list(others.proposals(1, "random", CTX.with_(watch=heard))) == []
    assert [e["text"] for e in events if e["kind"] == "log"] == [
        "waiting for 1 trial that others have in hand; one that is silent for 60 minutes counts as dead"
    ]
    assert events[-1]["done"] == events[-1]["total"] == 1


def test_a_proposal_that_is_not_judged_ends_the_search(tmp_path):
    """Else it would be waited for like a trial that others have in hand."""
    with pytest.raises(LuthierError, match="trial 0 was proposed, but not judged.*call evaluate"):
        list(Trials(tmp_path / "log", "a", "one").proposals(2, "random", CTX))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_is_read_as_it_was_written(kind, tmp_path):
    trials = Trials(place(kind, tmp_path), "s", "me")
    noted = trials.note("", {4: (1.5, 2.5)}, 0.25, 11)
    proposal = go(trials, 2, upto=0)
    told = proposal.tell("one", {2: (3.0, math.nan), 4: (math.inf, 2.0)}, False, 1.23456, 12)
    assert told.values == (BROKEN, 2.0) and told.rungs == {2: (3.0, BROKEN), 4: (BROKEN, 2.0)}
    for read in (trials.finished(), Trials(place(kind, tmp_path), "s", "other").finished()):
        assert [d.candidate for d in read] == ["", "one"] and [d.ordinal for d in read] == [-1, 0]
        assert (read[0].values, read[0].items, read[0].parameters) == ((1.5, 2.5), 4, 11)
        assert read[0].number == noted.number == 0
        assert (read[1].values, read[1].rungs, read[1].items) == (told.values, told.rungs, 4)
        assert (read[1].seconds, read[1].parameters, read[1].vector) == (1.235, 12, told.vector)
        assert read[1].params == dict(zip(("n0", "n1", "n2"), told.vector, strict=True))
    assert next(iter(trials.proposals(2, "cmaes", CTX, size=3))).ordinal == 1


@pytest.mark.parametrize("half", [b'{"op_code":4,"wor', b"x" * 200_000])
def test_a_line_that_was_left_half_written_is_cut_off(half, tmp_path):
    trials = Trials(tmp_path / "log", "s", "me")
    go(trials, 3)
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole + half)
    again = Trials(tmp_path / "log", "s", "me")
    go(again, 5)
    assert (tmp_path / "log").read_bytes().startswith(whole)
    assert all(json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert len(Trials(tmp_path / "log", "s", "me").finished()) == 5
    if half.startswith(b"{"):
        (tmp_path / "new").write_bytes(half)
        assert Trials(tmp_path / "new", "s", "me").finished() == []


def test_a_dead_process_holds_no_lock(tmp_path):
    def dies():
        storages.Lock(tmp_path / "log").acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(fork(dies)) == -signal.SIGKILL
    go(Trials(tmp_path / "log", "s", "me"), 2)
    assert os.listdir(tmp_path) == ["log"]


# what is refused


@pytest.mark.parametrize(("storage", "says"), [
    ("trials.db", "search.storage: 'trials.db' is no storage; write journal:PATH or"),
    ("journal:", "search.storage: 'journal:' is no storage"),
    ("sqlite:////no/such/folder/trials.db", "search.storage: cannot keep trials there"),
    ("nosuchbase://host/trials", "search.storage: cannot keep trials there"),
    ("postgresql+nodriver://127.0.0.1:1/trials", "search.storage: cannot keep trials there"),
    ("journal:/dev/null/trials", "search.storage: cannot keep trials there"),
])  # fmt: skip
def test_storages_that_cannot_be(storage, says):
    with pytest.raises(LuthierError) as fault:
        Trials(storage, "s", "me")
    assert says in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("text", ["my notes", "my notes\nof two lines\n", '{"op": 1}'])
def test_a_file_that_is_no_journal_is_left_as_it_was(text, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(LuthierError, match="notes.txt holds something else than trials; name a file that is not"):
        Trials(f"journal:{path}", "s", "me")
    assert path.read_text() == text


def test_a_folder_is_no_journal(tmp_path):
    with pytest.raises(LuthierError, match="search.storage: cannot keep trials there"):
        Trials(tmp_path, "s", "me")


@pytest.mark.parametrize("kind", KINDS)
def test_a_storage_that_goes_away(kind, tmp_path):
    trials = Trials(place(kind, tmp_path), "s", "me")
    held = go(trials, 3, upto=1)
    if kind == "journal":
        (tmp_path / "trials.log").unlink()
        (tmp_path / "trials.log").mkdir()
    else:
        with sqlite3.connect(tmp_path / "trials.db") as base:
            base.execute("drop table trial_user_attributes")
    for use in (lambda: go(trials, 3), lambda: finish(held, held.vector), lambda: trials.note("", {1: (1.0,)}, 0.0, 1)):
        with pytest.raises(LuthierError, match="search.storage: cannot keep trials there") as fault:
            use()
        assert "\n" not in str(fault.value)


def test_samplers_and_packages_that_are_not_there(tmp_path, monkeypatch):
    trials = Trials(tmp_path / "log", "s", "me")
    with pytest.raises(LuthierError, match="unknown sampler 'cmeas'; did you mean 'cmaes'"):
        go(trials, 2, "cmeas")
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(LuthierError, match=r"this search needs cmaes; pip install 'luthier\[search\]'"):
        go(trials, 2)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LuthierError, match=r"a search needs optuna; pip install 'luthier\[search\]'"):
        Trials(tmp_path / "other", "s", "me")
