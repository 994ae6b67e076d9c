"""decode.sample against transformers' generate, its logits processors, and hand calculations."""

import pytest
import torch
from transformers import DynamicCache, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from luthier.decode.sample import Sample, _Text, filtered
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.decoding import draw
from luthier.kit.encode import prompt_ids
from luthier.testing import tiny

TOKENIZER = tiny.tokenizer()
PROMPTS = ["3 + 4 =", "the number after 12 is", "a", "7 is the number before 8, and after"]


def run(method, prompts=PROMPTS, model=None, seed=0):
    decoding = method.steps([(model or tiny.llama(), TOKENIZER)], prompts, Context(seed=seed))
    steps = list(decoding)
    return decoding.trace(), steps


def generated(model, prompt, new, **options):
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, **options)
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_transformers_greedy(seed):
    model = tiny.llama(seed)
    trace, _ = run(Sample(max_new_tokens=20), model=model)
    assert trace.tokens == tuple(generated(model, p, 20, do_sample=False) for p in PROMPTS)
    assert trace.texts == tuple(TOKENIZER.decode(list(row), skip_special_tokens=True) for row in trace.tokens)
    assert trace.stopped == ("length",) * 4


def test_rows_end_at_different_times_and_leave_the_batch():
    """Eight rows, five of which end early: every row is what it is alone in transformers."""
    prompts, model = [f"{n} is {'so ' * n}" for n in range(8)], tiny.llama()
    ends = [generated(model, p, 3, do_sample=False)[2] for p in prompts[:2]]  # two tokens that do come end a row
    model.generation_config.eos_token_id = [1, *ends]
    want = tuple(generated(model, p, 8, do_sample=False) for p in prompts)
    assert [len(row) for row in want] == [1, 3, 8, 3, 8, 8, 3, 4]
    seen = passes(model)
    trace, _ = run(Sample(max_new_tokens=8), prompts, model)
    assert trace.tokens == want and trace.forwards == 8
    assert trace.stopped == tuple("length" if len(row) == 8 else "eos" for row in want)
    assert [rows for rows, _ in seen] == [8, 8, 8, 4, 4, 4, 4, 4]  # the fourth pass is without the four that were done


def passes(model):
    """(rows, tokens) of each forward pass to come."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_a_shared_beginning_is_computed_once_and_changes_nothing():
    prompts = [
        prompt_ids(tiny.item(prompt=f"{a} + {b} =", answer=""), TOKENIZER) for a, b in ((1, 2), (13, 4), (5, 678))
    ]
    prompts = [TOKENIZER("you are good at sums. ")["input_ids"] + p for p in prompts]
    model = tiny.llama(3)
    trace, _ = run(Sample(max_new_tokens=8), prompts, model)
    assert trace.tokens == tuple(run(Sample(max_new_tokens=8), [p], model)[0].tokens[0] for p in prompts)
    assert trace.forwards == 9  # the shared part, then one a token
    sliding = tiny.llama(3)
    sliding.config.sliding_window = 4  # where distance in the cache counts, the batch goes through whole
    assert run(Sample(max_new_tokens=8), prompts, sliding)[0].forwards == 8


def test_what_counts_as_shared():
    """Sixteen tokens or more of two prompts or more; a prompt keeps at least one for itself."""
    for share, own, want in (
        (16, ([50, 51], [60]), [(1, 16), (2, 2)]), (15, ([50, 51], [60]), [(2, 17)]),
        (20, ([], []), [(1, 19), (2, 1)]), (18, ([50, 51], []), [(1, 17), (2, 3)]), (20, ([50],), [(1, 21)]),
    ):  # fmt: skip
        model, prompts = tiny.llama(1), [[*range(20, 20 + share), *rest] for rest in own]
        seen = passes(model)
        trace, _ = run(Sample(max_new_tokens=1), prompts, model)
        assert seen == want and trace.forwards == len(want)
        assert trace.tokens == tuple(run(Sample(max_new_tokens=1), [p], model)[0].tokens[0] for p in prompts)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.5, "min_p": 0.2}, {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 10_000},
    ],
)  # fmt: skip
def test_filters_leave_the_tokens_that_transformers_leaves(fields):
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(1)) * 3
    mine = filtered(logits, Sample(**fields))
    other = TemperatureLogitsWarper(fields["temperature"])(None, logits)
    if "top_k" in fields:
        other = TopKLogitsWarper(fields["top_k"])(None, other)
    if "top_p" in fields:
        other = TopPLogitsWarper(fields["top_p"])(None, other)
    if "min_p" in fields:
        other = MinPLogitsWarper(fields["min_p"])(None, other)
    assert torch.equal(mine.isfinite(), other.isfinite())
    torch.testing.assert_close(mine.softmax(-1), other.softmax(-1))
    assert mine.isfinite().any(-1).all()


def test_filters_at_their_edges():
    """Two tokens of one half each: the first alone holds half. At top_p 1 nothing is cut, however unlikely."""
    assert filtered(torch.zeros(1, 2), Sample(temperature=1.0, top_p=0.5)).isfinite().sum() == 1
    assert filtered(torch.tensor([[50.0, 0.0, -1.0]]), Sample(temperature=1.0)).isfinite().all()


def test_equal_prompts_draw_by_their_number():
    """Each row draws from the generator of (its tokens, how many equal prompts stand before it)."""
    model, ids = tiny.llama(2), TOKENIZER("the")["input_ids"]
    rows, _ = run(Sample(temperature=1.3, max_new_tokens=1), [ids] * 6, model, seed=5)
    with torch.no_grad():
        p_BV = (model(torch.tensor([ids])).logits[:, -1] / 1.3).softmax(-1)
    rngs = [Context(seed=5).rng("sample", tuple(ids), n) for n in range(6)]
    want = [draw(p_BV, torch.rand((), generator=rng)[None]).item() for rng in rngs]
    assert [row[0] for row in rows.tokens] == want and len(set(want)) > 1


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    p = torch.tensor([[0.1, 0.0, 0.4, 0.5]]).expand(6, -1)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.99999])
    assert draw(p, u).tolist() == [0, 0, 2, 2, 3, 3]


def test_drawn_tokens_have_the_models_frequencies():
    model, prompt = tiny.llama(2), "the"
    method = Sample(temperature=1.3, top_k=4, max_new_tokens=1)
    trace, _ = run(method, [prompt] * 3000, model)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENIZER(prompt)["input_ids"]])).logits[0, -1] / 1.3
    best = logits.topk(4)
    want = dict(zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True))
    drawn = [row[0] for row in trace.tokens]
    assert set(drawn) == set(want)
    for token, share in want.items():
        assert drawn.count(token) / 3000 == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)


def test_what_a_row_draws_does_not_depend_on_its_batch():
    method = Sample(temperature=1.0, max_new_tokens=10)
    together = run(method)[0].tokens
    assert together == tuple(run(method, [p])[0].tokens[0] for p in PROMPTS)
    twice = run(method, [PROMPTS[0], PROMPTS[0], PROMPTS[1]])[0].tokens
    assert twice[0] == together[0] != twice[1] and twice[2] == together[1]
    assert run(method, seed=1)[0].tokens != together


def test_stop_strings_end_a_row_and_are_cut_from_its_text():
    model = tiny.llama(1)
    free, _ = run(Sample(max_new_tokens=16), model=model)
    text = free.texts[0]
    stop = text[5:8]
    assert text.index(stop) == 5
    trace, steps = run(Sample(max_new_tokens=16, stop=(stop, "never there")), model=model)
    assert trace.texts[0] == text[:5] and trace.stopped[0] == "stop"
    assert free.tokens[0][: len(trace.tokens[0])] == trace.tokens[0] and len(trace.tokens[0]) < 16
    assert "".join(step.texts[0] for step in steps) == text[:5]


@pytest.mark.parametrize("stop", [(), ("zq", "e x"), ("\ufffd",)])
def test_streamed_pieces_join_to_the_text(stop):
    for seed in range(4):
        trace, steps = run(Sample(temperature=1.5, max_new_tokens=24, stop=stop), model=tiny.llama(seed))
        for row, text in enumerate(trace.texts):
            assert "".join(step.texts[row] for step in steps) == text
            tokens = tuple(step.tokens[row] for step in steps if step.tokens[row] is not None)
            assert tokens == trace.tokens[row]
            if not stop:
                assert text == TOKENIZER.decode(list(tokens), skip_special_tokens=True)


def test_characters_of_several_tokens_come_whole():
    row = _Text(TOKENIZER, ())
    pieces = [row.push(i) for i in TOKENIZER("é→😀!")["input_ids"]]
    assert [p for p in pieces if p] == ["é", "→", "😀", "!"] and row.whole() == "é→😀!"
    cut = _Text(TOKENIZER, ())
    half = TOKENIZER("a😀")["input_ids"][:-1]
    assert "".join([cut.push(i) for i in half]) == "a"
    assert cut.flush() == TOKENIZER.decode(half)[1:]


def test_bytes_that_never_make_a_character_are_shown_in_the_end():
    """The first byte of a four-byte character, again and again: eight of them wait for what never comes."""
    row, start = _Text(TOKENIZER, ()), TOKENIZER("😀")["input_ids"][0]
    assert [row.push(start) for _ in range(17)] == ([""] * 7 + ["\ufffd" * 8]) * 2 + [""]
    assert row.flush() == "\ufffd" and row.whole() == "\ufffd" * 17
    assert row.flush() == "" and row.whole() == "\ufffd" * 17


def test_special_tokens_have_no_text():
    row = _Text(TOKENIZER, ())
    assert [row.push(i) for i in (TOKENIZER.pad_token_id, *TOKENIZER("a")["input_ids"])] == ["", "a"]


def pushed(text, *stop):
    """What each character of the text makes sure, what is held in the end, and the whole."""
    row = _Text(TOKENIZER, stop)
    pieces = []
    for i in TOKENIZER(text)["input_ids"]:
        pieces.append(row.push(i))
        if row.stopped:
            break
    return pieces, row.flush(), row.whole(), row.stopped


def test_text_that_may_begin_a_stop_string_is_held_back():
    assert pushed("xaby", "abc") == (["x", "", "", "aby"], "", "xaby", False)
    assert pushed("xab", "abc") == (["x", "", ""], "ab", "xab", False)
    assert pushed("xabcz", "abc") == (["x", "", "", ""], "", "x", True)
    assert pushed("aabc", "abc", "never") == (["", "a", "", ""], "", "a", True)
    assert pushed("pqr", "r", "") == (["p", "q", ""], "", "pq", True)  # an empty stop string is none
    assert pushed("xabcd", "bcd", "abcde", "cd") == (["x", "", "", "", "a"], "", "xa", True)  # the earliest counts
    assert pushed("abab", "b") == (["a", ""], "", "a", True)


def test_a_row_that_has_stopped_says_nothing_more():
    """Neither the tokens before the stop string nor an end-of-sequence token are in the text."""
    model = tiny.llama(1)
    free = generated(model, "a", 6, do_sample=False)
    model.generation_config.eos_token_id = free[3]
    trace, steps = run(Sample(max_new_tokens=6), ["a"], model)
    assert trace.tokens == (free[: free.index(free[3]) + 1],) and trace.stopped == ("eos",)
    assert trace.texts == (TOKENIZER.decode(free[: free.index(free[3])], skip_special_tokens=True),)
    assert "".join(step.texts[0] for step in steps) == trace.texts[0]


def test_defaults():
    """Greedy, 128 tokens, nothing cut."""
    assert Sample().to_dict()["set"] == {
        "temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "max_new_tokens": 128, "stop": [],
    }  # fmt: skip


def test_a_reader_may_stop_early():
    decoding = Sample(max_new_tokens=30).steps([(tiny.llama(), TOKENIZER)], PROMPTS, Context())
    for count, _ in enumerate(decoding, start=1):
        if count == 3:
            break
    trace = decoding.trace()
    assert trace.forwards == 3 and {len(row) for row in trace.tokens} == {3} and trace.stopped == ("",) * 4


def test_cost_is_counted():
    model, places = tiny.llama(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: places.append(args[0].shape[1]))
    trace, _ = run(Sample(max_new_tokens=5), ["abc"], model)
    length = len(TOKENIZER("abc")["input_ids"]) + 4  # the last token is never fed back
    assert trace.forwards == 5 and places == [1] * 5  # logits of the last place only
    assert trace.cache_bytes == 2 * 2 * 2 * 8 * 4 * length  # k and v, 2 layers, 2 heads of width 8, fp32


def test_the_context_ends_a_row_and_a_longer_prompt_is_refused():
    model = tiny.llama(max_position_embeddings=12)
    ids = list(range(5, 14))
    assert [len(row) for row in run(Sample(max_new_tokens=50), [ids], model)[0].tokens] == [3]
    together = run(Sample(max_new_tokens=50), [ids, ids[:4]], model)[0]  # the longest prompt decides
    assert [len(row) for row in together.tokens] == [3, 3] and together.stopped == ("length",) * 2
    with pytest.raises(LuthierError, match="12 tokens, the model's context 12"):
        run(Sample(), [list(range(5, 17))], model)
    with pytest.raises(LuthierError, match="no tokens"):
        run(Sample(), ["fine", ""])
    with pytest.raises(LuthierError, match="one model"):
        Sample().steps([], ["a"], Context())


def test_no_prompts_is_no_work():
    trace, steps = run(Sample(), [])
    assert trace.tokens == () and trace.forwards == 0 and steps == []


def test_our_own_decoder():
    from luthier.model import build_model

    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = tiny.redraw_(build_model({**sizes, "num_attention_heads": 4, **ids}, seed=0), 0).eval()
    prompts = [f"they all begin alike and go on {end}" for end in ("so", "otherwise", "in a third way")]
    trace, _ = run(Sample(max_new_tokens=10), prompts, model)
    assert trace.tokens == tuple(generated(model, p, 10, do_sample=False) for p in prompts)
    assert trace.forwards == 11  # what they share went first


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "bloom"])
def test_other_families(family):
    """The last one has no end of its context, and takes no positions: nothing is computed once for all there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        "qwen2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 48},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }[family]  # fmt: skip
    if family != "bloom":
        sizes["max_position_embeddings"] = 64
    config = AutoConfig.for_model(
        family, vocab_size=tiny.VOCAB, eos_token_id=1, bos_token_id=None, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        model = tiny.redraw_(AutoModelForCausalLM.from_config(config), 0).eval()
    prompts = [*PROMPTS, f"{PROMPTS[3]} that is 9"]
    trace, _ = run(Sample(max_new_tokens=10), prompts, model)
    assert trace.tokens == tuple(generated(model, p, 10, do_sample=False) for p in prompts)
    assert isinstance(model(torch.tensor([[5]]), use_cache=True).past_key_values, DynamicCache)
    two = run(Sample(max_new_tokens=2), prompts[3:], model)[0]
    assert two.forwards == (2 if family == "bloom" else 3)
