"""Configurations, pickles, tokenizers and data: what is given to a model that is to be run."""

import io
import json
import os
import zipfile
from pathlib import Path

from hostile import CONFIG, case, folder, merge, merged, real

GENERATE = ["generate", "./bad", "one", "--raw", "--set", "max_new_tokens=1"]


def configured(change, command=GENERATE):
    """A whole model whose config.json says something else."""

    def make(here: Path):
        path = real(here) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return command

    return make


def file(name, content, command=GENERATE):
    """A whole model in which one file is another."""

    def make(here: Path):
        (real(here) / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return command

    return make


case("model: whole and good", configured({}))
for what, text, says in (
    ("empty", "", "not valid JSON"), ("a list", "[]", "JSON map"), ("a word", '"llama"', "JSON map"),
    ("cut", '{"model_type": "llama"', "not valid JSON"), ("no type", "{}", "names no model_type"),
    ("a number for the type", '{"model_type": 3}', "names no model_type"),
    ("a key twice", '{"model_type": "llama", "model_type": "gpt2"}', "occurs twice"),
    ("deep nesting", '{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "not valid JSON"),
    ("9 MB", '{"a": "' + "x" * 9_000_000 + '"}', "too many for a JSON file"),
    ("a number of 5000 digits", '{"model_type": "llama", "a": ' + "9" * 5000 + "}", "not valid JSON"),
    ("infinity", '{"model_type": "llama", "a": Infinity}', "not valid JSON"),
):  # fmt: skip
    case(f"config: {what}", merged(config=text), "config.json", says)

for what, change, says in (
    ("a billion layers", {"num_hidden_layers": 10**9}, "layer 2 of 1000000000 has no tensors"),
    ("no layers", {"num_hidden_layers": 0}, "bad"),
    ("negative layers", {"num_hidden_layers": -3}, "bad"),
    ("layers by a word", {"num_hidden_layers": "two"}, "bad"),
    ("layers by a list", {"num_hidden_layers": [2]}, "bad"),
    ("width of terabytes", {"hidden_size": 10**9}, "config.json says"),
    ("inner width of terabytes", {"intermediate_size": 10**9}, "bad"),
    ("heads by the billion", {"num_attention_heads": 10**9}, "bad"),
    ("no heads", {"num_attention_heads": 0}, "bad"),
    ("vocabulary of terabytes", {"vocab_size": 10**12}, "config.json says"),
    ("negative vocabulary", {"vocab_size": -1}, "config.json says"),
    ("unknown family", {"model_type": "nosuchfamily"}, "nosuchfamily"),
    ("a family that is no decoder", {"model_type": "t5"}, "bad"),
    ("another family", {"model_type": "gpt2"}, "bad"),
    ("experts by the billion", {"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts"),
    ("layers by the billion of an unknown family", {"model_type": "opt", "num_hidden_layers": 10**9}, "layers"),
    ("dtype that is none", {"dtype": "float17"}, "bad"),
    ("activation that is none", {"hidden_act": "__import__('os').system('true')"}, "bad"),
    ("rope of words", {"rope_parameters": {"rope_type": "x", "rope_theta": "y"}}, "bad"),
    ("our family with a billion layers", {"model_type": "luthier", "num_hidden_layers": 10**9}, "has no tensors"),
):
    case(f"config: {what}", configured(change), says)
case("config: asks for remote code", configured({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))


def remote(here: Path):
    """The code it asks for lies beside it, and would write a file."""
    (real(here) / "evil.py").write_text("import pathlib\npathlib.Path('ran').write_text('')\nclass Evil: pass\n")
    path = here / "bad" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}))  # fmt: skip
    return GENERATE


case("config: remote code beside it, unknown family", remote, "custom code")


class Bomb:
    def __reduce__(self):
        return Path("ran").write_text, ("it ran",)


def pickled(name, zipped=False):
    def make(here: Path):
        import torch

        folder(here, "good")
        bad = folder(here, "bad", False)
        if zipped:
            held = io.BytesIO()
            with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as bomb:
                bomb.writestr("archive/data.pkl", bytes(50_000_000))
            (bad / name).write_bytes(held.getvalue())
        else:
            torch.save({"a": Bomb()}, bad / name)
        return merge(here)

    return make


for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"):
    case(f"pickle: {name}", pickled(name), "is a pickle", "refused")
case("pickle: zip bomb", pickled("pytorch_model.bin", zipped=True), "is a pickle", "refused")


def named_pickle(here: Path):
    import torch

    torch.save({"a": Bomb()}, here / "bad.pt")
    return ["generate", "./bad.pt", "one"]


def disguised(here: Path):
    """A pickle called safetensors."""
    import torch

    folder(here, "good")
    torch.save({"a": Bomb()}, folder(here, "bad", False) / "model.safetensors")
    return merge(here)


case("pickle: as the model itself", named_pickle, "is a pickle", "refused")
case("pickle: called safetensors", disguised, "model.safetensors", "header")

for what, text in {
    "empty": "", "a list": "[]", "a word": '"x"', "numbers": '{"model": 3}', "no model": '{"version": "1.0"}',
    "deep": "[" * 100_000 + "]" * 100_000, "unknown kind": '{"model": {"type": "Evil"}}', "bytes": b"\xff\xfe\0\0",
    "merges of words that are not there": '{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
    '"post_processor":null,"decoder":null,"model":{"type":"BPE","vocab":{"a":0},"merges":[["x","y"]]}}',
    "20 MB": '{"a": "' + "x" * 20_000_000 + '"}',
}.items():  # fmt: skip
    case(f"tokenizer: {what}", file("tokenizer.json", text), "bad", "tokenizer")
case("tokenizer: its settings a list", file("tokenizer_config.json", "[]"), "bad", "tokenizer")
case("tokenizer: its settings cut", file("tokenizer_config.json", "{"), "bad", "tokenizer")
case("tokenizer: class that is none", file("tokenizer_config.json", '{"tokenizer_class": "os.system"}'))
case("tokenizer: template that is broken", file("chat_template.jinja", "{% for %}", GENERATE[:3]), "template")
case("tokenizer: template that reaches for the system",
     file("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}", GENERATE[:3]),
         "template")  # fmt: skip
case("tokenizer: template that fills the memory", file("chat_template.jinja", "{{ 'x' * 10**10 }}", GENERATE[:3]),
     "memory ran out")  # fmt: skip
case("generation config: words for numbers", file("generation_config.json", '{"eos_token_id": "x", "top_k": []}'))
case("generation config: a list", file("generation_config.json", "[]"), "bad")


def data(content, kind="jsonl", *extra):
    """A file of data given to a measure."""

    def make(here: Path):
        real(here)
        (here / "d.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["eval", "./bad", "--data", f"{kind}:d.jsonl", "--use", "eval.perplexity", *extra]

    return make


GOOD = '{"text": "one two three"}\n{"prompt": "a", "answer": "b"}\n'
case("data: whole and good", data(GOOD))
case("data: empty", data(""), "too little")
for what, line, says in (
    ("not JSON", "{", "d.jsonl:3: not JSON"), ("a list", "[1]", "expected a JSON object"),
    ("a word", '"x"', "expected a JSON object"), ("no known key", '{"txt": "x"}', "unknown kind of line"),
    ("text a number", '{"text": 3}', "text is not a string"),
    ("answer a map", '{"prompt": "x", "answer": {}}', "answer"),
    ("messages a word", '{"messages": "x"}', "messages"), ("messages empty", '{"messages": []}', "messages"),
    ("a turn without content", '{"messages": [{"role": "user"}]}', "messages"),
    ("lists 100,000 deep", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "d.jsonl:3: not JSON"),
    ("a number of 5000 digits", '{"text": "x", "n": ' + "9" * 5000 + "}", "d.jsonl:3: not JSON"),
    ("lone surrogate", '{"text": "\\ud800"}', "d.jsonl:3"),
    ("text of two million letters that is not JSON", "x" * 2_000_000, "d.jsonl:3: not JSON"),
):  # fmt: skip
    case(f"data: {what}", data(GOOD + line + "\n"), says)
case("data: broken UTF-8", data(GOOD.encode() + b'{"text": "\xff\xfe"}\n'), "not UTF-8 at byte")
case("data: NUL", data(GOOD.encode() + b"\0\0\n"), "d.jsonl:3: not JSON")
case("data: a text of a megabyte", data(GOOD + json.dumps({"text": "word " * 200_000}) + "\n"), memory=1500, cpu=20)
case("data: empty texts", data(GOOD + '{"text": ""}\n{"prompt": "", "answer": ""}\n'))
case("data: line and paragraph separators inside a text", data('{"text": "one\u2028two\x85three"}\n' + GOOD))
case("data: a BOM first", data("\ufeff" + GOOD))


def source(word, says, before=lambda here: None):
    def make(here: Path):
        real(here)
        before(here)
        return ["eval", "./bad", "--data", word, "--use", "eval.perplexity"]

    case(f"data: {word[:40]}", make, says)


def looped(here: Path):
    """A folder of text that holds itself."""
    real(here)
    (here / "d").mkdir()
    (here / "d" / "a.txt").write_text("one two three\n" * 200)
    os.symlink(".", here / "d" / "loop")
    return ["eval", "./bad", "--data", "text:./d", "--use", "eval.perplexity"]


case("data: a folder that holds itself", looped)
source("text:/dev/zero", "no plain file")
source("text:./pipe", "no plain file", lambda here: os.mkfifo(here / "pipe"))
source("text:" + "x" * 5000, "no file")
source("text:~nobody-at-all/x", "no file")
source("text:a\tb", "no file")
source("jsonl:./loop", "no file", lambda here: os.symlink("loop", here / "loop"))
assert CONFIG
