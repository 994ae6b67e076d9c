"""objective.meap against a twin that goes label by label in plain Python, and what the released code draws."""

import math
import random

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.model import build_model
from luthier.objective.meap import Meap
from luthier.objective.next_token import NextToken
from luthier.testing import tiny
from luthier.testing.objective import batch

MASK = 3
CTX = Context(seed=4, step="golden")


class Seen:
    """A model that keeps what its body was given."""

    def __init__(self, model=None):
        self.model = model or tiny.llama(mask_token_id=MASK)
        self.inputs = []
        self.model.model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs):
        self.inputs.append(kwargs)

    def given(self, method, batch_, ctx=CTX):
        """The ids, mask and positions that the body saw, and the loss."""
        self.inputs.clear()
        loss = method.loss(self.model, batch_, ctx)
        assert len(self.inputs) == 1
        return self.inputs[0], loss


def text(rows=2, length=40, seed=1):
    ids = torch.randint(4, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def chat(answers=(60, 51, 50, 3), prompt=6):
    """Right-padded rows: a prompt without labels, an answer of so many tokens, an end token (1)."""
    gen, width = torch.Generator().manual_seed(2), prompt + max(answers) + 1
    ids, mask = torch.zeros(len(answers), width, dtype=torch.long), torch.zeros(len(answers), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, size in enumerate(answers):
        ids[row, : prompt + size] = torch.randint(4, tiny.VOCAB, (prompt + size,), generator=gen)
        ids[row, prompt + size] = 1
        mask[row, : prompt + size + 1] = 1
        labels[row, prompt : prompt + size + 1] = ids[row, prompt : prompt + size + 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def nll(model, inputs, labels):
    """-log softmax of every label from the place before it, one row without padding; a list of (place, value)."""
    with torch.no_grad():
        logits = model(torch.tensor([inputs])).logits[0].double().tolist()
    found = []
    for place in range(1, len(inputs)):
        if labels[place] != -100:
            row = logits[place - 1]
            found.append((place, math.log(sum(math.exp(x - max(row)) for x in row)) + max(row) - row[labels[place]]))
    return found


def drawn(places, share, content, nth=0, ctx=CTX):
    """The places with the smallest of so many uniform numbers, keyed by the content."""
    count = max(1, math.floor(share * len(places))) if places and share else 0
    u = torch.rand(len(places), generator=ctx.rng("masks", content, nth)).tolist()
    return [places[i] for i in sorted(range(len(places)), key=lambda i: u[i])[:count]]


@pytest.mark.parametrize("share", [None, 0.05, 0.4, 1.0])
def test_pre_training_label_by_label(share):
    """Rows of 10, 7 and 5 tokens, some without labels: masks among the places before a row's last label."""
    host, given = Seen(), batch()
    seen, loss = host.given(Meap(share=share), given)
    total, count = 0.0, 0
    for i in range(3):
        real = [t for t, r in enumerate(given["attention_mask"][i].tolist()) if r]
        ids, labels = given["input_ids"][i].tolist(), given["labels"][i].tolist()
        last = max(t for t in real if labels[t] != -100)
        hidden = drawn([t for t in real if t < last], 0.15 if share is None else share, ids[: last + 1])
        inputs = [MASK if t in hidden else ids[t] for t in real]
        assert seen["input_ids"][i, : len(real)].tolist() == inputs and hidden
        found = nll(host.model, inputs, labels)
        total, count = total + sum(v for _, v in found), count + len(found)
    assert loss.count == count and loss.total.item() == pytest.approx(total / count, abs=3e-6)
    assert set(loss.terms) == {"nll"} and not loss.terms["nll"].requires_grad


def test_how_many_and_where():
    """40 tokens: 39 places before the last label, 0.15 of them rounded down are 5; the last is never masked."""
    host, counts = Seen(), torch.zeros(40)
    for seed in range(200):
        seen, _ = host.given(Meap(), text(1), Context(seed=seed))
        hidden = seen["input_ids"][0] == MASK
        assert int(hidden.sum()) == 5
        counts += hidden
    assert counts[39] == 0 and counts[:39].min() >= 10 and counts[:39].max() <= 45  # 25.6 each on average
    assert int((host.given(Meap(share=0.01), text(1))[0]["input_ids"] == MASK).sum()) == 1


def test_rows_draw_for_themselves_or_share():
    """Own: another set for each row, also for a row that is there twice. Shared: one set, whatever the rows hold."""
    host, given = Seen(), text(4)
    given["input_ids"][3] = given["input_ids"][0]
    own = [tuple(row.nonzero()[:, 0].tolist()) for row in host.given(Meap(), given)[0]["input_ids"] == MASK]
    assert len(set(own)) == 4
    assert list(own[3]) == sorted(drawn(list(range(39)), 0.15, given["input_ids"][3].tolist(), nth=1))
    shared = [
        tuple(row.nonzero()[:, 0].tolist()) for row in host.given(Meap(rows="shared"), given)[0]["input_ids"] == MASK
    ]
    assert len(set(shared)) == 1 and len(shared[0]) == 5
    u = torch.rand(40, generator=CTX.rng("masks", 40))[:39].tolist()
    assert list(shared[0]) == sorted(sorted(range(39), key=lambda i: u[i])[:5])
    other = host.given(Meap(rows="shared"), text(4, seed=9))[0]["input_ids"] == MASK
    assert tuple(other[2].nonzero()[:, 0].tolist()) == shared[0]


def test_shared_places_in_rows_of_unequal_length():
    """Rows of 10, 7 and 5 tokens: numbers for the longest, of which each row takes as many as it has places."""
    host, given = Seen(), batch()
    seen, _ = host.given(Meap(rows="shared", share=0.4), given)
    u = torch.rand(10, generator=CTX.rng("masks", 10)).tolist()
    for i, places in enumerate((9, 6, 4)):
        hidden = sorted(sorted(range(places), key=lambda p: u[p])[: int(0.4 * places)])
        assert seen["input_ids"][i].eq(MASK).nonzero()[:, 0].tolist() == hidden


@pytest.mark.parametrize("fields", [{"share": 1.2}, {"share": -0.1}, {"aux": -0.1}, {"least": -1}])
def test_what_is_out_of_range(fields):
    with pytest.raises(LuthierError, match="out of range"):
        Meap(**fields)


def test_a_row_in_another_batch_is_masked_alike():
    host, given = Seen(), text(3)
    whole = host.given(Meap(), given)[0]["input_ids"]
    for i in range(3):
        alone = host.given(Meap(), {k: v[i : i + 1] for k, v in given.items()})[0]["input_ids"]
        assert torch.equal(alone[0], whole[i])


def test_fine_tuning_label_by_label():
    """Answers of 60 and 51 tokens get a copy with 6 and 5 masks inside, labels there alone; 50 and 3 get none."""
    host, given = Seen(), chat()
    seen, loss = host.given(Meap(form="finetune"), given)
    assert seen["input_ids"].shape == (6, 67) and torch.equal(seen["input_ids"][:4], given["input_ids"])
    assert torch.equal(seen["attention_mask"][4:], given["attention_mask"][:2])
    total, count = 0.0, 0
    for i, size in enumerate((60, 51, 50, 3)):
        ids, labels = given["input_ids"][i, : size + 7].tolist(), given["labels"][i].tolist()
        found = nll(host.model, ids, labels)
        assert len(found) == size + 1
        if size > 50:
            hidden = drawn(list(range(6, 6 + size)), 0.1, ids)
            inputs = [MASK if t in hidden else token for t, token in enumerate(ids)]
            assert seen["input_ids"][4 + i, : size + 7].tolist() == inputs and len(hidden) == size // 10
            found += nll(host.model, inputs, [ids[t] if t in hidden else -100 for t in range(len(ids))])
            assert len(found) == size + 1 + size // 10
        total, count = total + sum(v for _, v in found), count + len(found)
    assert loss.count == count == 61 + 52 + 51 + 4 + 6 + 5
    assert loss.total.item() == pytest.approx(total / count, abs=3e-6)


def test_a_masked_token_is_predicted_before_its_mask_is_read():
    """With one mask in the copy, its label's loss is that of the plain row: the hole only changes what follows."""
    host, given = Seen(), chat((8,))
    plain = dict(nll(host.model, given["input_ids"][0].tolist(), given["labels"][0].tolist()))
    seen, loss = host.given(Meap(form="finetune", least=7, share=0.01), given)
    place = int((seen["input_ids"][1] == MASK).nonzero())
    assert loss.total.item() == pytest.approx((sum(plain.values()) + plain[place]) / 10, abs=3e-6)


def test_which_answers_are_copied():
    """More than `least` tokens before the end token; positions go along; the end token is never masked."""
    host, given = Seen(), chat((9, 8))
    given["position_ids"] = torch.arange(16)[None].expand(2, 16) + torch.tensor([[3], [0]])
    for least, copies in ((9, []), (8, [0]), (7, [0, 1]), (0, [0, 1])):
        seen, loss = host.given(Meap(form="finetune", least=least, share=1.0), given)
        assert torch.equal(seen["position_ids"][2:], given["position_ids"][copies])
        assert loss.count == 10 + 9 + sum((9, 8)[i] for i in copies)
        assert bool((seen["input_ids"][2:, :6] != MASK).all())
        for row, i in enumerate(copies):
            assert seen["input_ids"][2 + row].eq(MASK).nonzero()[:, 0].tolist() == list(range(6, 6 + (9, 8)[i]))
    bare = chat((1,))
    bare["labels"][0, -1] = -100
    assert host.given(Meap(form="finetune", least=0), bare)[1].count == 1


def test_a_row_that_begins_with_its_answer():
    """Nothing stands before the first token to predict it from: it is neither masked nor counted, padded or not."""
    host, given = Seen(), text(1, 12)
    seen, loss = host.given(Meap(form="finetune", least=3, share=1.0), given)
    assert loss.count == 11 + 10
    assert seen["input_ids"][1].eq(MASK).nonzero()[:, 0].tolist() == list(range(1, 11))
    left = {k: torch.cat([torch.full((1, 5), v), given[k]], 1) for k, v in
            {"input_ids": 0, "attention_mask": 0, "labels": -100}.items()}  # fmt: skip
    seen, loss = host.given(Meap(form="finetune", least=3, share=1.0), left)
    assert loss.count == 21 and seen["input_ids"][1].eq(MASK).nonzero()[:, 0].tolist() == list(range(6, 16))


def test_without_an_attention_mask_everything_is_real():
    host, given = Seen(), text(2)
    with_mask = host.given(Meap(), given)[1].total.item()
    del given["attention_mask"]
    seen, loss = host.given(Meap(), given)
    assert loss.total.item() == pytest.approx(with_mask, abs=1e-6) and int((seen["input_ids"] == MASK).sum()) == 10


def test_every_step_draws_anew():
    """Forty steps, forty sets of places, in both forms; the same step draws the same."""
    for method, given in ((Meap(), text(1)), (Meap(form="finetune", share=0.2), chat((60,)))):
        host, sets = Seen(), []
        for step in [*range(40), 0]:
            seen, _ = host.given(method, given, Context(seed=step))
            sets.append(tuple((seen["input_ids"][-1] == MASK).nonzero()[:, 0].tolist()))
        assert len(set(sets)) == 40 and sets[-1] == sets[0]


def test_released_masks_repeat():
    """The released pre-training seeds Python's generator with 50 + step mod 51 before it samples the places: 51
    sets in 190,000 steps of context 4096. Ours draws another set at each of 200 steps."""

    def released(step):
        return tuple(sorted(random.Random(50 + step % 51).sample(range(4095), int(4096 * 0.15))))

    assert len({released(step) for step in range(0, 190_000, 190)}) == 51
    host = Seen()
    ours = [host.given(Meap(rows="shared"), text(1, 120), Context(seed=step))[0]["input_ids"] for step in range(200)]
    assert len({tuple((ids[0] == MASK).tolist()) for ids in ours}) == 200


def test_which_token_masks():
    """The field before the model's own; a model without one is refused, and so is an id beyond the vocabulary."""
    host = Seen()
    seen, _ = host.given(Meap(mask_token=2), text(1))
    assert int((seen["input_ids"] == 2).sum()) == 5 and not (seen["input_ids"] == MASK).any()
    for method, model, words in (
        (Meap(), tiny.llama(), "names no mask token"), (Meap(mask_token=tiny.VOCAB), host.model, "is not among"),
    ):  # fmt: skip
        with pytest.raises(LuthierError, match=words):
            method.loss(model, text(1), CTX)


def test_routers_pay():
    """The aux losses of our decoder's parts are in the total once, thrice at aux 3, out at 0."""
    ffn = {"use": "block.moe", "set": {"experts": 4, "top_k": 2, "width": 16, "balance_weight": 0.5}}
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "mask_token_id": MASK}  # fmt: skip
    model, given = build_model({**sizes, "slots": {"ffn": ffn}}, seed=0), text(2)
    plain, one, three = (Meap(aux=a).loss(model, given, CTX) for a in (0.0, 1.0, 3.0))
    assert set(plain.terms) == {"nll"} and set(one.terms) == {"nll", "aux"}
    assert one.terms["aux"].item() > 1e-3 and not any(t.requires_grad for t in one.terms.values())
    assert one.total.item() == pytest.approx(one.terms["nll"].item() + one.terms["aux"].item(), abs=1e-6)
    assert three.total.item() == pytest.approx(plain.total.item() + 3 * one.terms["aux"].item(), abs=1e-5)


def test_stretches(monkeypatch):
    """Logits exist for labelled places alone, as many at once as fit: room for 1,000 numbers is three rows of 276."""
    from luthier.objective import meap

    monkeypatch.setattr(meap, "AT_ONCE", 1000)
    host, sizes = Seen(), []
    whole = NextToken().loss(host.model, text(1, 11), CTX)
    host.model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    loss = Meap(share=0.0).loss(host.model, text(1, 11), CTX)
    assert sizes == [3, 3, 3, 1] and loss.total.item() == pytest.approx(whole.total.item(), abs=1e-6)
    monkeypatch.setattr(meap, "AT_ONCE", 10)
    sizes.clear()
    Meap().loss(host.model, text(1, 4), CTX)
    assert sizes == [1, 1, 1]
    gone = text(1, 4)
    gone["labels"][:, 2:] = -100
    loss = Meap(share=0.0).loss(host.model, gone, CTX)
    value = nll(host.model, gone["input_ids"][0].tolist(), gone["labels"][0].tolist())[0][1]
    assert loss.count == 1 and loss.total.item() == pytest.approx(value, abs=3e-6)


def test_defaults_are_the_papers():
    method = Meap()
    assert (method.form, method.share, method.rows, method.least, method.aux) == ("pretrain", None, "own", 50, 1.0)
    host = Seen()
    assert int((host.given(method, text(1, 101))[0]["input_ids"] == MASK).sum()) == 15
    assert int((host.given(method.replace(form="finetune"), text(1, 102))[0]["input_ids"] == MASK).sum()) == 10
