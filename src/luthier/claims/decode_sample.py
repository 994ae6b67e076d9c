"""Sampling: the nucleus paper (arXiv 1904.09751, section 5) finds that the text a model is most certain of is far
likelier than human text, that pure sampling is less likely than it, and that top-p 0.95 comes closest.

Here: the 135M model continues windows of Python source by 32 tokens. The value is the distance between
the mean negative log-likelihood of what it wrote and of what stands in the file. Controls: greedy, and
sampling from the whole distribution.
"""

from luthier.claims import Claim
from luthier.claims._bundled import data, host
from luthier.decode.sample import Sample
from luthier.eval.perplexity import summed_nll
from luthier.kit.context import Context
from luthier.kit.encode import IGNORE, Row

ITEMS, PROMPT, NEW = 24, 48, 32
WAYS = {
    "top-p": Sample(temperature=1.0, top_p=0.95, max_new_tokens=NEW),
    "pure": Sample(temperature=1.0, max_new_tokens=NEW), "greedy": Sample(max_new_tokens=NEW),
}  # fmt: skip


def run(seed: int, ctx: Context) -> dict[str, float]:
    model, tokenizer = host()
    code = data("code", seed, "text:stdlib", 2 * ITEMS, chars=600, glob="[a-d]*.py")
    rows = [tokenizer(item.text)["input_ids"] for item in code.test]
    rows = [ids[: PROMPT + NEW] for ids in rows if len(ids) >= PROMPT + NEW][:ITEMS]
    human = _nll([(ids[:PROMPT], ids[PROMPT:]) for ids in rows])
    found = {"human": human}
    forwards = 0
    for name, method in WAYS.items():
        decoding = method.steps([(model, tokenizer)], [ids[:PROMPT] for ids in rows], ctx)
        for _ in decoding:
            pass
        trace = decoding.trace()
        forwards += trace.forwards
        found[name] = _nll([(ids[:PROMPT], list(new)) for ids, new in zip(rows, trace.tokens, strict=True)])
    return {
        "method": abs(found["top-p"] - human), "control/pure sampling": abs(found["pure"] - human),
        "control/greedy": abs(found["greedy"] - human), **{f"nll of {k}": v for k, v in found.items()},
        "cost/forwards": float(forwards), "cost/tokens": float(3 * NEW * len(rows)),
    }  # fmt: skip


def _nll(pairs: list[tuple[list[int], list[int]]]) -> float:
    """Nats a token of what follows each prompt."""
    rows = [Row((*prompt, *new), (*[IGNORE] * len(prompt), *new)) for prompt, new in pairs]
    return sum(summed_nll(host()[0], rows, 0)) / sum(row.count for row in rows)


CLAIM = Claim(
    id="decode.sample",
    sentence="In likelihood, text drawn with top-p 0.95 is 0.1 nats a token nearer to human text than text of pure"
    " sampling and of greedy decoding.",
    relation="below", effect=0.1, unit="nats per token from human text", control="pure sampling; greedy decoding",
    seeds=5, minutes=4, run=run, source="1904.09751: section 5, perplexity against human text",
)  # fmt: skip
