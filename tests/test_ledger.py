"""The ledger: records read back, in order, also while another process writes; one run a folder."""

import json
import subprocess
import sys
import threading

import pytest

from luthier import ledger
from luthier.errors import LuthierError
from luthier.ledger import Ledger, Record


def record(step="math", status="done", **more):
    fields = {"run": "r", "step": step, "base": step, "hash": "h1", "use": "tune.full", "shape": "Tune", "seed": 0}
    return Record(**(fields | {"status": status} | more))


def test_records_read_back_equal_and_in_order(tmp_path):
    book = Ledger(tmp_path)
    first = record(
        vary={"seed": 1}, config={"use": "tune.full", "set": {"targets": ["*"]}}, inputs={"data": [{"name": "a"}]},
        metrics={"loss": 1.5}, artefacts={"model": "steps/math"}, notes=("a", "b"), seconds=2.5, output="o",
    )  # fmt: skip
    second = record("python", status="failed", notes=("broke",))
    for one in (first, second):
        book.add(one)
    assert Ledger(tmp_path).records() == [first, second]
    assert book.records("python") == [second]


def test_latest_is_the_last_one_done(tmp_path):
    book = Ledger(tmp_path)
    for digest, status in (("h1", "done"), ("h2", "done"), ("h3", "failed")):
        book.add(record(hash=digest, status=status))
    assert {step: r.hash for step, r in book.latest().items()} == {"math": "h2"}


def test_export_is_json_lines(tmp_path):
    book = Ledger(tmp_path)
    book.add(record())
    book.add(record("sum", metrics={"bytes": 3}))
    lines = book.export(tmp_path / "ledger.jsonl").read_text().splitlines()
    assert [Record.from_dict(json.loads(line)) for line in lines] == book.records()


def test_keys_of_other_versions_are_left_out():
    raw = record().as_dict() | {"colour": "blue"}
    assert Record.from_dict(raw) == record()


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError):
        Ledger(tmp_path).add(record(metrics={"loss": float("nan")}))
    assert Ledger(tmp_path).records() == []


def test_writers_do_not_lose_each_others_records(tmp_path):
    Ledger(tmp_path)

    def write(name):
        for i in range(20):
            Ledger(tmp_path).add(record(f"{name}{i}"))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(tmp_path).records()) == 60


def test_a_broken_ledger_is_one_line(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all, but long enough to look like one" * 40)
    with pytest.raises(LuthierError, match="the ledger cannot be used"):
        Ledger(tmp_path).records()


def test_a_second_run_is_refused_and_a_dead_one_does_not_stand_in_the_way(tmp_path):
    code = "import sys, time\nfrom luthier.ledger import only_one\nfrom pathlib import Path\n"
    code += "with only_one(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    with pytest.raises(LuthierError, match="another run is at work"), ledger.only_one(tmp_path):
        pass
    other.kill()
    other.wait()
    with ledger.only_one(tmp_path):
        pass


def test_what_is_said_of_the_machine_is_plain():
    found = ledger.machine("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] and found["python"]
    assert "luthier" in ledger.versions()
