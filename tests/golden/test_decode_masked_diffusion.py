"""decode.masked_diffusion against a twin that fills one prompt at a time in plain Python, and hand calculations."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from luthier.decode.masked_diffusion import MaskedDiffusion, shared_out
from luthier.errors import LuthierError
from luthier.kit.canvas import stretches
from luthier.kit.context import Context
from luthier.kit.decoding import limited
from luthier.model import build_model
from luthier.testing import tiny
from luthier.testing.decode import counted

TOKENIZER = tiny.tokenizer()
PROMPTS = ["3 + 4 =", "the number after 12 is", "a", "7 is the number before 8, and after"]
MASK, EOS, LENGTH = 3, 1, 10


def host(seed=0):
    """Sharper than the tiny model, so that places differ in how sure they are."""
    model = tiny.llama(seed, is_causal=False, mask_token_id=MASK)
    model.lm_head.weight.data *= 6
    return model


def run(method, prompts=PROMPTS, model=None, seed=0):
    decoding = method.steps([(model or host(), TOKENIZER)], prompts, Context(seed=seed, step="golden"))
    drafts = list(decoding)
    return decoding.trace(), drafts


def logits_of(model, prompt, canvas):
    with torch.no_grad():
        row = model(torch.tensor([[*TOKENIZER(prompt)["input_ids"], *canvas]])).logits[0, -len(canvas) :].double()
    row[:, MASK] = -math.inf
    return row


def sureness(order, row):
    p = [x for x in row.softmax(-1).tolist() if x > 0]
    if order == "confidence":
        return max(p)
    if order == "margin":
        return sorted(p)[-1] - sorted(p)[-2]
    return sum(x * math.log(x) for x in p)


def slow(model, prompt, order="confidence", budget=None, block=None, threshold=None, length=LENGTH):
    """The canvas, and the number of passes; blocks and budget divide the length, as in LLaDA's code."""
    canvas, passes = [MASK] * length, 0
    block = block or length
    per_block = (budget or length) // (length // block)
    for start in range(0, length, block):
        places = list(range(start, start + block))
        done = 0
        while any(canvas[i] == MASK for i in places):
            rows = logits_of(model, prompt, canvas)
            passes += 1
            left = [i for i in places if canvas[i] == MASK]
            left.sort(key=lambda i: -sureness(order, rows[i]))
            if threshold is None:
                keep = left[: block // per_block + (done < block % per_block)]
            else:
                keep = left[:1] + [i for i in left[1:] if sureness(order, rows[i]) >= threshold]
            for i in keep:
                canvas[i] = int(rows[i].argmax())
            done += 1
    return canvas, passes


def cut(canvas):
    return tuple(canvas[: canvas.index(EOS) + 1] if EOS in canvas else canvas)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"order": "margin"}, {"order": "entropy"}, {"budget": 1}, {"budget": 3}, {"budget": 4, "order": "margin"},
        {"block": 5}, {"block": 2}, {"block": 5, "budget": 4}, {"block": 2, "budget": 5, "order": "entropy"},
        {"block": 1}, {"threshold": 0.3}, {"threshold": 0.4, "block": 5}, {"threshold": 1.0},
    ],
)  # fmt: skip
def test_twin(fields, seed):
    model = host(seed)
    trace, _ = run(MaskedDiffusion(max_new_tokens=LENGTH, **fields), model=model)
    want = [slow(model, p, **fields) for p in PROMPTS]
    assert trace.tokens == tuple(cut(canvas) for canvas, _ in want)
    assert trace.texts == tuple(TOKENIZER.decode(list(row), skip_special_tokens=True) for row in trace.tokens)
    assert trace.forwards <= max(passes for _, passes in want) and trace.cache_bytes == 0
    if not any(EOS in canvas for canvas, _ in want):
        assert trace.forwards == max(passes for _, passes in want) and trace.stopped == ("length",) * 4


def test_the_thresholds_of_the_twin_matter():
    """Between one token a pass and all at once, and rows need different numbers of passes."""
    assert [slow(host(0), p, threshold=0.3)[1] for p in PROMPTS] == [4, 1, 6, 1]


class Said(nn.Module):
    """A host whose logits are written out: place by place of the canvas, whatever it is given."""

    def __init__(self, logits_LV):
        super().__init__()
        self.logits_LV = nn.Parameter(torch.tensor(logits_LV), requires_grad=False)
        self.embed = nn.Embedding(len(logits_LV[0]), 1)
        self.config = type("Config", (), {"mask_token_id": MASK})()
        self.seen = []

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask, use_cache):
        self.seen.append(input_ids.tolist())
        before = torch.zeros(len(input_ids), input_ids.shape[1] - len(self.logits_LV), self.logits_LV.shape[1])
        canvas = self.logits_LV.expand(len(input_ids), -1, -1)
        return type("Out", (), {"logits": torch.cat([before, canvas], 1)})()


BY_HAND = [
    # words   pad  end   2   mask   4    5
    [0.0, -9.0, 3.0, 99.0, 2.9, 0.0],  # the mask token is likeliest, and never taken
    [0.0, -9.0, 0.0, 0.0, 2.0, 0.0],
    [5.0, -9.0, 5.1, 0.0, 0.0, 0.0],
    [0.0, -9.0, 0.0, 0.0, 0.0, 4.0],
]


@pytest.mark.parametrize(
    ("order", "places"),
    [  # probabilities .47 .60 .51 .92; margins .05 .52 .05 .90; entropies .99 1.26 .78 .39
        ("confidence", [3, 1, 2, 0]), ("margin", [3, 1, 2, 0]), ("entropy", [3, 2, 0, 1]),
    ],
)  # fmt: skip
def test_orders_by_hand(order, places):
    model = Said(BY_HAND)
    _, drafts = run(MaskedDiffusion(max_new_tokens=4, order=order), [[4, 4]], model)
    opened = [d.open_BL[0].nonzero()[:, 0].tolist() for d in drafts] + [[]]
    assert [(set(a) - set(b)).pop() for a, b in zip(opened, opened[1:], strict=False)] == places
    assert drafts[-1].canvas_BL.tolist() == [[2, 4, 2, 5]]
    assert model.seen[0] == [[4, 4, MASK, MASK, MASK, MASK]]
    assert all(d.logits_BLV[..., MASK].eq(-torch.inf).all() for d in drafts)


@pytest.mark.parametrize(("length", "first"), [(5, 3), (40, 20)])
def test_ties_go_to_the_left(length, first):
    """Also on a long canvas, where a sort that need not keep the order of equals does not."""
    model = Said([[0.0, -9.0, 1.0, 0.0, 0.0, 0.0]] * length)
    _, drafts = run(MaskedDiffusion(max_new_tokens=length, budget=2), [[4]], model)
    assert drafts[0].open_BL.tolist() == [[True] * length]
    assert drafts[1].open_BL.tolist() == [[False] * first + [True] * (length - first)]


def test_a_threshold_is_reached_by_equality():
    """Two words at even odds have probability one half to the bit; a third at a quarter stays open."""
    even, low = [-99.0, -99.0, 0.0, -99.0, 0.0, -99.0], [0.0, -99.0, 0.0, -99.0, 0.0, 0.0]
    _, drafts = run(MaskedDiffusion(max_new_tokens=3, threshold=0.5), [[4]], Said([even, low, even]))
    assert drafts[0].canvas_BL.tolist() == [[2, MASK, 2]] and len(drafts) == 2


def test_the_surest_is_kept_below_the_threshold():
    _, drafts = run(MaskedDiffusion(max_new_tokens=4, threshold=0.99), [[4]], Said(BY_HAND))
    assert drafts[0].canvas_BL.tolist() == [[MASK, MASK, MASK, 5]] and len(drafts) == 4


def test_progress_and_blocks_are_told():
    _, drafts = run(MaskedDiffusion(max_new_tokens=4, block=2, budget=3), [[4]], Said(BY_HAND))
    assert [d.progress_B.tolist() for d in drafts] == [[0.0], [1 / 3], [2 / 3]]
    assert [d.block_BL[0].tolist() for d in drafts] == [[True, True, False, False]] * 2 + [[False, False, True, True]]
    _, drafts = run(MaskedDiffusion(max_new_tokens=4, threshold=0.55), [[4]], Said(BY_HAND))
    assert [d.progress_B.tolist() for d in drafts] == [[0.0], [0.5], [0.75]]


def test_the_budget_over_blocks():
    assert stretches(7, 3) == [3, 2, 2] and stretches(6, 3) == [2, 2, 2] and stretches(2, 3) == [1, 1, 0]
    assert shared_out(4, [5, 5]) == [2, 2] and shared_out(5, [5, 5]) == [3, 2] and shared_out(99, [4, 2]) == [4, 2]
    assert shared_out(7, [4, 4, 2]) == [3, 2, 2] and shared_out(9, [4, 4, 2]) == [4, 3, 2] and shared_out(3, []) == []
    for block, budget, passes in ((4, None, 10), (4, 3, 3), (4, 99, 10), (None, 4, 4), (3, 7, 7)):
        assert run(MaskedDiffusion(max_new_tokens=10, block=block, budget=budget), ["a"], host(1))[0].forwards == passes


def ending(place):
    """A host that fills place 0 first, then on to the right, with an end token at `place`."""
    rows = [[0.0, -9.0, 9.0 - i, 0.0, 0.0, 0.0] for i in range(6)]
    rows[place] = [0.0, 9.0 - place, 0.0, 0.0, 0.0, 0.0]
    return Said(rows)


@pytest.mark.parametrize(("place", "block"), [(0, None), (2, None), (2, 2), (5, 3)])
def test_a_row_is_done_when_its_text_is(place, block):
    """What stands behind the first end token is neither kept nor waited for."""
    method = MaskedDiffusion(max_new_tokens=6, block=block)
    decoding = method.steps([(ending(place), TOKENIZER)], [[4]], Context())
    drafts, trace = list(decoding), decoding.trace()
    assert trace.tokens == ((2,) * place + (EOS,),) and trace.stopped == ("eos",)
    assert trace.forwards == len(drafts) == place + 1
    assert drafts[-1].texts == trace.texts and all(d.texts == ("",) for d in drafts[:-1])


def test_an_end_token_before_open_places_is_waited_for():
    """The end token comes first and the places before it later: the text is not done before they are."""
    rows = [[0.0, -9.0, 1.0 + i, 0.0, 0.0, 0.0] for i in range(4)]
    rows[3] = [0.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    trace, drafts = run(MaskedDiffusion(max_new_tokens=4), [[4]], Said(rows))
    assert trace.tokens == ((2, 2, 2, EOS),) and len(drafts) == 4


def test_the_generation_config_ends_too():
    model = Said([[0.0, -9.0, 0.0, 0.0, 9.0, 0.0]] * 3)
    model.generation_config = type("Config", (), {"eos_token_id": [4, 5]})()
    trace, _ = run(MaskedDiffusion(max_new_tokens=3), [[2]], model)
    assert trace.tokens == ((4,),) and trace.stopped == ("eos",)


def test_done_rows_leave_the_batch():
    """Rows of different speed: the passes see only those that still run, and all are what they are alone."""
    method, model = MaskedDiffusion(max_new_tokens=LENGTH, threshold=0.3), host(0)
    trace, drafts = run(method, model=model)
    alone = [run(method, [p], model) for p in PROMPTS]
    assert trace.tokens == tuple(t.tokens[0] for t, _ in alone)
    sizes = [len(d.rows) for d in drafts]
    assert sizes[0] == 4 and sizes[-1] < 4
    assert [sum(row in d.rows for d in drafts) for row in range(4)] == [len(d) for _, d in alone]
    assert trace.forwards == max(len(d) for _, d in alone)
    for d in drafts:
        assert d.logits_BLV.shape[:2] == d.canvas_BL.shape == (len(d.rows), LENGTH)
    said = [row for d in drafts for row, text in enumerate(d.texts) if text]
    assert sorted(said) == [0, 1, 2, 3]


@pytest.mark.parametrize("fields", [{"temperature": 1.0}, {"order": "random"}, {"order": "random", "temperature": 0.7}])
def test_what_a_row_draws_is_its_own(fields):
    method = MaskedDiffusion(max_new_tokens=LENGTH, **fields)
    trace, _ = run(method, PROMPTS + PROMPTS[:1])
    backwards, _ = run(method, PROMPTS[::-1])
    assert trace.tokens[:4] == backwards.tokens[::-1]
    assert trace.tokens[4] != trace.tokens[0]  # an equal prompt draws its own
    assert run(method, seed=1)[0].tokens != trace.tokens[:4] == run(method, seed=0)[0].tokens


def test_tokens_are_drawn_from_the_softmax():
    """4,000 rows of one place, at temperature 2: frequencies of softmax(logits / 2)."""
    model = Said([[1.0, -9.0, 2.0, 5.0, 0.0, -1.0]])
    trace, _ = run(MaskedDiffusion(max_new_tokens=1, temperature=2.0), [[4]] * 4000, model)
    got = torch.tensor([row[0] for row in trace.tokens]).bincount(minlength=6) / 4000
    want = torch.tensor([1.0, -9.0, 2.0, -torch.inf, 0.0, -1.0]).div(2).softmax(-1)
    assert (got - want).abs().max() < 0.03 and got[MASK] == 0


def test_confidence_is_not_heated():
    """The order goes by the model's own probability of the token drawn, whatever the temperature."""
    rows, seen = [[-99.0, -99.0, 3.0, -99.0, 0.0, -99.0], [-99.0, -99.0, 1.0, -99.0, 0.0, -99.0]], set()
    sure = torch.tensor(rows).softmax(-1)
    for seed in range(60):
        decoding = MaskedDiffusion(max_new_tokens=2, temperature=9.0).steps(
            [(Said(rows), TOKENIZER)], [[4]], Context(seed=seed)
        )
        draft = next(iter(decoding))
        place = int((draft.canvas_BL[0] != MASK).nonzero()[0, 0])
        seen.add((place, int(draft.canvas_BL[0, place])))
    # of (.95 or .05) and (.73 or .27) the larger goes first: never the unlikely word of the first place
    assert sure[0, 2] > sure[1, 2] > sure[1, 4] > sure[0, 4] and seen == {(0, 2), (1, 2), (1, 4)}


def test_random_order_is_any_order():
    """Over seeds every place comes first about as often."""
    firsts = []
    for seed in range(300):
        decoding = MaskedDiffusion(max_new_tokens=4, order="random").steps(
            [(Said(BY_HAND), TOKENIZER)], [[4]], Context(seed=seed)
        )
        draft = next(iter(decoding))
        firsts.append(int((draft.canvas_BL[0] != MASK).nonzero()[0, 0]))
    counts = torch.tensor(firsts).bincount(minlength=4)
    assert counts.min() > 45 and counts.max() < 110


def test_an_anchor_stands_from_the_start():
    model, words = host(1), TOKENIZER(" = 7")["input_ids"]
    method = MaskedDiffusion(max_new_tokens=LENGTH, anchor=" = 7", anchor_at=4)
    trace, drafts = run(method, model=model)
    stop = 4 + len(words)
    assert all(d.canvas_BL[:, 4:stop].tolist() == [words] * len(d.rows) for d in drafts)
    assert not drafts[0].open_BL[:, 4:stop].any() and drafts[0].open_BL.sum(1).tolist() == [LENGTH - len(words)] * 4
    assert trace.forwards == LENGTH - len(words)
    at_start, _ = run(method.replace(anchor_at=0, block=2), model=model)
    assert all(row[: len(words)] == tuple(words) for row in at_start.tokens)
    assert at_start.forwards == LENGTH - len(words)
    whole, drafts = run(MaskedDiffusion(max_new_tokens=len(words), anchor=" = 7"), model=model)
    assert whole.tokens == (tuple(words),) * 4 and whole.forwards == 0 and drafts == []
    with pytest.raises(LuthierError, match=f"the anchor ends at place {8 + len(words)}, the canvas at 10"):
        run(method.replace(anchor_at=8), model=model)


def test_progress_under_a_threshold_leaves_the_anchor_out():
    method = MaskedDiffusion(max_new_tokens=LENGTH, anchor="7", threshold=1.0)
    _, drafts = run(method, ["a"])
    assert [d.progress_B.item() for d in drafts] == pytest.approx([i / 9 for i in range(9)])


def test_an_early_stop_keeps_what_is_sure():
    decoding = MaskedDiffusion(max_new_tokens=6).steps([(ending(5), TOKENIZER)], [[4], [5, 5]], Context())
    steps = iter(decoding)
    next(steps), next(steps)
    trace = decoding.trace()
    assert trace.tokens == ((2, 2), (2, 2)) and trace.stopped == ("", "") and trace.forwards == 2
    assert len(list(steps)) == 4 and decoding.trace().stopped == ("eos", "eos")


def test_a_user_may_fill():
    """Rows that are filled are done; the others go on as they would."""
    method, model = MaskedDiffusion(max_new_tokens=LENGTH), host(1)
    plain, _ = run(method, model=model)
    decoding = method.steps([(model, TOKENIZER)], PROMPTS, Context())
    sizes = []
    for place, draft in enumerate(decoding):
        sizes.append(len(draft.rows))
        if place == 2:
            before, best = draft.open_BL.clone(), draft.logits_BLV.argmax(-1)
            draft.fill(torch.tensor([False, True, False, True]))
            assert (draft.canvas_BL[1][before[1]] == best[1][before[1]]).all()
            assert [bool(t) for t in draft.texts] == [False, True, False, True]
    assert sizes == [4] * 3 + [2] * 7
    filled = decoding.trace().tokens
    assert (filled[0], filled[2]) == (plain.tokens[0], plain.tokens[2]) and filled[1] != plain.tokens[1]


def test_a_row_with_fewer_masks_keeps_its_tokens():
    """Dream's code keeps in every row as many as the mean of the rows' masks has; here every row goes on by itself."""
    method, model = MaskedDiffusion(max_new_tokens=LENGTH, budget=2), host(1)
    plain, _ = run(method, prompts=PROMPTS[:2], model=model)
    decoding = method.steps([(model, TOKENIZER)], PROMPTS[:2], Context(seed=0, step="golden"))
    drafts = iter(decoding)
    first = next(drafts)
    given = torch.full((LENGTH,), 7)
    given[-1] = MASK  # a user leaves one place of the second row open
    first.canvas_BL[1] = given
    masks = (first.canvas_BL == MASK).sum(1)
    last = next(drafts)
    assert masks.tolist() == [5, 1] and int(masks.sum() / 2) == 3, "Dream: 3 of 5, and 2 known tokens masked again"
    assert not (last.canvas_BL == MASK).any() and (last.canvas_BL[1, :-1] == 7).all()
    assert next(drafts, None) is None and decoding.trace().tokens[0] == plain.tokens[0]


def test_masked_language_models_and_our_decoder():
    """BERT takes positions but cannot leave logits out; ours takes both. Batches are single prompts for both."""
    config = BertConfig(vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=48)  # fmt: skip
    bert = tiny.redraw_(BertForMaskedLM(config), 0).eval()
    ours = build_model({
        "vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "initializer_range": 0.2, "mask_token_id": MASK,
        "slots": {"mixer": {"use": "block.attention", "set": {"causal": False}}},
    }).eval()  # fmt: skip
    for model in (bert, ours):
        method = MaskedDiffusion(max_new_tokens=LENGTH, mask_token=MASK, budget=4)
        trace, _ = run(method, model=model)
        assert trace.tokens == tuple(cut(slow_budget(model, p)) for p in PROMPTS)
    long = TOKENIZER(PROMPTS[1])["input_ids"] * 2
    room = 48 - len(long)
    assert len(run(MaskedDiffusion(max_new_tokens=99, mask_token=MASK), [long], bert)[0].tokens[0]) <= room
    with pytest.raises(LuthierError, match="no room"):
        run(MaskedDiffusion(mask_token=MASK), [[*long, *long]], bert)


def slow_budget(model, prompt):
    """Four passes over ten places: 3, 3, 2, 2."""
    canvas = [MASK] * LENGTH
    for keep in (3, 3, 2, 2):
        rows = logits_of(model, prompt, canvas)
        left = sorted((i for i in range(LENGTH) if canvas[i] == MASK), key=lambda i: -sureness("confidence", rows[i]))
        for i in left[:keep]:
            canvas[i] = int(rows[i].argmax())
    return canvas


def test_only_the_canvas_pays_for_logits():
    model, seen = host(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    run(MaskedDiffusion(max_new_tokens=3), model=model)
    assert seen == [(4, 3, 32)] * 3


def test_the_tokenizer_may_name_the_mask():
    model, tokenizer = tiny.llama(is_causal=False), tiny.tokenizer()
    with pytest.raises(LuthierError, match="the model names no mask token"):
        list(MaskedDiffusion().steps([(model, tokenizer)], ["a"], Context()))
    tokenizer.mask_token = tiny.START
    decoding = MaskedDiffusion(max_new_tokens=4).steps([(model, tokenizer)], ["a"], Context())
    first = next(iter(decoding))
    assert first.logits_BLV[..., tokenizer.mask_token_id].eq(-torch.inf).all()


def test_no_prompts_no_passes():
    trace, drafts = run(MaskedDiffusion(), [])
    assert drafts == [] and trace.tokens == () and trace.forwards == 0


def test_what_it_cannot_do_is_one_line():
    cases = [
        (lambda: MaskedDiffusion(threshold=0.9, budget=4), "a threshold leaves no fixed budget"),
        (lambda: MaskedDiffusion(threshold=0.9, order="margin"), "a threshold is of confidence"),
        (lambda: run(MaskedDiffusion(max_new_tokens=10, block=3, budget=3)), "a budget of 3 is below one pass a block"),
        (lambda: run(MaskedDiffusion(), model=tiny.llama(mask_token_id=3)), "looks both ways"),
        (lambda: run(MaskedDiffusion(), [[]]), "a prompt has no tokens"),
        (lambda: MaskedDiffusion().steps([], ["a"], Context()), "expected one model, got 0"),
    ]
    for action, says in cases:
        with pytest.raises(LuthierError, match=says) as fault:
            action()
        assert "\n" not in str(fault.value) and "decode.masked_diffusion" in str(fault.value)


def test_a_limit_reaches_the_host():
    from luthier.decode.prophet import Prophet
    from luthier.decode.sample import Sample

    assert limited(Sample(), 7).max_new_tokens == limited(MaskedDiffusion(block=2), 7).max_new_tokens == 7
    assert limited(Prophet(reduce="min"), 7) == Prophet(reduce="min", host=MaskedDiffusion(max_new_tokens=7))


def test_passes_are_counted_once_a_batch():
    model = host()
    with counted(model) as calls:
        trace, _ = run(MaskedDiffusion(max_new_tokens=LENGTH, budget=5), model=model)
    assert trace.forwards == len(calls) == 5


def test_defaults():
    """A canvas of 128, one place a pass, the likeliest token where it is surest."""
    want = MaskedDiffusion(max_new_tokens=128, order="confidence", temperature=0.0, anchor="", anchor_at=0)
    assert MaskedDiffusion() == want
    assert MaskedDiffusion().budget is MaskedDiffusion().block is MaskedDiffusion().threshold is None


def test_an_anchor_is_its_words_alone():
    """No beginning-of-text token comes into the middle of the canvas."""

    class Opening:
        eos_token_id = mask_token_id = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5] * add_special_tokens + [4, 4]}

        def decode(self, ids, skip_special_tokens=True):
            return ""

    method = MaskedDiffusion(max_new_tokens=4, anchor="so", anchor_at=1)
    drafts = list(method.steps([(Said(BY_HAND), Opening())], [[2]], Context()))
    assert drafts[-1].canvas_BL.tolist() == [[2, 4, 4, 5]]


def test_draws_are_keyed_by_prompt_and_place_among_equals():
    """Random order is the descending order of the numbers of generator ("canvas", prompt, how many equals before)."""
    ctx = Context(seed=5, step="golden")
    decoding = MaskedDiffusion(max_new_tokens=4, order="random").steps(
        [(Said(BY_HAND), TOKENIZER)], [[4, 5], [4], [4, 5], [4, 5]], ctx
    )
    first = next(iter(decoding)).canvas_BL
    for row, (prompt, nth) in enumerate((((4, 5), 0), ((4,), 0), ((4, 5), 1), ((4, 5), 2))):
        u = torch.rand(4, generator=ctx.rng("canvas", prompt, nth))
        assert (first[row] != MASK).nonzero()[0, 0] == u.argmax()


def test_room_and_padding():
    """A model that names no context has room for all but ever; shorter prompts are padded on the left by token 0."""
    model = Said(BY_HAND)
    decoding = MaskedDiffusion(max_new_tokens=4, budget=1).steps([(model, TOKENIZER)], [[4, 5, 2], [5]], Context())
    assert decoding.host.room == 2**30 - 3
    list(decoding)
    assert [row[:3] for row in model.seen[0]] == [[4, 5, 2], [0, 0, 5]]
    assert MaskedDiffusion().steps([(host(), TOKENIZER)], [], Context()).host.room == 256
