"""Prophet: the paper (arXiv 2508.19982, table of budgets on GSM8K) finds early commits far better than a fixed budget
of about as many steps, at the quality of full decoding.

Here: 256 held-out 4x4 sudoku, the published form (mean gap over the answer, thresholds 7.5, 5, 2.5 as the paper
has for sudoku) on decoders trained from scratch. The controls are what a user would try first, read off at the mean
number of passes that Prophet took: a fixed budget, and a confidence threshold. Reported and not judged: the same
for the least gap, and full decoding. Unlike the paper's tasks, here all of the canvas is the answer.
"""

from luthier.claims import Claim
from luthier.claims._sudoku import CELLS, at_passes, solved, trained
from luthier.kit.context import Context

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
HOST = {"use": "decode.masked_diffusion", "set": {"max_new_tokens": CELLS}}


def run(seed: int, ctx: Context) -> dict[str, float]:
    model = trained(seed)
    host = {"model": model, "use": "decode.masked_diffusion", "seed": seed, "max_new_tokens": CELLS}
    fixed = [solved(**host, budget=n) for n in BUDGETS]
    sure = [solved(**host, threshold=n) for n in THRESHOLDS]
    mean = solved(model, "decode.prophet", seed, host=HOST)
    least = solved(model, "decode.prophet", seed, host=HOST, reduce="min")
    return {
        "method": mean["accuracy"], "control/fixed budget": at_passes(mean["passes"], fixed),
        "control/threshold": at_passes(mean["passes"], sure), "passes": mean["passes"],
        "least gap": least["accuracy"], "least gap, passes": least["passes"],
        "fixed budget at those": at_passes(least["passes"], fixed),
        "threshold at those": at_passes(least["passes"], sure), "full decoding": fixed[-1]["accuracy"],
        "cost/passes a puzzle": mean["passes"],
    }  # fmt: skip


CLAIM = Claim(
    id="decode.prophet",
    sentence="At equal passes Prophet solves a point more puzzles than a fixed budget and than a confidence threshold.",
    relation="above", effect=0.01, unit="share of puzzles solved",
    control="fixed budget and confidence threshold at the passes Prophet took",
    seeds=5, minutes=6, run=run, source="2508.19982: fixed budgets against Prophet on GSM8K",
)  # fmt: skip
