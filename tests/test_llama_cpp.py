"""Files that llama.cpp itself loads: its tokens and its log-probabilities against transformers' reading of them.

llama.cpp comes in the wheel xllamacpp; it runs in a process of its own, since what it cannot load may end it.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from luthier.checkpoint import gguf_write
from luthier.checkpoint.bundled import smollm2
from luthier.checkpoint.gguf_write import to_gguf
from luthier.checkpoint.reader import Checkpoint
from test_gguf_write import CASES, LLAMA3, SIZES, TEXT, byte_level, pieces, saved

pytest.importorskip("xllamacpp")
PROMPT = [5, 17, 40, 99, 60, 71, 8, 130, 44, 90, 23, 65, 101, 12, 77, 50, 31, 88, 14, 120]
TEXTS = [TEXT, "   two  spaces, 3.1415", "x = [1234567, 'it''s']\n\n", "Ünïcödé and 中文 🙂"]
OFF = {"f16": 0.02, "bf16": 0.05, "q8_0": 0.15, "q4_0": 0.15}
"""Largest difference of a log-probability; llama.cpp multiplies in F16, or in bytes where weights are quantised."""
RUN = """
import json, sys, urllib.request
import xllamacpp
path, prompt, texts = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
def ask(what, **body):
    head = {"Content-Type": "application/json"}
    asked = urllib.request.Request(server.listening_address + what, json.dumps(body).encode(), head)
    return json.loads(urllib.request.urlopen(asked, timeout=120).read())
tokens = [ask("/tokenize", content=text, add_special=True)["tokens"] for text in texts]
asked = {"n_predict": 1, "temperature": 0.0, "n_probs": 8, "ignore_eos": True}
told = [ask("/completion", prompt=prompt[:n], **asked) for n in range(1, len(prompt) + 1)]
told = [[part["top_logprobs"] for part in one.get("completion_probabilities") or []] for one in told]
print("\\n" + json.dumps([tokens, [[[top["id"], top["logprob"]] for part in one for top in part] for one in told]]))
"""


def asked(path):
    """llama.cpp's tokens of TEXTS; and after each start of PROMPT its likeliest tokens, (id, log-probability); none
    where the first of them is a part of a letter only."""
    command = [sys.executable, "-c", RUN, json.dumps([str(path), PROMPT, TEXTS])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@torch.no_grad()
def check(path, tokenizer, off, model=None):
    """model: what the file was made from, where quantising does not matter."""
    tokens, told = asked(path)
    assert tokens == [tokenizer(text).input_ids for text in TEXTS]
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    logs = model.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert sum(len(likeliest) == 8 for likeliest in told) >= 4
    for likeliest, row in zip(told, logs, strict=True):
        assert all(abs(log - float(row[token])) < off for token, log in likeliest)
        assert all(float(row.max() - row[token]) < 2 * off for token, _ in likeliest[:1])


@pytest.mark.parametrize("kind", gguf_write.TYPES)
@pytest.mark.parametrize("case", CASES)
def test_it_loads_what_we_write(tmp_path, case, kind):
    config, pre = CASES[case]
    tokenizer = byte_level(pre)
    saved(tmp_path / "m", config, tokenizer)
    to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf", kind)
    check(tmp_path / "t.gguf", tokenizer, OFF[kind])


@pytest.mark.parametrize("case", ["scaled rotary", "pieces"])
def test_it_reads_other_settings_as_we_do(tmp_path, case):
    """Llama 3's scaled frequencies, and a vocabulary in the manner of SentencePiece."""
    more = {"rope_parameters": LLAMA3} if case == "scaled rotary" else {"unk_token_id": 0, "bos_token_id": 1}
    tokenizer = pieces() if case == "pieces" else byte_level("llama-bpe")
    model = saved(tmp_path / "m", LlamaConfig(**{**SIZES, **more}), tokenizer)
    to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf", "f16")
    check(tmp_path / "t.gguf", tokenizer, OFF["f16"], model)


def test_it_loads_the_bundled_model(tmp_path):
    source = smollm2()
    to_gguf(Checkpoint.open(source), tmp_path / "t.gguf", "f16")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    check(tmp_path / "t.gguf", AutoTokenizer.from_pretrained(source), OFF["f16"], model)
