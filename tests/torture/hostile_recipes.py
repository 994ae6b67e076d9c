"""Recipes and mergekit files, as YAML that means ill."""

from pathlib import Path

from hostile import case, folder, merge, real, recipe

HEAD = "luthier: 1\n"
CERTIFY = HEAD + "steps:\n  a: {use: sos.certify, problem: x^2}\n"
LAUGHS = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)])  # fmt: skip

case("recipe: whole and good", recipe(CERTIFY))
case("recipe: a BOM first", recipe("\ufeff" + CERTIFY))
case("recipe: DOS line ends", recipe(CERTIFY.replace("\n", "\r\n")))
for what, text, says in (
    ("empty", "", "no recipe yet"), ("a list", "- 1\n", "must be a map"), ("a word", "x", "must be a map"),
    ("billion laughs", HEAD + LAUGHS, "use fewer aliases"),
    ("billion laughs of maps", HEAD + LAUGHS.replace("[", "{p: [").replace("]", "]}"), "use fewer aliases"),
    ("an anchor that holds itself", HEAD + "seed: &x [*x]\n", "r.yaml:2"),
    ("a map that holds itself", HEAD + "steps: &x {a: *x}\n", "r.yaml:2"),
    ("an alias to nothing", HEAD + "seed: *x\n", "r.yaml:2: not YAML"),
    ("a merge key", HEAD + "steps:\n  a: {<<: {use: x}}\n", "r.yaml:3: merge keys"),
    ("a merge of merges", HEAD + "a: &a {<<: {<<: {}}}\n", "merge keys"),
    ("10,000 lists deep", HEAD + "seed: " + "[" * 10_000, "r.yaml"),
    ("10,000 maps deep in blocks", "".join(" " * i + "a:\n" for i in range(1000)), "r.yaml"),
    ("60 lists deep", HEAD + "seed: " + "[" * 60 + "]" * 60, "r.yaml:2: nested deeper than 40"),
    ("two megabytes", "# " + "x" * 2_000_000, "a recipe is a small file"),
    ("a megabyte of brackets", HEAD + "seed: [" + "[]," * 340_000 + "]", "more than 60000"),
    ("a megabyte of keys", HEAD + "".join(f"k{i}: 1\n" for i in range(90_000)), "more than 60000"),
    ("a megabyte of one word", HEAD + "seed: " + "x" * 1_000_000, "a seed is a whole number"),
    ("a megabyte of one name", HEAD + "steps: {" + "x" * 1_000_000 + ": 1}", "r.yaml:2"),
    ("a megabyte of dashes", HEAD + "seed: " + "- " * 500_000, "r.yaml"),
    ("a megabyte of anchors", HEAD + "".join(f"- &a{i}\n" for i in range(100_000)), "more than 60000"),
    ("a megabyte of documents", "---\n" * 250_000, "more than 60000"),
    ("a megabyte of comments", "#\n" * 500_000, "more than 60000"),
    ("a Python object", HEAD + "seed: !!python/object/apply:os.system [touch ran]\n", "r.yaml:2: tag"),
    ("a Python name", HEAD + "seed: !!python/name:os.system\n", "r.yaml:2: tag"),
    ("a tag of its own", HEAD + "seed: !evil {}\n", "r.yaml:2: tag"),
    ("a set", HEAD + "seed: !!set {a}\n", "r.yaml:2: tag"),
    ("binary", HEAD + "seed: !!binary aGVsbG8=\n", "r.yaml:2: tag"),
    ("a word called a whole number", HEAD + "seed: !!int x\n", "r.yaml:2"),
    ("a word called a number", HEAD + "seed: !!float x\n", "r.yaml:2"),
    ("a word called true", HEAD + "seed: !!bool x\n", "r.yaml:2"),
    ("a directive", "%TAG ! tag:evil,2000:\n---\nseed: !x 1\n", "directives are refused"),
    ("a key twice", HEAD + "seed: 1\nseed: 2\n", "r.yaml:3: key 'seed' stands twice"),
    ("a key that is a list", HEAD + "? [a, b]\n: 1\n", "r.yaml:2: a key must be"),
    ("a key that is null", HEAD + "null: 1\n", "r.yaml:2"),
    ("two documents", HEAD + "---\n" + HEAD, "another document"),
    ("tabs", "luthier: 1\n\tseed: 1\n", "r.yaml:2: not YAML"),
    ("19,000 keys", HEAD + "".join(f"k{i}: 1\n" for i in range(19_000)), "unknown recipe key"),
    ("NUL", HEAD + "seed: \0\n", "not YAML"), ("control letters", HEAD + "seed: \x07\x1b[31m\n", "not YAML"),
    ("letters that only look alike", CERTIFY.replace("problem", "рroblem"), "did you mean 'problem'?"),
    ("right to left", HEAD + "seed: \u202e1\n", "a seed is a whole number"),
    ("a whole number of 1000 digits", HEAD + "seed: " + "9" * 1000, "more than 40 digits"),
    ("infinity", HEAD + "seed: .inf\n", "no finite number"), ("NaN", HEAD + "seed: .nan\n", "no finite number"),
    ("1e999", HEAD + "seed: 1e999\n", "no finite number"),
    ("a version that is true", "luthier: true\n", "version True is not known"),
    ("step called ..", HEAD + "steps: {..: {use: sos.certify}}", "cannot be a name"),
    ("step called by a path", HEAD + "steps: {../../x: {use: sos.certify}}", "cannot be a name"),
    ("step called by an absolute path", HEAD + "steps: {/etc/x: {use: sos.certify}}", "cannot be a name"),
    ("step called by a newline", HEAD + 'steps: {"a\\n": {use: sos.certify}}', "cannot be a name"),
    ("a method by a path", HEAD + "steps: {a: {use: ../../evil}}", "unknown method"),
    ("a method that is a module", HEAD + "steps: {a: {use: os.system}}", "unknown method"),
    ("a method that is a list", HEAD + "steps: {a: {use: [sos.certify]}}", "unknown method"),
    ("a method that is a map", HEAD + "steps: {a: {use: {a: b}}}", "unknown method"),
    ("threads by the billion", HEAD + "hardware: {threads: 1000000000000}\n" + CERTIFY[11:], "threads"),
    ("memory of 400 digits", HEAD + f"hardware: {{memory: '{'9' * 400}'}}\n" + CERTIFY[11:], "amount of memory"),
    ("device of 30 digits", HEAD + f"hardware: {{device: 'cuda:{'9' * 30}'}}\n" + CERTIFY[11:], "cuda"),
    ("a grid of a hundred million",
    HEAD + "steps:\n  a:\n    use: sos.certify\n    problem: x^2\n    vary:\n" + "".join(
        f"      set.{n}: [0,1,2,3,4,5,6,7,8,9]\n" for n in "abcdefgh"), "r.yaml:6"),
    ("a model at a home that is not", HEAD + "steps: {a: {use: merge.linear, experts: [~nobody-at-all/x]}}",
    "r.yaml:2"),
    ("a model with NUL", HEAD + 'steps: {a: {use: merge.linear, experts: ["a\\0b"]}}', "r.yaml:2"),
    ("a model of 5000 letters", HEAD + f"steps: {{a: {{use: merge.linear, experts: [{'x' * 5000}]}}}}", "r.yaml:2"),
    ("a folder of 5000 letters", HEAD + f"steps: {{a: {{use: merge.linear, experts: [./{'x' * 5000}]}}}}", "r.yaml:2"),
    ("a source of 5000 letters", HEAD + f"data: {{a: {{source: {'x' * 5000}}}}}\n" + CERTIFY[11:], "r.yaml:2"),
    ("a source with NUL", HEAD + 'data: {a: {source: "text:a\\0b"}}\n' + CERTIFY[11:], "r.yaml:2"),
    ("a source that is a list", HEAD + "data: {a: {source: [x]}}\n" + CERTIFY[11:], "r.yaml:2"),
    ("a glob that is absolute", HEAD + "data: {a: {source: 'text:.', set: {glob: /etc/*}}}\n" + CERTIFY[11:],
    "r.yaml:2"),
    ("a glob that climbs", HEAD + "data: {a: {source: 'text:.', set: {glob: ../../*}}}\n" + CERTIFY[11:], "r.yaml:2"),
    ("a glob that is empty", HEAD + "data: {a: {source: 'text:.', set: {glob: ''}}}\n" + CERTIFY[11:], "r.yaml:2"),
    ("a glob that is none", HEAD + "data: {a: {source: 'text:.', set: {glob: '**x'}}}\n" + CERTIFY[11:], "r.yaml:2"),
):  # fmt: skip
    case(f"recipe: {what}", recipe(text), says)

for what, raw in {
    "UTF-16": CERTIFY.encode("utf-16"),
    "bytes": b"luthier: 1\n\xff\xfe",
    "a picture": bytes(range(256)),
}.items():
    case(f"recipe: {what}", recipe(raw), "r.yaml")

NEW = HEAD + "data: {d: {source: 'text:d.txt', split: {by: window, test: 1}}}\nsteps:\n  a:\n    use: tune.full\n" + (
    "    data: d\n    train: {steps: 1}\n    model: {new: {%s}, tokenizer: {train: d, size: 300}}\n")  # fmt: skip
for what, sizes, says in (
    ("a billion layers", "num_hidden_layers: 1000000000", "num_hidden_layers"),
    ("no layers", "num_hidden_layers: 0", "num_hidden_layers"),
    ("no heads", "num_attention_heads: 0", "num_attention_heads"),
    ("negative width", "hidden_size: -8", "hidden_size"),
    ("width of exabytes", "hidden_size: 1000000000000", "hidden_size"),
    ("a width that overflows", f"hidden_size: {2**62}", "hidden_size"),
    ("terabytes in all", "hidden_size: 65536, intermediate_size: 262144, num_hidden_layers: 200", "needs"),
    ("experts by the billion", "slots: {ffn: {use: block.moe, set: {experts: 1000000000}}}", "needs"),
    ("a slot that is none", "slots: {../x: block.dense}", "unknown slot"),
    ("a slot of 5000 digits", f"slots: {{ffn@{'9' * 900}: block.dense}}", "slot"),
    ("slots that hold themselves", "slots: &s {ffn: *s}", "r.yaml"),
):  # fmt: skip

    def make(here: Path, sizes=sizes):
        (here / "d.txt").write_text("one two three four\n" * 400)
        return recipe(NEW % sizes, "run")(here)

    case(f"new model: {what}", make, says)


def chain(count, ring):
    """Steps that wait for one another, in a line or in a ring."""

    def make(here: Path):
        real(here, "good")
        last = f"s{count - 1}" if ring else "./good"
        steps = [f"  s0: {{use: merge.linear, experts: [{last}]}}"]
        steps += [f"  s{i}: {{use: merge.linear, experts: [s{i - 1}]}}" for i in range(1, count)]
        return recipe(HEAD + "steps:\n" + "\n".join(reversed(steps)))(here)

    return make


VARIED = HEAD + (
    "data: {d: {source: 'text:stdlib'}}\nsteps:\n  a:\n    use: tune.full\n    model: a/b\n    data: d\n")  # fmt: skip


def lattice(levels):
    """Each step takes both of the level below: few steps, but ways through them without end."""

    def make(here: Path):
        folder(here, "good")
        below, steps = "./good, ./good", []
        for i in range(levels):
            steps += [f"  {side}{i}: {{use: merge.linear, experts: [{below}]}}" for side in "ab"]
            below = f"a{i}, b{i}"
        return recipe(HEAD + "steps:\n" + "\n".join(steps), "run")(here)

    return make


case("recipe: a lattice of 60 steps", lattice(30), cpu=20)
case("recipe: a ring of 3 steps", chain(3, True), "wait for each other")
case("recipe: a ring of 1500 steps", chain(1500, True), "wait for each other")
case("recipe: a line of 1500 steps", chain(1500, False), cpu=20)
case("recipe: called ...yaml", recipe(CERTIFY, "run", "...yaml"))
case("recipe: a name that is too long", lambda here: ["plan", "x" * 5000], "unknown recipe")
case("recipe: a folder", lambda here: ((here / "r").mkdir(), ["plan", "r"])[-1], "a folder without a recipe")
case("recipe: a device", lambda here: ["plan", "/dev/zero"], "unknown recipe")
case("recipe: values that become one name", recipe(
    VARIED + "    train: {steps: 1}\n    vary: {train.draws: ['a/b', 'a:b']}\n"), "r.yaml:9")  # fmt: skip
case("recipe: a value of 5000 letters that varies", recipe(
    VARIED + f"    train: {{steps: 1}}\n    vary: {{train.draws: ['{'x' * 5000}', y]}}\n"), "r.yaml:9")  # fmt: skip
for what, text, says in (
    ("nothing", "", "expected KEY=VALUE"),
    ("a bomb", "a.problem=" + "[" * 5000, "nested"),
    ("a path", "../../x=1", "unknown step"),
    ("a Python object", "a.problem=!!python/name:os.system", "tag"),
    ("a key of dots", "." * 5000 + "=1", "unknown step"),
):
    case(f"set: {what}", lambda here, text=text: [*recipe(CERTIFY)(here), "--set", text], says)

KIT = "merge_method: linear\nmodels:\n  - {model: ./good, parameters: {weight: 1}}\n"
ENDLESS = """merge_method: linear
slices:
  - sources:
      - {model: ./good, layer_range: [0, 999999999], parameters: {weight: 1}}
"""
for what, text, says in (
    ("another method", KIT.replace("linear", "evil"), "m.yaml:1: unknown merge_method 'evil'"),
    ("a method that is a list", KIT.replace("linear", "[linear]"), "m.yaml:1: unknown merge_method"),
    ("models a word", "merge_method: linear\nmodels: x\n", "m.yaml:2: expected a list"),
    ("a model that is a map", "merge_method: linear\nmodels: [{model: {model: 3}}]\n", "m.yaml:2: expected the name"),
    ("a model by a list", "merge_method: linear\nmodels: [[x]]\n", "m.yaml:2: expected a map"),
    ("a weight that is a word", KIT.replace("weight: 1", "weight: x"), "m.yaml:3: expected a number"),
    ("no weight", KIT.replace("{weight: 1}", "{}"), "m.yaml:3: 'weight' is not given"),
    ("a weight of NaN", KIT.replace("weight: 1", "weight: .nan"), "m.yaml:3: .nan is no finite number"),
    ("weights that overflow", KIT.replace("weight: 1", "weight: 1.0e+300"), "m.yaml:3: 1e+300 is too large for fp32"),
    ("billion laughs", "merge_method: linear\n" + LAUGHS, "use fewer aliases"),
    ("a Python object", KIT + "dtype: !!python/name:os.system\n", "m.yaml:4: tag"),
    ("dtype a list", KIT + "dtype: [float32]\n", "m.yaml:4: unknown dtype"),
    ("slices beside models", KIT + "slices: []\n", "give models or slices, one of them"),
    ("layers without end", ENDLESS, "m.yaml:4: there are no layers [0, 999999999]"),
    ("modules", KIT + "modules: {}\n", "m.yaml:4: 'modules' is not taken over"),
    ("parameters a list", KIT + "parameters: [1]\n", "m.yaml:4: expected a map"),
    ("a filter of stars", KIT.replace("weight: 1", f"weight: [{{filter: '{'*a' * 200}', value: 1}}]"), "m.yaml:3"),
    ("a base that is a number", KIT + "base_model: 3\n", "m.yaml:4: expected the name"),
    ("a model that leads out with a plus", KIT.replace("./good", "a+../../x"), "m.yaml:3: unknown model or step 'a'"),
    ("a model that is nowhere", KIT.replace("./good", "../../../nowhere/x"), "no such folder"),
):
    case(f"mergekit: {what}", lambda here,
        text=text: (folder(here, "good", data=b"\0\0\x80?" * 8), merge(here, text))[-1],
         says)  # fmt: skip
case("mergekit: whole and good", lambda here: (folder(here, "good"), merge(here, KIT))[-1])
