"""Many certificates at once: what is done stays done, whoever is killed; what cannot be done says why."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import certify_work
from certify_work import work
from luthier.certificate import Certificate
from luthier.cli import main
from luthier.engine.certify_file import BEGIN, Results, rows, run
from luthier.engine.certify_pool import Lost, answers
from luthier.errors import LuthierError

LINES = (
    "# some polynomials",
    "x^2 + 1",
    "",
    "x^2 - 1  ",
    "x^^2",
    '{"polynomial": "x^4 + y^4 + 1", "name": "quartic"}',
    '{"polynomial": {"a": 1}}',
    '{"polynomal": "x"}',
    '{"polynomial": ',
    "[" * 3000,
    "x^2 + 1",
    "x\u0661 + 1",
    "(x + y)^2 + 1/3",
)


def pool(tasks, jobs=2, seconds=None, warm=certify_work.warm):
    return dict(answers(tasks, work, warm, jobs, seconds))


def test_answers_come_from_several_processes():
    made = pool([("pid", i) for i in range(6)])
    assert len(set(made.values())) == 2 and os.getpid() not in made.values()


def test_no_tasks_no_processes():
    assert pool([], jobs=4) == {}


def test_who_is_late_is_ended_and_the_rest_go_on():
    tasks = [("sleep", 60), ("echo", 1), ("sleep", 59), ("echo", 2), ("echo", 3)]
    began = time.monotonic()
    made = pool(tasks, seconds=0.3)
    assert time.monotonic() - began < 30
    assert {t: made[t] for t in tasks if t[0] == "echo"} == {("echo", i): i for i in (1, 2, 3)}
    assert made["sleep", 60] == made["sleep", 59] == "stopped after 0.3 s" and isinstance(made["sleep", 60], Lost)


@pytest.mark.parametrize(
    ("task", "says"),
    [(("signal", "SIGKILL"), "SIGKILL; memory may"), (("signal", "SIGSEGV"), "SIGSEGV"), (("exit", 7), "with code 7")],
)
def test_who_dies_is_replaced(task, says):
    made = pool([task, ("echo", 1), ("echo", 2)], jobs=1)
    assert says in made.pop(task)
    assert set(made.values()) == {1, 2}


def test_who_cannot_start_is_an_error():
    with pytest.raises(LuthierError, match="certificates need a solver"):
        pool([("echo", 1)], warm=certify_work.lacking)
    with pytest.raises(LuthierError, match="cannot start: its process ended with code 3"):
        pool([("echo", 1)], warm=certify_work.broken)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A file of problems and its results."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "p.txt").write_text("\n".join(LINES))
    assert main(["certify", str(folder / "p.txt"), "--out", str(folder / "r.jsonl"), "--jobs", "2"]) == 1
    return folder


@pytest.fixture
def home(done, tmp_path, monkeypatch):
    for name in ("p.txt", "r.jsonl"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *words):
    code = main(["certify", *words])
    out, err = capsys.readouterr()
    return code, out, err


def statuses(path):
    found = {}
    for _, row in rows(path):
        found[row["line"]] = row["certificate"]["status"] if "certificate" in row else row["error"]
    return found


def test_every_line_gets_a_row(done):
    found = statuses(done / "r.jsonl")
    assert [found[n] for n in (2, 4, 6, 13)] == ["exact", "not_sos", "exact", "exact"]
    for line, says in ((5, "column 3"), (7, "unknown key 'a'"), (8, "did you mean 'polynomial'"),
                       (9, "not JSON"), (10, "column 1"), (12, "column 2")):  # fmt: skip
        assert says in found[line]
    assert len(found) == 10  # line 11 is line 2 again
    names = {row["line"]: row["name"] for _, row in rows(done / "r.jsonl")}
    assert names[6] == "quartic" and names[2] is None


def test_what_is_there_is_not_repeated(home, capsys):
    before = (home / "r.jsonl").read_bytes()
    code, out, _ = said(capsys, "p.txt", "--out", "r.jsonl")
    assert code == 1 and "0 done, 10 kept" in out and (home / "r.jsonl").read_bytes() == before
    (home / "p.txt").write_text("y^2 + 5\n\n" + (home / "p.txt").read_text())  # lines move
    code, out, _ = said(capsys, "p.txt", "--out", "r.jsonl")
    assert "1 done, 10 kept" in out
    code, out, _ = said(capsys, "p.txt", "--out", "r.jsonl", "--set", "bits=20")  # other settings
    assert "11 done, 0 kept" in out


def test_all_exact_is_code_0(home, capsys):
    (home / "q.jsonl").write_text('{"polynomial": "x^2"}\n')
    assert said(capsys, "q.jsonl", "--out", "s.jsonl")[0] == 0
    (home / "q.jsonl").write_text("# nothing\n")
    code, out, _ = said(capsys, "q.jsonl", "--out", "t.jsonl")
    assert code == 0 and "no problems" in out


def test_a_torn_last_line_is_mended_wherever_it_is_torn(home, capsys):
    whole = (home / "r.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for cut in [start + 1, start + 5, start + len(BEGIN) + 3, len(whole) - 2, len(whole) - 1]:
        (home / "r.jsonl").write_bytes(whole[:cut])
        with Results(home / "r.jsonl") as results:
            torn = cut < len(whole) - 1
            assert len(results.keys) == len(lines) - torn
            assert bool(results.cut) == torn
        left = (home / "r.jsonl").read_bytes()
        assert left == (whole[:start] if torn else whole)
    (home / "r.jsonl").write_bytes(whole[: start + 40])
    code, out, _ = said(capsys, "p.txt", "--out", "r.jsonl")
    assert "was torn" in out and "1 done, 9 kept" in out
    assert len(statuses(home / "r.jsonl")) == 10


@pytest.mark.parametrize("text", ["x^2 + 1\n", "x^2 + 1", '{"a": 1}\n', '{"key": 3}\n', "\0\0\0", '{"key": "a"\n{"key'])
def test_a_file_that_is_not_ours_is_left_alone(home, capsys, text):
    (home / "mine").write_text(text)
    code, out, err = said(capsys, "p.txt", "--out", "mine")
    assert code == 2 and "mine:1: is no result of luthier certify; nothing was changed" in err
    assert (home / "mine").read_text() == text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"x+" * 5_000_000, "10000000 characters"),
        (b"\xff\xfe+\x80", "column 1"),
        (b"\0\0\0", "column 1"),
        (b'{"polynomial": ' + b"[" * 100_000, "not JSON"),
        (b'{"polynomial": 1e999}', "inf is no rational number"),
        (b'{"polynomial": 1, "zero": [' + b"1," * 9999 + b"1]}", "10000 constraints"),
        (b'{"polynomial": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"polynomial": "\\ud800"}', "column 1"),
        (b"x^1000000000", "too large"),
        (b"(" * 90_000, "nest deeper"),
        ("x\u202e^2".encode(), "column 2"),
    ],
    ids=lambda v: v[:20].decode("latin-1") if isinstance(v, bytes) else v,
)
def test_hostile_lines_get_a_row(tmp_path, line, says):
    (tmp_path / "p.txt").write_bytes(line)
    assert dict(run(tmp_path / "p.txt", tmp_path / "r.jsonl", "sos.certify", {}, 1))["todo"] == 1
    ((_, row),) = rows(tmp_path / "r.jsonl")
    assert says in row["error"] and "\n" not in row["error"] and len(row["error"]) < 1000


def test_two_at_once_do_not_mix(home, capsys):
    with Results(home / "r.jsonl"):
        code, _, err = said(capsys, "p.txt", "--out", "r.jsonl")
    assert code == 2 and "another process is writing" in err


def test_time_is_kept_and_again_repeats(home, capsys):
    """A problem that takes long: stopped, kept as unknown with its polynomial, and repeated when asked."""
    (home / "q.txt").write_text("(x + y + z + w + 1)^8 + x^8 + 1\nx^2 + 1")
    slow = ("q.txt", "--out", "s.jsonl", "--jobs", "1", "--timeout")
    code, out, _ = said(capsys, *slow, "0.2s", "--set", "basis=full")
    (row,) = [row for _, row in rows(home / "s.jsonl") if "stopped" in row]
    made = Certificate.from_json(json.dumps(row["certificate"]))
    assert code == 1 and (made.status, made.reason, made.tried) == ("unknown", "stopped after 0.2 s", (made.reason,))
    assert len(made.polynomial) == 495 and not made.verify() and "1 exact, 1 unknown" in out
    assert "0 done, 2 kept" in said(capsys, *slow, "0.2s", "--set", "basis=full")[1]
    out = said(capsys, *slow, "0.3s", "--set", "basis=full", "--again")[1]
    assert "1 done, 1 kept" in out and "1 exact, 1 unknown" in out  # the last row of a key counts


def test_killed_at_any_point_nothing_is_lost(tmp_path):
    """Killed again and again while it writes; each start keeps every whole row, and the end is complete."""
    problems = tmp_path / "p.txt"
    problems.write_text("\n".join(f"x^4 + {i}*x*y + y^4 + {i * i}" for i in range(1, 41)))
    out = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "luthier.cli", "certify", str(problems), "--out", str(out), "--jobs", "2"]
    for enough in (1, 15):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and (out.read_bytes().count(b"\n") if out.exists() else 0) < enough:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = out.read_bytes().splitlines(keepends=True)
    assert after[: len(before)] == before and len(after) == 40
    assert len({json.loads(line)["key"] for line in after}) == 40
    assert f"{40 - len(before)} done, {len(before)} kept" in done.stdout


def test_ctrl_c_is_code_130_and_goes_on(tmp_path):
    problems, out = tmp_path / "p.txt", tmp_path / "r.jsonl"
    long = [f"(x + 2*y + 3*z + {i}*w + 1)^8 + x^8 + 1" for i in range(4, 44)]
    problems.write_text("\n".join(["x^2 + 1", *long]))
    command = [sys.executable, "-m", "luthier.cli", "certify", str(problems), "--out", str(out), "--jobs", "1"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background may be deaf to it
    process = subprocess.Popen(
        [*command, "--set", "basis=full"], start_new_session=True, stderr=subprocess.PIPE, preexec_fn=heard
    )
    while process.poll() is None and not (out.exists() and out.read_bytes().endswith(b"\n")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"run again to go on" in err and err.count(b"\n") <= 2
    assert 1 <= len(out.read_bytes().splitlines()) <= len(long)


def test_verify_reads_what_was_written(home, capsys):
    code, out, _ = said(capsys, "--verify", "r.jsonl")
    assert code == 0 and out == "r.jsonl: 6 no proof, 4 proven\n"
    with (home / "r.jsonl").open("a") as file:
        file.write('{"key": "a line that is being wr')
    assert said(capsys, "--verify", "r.jsonl")[1] == out
    made = said(capsys, "x^2 + y^2", "--json")[1]
    (home / "c.json").write_text(made)
    code, out, _ = said(capsys, "--verify", "c.json")
    assert code == 0 and "1 proven" in out


@pytest.mark.parametrize("change", ["squares", "problem", "point", "garbage"])
def test_verify_refuses(home, capsys, change):
    found = [row for _, row in rows(home / "r.jsonl") if "certificate" in row]
    row = next(r for r in found if r["certificate"]["status"] == ("not_sos" if change == "point" else "exact"))
    if change == "squares":
        row["certificate"]["squares"] = row["certificate"]["squares"][:-1]
    if change == "problem":
        row["problem"] = "x^2 + 2"
    if change == "point":
        row["certificate"]["point"] = ["100"]
    if change == "garbage":
        row["certificate"] = {"status": "exact"}
    (home / "bad.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = said(capsys, "--verify", "bad.jsonl")
    assert code == 1 and "bad.jsonl:1: refused" in out and not err
