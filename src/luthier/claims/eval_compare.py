"""Compare: pairing by item removes how hard the items are, so intervals of a difference narrow.

Here: the 135M model and a copy with small noise on its block matrices, on the same windows of Python source. The
method's value is the width of the paired 95 % interval; the control's is that of an unpaired bootstrap,
which resamples the two models' items independently.
"""

import copy

import torch

from luthier.claims import Claim
from luthier.claims._bundled import Host, data, host
from luthier.eval.compare import Compare
from luthier.eval.perplexity import Perplexity
from luthier.kit.context import Context

ITEMS, NOISE, RESAMPLES = 24, 0.02, 4000


def run(seed: int, ctx: Context) -> dict[str, float]:
    code = data("code", seed, "text:stdlib", ITEMS, chars=300, glob="[a-d]*.py")
    models = [Host("base"), Host("noisy", _noisy(ctx))]
    seen = Perplexity().measure(models, [code], ctx)
    paired = Compare(measures=("eval.perplexity",), resamples=RESAMPLES).measure(models, [code], ctx)  # type: ignore[arg-type]
    row = paired.where(model="noisy")[0]
    means = [_resampled(seen.where(model=name), ctx.rng("unpaired", name)) for name in ("base", "noisy")]
    ends = torch.quantile(means[1] - means[0], torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {
        "method": row["high"] - row["low"], "control": float(ends[1] - ends[0]), "difference": row["diff"],
        "cost/tokens": float(sum(r["tokens"] for r in seen.dicts())),
    }  # fmt: skip


def _resampled(rows: list[dict], rng: torch.Generator) -> torch.Tensor:
    """Token-weighted means of resampled items."""
    value_N = torch.tensor([row["value"] for row in rows], dtype=torch.float64)
    weight_N = torch.tensor([row["tokens"] for row in rows], dtype=torch.float64)
    drawn_RN = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=rng)
    return (value_N * weight_N)[drawn_RN].sum(1) / weight_N[drawn_RN].sum(1)


def _noisy(ctx: Context) -> torch.nn.Module:
    """The model with noise of 2 % of each block matrix's own standard deviation."""
    model = copy.deepcopy(host()[0])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "layers" in name:
                p.add_(torch.randn(p.shape, generator=ctx.rng("noise", name)) * p.std() * NOISE)
    return model


CLAIM = Claim(
    id="eval.compare",
    sentence="Pairing by item makes the 95 % interval of a difference 0.1 nats narrower than two unpaired means do.",
    relation="below", effect=0.1, unit="nats per token, width", control="unpaired bootstrap of the same items",
    seeds=5, minutes=3, run=run,
)  # fmt: skip
