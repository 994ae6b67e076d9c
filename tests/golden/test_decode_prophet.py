"""decode.prophet against a twin of the paper's rule in plain Python, on hosts whose gaps are written out."""

import math

import pytest
import torch
from torch import nn

from luthier.decode.masked_diffusion import MaskedDiffusion
from luthier.decode.prophet import EARLY, LATE, TABLE, Prophet, gap
from luthier.decode.sample import Sample
from luthier.errors import LuthierError
from luthier.kit.canvas import Draft
from luthier.kit.context import Context
from luthier.testing import tiny

TOKENIZER = tiny.tokenizer()
PROMPTS = ["3 + 4 =", "the number after 12 is", "a", "7 is the number before 8, and after"]
MASK, WORDS = 3, 8


class Gaps(nn.Module):
    """A host whose two largest logits differ by gaps[row of the prompt's first token][pass][place].

    At pass n place i prefers word 4, then 5, while n < turn, and the other way round from then on.
    """

    def __init__(self, gaps, turn=99):
        super().__init__()
        self.gaps, self.turn, self.passes = gaps, turn, 0
        self.embed = nn.Embedding(WORDS, 1)
        self.config = type("Config", (), {"mask_token_id": MASK})()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask, use_cache):
        rows = [[r for r in row if r > 5][0] - 6 for row in input_ids.tolist()]
        length = len(self.gaps[0][0])
        logits = torch.full((*input_ids.shape, WORDS), -9.0)
        likely, next_ = (4, 5) if self.passes < self.turn else (5, 4)
        for i, row in enumerate(rows):
            logits[i, -length:, likely] = 1.0 + torch.tensor(self.gaps[row][min(self.passes, len(self.gaps[row]) - 1)])
            logits[i, -length:, next_] = 1.0
        logits[..., MASK] = 50.0  # what the mask token gets is no rival
        self.passes += 1
        return type("Out", (), {"logits": logits})()


def run(method, model, rows=1, seed=0):
    decoding = method.steps([(model, TOKENIZER)], [[6 + i] for i in range(rows)], Context(seed=seed))
    drafts = list(decoding)
    return decoding.trace(), drafts


def host(length, **fields):
    return MaskedDiffusion(max_new_tokens=length, **fields)


def passes_of(gap_, length, **fields):
    """How many passes a row takes whose gap is the same everywhere and always."""
    return run(Prophet(host=host(length), **fields), Gaps([[[gap_] * length]]))[0].forwards


@pytest.mark.parametrize("length", [6, 10, 100])
@pytest.mark.parametrize("kind", [*TABLE, (6.0, 4.0, 1.0)])
def test_twin_of_the_papers_rule(length, kind):
    """Constant gaps: commit at the first step t of T where gap >= threshold((T - t) / T)."""
    high, middle, low = TABLE[kind] if isinstance(kind, str) else kind
    for gap_ in (high, high - 0.25, middle, middle - 0.25, low, low - 0.25):
        want = length
        for t in range(length, 0, -1):
            p = (length - t) / length
            if gap_ >= (high if p < 0.33 else middle if p < 0.67 else low):
                want = length - t + 1
                break
        assert passes_of(gap_, length, thresholds=kind) == want


def test_the_papers_table():
    assert TABLE == {"general": (7.5, 5.0, 2.5), "math": (8.0, 5.0, 3.5), "code": (7.5, 5.0, 4.5)}
    assert (EARLY, LATE) == (0.33, 0.67)
    method = Prophet()
    assert (method.thresholds, method.reduce, method.over, method.region) == ("general", "mean", "region", None)
    assert method.host == MaskedDiffusion()


def test_progress_starts_from_zero():
    """Four steps: progress 0, 1/4, 1/2, 3/4. The released code has 1/4, 1/2, 3/4, 1, and would fire one step early."""

    def released(gap_, steps=4):
        for step in range(1, steps + 1):
            level = 7.5 if step / steps < 0.33 else 5.0 if step / steps < 0.67 else 2.5
            if gap_ >= level:
                return step
        return steps

    assert passes_of(5.0, 4) == 3 and released(5.0) == 2
    assert passes_of(2.5, 4) == 4 and released(2.5) == 3
    assert passes_of(7.5, 4) == released(7.5) == 1


def test_five_places_are_not_a_longer_answer():
    """Eight answer places, the last three unsure: the mean over all stays below what the first five have."""
    gaps = [[[9.0] * 5 + [0.5] * 3]]
    short = run(Prophet(host=host(8), region=(0, 5)), Gaps(gaps))[0]
    whole = run(Prophet(host=host(8), region=(0, 8)), Gaps(gaps))[0]
    assert short.forwards == 1 and whole.forwards == 4  # mean 5.8125 suffices from progress 3/8 on


def test_the_likeliest_tokens_are_filled_in():
    """At temperature 50 the host draws; what the commit fills in is the likeliest token, of this pass, everywhere."""
    model = Gaps([[[0.0] * 12, [9.0] * 12]], turn=1)
    method = Prophet(host=host(12, temperature=50.0, order="random"))
    trace, drafts = run(method, model)
    assert trace.forwards == 2
    first = drafts[0].canvas_BL[0] != MASK
    assert first.sum() == 1
    committed = torch.tensor(trace.tokens[0])
    assert (committed[~first] == 5).all() and committed[first] == drafts[0].canvas_BL[0][first]


def test_rows_decide_for_themselves():
    """Three rows: sure at once, sure at the third pass, never."""
    gaps = [[[9.0] * 5], [[0.0] * 5, [0.0] * 5, [8.0] * 5], [[0.0] * 5]]
    trace, drafts = run(Prophet(host=host(5)), Gaps(gaps), rows=3)
    assert [d.rows for d in drafts] == [(0, 1, 2), (1, 2), (1, 2), (2,), (2,)]
    assert trace.forwards == 5 and trace.tokens == ((4,) * 5,) * 3 and trace.stopped == ("length",) * 3
    assert [[bool(t) for t in d.texts] for d in drafts][:3] == [[True, False, False], [False] * 3, [False, True, False]]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, 4.75), ({"reduce": "min"}, 2.0), ({"region": (1, 2)}, 5.0), ({"region": (2, 9)}, 7.0),
        ({"over": "masked"}, 16 / 3), ({"over": "masked", "reduce": "min"}, 2.0),
        ({"over": "masked", "region": (0, 2)}, 2.0), ({"over": "masked", "region": (0, 1)}, math.inf),
        ({"over": "masked", "region": (0, 1), "reduce": "min"}, math.inf), ({"over": "block"}, 2.5),
        ({"over": "block", "region": (1, 3)}, 2.0), ({"over": "block", "region": (3, 1)}, math.inf),
        ({"over": "block", "reduce": "min", "region": (0, 4)}, 2.0)
    ],
)  # fmt: skip
def test_what_is_looked_at(fields, want):
    """Gaps 3, 2, 8 and 6; the first place is filled; the block at work is the first two."""
    logits = torch.tensor([[[3.0, 0.0, -1.0], [2.0, 4.0, 0.0], [0.0, 0.0, 8.0], [0.0, 6.0, -torch.inf]]])
    draft = Draft(
        rows=(0,), logits_BLV=logits, open_BL=torch.tensor([[False, True, True, True]]),
        block_BL=torch.tensor([[True, True, False, False]]), progress_B=torch.zeros(1),
        canvas_BL=torch.zeros(1, 4, dtype=torch.long), _said=lambda draft: (),
    )  # fmt: skip
    assert gap(draft, Prophet(**fields)).tolist() == pytest.approx([want])


def test_filled_places_count_as_the_region_has_them():
    """The mean over the region includes places already visible, the mean over open ones does not."""
    sure_when_seen = [[[0.0, 0.0], [20.0, 1.0]]]
    assert run(Prophet(host=host(2)), Gaps(sure_when_seen))[1][1].open_BL.tolist() == [[False, True]]
    region = gap(run(Prophet(host=host(2)), Gaps(sure_when_seen))[1][1], Prophet())
    masked = gap(run(Prophet(host=host(2)), Gaps(sure_when_seen))[1][1], Prophet(over="masked"))
    assert region.tolist() == [10.5] and masked.tolist() == [1.0]


@pytest.mark.parametrize("fields", [{}, {"block": 3}, {"threshold": 0.3}, {"temperature": 1.0}, {"order": "random"}])
def test_without_thresholds_it_is_its_host(fields):
    model = tiny.llama(1, is_causal=False, mask_token_id=MASK)
    plain = host(9, **fields)
    pairs = [(model, TOKENIZER)]
    traces = []
    for method in (plain, Prophet(host=plain, thresholds=None), Prophet(host=plain, thresholds=(99.0, 99.0, 99.0))):
        decoding = method.steps(pairs, PROMPTS, Context(seed=3))
        for _ in decoding:
            pass
        traces.append(decoding.trace())
    assert traces[0] == traces[1] == traces[2]


def test_all_blocks_are_filled_at_once():
    """The commit does not stop at the end of the block at work."""
    trace, drafts = run(Prophet(host=host(9, block=3), over="block"), Gaps([[[0.0] * 9, [9.0] * 9]]))
    assert trace.forwards == 2 and drafts[1].block_BL.sum() == 3 and trace.tokens == ((4,) * 9,)


def test_a_host_with_a_threshold_counts_what_is_filled():
    """Progress is the share that is filled: four of six places at the first pass, so the third level applies."""
    gaps = [[[9.0] * 4 + [3.0] * 2, [3.0] * 6]]
    plain = host(6, threshold=0.99)
    assert run(plain, Gaps(gaps))[0].forwards == 3
    trace, drafts = run(Prophet(host=plain, reduce="min"), Gaps(gaps))
    assert trace.forwards == 3 and drafts[1].progress_B.tolist() == [pytest.approx(4 / 6)]  # 4/6 is below 0.67
    trace, _ = run(Prophet(host=host(6, threshold=0.99, anchor="a"), reduce="min", region=(1, 5)), Gaps(gaps))
    assert trace.forwards == 3
    gaps = [[[9.0] * 5 + [3.0] * 2, [3.0] * 7]]
    assert run(Prophet(host=host(7, threshold=0.99), reduce="min"), Gaps(gaps))[0].forwards == 2


def test_what_it_cannot_do_is_one_line():
    model = tiny.llama()
    with pytest.raises(LuthierError, match="decode.sample shows no drafts to fill; use decode.masked_diffusion"):
        list(Prophet(host=Sample()).steps([(model, TOKENIZER)], ["a"], Context()))
    with pytest.raises(LuthierError, match="the answer begins at place 4 of a canvas of 4"):
        run(Prophet(host=host(4), region=(4, 1)), Gaps([[[0.0] * 4]]))
    with pytest.raises(LuthierError, match="expected a method of shape Decode"):
        Prophet(host="merge.ties")
