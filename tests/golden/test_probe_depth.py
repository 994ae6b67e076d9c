"""probe.depth against models whose layers are deleted, scored one item at a time by transformers."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors

from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.kit.encode import collate, encode, prompt_ids
from luthier.kit.stats import spearman
from luthier.model import build_model
from luthier.probe.depth import Depth
from luthier.testing import tiny
from luthier.testing.measure import untouched

TOKENIZER = tiny.tokenizer()
LAYERS = 5
TASKS = tiny.task_data(test=8)
TEXT = tiny.text_data(test=5)


@pytest.fixture(scope="module")
def model():
    """Five layers that have half learnt the sums, so that skipping one loses something."""
    learner = tiny.llama(2, num_hidden_layers=LAYERS)
    batch = collate([encode(item, TOKENIZER) for item in TASKS.test], 0)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-3)
    for _ in range(40):
        learner(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return learner


def without(model, first, last):
    """A copy whose layers are deleted, the rest renumbered."""
    other = copy.deepcopy(model)
    for i in range(last, first - 1, -1):
        del other.model.layers[i]
    for i, layer in enumerate(other.model.layers):
        layer.self_attn.layer_idx = i
    other.config.num_hidden_layers = len(other.model.layers)
    return other


def table(model, data=TASKS, seed=0, **fields):
    return Depth(**fields).measure([tiny.subject("m", model)], [data], Context(seed=seed))


def values(model, data=TASKS, **fields):
    """{(metric, layer, last): row}"""
    return {(r["metric"], r["layer"], r["last"]): r for r in table(model, data, **fields).dicts()}


@torch.no_grad()
def item_nll(model, item):
    """Summed nats of the item's labels, and how many there are."""
    row = encode(item, TOKENIZER)
    return model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item() * row.count, row.count


def slow_mean(pairs):
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


@pytest.mark.parametrize(("protocols", "skip"), [(["nll"], None), (["nll"], ["1-3"]), (["continuation"], ["0", "4"])])
def test_the_plan_counts_the_passes_there_are(model, protocols, skip):
    rows = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    table(model, protocols=protocols, skip=skip, options=3)
    hook.remove()
    assert Depth(protocols=protocols, skip=skip, options=3).passes(LAYERS) == sum(rows) / len(TASKS.test)


def test_the_plan_counts_protocols_and_ranges():
    assert Depth(protocols=["nll"], skip=[]).passes(30) == 2
    assert Depth(protocols=["likelihood", "generation"], skip=["1-9"]).passes(30) == 1 + 2 * 3
    assert Depth().passes(30) == 1 + 31 * 8


@pytest.mark.parametrize("data", [TASKS, TEXT], ids=["tasks", "text"])
@pytest.mark.parametrize("batch", [1, 32])
def test_nll_is_that_of_models_without_the_layers(model, data, batch):
    ranges = {"0": (0, 0), "2": (2, 2), "1-3": (1, 3), "-1": (4, 4), "-2--1": (3, 4)}
    found = values(model, data, protocols=["nll"], skip=list(ranges), batch=batch)
    whole = [item_nll(model, item) for item in data.test]
    assert found["nll", None, None]["value"] == pytest.approx(slow_mean(whole), rel=1e-5)
    assert found["nll", None, None]["change"] is None
    for first, last in ranges.values():
        other = [item_nll(without(model, first, last), item) for item in data.test]
        row = found["nll", first, last]
        assert row["value"] == pytest.approx(slow_mean(other), rel=1e-5)
        change = slow_mean(other) - slow_mean(whole)
        assert row["change"] == pytest.approx(change, abs=1e-5) and row["n"] == len(data.test)
        gaps = [(a - b) - change * n for (a, n), (b, _) in zip(other, whole, strict=True)]
        weight, n = sum(b for _, b in whole), len(whole)
        assert row["error"] == pytest.approx(math.sqrt(sum(g * g for g in gaps) * n / (n - 1)) / weight, rel=1e-3)


def generated(model, new):
    """Share of right answers of transformers' own greedy generation, one prompt at a time."""
    right = 0
    for item in TASKS.test:
        ids = torch.tensor([prompt_ids(item, TOKENIZER)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
        )
        text = TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right += TASKS.score(item, text) == 1
    return right / len(TASKS.test)


@pytest.mark.parametrize("batch", [1, 3])
def test_generation_is_that_of_models_without_the_layers(model, batch):
    """The cache of a skipped layer is right: transformers generates the same from a model that lacks it."""
    with untouched(model):
        found = values(model, protocols=["generation"], skip=["3", "4", "1-2"], batch=batch, max_new_tokens=5)
    assert found["generation", None, None]["value"] == generated(model, 5) > 0.3
    shares = [found["generation", a, b]["value"] for a, b in ((3, 3), (4, 4), (1, 2))]
    assert shares == [generated(without(model, a, b), 5) for a, b in ((3, 3), (4, 4), (1, 2))]
    assert len({*shares, generated(model, 5)}) > 1


@torch.no_grad()
def chosen(model, item, texts):
    """Which option has the likeliest text, by one pass an option."""
    sums = [item_nll(model, tiny.item(prompt=item.prompt, answer=text))[0] for text in texts]
    return texts[sums.index(min(sums))]


def test_continuation_with_all_answers_as_options(model):
    """Eight items, seven answers or fewer: with as many options as there are answers nothing is left to chance."""
    answers = sorted({item.answer for item in TASKS.test})
    found = values(model, protocols=["continuation"], options=len(answers), skip=["0", "3"])
    for key, host in (((None, None), model), ((0, 0), without(model, 0, 0)), ((3, 3), without(model, 3, 3))):
        right = [chosen(host, item, answers) == item.answer for item in TASKS.test]
        assert found[("continuation", *key)]["value"] == sum(right) / 8
    whole, row = found["continuation", None, None]["value"], found["continuation", 0, 0]
    assert row["change"] == row["value"] - whole


class Letters(torch.nn.Module):
    """Gives the letter `favoured` the largest logit, then B, A, the others."""

    def __init__(self, favoured):
        super().__init__()
        self.config = SimpleNamespace(model_type="letters")
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])
        self.layers[0].weight = torch.nn.Parameter(torch.zeros(1))
        self.favoured, self.seen = favoured, []

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        self.layers[0](input_ids[..., None].float())
        self.seen += [TOKENIZER.decode(row[keep.bool()]) for row, keep in zip(input_ids, attention_mask, strict=True)]
        logits = torch.zeros(*input_ids.shape, tiny.VOCAB)
        for height, letter in enumerate("DCAB", 1):
            logits[..., TOKENIZER(letter)["input_ids"][0]] = height
        logits[..., TOKENIZER(self.favoured)["input_ids"][0]] = 9
        return SimpleNamespace(logits=logits)


def test_letters_are_listed_and_scored():
    """The prompt holds every option once; the share of items whose right letter is the favoured one comes out."""
    model = Letters("C")
    found = values(model, protocols=["likelihood"], skip=[])
    share = 0
    for item, shown in zip(sorted(TASKS.test, key=lambda i: i.id), sorted_prompts(model), strict=True):
        lines = {line[0]: line[3:] for line in shown.split("\n") if line[1:3] == ". "}
        assert list(lines) == list("ABCD") and len(set(lines.values())) == 4
        assert item.answer in lines.values() and "Answer with the letter." in shown
        share += lines["C"] == item.answer
    assert found["likelihood", None, None]["value"] == share / 8 and 0 < share < 8
    assert (
        values(Letters("E"), protocols=["likelihood"], skip=[])["likelihood", None, None]["value"]
        == sum(
            next(line for line in shown.split("\n") if line[:3] == "B. ")[3:] == item.answer
            for item, shown in zip(sorted(TASKS.test, key=lambda i: i.id), sorted_prompts(model), strict=True)
        )
        / 8
    )  # E is no option: the next best letter counts


def test_letters_are_those_of_a_tokenizer_that_starts_every_text():
    """A tokenizer that puts a token before all it is given: the letters' own tokens are compared all the same."""
    starts = tiny.tokenizer()
    starts.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.START} $A", special_tokens=[(tiny.START, starts.convert_tokens_to_ids(tiny.START))]
    )
    assert len(starts("A")["input_ids"]) == 2
    method, shares = Depth(protocols=["likelihood"], skip=[]), []
    for tokenizer in (TOKENIZER, starts):
        subjects = [tiny.TinySubject(letter, Letters(letter), tokenizer) for letter in "ABCD"]
        shares.append([row["value"] for row in method.measure(subjects, [TASKS], Context()).dicts()])
    assert shares[0] == shares[1] and sum(shares[0]) == 1 and len(set(shares[0])) > 1


def sorted_prompts(model):
    """What the model was shown, in the order of the items' ids."""
    shown = {item.id: next(s for s in model.seen if f"\n{item.prompt}\n" in s) for item in TASKS.test}
    return [shown[id_] for id_ in sorted(shown)]


def test_options_depend_on_the_item_and_the_seed():
    def prompts(seed, data=TASKS):
        model = Letters("A")
        table(model, data, seed, protocols=["likelihood"], skip=[], max_items=2)
        return model.seen

    assert prompts(0) == prompts(0) != prompts(1)


def test_angles(model):
    found = values(model, TEXT, protocols=["nll"], skip=["1", "1-3", "4"])
    for first, last in ((1, 1), (1, 3), (4, 4)):
        angle = 0.0
        for item in TEXT.test:
            held = []
            hook = model.model.norm.register_forward_pre_hook(lambda _, args, held=held: held.append(args[0]))
            with torch.no_grad():
                states = model(
                    torch.tensor([encode(item, TOKENIZER).input_ids]), output_hidden_states=True
                ).hidden_states
            hook.remove()
            a, b = states[first][0, -1], (held[0] if last == LAYERS - 1 else states[last + 1])[0, -1]
            angle += math.acos(torch.cosine_similarity(a.double(), b.double(), dim=0)) / math.pi / len(TEXT.test)
        row = found["angular", first, last]
        assert row["value"] == pytest.approx(angle, abs=1e-6) and row["change"] is None


def naive_spearman(a, b):
    """Pearson's correlation of the ranks, where no two are equal."""
    ra, rb = ([sorted(x).index(v) for v in x] for x in (a, b))
    mean = (len(a) - 1) / 2
    cov = sum((x - mean) * (y - mean) for x, y in zip(ra, rb, strict=True))
    return cov / sum((x - mean) ** 2 for x in ra)


def test_rank_of_the_angle_by_harm(model):
    """Harm is a higher loss, but a lower accuracy; fewer than three ranges, or none that differ, have no rank."""
    whole = table(model)
    rows = whole.dicts()
    angle = [r["value"] for r in rows if r["metric"] == "angular"]
    harm = [r["change"] for r in rows if r["metric"] == "nll" and r["layer"] is not None]
    rank = {r["metric"]: r["value"] for r in rows if r["metric"].startswith("rank")}
    assert rank["rank of angular by nll"] == pytest.approx(naive_spearman(angle, harm))
    lost = [-r["change"] for r in rows if r["metric"] == "continuation" and r["layer"] is not None]
    assert len(set(lost)) > 1
    assert rank["rank of angular by continuation"] == spearman(angle, lost)
    assert not [m for m, *_ in values(model, protocols=["nll"], skip=["0", "1"]) if m.startswith("rank")]
    most = sorted(range(LAYERS), key=lambda i: -harm[i])
    least = sorted(range(LAYERS), key=lambda i: angle[i])
    said = [", ".join(map(str, order)) for order in (most, least)]
    note = f"m on sums: by nll the layers that matter most are {said[0]}; the smallest angles have {said[1]}"
    assert note in whole.notes


def test_ranges_are_named_in_remarks(model):
    notes = table(model, protocols=["nll"], skip=["0", "1-2", "3-4"]).notes
    assert len(notes) == 1 and "1-2" in notes[0] and "3-4" in notes[0] and "0-0" not in notes[0]


def test_nothing_skipped_leaves_the_whole_model(model):
    found = values(model, skip=[])
    assert set(found) == {(p, None, None) for p in ("nll", "likelihood", "continuation", "generation")}


def test_each_layer_by_itself_is_the_default(model):
    found = values(model, TEXT)
    assert [k[1:] for k in found if k[0] == "nll"] == [(None, None), *((i, i) for i in range(LAYERS))]
    assert {k[0] for k in found} == {"nll", "angular", "rank of angular by nll"}


def test_what_the_data_do_not_allow_is_noted(model):
    notes = table(model, TEXT, skip=[]).notes
    assert notes == tuple(
        f"text: no {p}: there is nothing to choose or to score" for p in ("likelihood", "continuation", "generation")
    )
    same = tiny.TinyData("same", (), [tiny.item(prompt=f"{i} * 0 =", answer="0") for i in range(3)])
    assert {k[0] for k in values(model, same, skip=[])} == {"nll"}
    unscored = tiny.TinyData("unscored", (), TASKS.test)
    assert {k[0] for k in values(model, unscored, skip=[])} == {"nll", "likelihood", "continuation"}


def test_plain_text_among_tasks_has_nothing_to_choose(model):
    """Shares are over the same items whatever the protocol, so one item without a prompt leaves the loss alone."""
    mixed = tiny.TinyData("mixed", (), [*TASKS.test[:3], TEXT.test[0]])
    found = values(model, mixed, skip=[])
    assert set(found) == {("nll", None, None)} and found["nll", None, None]["n"] == 4


def test_limits(model):
    assert {r["n"] for r in table(model, max_items=3, skip=["0"]).dicts()} == {3}
    first = table(model, tiny.TinyData("text", (), [tiny.item(text=TEXT.test[0].text)]), protocols=["nll"], skip=[])
    assert table(model, TEXT, max_items=1, protocols=["nll"], skip=[]).dicts()[0]["value"] == first.dicts()[0]["value"]
    cut = table(model, TEXT, max_items=1, max_length=8, protocols=["nll"], skip=[])
    assert cut.dicts()[0]["value"] != first.dicts()[0]["value"]
    mixed = tiny.TinyData("d", (), [tiny.item(text="a"), tiny.item(prompt="unanswered"), TEXT.test[0]])
    assert table(model, mixed, protocols=["nll"], skip=[]).dicts()[0]["n"] == 1
    with pytest.raises(LuthierError, match="anything to predict"):
        table(model, tiny.TinyData("d", (), [tiny.item(text="a")]))


@pytest.mark.parametrize("text", ["5", "-6", "3-2", "0-5", "-1-0"])
def test_layers_that_are_not_there(model, text):
    with pytest.raises(LuthierError, match=f"no layers {text} of 5"):
        table(model, skip=[text])


@pytest.mark.parametrize("text", ["", "a", "1,2", "1-", "1--", "1-2-3"])
def test_words_that_are_no_range(text):
    with pytest.raises(LuthierError, match="no range"):
        Depth(skip=[text])


def test_a_decoder_of_ours(model):
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 24, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
    ours = build_model(sizes, 1).eval()
    found = values(ours, protocols=["nll", "generation"], skip=["1"], max_new_tokens=3)
    shorter = build_model({**sizes, "num_hidden_layers": 2}, 1).eval()
    weights = {n.replace("layers.2.", "layers.1."): v for n, v in ours.state_dict().items() if "layers.1." not in n}
    shorter.load_state_dict(weights)
    assert found["nll", 1, 1]["value"] == pytest.approx(slow_mean([item_nll(shorter, i) for i in TASKS.test]), rel=1e-5)
    assert found["generation", 1, 1]["value"] == generated(shorter, 3)


def test_released_code_removes_others(model):
    """The released loop deletes by index, going up: of layers 1 and 2 it removes 1 and 3."""
    released = copy.deepcopy(model)
    for i in (1, 2):
        del released.model.layers[i]
    for kept, i in zip(released.model.layers, (0, 2, 4), strict=True):
        assert torch.equal(kept.self_attn.q_proj.weight, model.model.layers[i].self_attn.q_proj.weight)
    for i, layer in enumerate(released.model.layers):
        layer.self_attn.layer_idx = i
    theirs = slow_mean([item_nll(released, item) for item in TASKS.test])
    ours = values(model, protocols=["nll"], skip=["1-2"])["nll", 1, 2]["value"]
    assert ours == pytest.approx(slow_mean([item_nll(without(model, 1, 2), i) for i in TASKS.test]), rel=1e-5)
    assert abs(theirs - ours) > 0.01


def test_what_is_asked_unless_told_otherwise():
    assert Depth().to_dict()["set"] | {"decode": None} == {
        "protocols": ["nll", "likelihood", "continuation", "generation"], "skip": None, "options": 4, "max_items": 32,
        "max_length": 512, "max_new_tokens": 32, "batch": 32, "decode": None,
    }  # fmt: skip
    assert Depth(options=2).options == 2 and Depth(options=26).options == 26
    for wrong in (1, 27):
        with pytest.raises(LuthierError, match="out of range"):
            Depth(options=wrong)


def test_two_items_two_answers(model):
    """The error of two paired changes is half their difference, weighted; two answers are enough to choose."""
    data = tiny.TinyData("two", (), [tiny.item(prompt="0 + 1 =", answer="1"), tiny.item(prompt="0 + 5 =", answer="55")])
    found = values(model, data, skip=["2"], protocols=["nll", "continuation"])
    (a, n), (b, m) = (item_nll(without(model, 2, 2), item) for item in data.test)
    (c, _), (d, _) = (item_nll(model, item) for item in data.test)
    change = (a + b - c - d) / (n + m)
    error = math.sqrt(2 * ((a - c - change * n) ** 2 + (b - d - change * m) ** 2)) / (n + m)
    assert found["nll", 2, 2]["error"] == pytest.approx(error, rel=1e-3)
    assert ("continuation", 2, 2) in found


def test_a_remark_names_five_of_each(model):
    (note,) = table(model, TEXT, protocols=["nll"], skip=["0", "1", "2", "3", "4", "0-1", "1-2"]).notes
    assert [part.count(",") for part in note.split(";")] == [4, 4]
