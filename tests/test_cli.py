"""The command line: light where it must be, one line for every error, exit codes that mean something."""

import json
import shutil
import subprocess
import sys

import pytest

from luthier import catalogue
from luthier.checkpoint.reader import Checkpoint
from luthier.cli import VERBS, main
from luthier.testing import tiny

LINES = "".join(f"the {i} quick brown foxes jump over {7 * i} lazy dogs\n" for i in range(120))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    base = tiny.checkpoint(folder / "base")
    tiny.expert_of(base, 1, folder / "one")
    (folder / "book.txt").write_text(LINES)
    (folder / "r.yaml").write_text(
        "luthier: 1\n"
        f"data: {{book: {{source: 'text:{folder}/book.txt', split: {{by: window, test: 0.3}}, set: {{chars: 100}}}}}}\n"
        "steps:\n"
        f"  a: {{use: tune.full, model: {base}, data: book, train: {{steps: 2, batch: 2, max_length: 32}}}}\n"
        f"  t: {{use: eval.compare, models: [{base}, a], data: book, set: {{resamples: 100}}}}\n"
    )
    (folder / "tune.yaml").write_text(
        f"luthier: 1\ndata: {{book: {{source: 'text:{folder}/book.txt'}}}}\n"
        f"steps:\n  a: {{use: tune.full, model: {base}, data: book, train: {{steps: 2}}}}\n"
    )
    (folder / "empty.yaml").write_text("# nothing yet\n")
    (folder / "merge.yaml").write_text(
        f"luthier: 1\nsteps:\n  m: {{use: merge.linear, experts: [{base}, {folder}/one]}}\n"
    )
    (folder / "mergekit.yaml").write_text(
        f"merge_method: linear\nmodels:\n  - model: {base}\n    parameters: {{weight: 1}}\n"
        f"  - model: {folder}/one\n    parameters: {{weight: 2}}\ndtype: float32\n"
    )
    return folder


def said(capsys, *words):
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("words", [["list"], ["show", "merge.ties"], ["plan", "--help"], ["run", "--help"],
                                   ["certify", "--help"], ["--help"]])  # fmt: skip
def test_light_commands_import_nothing_heavy(words):
    code = (
        "import sys\nfrom luthier.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'ruamel.yaml', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_list_names_every_method(capsys):
    code, out, _ = said(capsys, "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(catalogue.cards())


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["--stage", "merge"], {"merge.linear", "merge.task_arithmetic", "merge.ties"}),
        (["--shape", "optim"], {"optim.adamw"}),
        (["elect", "sign"], {"merge.ties"}),
        (["2306.01708"], {"merge.ties"}),
        (["--stage", "merge", "task"], {"merge.task_arithmetic"}),
    ],
)
def test_list_filters(capsys, words, ids):
    _, out, _ = said(capsys, "list", *words)
    assert {line.split()[0] for line in out.splitlines()} >= ids
    assert all(line.split()[0].startswith(tuple({i.split(".")[0] for i in ids})) for line in out.splitlines())
    _, out, _ = said(capsys, "list", *words, "--json")
    assert {card["id"] for card in json.loads(out)} >= ids


def test_show_tells_what_the_card_holds(capsys):
    code, out, _ = said(capsys, "show", "merge.ties")
    assert code == 0
    for word in (
        "arXiv 2306.01708",
        "density: Unit = 0.2",
        "base, experts (a list)",
        "merge.task_arithmetic at",
        "mergekit",
    ):
        assert word in " ".join(out.split())
    _, out, _ = said(capsys, "show", "merge.ties", "--json")
    assert json.loads(out)["id"] == "merge.ties"


def test_show_knows_recipes_by_name(capsys):
    code, out, err = said(capsys, "show", "quickstart")
    assert (code, out) == (2, "")
    assert "quickstart is a recipe, no method; luthier plan quickstart, or read " in err


def test_every_method_can_be_shown(capsys):
    for id_ in catalogue.cards():
        code, out, _ = said(capsys, "show", id_)
        assert code == 0 and id_ in out


@pytest.mark.parametrize("id_", catalogue.cards())
def test_what_is_shown_of_a_method_works(capsys, monkeypatch, id_):
    """The recipe is one, once its dots are filled; the line of Python runs; both are the method as it comes."""
    from luthier import recipe, recipe_text
    from luthier.testing.variants import default_of

    lines = said(capsys, "show", id_)[1].splitlines()
    shown = next(line for line in lines if line.startswith("Recipe ")).removeprefix("Recipe").strip()
    roles = {"model: ...": "model: smollm2", "base: ...": "base: smollm2", "problem: ...": "problem: x^2",
             "models: [...]": "models: [smollm2]", "experts: [...]": "experts: [smollm2]", "data: [...]": "data: [d]",
             "prompts: [...]": "prompts: [hello]"}  # fmt: skip
    for dots, name in roles.items():
        shown = shown.replace(dots, name)
    text = f"luthier: 1\ndata: {{d: {{source: 'text:stdlib'}}}}\nsteps:\n  {shown}\n"
    step = recipe.parse(recipe_text.parse(text), "shown").steps["NAME"]
    new = step.roles.get("model")
    parts = [slot["use"] for slot in new["new"]["slots"].values()] if hasattr(new, "keys") else []
    assert id_ in parts or default_of(id_) in step.methods()
    python = next(line for line in lines if line.startswith("Python ")).removeprefix("Python").strip()
    imported, made = python.split("; ")
    names: dict = {}
    exec(imported, names)
    assert eval(made, names) == default_of(id_)


def test_a_verdict_is_shown_from_anywhere(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "verdicts.json").write_text('["of something else"]')
    assert "Verdict    fails: " in said(capsys, "show", "merge.ties")[1]
    monkeypatch.setattr("luthier.cli_show.__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert "Verdict" not in said(capsys, "show", "merge.ties")[1]


WRONG = [
    (["lst"], "unknown command 'lst'; did you mean 'list'?"),
    (["--verison"], "did you mean '--version'?"),
    (["list", "--jsn"], "did you mean '--json'?"),
    (["list", "--stage", "tun"], "did you mean 'tune'?"),
    (["list", "--shape", "Tunes"], "did you mean 'Tune'?"),
    (["list", "zebra"], "no method matches 'zebra'; luthier list shows all"),
    (["list", "decoed"], "did you mean 'decode'?"),
    (["list", "--stage", "merge", "--shape", "Tune"], "no method matches --stage merge --shape Tune"),
    (["show"], "required: id"),
    (["show", "ties"], "did you mean 'merge.ties'?"),
    (["show", "merge.ties", "extra"], "unexpected 'extra'"),
    (["plan"], "required: recipe"),
    (["plan", "quickstrt"], "did you mean 'quickstart'?"),
    (["run", "r.yaml", "--st", "a.steps=1"], "did you mean '--set'?"),
    (["run", "r.yaml", "--set", "a.stps=1"], "did you mean 'steps'?"),
    (["run", "r.yaml", "--set", "b.steps=1"], "unknown step 'b'"),
    (["run", "r.yaml", "--set"], "expected one argument"),
    (["report", "nothing"], "unknown run 'nothing'"),
    (["merge", "merge.yaml"], "required: out"),
    (["merge", "merg.yaml", "out"], "unknown recipe 'merg.yaml'; did you mean 'merge.yaml'?"),
    (["merge", "r.yaml", "out"], "r.yaml: holds 2 steps, and merge does one; run it whole: luthier run r.yaml"),
    (["merge", "tune.yaml", "out"], "tune.yaml: holds no merge; run it whole: luthier run tune.yaml"),
    (["run", "empty.yaml"], "empty.yaml:1: this is no recipe yet"),
    (["run", "r.yaml", "--set", "hardware.device=cuda:7"], "--set hardware.device=cuda:7: there is no cuda:7 here"),
    (["eval", "base", "--data", "book.txt", "--device", "cuda:7"], "there is no cuda:7 here; use auto or cpu"),
    (["run", "base"], "base: is a folder without a recipe.yaml"),
    (["run", "book.txt"], "book.txt:1: the recipe must be a map, got 'the 0 quick brown foxes jump over 0"),
    (["merge", "merge.yaml", "out", "--set", "m.weigts=[1, 2]"], "did you mean 'weights'?"),
    (["eval", "base"], "required: --data"),
    (["eval", "bse", "--data", "book.txt"], "did you mean 'base'?"),
    (["eval", "base", "--data", "bok.txt"], "did you mean 'book.txt'?"),
    (["eval", "base", "--data", "gum:countdown"], "did you mean 'gym'?"),
    (["eval", "base", "--data", "book.txt", "--items", "0"], "whole number from 1"),
    (["eval", "base", "--data", "book.txt", "--use", "eval.perplexty"], "did you mean 'eval.perplexity'?"),
    (["eval", "base", "--data", "book.txt", "--set", "levl=0.9"], "did you mean 'level'?"),
    (["eval", "base", "--data", "book.txt", "--dtype", "fp23"], "did you mean 'fp32'?"),
    (["compare", "base", "--data", "book.txt"], "two models or more"),
    (["compare", "base", "one", "--data", "book.txt", "--paired-to", "onee"], "did you mean 'one'?"),
    (["generate", "base"], "required: prompts"),
    (["generate", "bse", "hello"], "did you mean 'base'?"),
    (["generate", "base", "hello", "--set", "temprature=1"], "did you mean 'temperature'?"),
    (["generate", "base", "hello", "--set", "temperature=-1"], "-1.0 is out of range"),
    (["generate", "base", "hello", "--use", "eval.compare"], "is of shape Measure, not Decode"),
    (["chat", "base", "--device", "gpu"], "unknown device 'gpu'"),
    (["test", "merge.tie"], "did you mean 'merge.ties'?"),
    (["certify"], "name a polynomial, a file of them, or --verify a file"),
    (["certify", "x +"], "column 4: the polynomial ends too soon"),
    (["certify", "-x^2+1"], "unknown option '-x^2+1'; put -- before a word that begins with a minus"),
    (["certify", "x", "--nonneg", "y", "--nonneg", "1^^"], "nonneg 2: column 3"),
    (["certify", "x", "--where", "x > 0"], "--where x > 0: column 3: '>' has no meaning in a constraint; write >="),
    (["certify", "x", "--timeout", "soon"], "--timeout: 'soon' is no time; write 30s, 5m or 1h"),
    (["certify", "x", "--timeout", "0"], "'0' is no time"),
    (["certify", "x", "--set", "bit=3"], "unknown field 'bit'; did you mean 'bits'?"),
    (["certify", "x", "--set", "bits"], "expected FIELD=VALUE"),
    (["certify", "x", "--use", "merge.ties"], "--use: merge.ties is no Certify"),
    (["certify", "x", "--use", "sos.certfy"], "did you mean 'sos.certify'?"),
    (["certify", "x", "--json", "--lean"], "not allowed with argument"),
    (["certify", "x", "--jobs", "2"], "--jobs: is for a file of problems"),
    (["certify", "none.txt", "--out", "r.jsonl"], "none.txt: no such file"),
    (["certify", "book.txt"], "name a file for the results; add --out"),
    (["certify", "book.txt", "--out", "book.txt"], "the results would go into the problems"),
    (["certify", "book.txt", "--out", "no/r.jsonl"], "no/r.jsonl: cannot be written (No such file or directory)"),
    (["certify", "book.txt", "--out", "r.jsonl", "--zero", "x"], "--zero: is for one polynomial"),
    (["certify", "book.txt", "--out", "r.jsonl", "--jobs", "0"], "--jobs: expected a whole number from 1"),
    (["certify", "--verify", "none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
    (["certify", "--verify", "book.txt"], "book.txt:1: is no result of luthier certify"),
    (["certify", "x", "--verify", "book.txt"], "--verify: takes no problem"),
    (["reproduce"], "name a method, or --all"),
    (["reproduce", "--all", "--budget", "soon"], "--budget: 'soon' is no time; write 90s, 60m or 2h"),
    (["reproduce", "merge.tie"], "unknown claim 'merge.tie'"),
]


@pytest.mark.parametrize(("words", "says"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_wrong_command_lines_get_one_line_and_code_2(home, monkeypatch, capsys, words, says):
    monkeypatch.chdir(home)
    code, out, err = said(capsys, *words)
    assert code == 2
    assert err.startswith("luthier: ") and err.count("\n") == 1 and len(err) < 900
    assert says in err
    assert out == "" and "Traceback" not in err
    assert not (home / "out").exists()


def test_debug_gives_the_traceback(capsys):
    from luthier.errors import LuthierError

    with pytest.raises(LuthierError):
        main(["--debug", "show", "ties"])


def test_plan_runs_nothing_and_says_what_it_takes(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    code, out, _ = said(capsys, "plan", "r.yaml")
    assert code == 0
    for word in ("tune.full", "33.2k", "leaked test items 0", "of disk"):
        assert word in out
    assert not list(home.glob("runs/*/steps"))
    code, out, _ = said(capsys, "plan", "r.yaml", "--json", "--set", "a.steps=3")
    plan = json.loads(out)
    assert [s["name"] for s in plan["steps"]] == ["a", "t"] and plan["leaked"] == 0


@pytest.mark.parametrize("name", ["out.gguf", "OUT.GGUF", "model.safetensors"])
def test_a_merge_writes_folders(home, monkeypatch, capsys, name):
    monkeypatch.chdir(home)
    code, _, err = said(capsys, "merge", "merge.yaml", name)
    assert code == 2 and f"{name}: a merge writes a folder, not a file; name a folder" in err
    assert ("luthier export makes a GGUF of it" in err) == name.lower().endswith("gguf")
    assert not (home / name).exists()


@pytest.mark.parametrize(("config", "status"), [("r.yaml", ""), ("r.yaml", "failed"), ("mergekit.yaml", "")])
def test_plan_reads_headers_only(home, tmp_path, monkeypatch, capsys, config, status):
    """A hash of contents would read every weight; of steps that are not done there is nothing to compare it with."""
    monkeypatch.chdir(home)
    for what in ("_content_hash", "read_flat"):
        monkeypatch.setattr(Checkpoint, what, lambda *_: pytest.fail("it read weights"))
    if status:
        for step in ("a", "t"):
            (tmp_path / "steps" / step).mkdir(parents=True)
            record = {"hash": "h", "seed": 0, "use": "merge.linear", "step": step, "status": status}
            (tmp_path / "steps" / step / "record.json").write_text(json.dumps(record))
    code, out, err = said(capsys, "plan", config, "--folder", str(tmp_path))
    assert code == 0 and "about" in out, err


def test_plan_hashes_what_is_done(home, tmp_path, monkeypatch, capsys):
    """The other side of it: a finished step stands only if its inputs are the same."""
    monkeypatch.chdir(home)
    assert said(capsys, "run", "merge.yaml", "--folder", str(tmp_path), "--no-report")[0] == 0
    plans = [json.loads(said(capsys, "plan", "merge.yaml", "--folder", str(tmp_path), "--json", *more)[1])
             for more in ((), ("--set", "m.weights=[3, 1]"))]  # fmt: skip
    assert [plan["steps"][0]["done"] for plan in plans] == [True, False]


def test_plan_asks_the_disk_that_is_written_to(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    usage = shutil.disk_usage(home)
    full = tmp_path / "full"
    full.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=0 if full in (p, *p.parents) else 1 << 60))
    assert said(capsys, "plan", "merge.yaml")[0] == 0
    code, out, _ = said(capsys, "plan", "merge.yaml", "--folder", str(full / "yet" / "to-be"))
    assert code == 2 and "of disk, 0.0 are free; free some, or give another folder" in out


def test_plan_says_when_memory_is_short(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for free, short in ((1 << 60, False), (1000, True), (None, False)):
        monkeypatch.setattr("luthier.recipe_plan.free_memory", lambda free=free: free)
        assert ("may not fit" in said(capsys, "plan", "r.yaml")[1]) is short


def test_plan_says_what_cannot_work(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    code, out, _ = said(capsys, "plan", "r.yaml", "--set", "data.book.split.train=0")
    assert code == 2 and "cannot work: r.yaml:4 (step a): data 'book' has no training items" in out


def test_run_plans_runs_and_reports(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    code, out, _ = said(capsys, "run", "r.yaml")
    assert code == 0
    words = ("Plan", "a: tune.full", "✓ a", "✓ t", "Results", "book has no scored answers", "Report: ", "Next:")
    places = [out.index(word) for word in words]
    assert places == sorted(places)
    assert out.split("Next:")[1].count("  luthier ") == 2
    assert (home / "runs" / "r" / "report.html").exists()
    assert (home / "runs" / "r" / "steps" / "a" / "config.json").exists()
    code, out, _ = said(capsys, "run", "runs/r", "--no-report")
    assert code == 0 and out.count("done before, kept") == 2
    code, out, _ = said(capsys, "report", "r")
    assert out.strip().endswith("report.html")
    shutil.rmtree(home / "runs" / "r" / "steps" / "t")  # as a stopped --fresh leaves it
    code, out, err = said(capsys, "report", "r", "--markdown")
    assert code == 0, err


def test_merge_writes_a_model(home, tmp_path, capsys):
    code, out, err = said(capsys, "merge", str(home / "merge.yaml"), str(tmp_path / "out"), "--set", "m.weights=[3, 1]")
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "weights" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("config", ["merge.yaml", "mergekit.yaml"])
def test_merge_hashes_nothing(home, tmp_path, monkeypatch, capsys, config):
    """It keeps no record, so there is nothing to compare a hash with."""
    monkeypatch.setattr(Checkpoint, "_content_hash", lambda _: pytest.fail("it read every weight once more"))
    assert said(capsys, "merge", str(home / config), str(tmp_path / "out"))[0] == 0


def test_eval_and_compare_give_numbers(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    code, out, err = said(capsys, "eval", "base", "one", "--data", "book.txt", "--items", "5", "--json",
                          "--use", "eval.perplexity")  # fmt: skip
    rows = json.loads(out)
    assert code == 0 and {r["model"] for r in rows} == {"base", "one"} and all(r["value"] > 0 for r in rows)
    code, out, _ = said(capsys, "compare", "base", "one", "--data", "book.txt", "--items", "5", "--json")
    row = next(r for r in json.loads(out) if r["model"] == "one")
    assert row["against"] == "base" and row["low"] <= row["diff"] <= row["high"]
    code, out, _ = said(capsys, "compare", "base", "one", "--data", "book.txt", "--items", "5")
    assert code == 0 and "diff" in out


def test_generate_is_seeded_and_stops(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = ["generate", "base", "the fox", "dogs", "--json", "--set", "max_new_tokens=6", "--set", "temperature=1"]
    first, again, other = (said(capsys, *words, "--seed", seed)[1] for seed in ("0", "0", "1"))
    assert first == again != other
    rows = [json.loads(line) for line in first.splitlines()]
    assert [r["prompt"] for r in rows] == ["the fox", "dogs"] and all(len(r["tokens"]) <= 6 for r in rows)


def test_generate_reads_prompts_from_standard_input(home, monkeypatch, capsys):
    import io

    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    code, out, _ = said(capsys, "generate", "base", "-", "--json", "--set", "max_new_tokens=2")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["one", "two"]


def test_chat_answers_until_an_empty_line(home, monkeypatch, capsys):
    answers = iter(["hello", "and now?", ""])
    monkeypatch.chdir(home)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    code, out, err = said(capsys, "chat", "base", "--set", "max_new_tokens=3")
    assert code == 0, err
    assert next(answers, None) is None


def test_a_conversation_too_long_for_the_model_says_so(home, monkeypatch, capsys):
    answers = iter(["hello", "hello " * 300])
    monkeypatch.chdir(home)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    code, _, err = said(capsys, "chat", "base", "--set", "max_new_tokens=3")
    assert code == 2 and "tokens, the model's context 256; begin a new one" in err


def test_every_command_has_help_and_options_with_words():
    for verb in VERBS:
        done = subprocess.run([sys.executable, "-m", "luthier", verb, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"usage: luthier {verb}" in done.stdout


MERGEKIT = """merge_method: ties
base_model: base
models:
  - model: one
    parameters: {density: 0.5, weight: 0.5}
dtype: bfloat16
"""


def test_merge_as_a_process(home, tmp_path):
    """It leaves without taking torch down: what it says and its exit code arrive all the same, also in a pipe."""
    (home / "mk.yaml").write_text(MERGEKIT)
    for words, code in ((["mk.yaml", tmp_path / "out"], 0), (["mk.yml", tmp_path / "no"], 2)):
        command = [sys.executable, "-m", "luthier", "merge", *map(str, words)]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stdout == (f"{words[1]}\n" if code == 0 else "")
        assert (done.stderr == "") == (code == 0)


def test_merge_reads_mergekit_files(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (tmp_path / "mk.yaml").write_text(MERGEKIT)
    code, _, err = said(capsys, "merge", str(tmp_path / "mk.yaml"), str(tmp_path / "out"))
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    (tmp_path / "mk.yaml").write_text(MERGEKIT.replace("density", "densty"))
    code, _, err = said(capsys, "merge", str(tmp_path / "mk.yaml"), str(tmp_path / "no"))
    assert code == 2 and "mk.yaml:5" in err and "did you mean 'density'?" in err
    code, _, err = said(capsys, "run", str(tmp_path / "mk.yaml"))
    assert code == 2 and "use luthier merge" in err


def test_test_and_reproduce(tmp_path, capsys):
    code, out, _ = said(capsys, "test", "norm.rms")
    assert code == 0 and "norm.rms: " in out.splitlines()[-1] and "FAILED" not in out


def test_ctrl_c_ends_with_one_line_and_code_130(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.cli_show.do_list", stop)
    code, _, err = said(capsys, "list")
    assert code == 130 and err.strip() == "luthier: stopped; run again to go on"


def test_a_fault_of_ours_is_one_line_and_code_1(monkeypatch, capsys):
    def break_(args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("luthier.cli_show.do_list", break_)
    code, _, err = said(capsys, "list")
    assert code == 1 and err == "luthier: RuntimeError: two lines; --debug shows where it came from\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize(("by", "ignored", "code"), [
    ("SIGTERM", "", 130), ("SIGHUP", "", 130), ("SIGINT", "", 130), ("SIGTERM", "SIGINT", 130),
    ("SIGHUP", "SIGINT", 130), ("SIGINT", "SIGINT", 7), ("SIGHUP", "SIGHUP", 7), ("SIGTERM", "SIGHUP", 130),
])  # fmt: skip
def test_schedulers_stop_it_as_a_user_does(by, ignored, code):
    """What a folder holds half written is removed on the way out; a signal that is ignored, as by nohup, stays so, and
    who is deaf to Ctrl-C hears the others."""
    script = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
if "{ignored}":
    signal.signal(getattr(signal, "{ignored}" or "SIGINT"), signal.SIG_IGN)
from luthier import cli
def work(words):
    try:
        os.kill(os.getpid(), signal.{by})
        time.sleep({20 if code == 130 else 1})
    finally:
        print("cleaned up")
    return 7
cli._verb, sys.argv = work, ["luthier", "list"]
cli.command()
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (made.stdout, made.returncode) == ("cleaned up\n", code)
    assert ("stopped; run again to go on" in made.stderr) is (code == 130)


@pytest.mark.skipif(sys.platform == "win32", reason="the shell is that of POSIX")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_who_closes_its_outputs_gets_its_work_all_the_same(closed, home, tmp_path):
    shell = f'cd "$1" && exec "$2" -m luthier merge merge.yaml "$3" {closed}'
    made = subprocess.run(["sh", "-c", shell, "sh", str(home), sys.executable, str(tmp_path / "out")])
    assert made.returncode == 0 and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="containers are those of Linux")
@pytest.mark.parametrize(("files", "left"), [
    ({"max": "5000000", "current": "4000000", "stat": "anon 1\ninactive_file 300000\n"}, 1300000),
    ({"max": "10", "current": "40", "stat": "inactive_file 0"}, 0),
    ({"max": "max", "current": "40", "stat": "inactive_file 0"}, None), ({"max": "10"}, None),
    ({"max": "ten", "current": "1", "stat": "inactive_file 0"}, None),
])  # fmt: skip
def test_a_container_has_no_more_memory_than_is_left_to_it(files, left, tmp_path, monkeypatch):
    from luthier.engine import room

    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    free = room.free_memory()
    assert free == left if left is not None else free > 1 << 20
