"""Checkpoint to GGUF: against transformers' own reading, our reader, the package gguf and the bundled model's file.

What llama.cpp itself makes of such files is in test_llama_cpp.py.
"""

import json
import math
import os

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from luthier.checkpoint import gguf_write
from luthier.checkpoint.bundled import _gguf, smollm2
from luthier.checkpoint.gguf import from_gguf
from luthier.checkpoint.gguf_file import GgufFile
from luthier.checkpoint.gguf_vocab import CONTROL, UNUSED, vocabulary
from luthier.checkpoint.gguf_write import to_gguf
from luthier.checkpoint.reader import Checkpoint
from luthier.cli import main
from luthier.errors import LuthierError
from luthier.testing import tiny

START, END = "<|endoftext|>", "<|im_end|>"
TEXT = (
    "def f(x): return x  12345 + 7\n\n\t# the class of the function, don't WE'RE нет ½ 你好 🚀 self.x and the rest\r\n"
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIZES = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=True), "qwen2"),
    "qwen3": (Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=False), "qwen2"),
    "llama": (LlamaConfig(**SIZES, tie_word_embeddings=True), "llama-bpe"),
    "mistral": (MistralConfig(**SIZES, sliding_window=256), "smollm"),
}


def split(digits):
    return [
        pre_tokenizers.Split(Regex(WORDS + digits + REST), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def byte_level(pre, trained=True):
    """A byte-level BPE trained on TEXT, which splits words as the models of that name do."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = {
        "gpt-2": [plain], "smollm": [pre_tokenizers.Digits(True), plain], "qwen2": split(r"\p{N}"),
        "llama-bpe": split(r"\p{N}{1,3}"), "smaug-bpe": split(r"\p{N}{1,3}"),
    }  # fmt: skip
    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(steps[pre]), decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=330, special_tokens=[START, END], initial_alphabet=alphabet)
    )
    if pre == "llama-bpe":
        made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=START, eos_token=END, pad_token=END)


def pieces():
    """A tokenizer in the manner of SentencePiece, as Llama 2 has it: ▁ for spaces, bytes as tokens of their own."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=380, special_tokens=special, limit_alphabet=50))
    raw = json.loads(made.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    raw["pre_tokenizer"] = None
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    made = Tokenizer.from_str(json.dumps(raw))
    made.normalizer = normalizers.Sequence([prepend, replace])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def saved(folder, config, tokenizer, seed=1):
    model = AutoModelForCausalLM.from_config(config)
    tiny.redraw_(model, seed).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def logits(model):
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        return model(ids).logits[0]


@pytest.mark.parametrize("kind", gguf_write.TYPES)
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_reads_is_the_model(tmp_path, case, kind):
    config, pre = CASES[case]
    model = saved(tmp_path / "m", config, byte_level(pre))
    to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf", kind)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="t.gguf", dtype=torch.float32).eval()
    with torch.no_grad():  # what quantising alone does: rounded in place, by the package
        for name, p in model.named_parameters():
            outer = kind == "q4_0" and ("embed" in name or "lm_head" in name)
            as_ = Kind.F32 if p.dim() == 1 else Kind["Q8_0" if outer else kind.upper()]
            p.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(p.numpy(), as_), as_)))
    exact, got = logits(model), logits(read)
    assert exact.std() > 0.5 and (got - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_round_trip_through_our_own_reader(tmp_path, pre):
    source = byte_level(pre)
    source.chat_template = "{% for m in messages %}<|im_end|>{{ m['content'] }}{% endfor %}"
    model = saved(tmp_path / "m", LlamaConfig(**SIZES, tie_word_embeddings=True), source)
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\n---\n")
    to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf", "f16")
    back = Checkpoint.open(from_gguf(tmp_path / "t.gguf", tmp_path / "back"))
    held = dict(model.named_parameters())
    assert back.tensors.keys() == held.keys()
    for name, tensor in back.items():
        kept = held[name].detach()
        assert torch.equal(tensor, (kept if kept.dim() == 1 else kept.half()).to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(back.path)
    assert tokenizer(TEXT + START).input_ids == source(TEXT + START).input_ids
    assert tokenizer.chat_template == source.chat_template and tokenizer.eos_token == END
    assert back.config["eos_token_id"] == 1 and "mit" in (back.path / "README.md").read_text()
    assert back.config["rope_parameters"]["rope_theta"] == 10000.0 and back.config["vocab_size"] == 384


def test_rows_of_query_and_key_by_hand(tmp_path):
    """Of a head of 4 rows, a b c d with pairs (a, c) and (b, d), a GGUF keeps a c b d; biases as well."""
    config = LlamaConfig(**{**SIZES, "hidden_size": 16, "intermediate_size": 32}, head_dim=4, attention_bias=True)
    model = saved(tmp_path / "m", config, byte_level("gpt-2"))
    file = GgufFile(to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf", "f16"))
    attention = model.model.layers[1].self_attn
    for name, live in (("attn_q", attention.q_proj), ("attn_k", attention.k_proj)):
        order = [4 * h + i for h in range(live.weight.shape[0] // 4) for i in (0, 2, 1, 3)]
        assert torch.equal(file.read(f"blk.1.{name}.bias"), live.bias[order])
        assert torch.equal(file.read(f"blk.1.{name}.weight"), live.weight[order].half().float())
    assert torch.equal(file.read("blk.1.attn_v.weight"), attention.v_proj.weight.half().float())
    assert torch.equal(file.read("blk.0.attn_norm.weight"), model.model.layers[0].input_layernorm.weight)
    assert file.tensors["blk.0.attn_norm.weight"].kind == Kind.F32


@pytest.mark.parametrize("batch", [1, 64 * 33, 1 << 20])
def test_bytes_do_not_depend_on_the_stretches(tmp_path, monkeypatch, batch):
    saved(tmp_path / "m", CASES["qwen3"][0], byte_level("qwen2"))
    saved(tmp_path / "l", CASES["llama"][0], byte_level("gpt-2"))
    for name in "ml":
        whole = to_gguf(Checkpoint.open(tmp_path / name), tmp_path / "a.gguf", "q4_0").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(gguf_write, "BATCH", batch)
            assert to_gguf(Checkpoint.open(tmp_path / name), tmp_path / "b.gguf", "q4_0").read_bytes() == whole


def test_llama3_divisors_against_the_definition(tmp_path):
    """Case by case: short waves stay, long ones are slowed by the factor, between them a mix."""
    saved(tmp_path / "m", LlamaConfig(**SIZES, rope_parameters=LLAMA3), byte_level("llama-bpe"))
    file = GgufFile(to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf", "f16"))
    expected = []
    for i in range(0, 16, 2):
        wave = 2 * math.pi * 10000.0 ** (i / 16)
        if wave < 64 / 4:
            expected.append(1.0)
        elif wave > 64 / 1:
            expected.append(8.0)
        else:
            smooth = (64 / wave - 1.0) / (4.0 - 1.0)
            expected.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert len(set(expected)) > 3
    np.testing.assert_allclose(file.read("rope_freqs.weight").numpy(), expected, rtol=1e-6)
    assert file.keys["llama.rope.freq_base"] == 10000.0 and "llama.rope.scaling.type" not in file.keys


def test_linear_rotary_and_windows(tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    saved(tmp_path / "m", MistralConfig(**SIZES, sliding_window=128, rope_parameters=linear), byte_level("gpt-2"))
    keys = GgufFile(to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf")).keys
    assert keys["llama.context_length"] == 128, "beyond its window llama.cpp would see what the model does not"
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert keys["llama.rope.freq_base"] == 5000.0 and keys["general.file_type"] == 7


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_how_words_are_split_is_known_by_the_rules(tmp_path, pre):
    byte_level(pre).save_pretrained(tmp_path)
    found = vocabulary(tmp_path, 400, {})
    assert (found.model, found.pre, found.scores) == ("gpt2", pre, None)
    assert found.tokens[:2] == [START, END] and found.kinds[:3] == [CONTROL, CONTROL, 1]
    assert found.tokens[399] == "[PAD399]" and found.kinds[399] == UNUSED and len(found.tokens) == 400
    assert found.adds == {"bos": pre == "llama-bpe", "eos": False}
    assert found.ids == {"bos": 0, "eos": 1, "pad": 1}
    joined = [merge.replace(" ", "") for merge in found.merges]
    assert joined == [t for t, kind in zip(found.tokens, found.kinds, strict=True) if kind == 1][256:] and joined


def test_sentencepiece_scores_give_the_same_tokens(tmp_path):
    """Twin: join, again and again, the two neighbours whose union has the highest score, the leftmost first."""
    tokenizer = pieces()
    tokenizer.save_pretrained(tmp_path)
    found = vocabulary(tmp_path, 400, {})
    assert (found.model, found.pre, found.merges, found.adds["bos"]) == ("llama", "default", [], True)
    assert found.kinds[:4] == [2, 3, 3, 6] and found.ids == {"bos": 1, "eos": 2, "unk": 0}
    rank = {t: s for t, s, k in zip(found.tokens, found.scores, found.kinds, strict=True) if k == 1}
    text = "the function of x  and don't return the rest"
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(rank[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in rank]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert [found.tokens.index(p) for p in parts] == tokenizer(text).input_ids[1:]
    assert len(parts) < len(text) / 2


def test_keys_are_those_of_the_converter_and_values_those_of_the_model(tmp_path):
    """The bundled model came as a GGUF from llama.cpp's converter: what it says, ours says, too."""
    source = Checkpoint.open(smollm2())
    theirs, ours = GgufFile(_gguf()), GgufFile(to_gguf(source, tmp_path / "t.gguf", "q8_0"))
    free = {"general.name", "general.organization", "general.finetune", "general.basename", "general.languages"}
    for key in theirs.keys.keys() - free - {"general.file_type"}:
        assert ours.keys[key] == theirs.keys[key], key
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ("blk.3.attn_q.weight", "blk.29.attn_k.weight", "blk.7.ffn_down.weight", "output_norm.weight"):
        a, b = ours.read(name), theirs.read(name)
        assert (a - b).norm() < 0.01 * b.norm(), name


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED = {
    "family": ({"model_type": "gpt_neox"}, "family 'gpt_neox' is not written"),
    "rotary": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary settings of type 'yarn'"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "rotating 50% of a head"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads should be a number above 0"),
    "quantized": ({"quantization_config": {}}, "the weights are quantized"),
    "untied without a head": ({"tie_word_embeddings": False}, "has no tensor for output.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(tmp_path, case):
    changes, words = REFUSED[case]
    saved(tmp_path / "m", CASES["llama"][0], byte_level("gpt-2"))
    edited(tmp_path / "m", **changes)
    with pytest.raises(LuthierError, match=words):
        to_gguf(Checkpoint.open(tmp_path / "m"), tmp_path / "t.gguf")
    assert not (tmp_path / "t.gguf").exists()


def test_tensors_and_tokenizers_without_a_place_are_refused(tmp_path):
    tiny.checkpoint(tmp_path / "narrow")  # rows of 48
    with pytest.raises(LuthierError, match=r"rows of 48, which are no whole blocks of 32; choose --type f16"):
        to_gguf(Checkpoint.open(tmp_path / "narrow"), tmp_path / "t.gguf", "q4_0")
    to_gguf(Checkpoint.open(tmp_path / "narrow"), tmp_path / "t.gguf", "f16")
    with pytest.raises(LuthierError, match="unknown type of GGUF 'q4_k'"):
        to_gguf(Checkpoint.open(tmp_path / "narrow"), tmp_path / "t.gguf", "q4_k")
    big = tiny.llama()
    big.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    tiny.save(big, tmp_path / "big")
    with pytest.raises(LuthierError, match="up_proj.weight': holds values beyond F16's 65,504; choose --type bf16"):
        to_gguf(Checkpoint.open(tmp_path / "big"), tmp_path / "u.gguf", "f16")
    tiny.llama(vocab_size=100).save_pretrained(tmp_path / "small")
    with pytest.raises(LuthierError, match="a GGUF holds its tokenizer"):
        to_gguf(Checkpoint.open(tmp_path / "small"), tmp_path / "u.gguf", "f16")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(LuthierError, match="its largest id is 275, the embedding has 100 rows"):
        to_gguf(Checkpoint.open(tmp_path / "small"), tmp_path / "u.gguf", "f16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "narrow", "small", "t.gguf"]


ODD = {
    "words": (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "no name for"),
    "digits by three": (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(False)])), "no name for",
    ),
    "a space in front": (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel()), "no name for"),
    "lower case": (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "rewrites text by 'Lowercase'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_a_tokenizer_with_rules_of_its_own_is_refused(tmp_path, case):
    change, words = ODD[case]
    tokenizer = byte_level("gpt-2")
    change(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LuthierError, match=words):
        vocabulary(tmp_path, 400, {})
    other = pieces()
    other.backend_tokenizer.normalizer = normalizers.NFKC()
    other.save_pretrained(tmp_path / "pieces")
    with pytest.raises(LuthierError, match="in a way llama.cpp's SentencePiece does not"):
        vocabulary(tmp_path / "pieces", 400, {})


def test_the_file_appears_whole_or_not_at_all(tmp_path, capsys):
    folder = tiny.checkpoint(tmp_path / "m", intermediate_size=64)
    out = tmp_path / "deep" / "t.gguf"
    assert main(["export", str(folder), str(out), "--type", "q8_0"]) == 0 and capsys.readouterr().out == f"{out}\n"
    before = out.read_bytes()
    bad = tiny.llama(intermediate_size=64)
    bad.model.norm.weight.data[3] = torch.nan
    tiny.save(bad, tmp_path / "bad")
    assert main(["export", str(tmp_path / "bad"), str(out)]) == 2
    assert "norm.weight': 1 of 32 values are NaN" in capsys.readouterr().err
    assert out.read_bytes() == before and os.listdir(out.parent) == ["t.gguf"]
    (tmp_path / "notes.gguf").write_text("mine")
    assert main(["export", str(folder), str(tmp_path / "notes.gguf")]) == 2
    assert "exists and is no GGUF" in capsys.readouterr().err and (tmp_path / "notes.gguf").read_text() == "mine"
    assert main(["export", str(folder), str(tmp_path / "notes")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err
