"""Accuracy: a strict scorer gives about nothing to a sentence that holds the right answer; extraction mends that.

Here: the 135M instruct model, untrained for the task, on sums of two one-digit numbers. The control scores
the whole output as the answer. Reported and not judged: how often the right number stands anywhere in
the output, above which no extraction can come.
"""

from luthier.claims import Claim
from luthier.claims._bundled import data, host
from luthier.decode.sample import Sample
from luthier.kit.context import Context
from luthier.kit.encode import prompt_ids

ITEMS = 24


def run(seed: int, ctx: Context) -> dict[str, float]:
    sums = data("sums", seed, "gym:chain_sum", ITEMS, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    prompts = [prompt_ids(item, host()[1]) for item in sums.test]
    decoding = Sample(max_new_tokens=24).steps([host()], prompts, ctx)
    for _ in decoding:
        pass
    trace = decoding.trace()
    pairs = list(zip(sums.test, trace.texts, strict=True))
    return {
        "method": sum(sums.score(item, text) >= 1 for item, text in pairs) / ITEMS,
        "control": sum(text.strip() == item.answer for item, text in pairs) / ITEMS,
        "the number anywhere": sum(str(item.answer) in text for item, text in pairs) / ITEMS,
        "cost/forwards": float(trace.forwards), "cost/tokens": float(sum(map(len, trace.tokens))),
    }  # fmt: skip


CLAIM = Claim(
    id="eval.accuracy",
    sentence="With answer extraction an instruct model untrained for the task scores 10 points above strict match.",
    relation="above", effect=0.1, unit="share of answers", control="the whole output scored as the answer",
    seeds=5, minutes=1.5, run=run,
)  # fmt: skip
