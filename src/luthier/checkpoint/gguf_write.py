"""From a checkpoint to a GGUF file that llama.cpp and its kin load: Llama- and Qwen-type models, streamed.

F16 and BF16 hold a number each, Q8_0 and Q4_0 blocks of 32 along a row with one scale. Norms and biases stay
fp32; with Q4_0 embedding and head are Q8_0, as quantisers of GGUFs keep them finer than the rest. For the
architecture `llama` the rows of query and key go into the order of rotary pairs; Qwen's stay. A tied head is
not written. What cannot be right (rows that are no whole blocks, rotary settings, other families) is refused
by name before anything is written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.checkpoint.atomic import write_binary
from luthier.checkpoint.gguf import INNER, OUTER
from luthier.checkpoint.gguf_vocab import Vocabulary, vocabulary
from luthier.checkpoint.reader import Checkpoint, TensorInfo, check_finite
from luthier.errors import LuthierError, said, unknown

TYPES = ("f16", "bf16", "q8_0", "q4_0")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""config.json's model_type → GGUF's architecture"""
BATCH = 1 << 22
"""entries quantised at once, at most, unless one head is larger"""
_NAMES = {v.removesuffix(".weight"): k.removesuffix(".weight") for k, v in OUTER.items()}
_INNER = {v: k for k, v in INNER.items()} | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FTYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}


class _Out(NamedTuple):
    """One tensor to write. heads: over how many of them its rows are put in pairs, 0 for none."""

    name: str
    kind: str
    info: TensorInfo
    heads: int = 0


def to_gguf(
    source: Checkpoint, out: str | os.PathLike[str], kind: str = "q8_0", watch: Callable[[int, int], None] | None = None
) -> Path:
    """Write a checkpoint as one GGUF file, whole or not at all; returns its path.

    kind: f16, bf16, q8_0 or q4_0.  watch: called with the tensors done and their number.
    Raises LuthierError for what a GGUF of that kind could not hold rightly, and for values that are not finite.
    """
    try:
        import gguf
    except ImportError:
        raise LuthierError("writing GGUF needs the package gguf", do="run: pip install gguf") from None
    out = Path(out)
    if kind not in TYPES:
        raise unknown("type of GGUF", kind, TYPES)
    if out.exists() and not _is_gguf(out):
        raise LuthierError("exists and is no GGUF", where=str(out), do="choose another name")
    config, where = source.config, str(source.path / "config.json")
    _check_config(config, where)
    rope, factors = _rope(config, where)
    parts = _outputs(source, kind)
    embed = next(p.info for p in parts if p.name == "token_embd.weight")
    vocab = vocabulary(source.path, embed.shape[0], config)
    writer = gguf.GGUFWriter(None, ARCHITECTURES[source.family])
    _describe(writer, source, kind, embed.shape[0], rope)
    _put_vocabulary(writer, vocab)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for part in parts:
        shape, each = part.info.shape, gguf.GGML_QUANT_SIZES[_kind(gguf, part.kind)]
        nbytes = part.info.numel // each[0] * each[1]
        writer.add_tensor_info(part.name, shape, _dtype(part.kind), nbytes, _kind(gguf, part.kind))
    with write_binary(out) as temp:
        try:
            writer.write_header_to_file(temp)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _put_tensors(writer, source, parts, factors, watch)
        finally:
            writer.close()
    return out


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _kind(gguf: Any, kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def _dtype(kind: str) -> Any:
    import numpy as np

    return np.dtype({"f32": np.float32, "f16": np.float16}.get(kind, np.int8))  # int8: shapes stay those of numbers


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if config["model_type"] not in ARCHITECTURES:
        do = f"written are {', '.join(ARCHITECTURES)}"
        raise LuthierError(f"a model of the family {said(config['model_type'])} is not written", where=where, do=do)
    if "quantization_config" in config:
        raise LuthierError("the weights are quantized", where=where, do="use the model's dense checkpoint")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise LuthierError(f"hidden_act {said(config['hidden_act'])}; llama.cpp has silu here", where=where)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise LuthierError(f"{key} should be a number above 0, is {said(config.get(key))}", where=where)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Any]:
    """Keys under `rope.`, and what each frequency is divided by where that varies (Llama 3)."""
    said_of = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = said_of.pop("rope_type", None) or said_of.pop("type", "default")
    theta = float(said_of.pop("rope_theta", config.get("rope_theta", 10000.0)))
    share = said_of.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    said_of.pop("type", None)
    size = _head_dim(config)
    keys = {"freq_base": theta, "dimension_count": size}
    needed = {"default": set(), "linear": {"factor"}, "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}}  # fmt: skip
    if kind not in needed or (kind != "default" and set(said_of) != needed[kind]) or share != 1.0:
        what = f"rotary settings of type {said(kind)} with {said(sorted(said_of))}, rotating {share:.0%} of a head"
        raise LuthierError(f"{what}, are not written", where=where, do=f"written are {', '.join(needed)}")
    if kind == "linear":
        keys |= {"scaling.type": "linear", "scaling.factor": float(said_of["factor"])}
    return keys, _llama3(theta, size, said_of) if kind == "llama3" else None


def _llama3(theta: float, size: int, about: Mapping[str, Any]) -> Any:
    """Llama 3's divisors: 1 for short waves, `factor` for long ones, between them a bridge that is even in 1/wave."""
    factor, low, high = about["factor"], about["low_freq_factor"], about["high_freq_factor"]
    wave = 2 * math.pi * theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = about["original_max_position_embeddings"] / wave
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float().numpy()


def _outputs(source: Checkpoint, kind: str) -> list[_Out]:
    """What is written, in the order of the bytes; LuthierError for what has no place in a GGUF."""
    config = source.config
    tied = config.get("tie_word_embeddings", False)
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    made = []
    for name, info in source.tensors.items():
        where = f"{info.file}: tensor {name!r}"
        if (tied and info.role == "head") or name.endswith("rotary_emb.inv_freq"):
            continue
        module, _, leaf = name.rpartition(".")
        found = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)", module)
        stem = _INNER.get(found[2]) if found else _NAMES.get(module)
        if stem is None or leaf not in ("weight", "bias") or not info.dtype.is_floating_point:
            raise LuthierError(f"has no place in a GGUF of {source.family}", where=where)
        as_ = "f32" if len(info.shape) < 2 else "q8_0" if kind == "q4_0" and not found else kind
        columns = list(info.shape)[-1] if info.shape else 1
        if as_.startswith("q") and columns % 32:
            what = f"has rows of {columns}, which are no whole blocks of 32"
            raise LuthierError(what, where=where, do="choose --type f16")
        in_pairs = heads.get(module.rpartition(".")[2], 0) if ARCHITECTURES[source.family] == "llama" else 0
        made.append(_Out(f"blk.{found[1]}.{stem}.{leaf}" if found else f"{stem}.{leaf}", as_, info, in_pairs))
    _check_whole({part.name for part in made}, source, tied)
    return made


def _check_whole(names: set[str], source: Checkpoint, tied: bool) -> None:
    needed = {"token_embd.weight", "output_norm.weight", *(() if tied else ("output.weight",))}
    needed |= {f"blk.{n}.{stem}.weight" for n in range(source.config["num_hidden_layers"]) for stem in INNER}
    missing = sorted(needed - names)
    if missing:
        raise LuthierError(f"has no tensor for {missing[0]}", where=str(source.path), do="get the whole checkpoint")


def _describe(writer: Any, source: Checkpoint, kind: str, rows: int, rope: Mapping[str, Any]) -> None:
    import gguf

    config, heads = source.config, source.config["num_attention_heads"]
    writer.add_type("model")
    writer.add_name(source.path.name)
    writer.add_size_label(gguf.size_label(source.n_params, 0, 0, 0))
    licence = _licence(source.path)
    if licence:
        writer.add_license(licence)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FTYPES[kind])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(rows)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    for key, value in rope.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{writer.arch}.rope.{key}", value)


def _context(config: Mapping[str, Any]) -> int:
    """The context in which llama.cpp, which has no sliding window here, computes what the model does."""
    length, window = config.get("max_position_embeddings", 2048), config.get("sliding_window")
    slides = config.get("use_sliding_window", config["model_type"] == "mistral")
    return min(length, window) if slides and type(window) is int else length


def _licence(folder: Path) -> str | None:
    """What the head of the folder's card says."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace")[:4000].split("\n---")[0] if card.is_file() else ""
    found = re.search(r'^license: *"?([\w.-]+)"?\s*$', head, re.MULTILINE)
    return found[1] if found else None


def _put_vocabulary(writer: Any, vocab: Vocabulary) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.kinds)
    writer.add_token_merges(vocab.merges)
    for word, i in vocab.ids.items():
        getattr(writer, f"add_{word}_token_id")(i)
    writer.add_add_space_prefix(vocab.scores is not None)
    writer.add_add_bos_token(vocab.adds["bos"])
    writer.add_add_eos_token(vocab.adds["eos"])
    if vocab.template:
        writer.add_chat_template(vocab.template)


def _put_tensors(
    writer: Any, source: Checkpoint, parts: list[_Out], factors: Any, watch: Callable[[int, int], None] | None
) -> None:  # fmt: skip
    import gguf
    from gguf.quants import quantize

    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after an hour
        os.posix_fallocate(file.fileno(), 0, file.tell() + sum(t.nbytes for t in writer.tensors[0].values()))
    if factors is not None:
        file.write(factors.tobytes())
        writer.write_padding(file, factors.nbytes)
    for done, part in enumerate(parts):
        for stretch in _stretches(source, part):
            if part.kind == "f16" and float(stretch.abs().max()) > 65504:
                where = f"{part.info.file}: tensor {part.info.name!r}"
                raise LuthierError("holds values beyond F16's 65,504", where=where, do="choose --type bf16")
            file.write(quantize(stretch.numpy(), _kind(gguf, part.kind)).data)
        writer.write_padding(file, file.tell())
        if watch:
            watch(done + 1, len(parts))


def _stretches(source: Checkpoint, part: _Out) -> Iterator[Tensor]:
    """Rows of a tensor, fp32, as many at a time as fit; of what turns in pairs, whole heads."""
    info = part.info
    rows, columns = info.shape[0], math.prod(info.shape[1:])
    size = rows // part.heads if part.heads else 1
    if rows % size or (part.heads and (rows % part.heads or size % 2)):
        what = f"its {rows} rows are no {part.heads} heads of pairs"
        raise LuthierError(what, where=f"{info.file}: tensor {info.name!r}")
    step = max(1, BATCH // (columns * size)) * size
    for start in range(0, rows, step):
        count = min(step, rows - start)
        stretch = source.read_flat(info.name, start * columns, count * columns).float().view(count, *info.shape[1:])
        check_finite(info.name, stretch, info.file)
        if part.heads:
            stretch = stretch.view(count // size, 2, size // 2, columns).transpose(1, 2).reshape(count, *info.shape[1:])
        yield stretch
