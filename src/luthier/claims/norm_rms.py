"""RMSNorm: the paper (arXiv 1910.07467) finds that re-centring is dispensable: quality is that of LayerNorm.

Here: RMSNorm against LayerNorm without a bias (`center`), from scratch. Reported and not judged: no
norm at all, which tells whether a norm matters in this experiment.
"""

from typing import Any

from torch import nn

from luthier.claims import Claim
from luthier.claims._scratch import trained
from luthier.kit.context import Context
from luthier.norm.rms import RmsNorm


class _Nothing(nn.Module):
    """In place of a norm."""

    def forward(self, x_BTD: Any, at: Any = None) -> Any:
        return x_BTD, {}


def _without(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, RmsNorm):
                setattr(module, name, _Nothing())


def run(seed: int, ctx: Context) -> dict[str, float]:
    rms, none = trained(seed, ctx, {}), trained(seed, ctx, {}, _without)
    layer = trained(seed, ctx, {"norm": {"use": "norm.rms", "set": {"center": True}}})
    return {
        "method": rms["loss"], "control/layer norm": layer["loss"], "no norm": none["loss"],
        "cost/tokens": rms["tokens"], "cost/parameters": rms["parameters"],
    }  # fmt: skip


CLAIM = Claim(
    id="norm.rms",
    sentence="Without re-centring the loss stays within 0.02 nats a byte of LayerNorm's.",
    relation="within", effect=0.02, unit="nats per byte", control="LayerNorm without a bias, same steps and data",
    seeds=5, minutes=2, run=run, source="the experiments, against LayerNorm",
)  # fmt: skip
