"""Planted faults: small wrong changes to a method's file, and the share of them that its tests notice.

Contract checks and golden vectors of one method run against each changed file, in a process of its
own, on a copy of the package: the tree is never edited. A fault nobody notices is reported with its
line; it either needs a test or changes nothing that matters, and then stands in HARMLESS with the proof.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier import catalogue
from luthier.errors import LuthierError
from luthier.testing import golden
from luthier.testing.faults import Mutant, plant

GOAL = 0.95
_LAST = "of the two dimensions the last is the second"
_ALONE = "the coefficient of fewer than two experts is not looked at"
_CUT = "what is more than asked for is cut off at the end"
_RATIOS = "where no weights are given all are equal, and they count by their ratios alone"
HARMLESS: dict[tuple[str, str, str], str] = {
    ("compress.drop", "BATCH = 8", "8 -> 9"): "how many items go through the model together changes no sum",
    ("compress.drop", "count += len(states[0])", "0 -> 1"): "states of every layer are of the same tokens",
    ("compress.drop", "return (1 - torch.cosine_similarity(x_ND.double(), y_ND.double(), dim=-1)).sum().cpu()",
     "-1 -> 1"): _LAST,
    ("compress.gptailor", 'h = proposal.share(f"{layer}.h") if len(taken) > 1 else 1.0', "1.0 -> 1.25"): _ALONE,
    ("compress.gptailor", 'if sum(bits) == 1 or (sum(bits) > 1 and self.pick == "merge"):',
     "sum(bits) > 1 -> sum(bits) >= 1"): "what it adds stands before the `or`",
    ("compress.gptailor", "patterns += [(bits, h) for h in (COEFFICIENTS if sum(bits) > 1 else (1.0,))]",
     "1.0 -> 1.25"): _ALONE,
    ("compress.gptailor", "plain = [self._numbers(space, gone, (0,) * experts, 1.0) for gone in every.values()]",
     "1.0 -> 1.25"): _ALONE,
    ("compress.gptailor",
     """taken.setdefault("merged", []).append(f"{layer} ({' + '.join(models)}, h {entry[terms[0]]:.2f})")""", "0 -> 1"):
        "all experts of a layer have one coefficient",
    ("compress.laco",
     "return model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state.flatten().double().cpu()",
     "False -> True"): "a cache that nothing reads",
    ("decode.masked_diffusion", "p_MV = logits_MV.softmax(-1)", "-1 -> 1"): _LAST,
    ("decode.masked_diffusion", "token_M = logits_MV.argmax(-1)", "-1 -> 1"): _LAST,
    ("decode.masked_diffusion",
     "token_M = draw((logits_MV / self.method.temperature).softmax(-1), self._uniform(rows)[spots_BL])", "-1 -> 1"):
        _LAST,
    ("decode.masked_diffusion", "top_M2 = p_MV.topk(2).values", "2 -> 3"):
        "the two largest are the first of the three, and the third is not looked at",
    ("decode.masked_diffusion", "score_M = -torch.special.entr(p_MV).sum(-1)", "-1 -> 1"): _LAST,
    ("decode.masked_diffusion", "score_M = -torch.special.entr(p_MV).sum(-1)",
     "torch.special.entr(p_MV).sum(-1) -> torch.special.entr(p_MV).mean(-1)"):
        "entropies only rank the places, and all are divided by the number of words",
    ("decode.prophet", "top_BL2 = draft.logits_BLV.topk(2).values", "2 -> 3"):
        "the two largest are the first of the three, and the third is not looked at",
    ("decode.sample", "longest = max((len(p) for p in prompts), default=0)", "0 -> 1"):
        "it is the length of no prompts, and then nothing is decoded",
    ("decode.sample", "first_1T = torch.tensor([prompts[0][:shared]])", "0 -> 1"):
        "all prompts have these tokens, so any may give them",
    ("decode.sample", "ids_BT = torch.tensor([[0] * (width - len(r)) + list(r) for r in rest])", "0 -> 1"):
        "which token stands in the padding, behind the mask, does not matter",
    ("eval.compare", 'weight = float(row["tokens"]) if row["metric"] in BY_TOKENS else 1.0', "1.0 -> 1.25"):
        "weights count by their ratios alone, and here all are equal",
    ("merge.breadcrumbs", "ranks = self._ranks(piece, piece.count, twice[0].numel())", "0 -> 1"):
        "every expert's change has as many entries",
    ("merge.breadcrumbs", "ranks = self._ranks(piece, piece.count, piece.seen[-1])", "-1 -> 1"): _LAST,
    ("merge.copa", "scale_R = torch.where(held_R, whole_R / left_R, 0)", "0 -> 1"):
        "a scale is at least 1, so a lost row stays the lowest; its own is put to 0 two lines below",
    ("merge.dare", "rescales = [1 / density if density else 1.0 for density in self._densities(piece)]", "1.0 -> 1.25"):
        "where the density is 0 nothing is left that it could multiply",
    ("merge.della", "factor_C = np.divide(1, share_C, out=np.zeros_like(share_C), where=share_C > 0)",
     "np.zeros_like(share_C) -> np.ones_like(share_C)"):
        "where the chance is 0 nothing is left that it could multiply",
    ("merge.della", "count = max(1, len(self.densities or ()), len(self.epsilons or ()))", "1 -> 2"):
        "where one number stands for all experts it is checked, once or twice",
    ("merge.fisher", "weights = each(self.weights, 1.0, tensors, len(tensors.experts))", "1.0 -> 1.25"): _RATIOS,
    ("merge.map", "left = max(0, count - size)", "0 -> 1"): _CUT,
    ("merge.map", "found_PN = torch.cat([plain_PN, (disturbed_PN + self.disturb * noise_PN).clamp(0, 1)])",
     "disturbed_PN + self.disturb * noise_PN -> disturbed_PN - self.disturb * noise_PN"):
        "noise is as likely as its opposite",
    ("merge.map", "places = spread(y_PM, self.trials - self.sampled, self.method.pick(y_PM.tolist()))",
     "self.trials - self.sampled -> self.trials + self.sampled"):
        "each point is chosen by those before it, so that more of them change no earlier one",
    ("merge.model_stock", "return torch.where(below.abs() < SINGULAR, 0.0, count * mean / below)",
     "below.abs() < SINGULAR -> below.abs() <= SINGULAR"):
        "a denominator is a float from angles, and none is 1e-6 to the last bit",
    ("merge.pcb", "change_N.abs().clamp_(low, high).sub_(low).div_(high - low or 1.0)", "1.0 -> 1.25"):
        "where both ends are equal all sizes are 0 before they are divided",
    ("merge.pcb", "claim_N.sub_(cut).clamp_(min=0).div_(top - cut or 1.0)", "1.0 -> 1.25"):
        "where the largest claim is the cut all claims are 0 before they are divided",
    ("merge.regmean", "x_NI = x.detach().reshape(-1, x.shape[-1]).float()", "x.detach() -> x"):
        "the whole look runs under no_grad, where nothing is recorded",
    ("merge.regmean", 'return Measured(grams, owners, 1.0 if self.per == "sum" else 1 / tokens)', "1.0 -> 1.25"):
        "a factor that all Gram matrices share cancels: the ridge is a share of their sum, too",
    ("merge.regmean", 'return Measured(grams, owners, 1.0 if self.per == "sum" else 1 / tokens)', "1 -> 2"):
        "a factor that all Gram matrices share cancels: the ridge is a share of their sum, too",
    ("merge.regmean", "weights = each(self.weights, 1.0, tensors, len(tensors.experts))", "1.0 -> 1.25"): _RATIOS,
    ("merge.regmean", "left_II, right_IO = torch.zeros(0), torch.zeros(0)", "torch.zeros(0) -> torch.ones(0)"):
        "the first expert's matrices take their place, and nothing is read before",
    ("merge.regmean", "left_II, right_IO = torch.zeros(0), torch.zeros(0)", "0 -> 1"):
        "the first expert's matrices take their place, and nothing is read before",
    ("merge.sens", "values = {name: p.detach() for name, p in model.named_parameters()}", "p.detach() -> p"):
        "they are read within a backward pass, which records nothing",
    ("merge.sens", "length = math.sqrt(sum(value * value for value in total.values())) or 1.0", "1.0 -> 1.25"):
        "where the length is 0 so are all values that it divides",
    ("merge.sens", "float((self._logits(model, pad, item, row, ctx) - own.read(item)).norm(dim=-1).mean())",
     "-1 -> 1"): _LAST,
    ("objective.masked_diffusion",
     "return weight_BT / asked_BT.sum(1, keepdim=True).clamp(min=1), int(asked_BT.any(1).sum())",
     "asked_BT.sum(1, keepdim=True).clamp(min=1) -> asked_BT.sum(1, keepdim=True)"):
        "a row without labels has no masked place whose weight could count",
    ("protect.mergelock", 'swap_F = secret.uniform(f"{label} swap", len(at.pairs_F2)) > 0.5',
     "secret.uniform(f'{label} swap', len(at.pairs_F2)) > 0.5 -> "
     "secret.uniform(f'{label} swap', len(at.pairs_F2)) >= 0.5"):
        "one of 2^53 numbers that can be drawn lies on the edge",
    ("protect.mergelock", "scale_U = torch.ones_like(scale_U) if units.gate_UX is None else scale_U * sign_U",
     "scale_U * sign_U -> scale_U / sign_U"): "a sign is 1 or -1, and divides as it multiplies",
    ("protect.restore", "if search and at.groups > 1:", "at.groups > 1 -> at.groups >= 1"):
        "a group that is alone stands for itself, and stays",
    ("protect.restore", "if search and at.heads > at.groups:", "at.heads > at.groups -> at.heads >= at.groups"):
        "a head that is alone in its group stands for itself, and stays",
    ("protect.restore", "swap_F = (z_GF.imag.abs() - z_GF.real.abs()).sum(0) > 0",
     "(z_GF.imag.abs() - z_GF.real.abs()).sum(0) -> (z_GF.imag.abs() - z_GF.real.abs()).mean(0)"):
        "a mean is above 0 where the sum is",
    ("protect.restore", "inputs = base.shape[-1]", "-1 -> 1"):
        "of two dimensions the last is the second, and with three `free` is 0, so that the number cancels",
    ("protect.restore",
     "alike_GG = alike_GG + (dot_GGF.abs().square() / (base_GGF * other_GF).clamp(min=1e-300)).mean(-1)",
     "1e-300 -> 1.0000000000000001e-298"):
        "sums of squares of fp32 numbers are 0 or above 1e-90, so that no product lies between",
    ("protect.restore", "if base.gate_UX is None or units.gate_UX is None:",
     "base.gate_UX is None or units.gate_UX is None -> base.gate_UX is None and units.gate_UX is None"):
        "both are read under the same names, so that both have a gate or neither",
}  # fmt: skip
"""(method, line of its file, what became of what) -> why no test can tell: what the method does is the same.
Such a fault is tried like the others; it never counts as noticed, and a test that does notice it is an error."""


@dataclass(frozen=True)
class Hunt:
    """What became of the planted faults of one method."""

    id: str
    tried: int
    survivors: tuple[Mutant, ...]
    """those that nothing noticed, without the harmless"""
    harmless: tuple[tuple[Mutant, str], ...]
    """those that nothing can notice, and why"""
    by: dict[str, int]
    """how many each check caught, the first that noticed"""

    @property
    def noticed(self) -> int:
        """How many faults some test noticed."""
        return sum(self.by.values())

    @property
    def share(self) -> float:
        """The share of all faults, harmless ones too, that were noticed."""
        return self.noticed / self.tried if self.tried else 1.0

    def lines(self) -> list[str]:
        """The result for people: the share, then each fault nobody noticed, and why if that is known."""
        return [
            f"{self.id}: {self.noticed} of {self.tried} planted faults noticed ({self.share:.0%})",
            *(f"  line {m.line}: {m.what}" for m in self.survivors),
            *(f"  line {m.line}: {m.what}: changes nothing, {why}" for m, why in self.harmless),
        ]


def hunt(id_: str, limit: int | None = None, watch: Callable[[str], None] | None = None) -> Hunt:
    """Plant faults in the method's file, one at a time, and see which the tests notice.

    limit: try at most this many, spread evenly over the file.  watch: receives one line a fault.
    Raises LuthierError if the tests fail on the file as it is or notice what is said to be harmless, or if the
    platform cannot fork.
    """
    if not hasattr(os, "fork"):
        raise LuthierError("planted faults need os.fork", do="use Linux or macOS")
    entry = catalogue.card(id_)
    source = entry.path.read_text(encoding="utf-8")
    mutants, lines = plant(source), source.splitlines()
    if limit is not None and len(mutants) > limit:
        mutants = [mutants[i * len(mutants) // limit] for i in range(limit)]
    survivors, harmless, by = [], [], {}
    with tempfile.TemporaryDirectory(prefix="luthier-mutants-") as temp:
        target = _overlay(Path(temp), entry)
        for i, caught in _trials(id_, Path(temp), target, mutants):
            mutant = mutants[i]
            why = HARMLESS.get((id_, lines[mutant.line - 1].strip(), mutant.what), "")
            if caught and why:
                where, said = f"{id_} line {mutant.line}", f"{caught} noticed {mutant.what}, said to change nothing"
                raise LuthierError(said, where=where, do="take it out of HARMLESS")
            if caught:
                by[caught] = by.get(caught, 0) + 1
            elif why:
                harmless.append((mutant, why))
            else:
                survivors.append(mutant)
            if watch:
                watch(f"{i + 1}/{len(mutants)} line {mutant.line}: {mutant.what}: {caught or why or 'NOT NOTICED'}")
    return Hunt(id_, len(mutants), tuple(survivors), tuple(harmless), by)


def _overlay(where: Path, entry: catalogue.Card) -> Path:
    """Copy the package, and the method's own package if it is another one; the method's file in the copy."""
    for top in dict.fromkeys(("luthier", entry.module.split(".")[0])):
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            raise LuthierError(f"cannot find the source of {top}", where=entry.id)
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            stale = shutil.ignore_patterns(f"{entry.path.stem}.*.pyc")  # the rest spares trials the compiling
            shutil.copytree(origin.parent, where / top, ignore=stale)
        else:
            shutil.copy(origin, where / origin.name)
    parts = entry.module.split(".")
    return where.joinpath(*parts[:-1], f"{parts[-1]}.py")


def _trials(id_: str, overlay: Path, target: Path, mutants: list[Mutant]) -> Iterator[tuple[int, str]]:
    """(index, what noticed it or "") of each mutant, as they finish."""
    vectors = golden.file_of(id_)
    task: dict[str, Any] = {
        "id": id_, "target": str(target), "golden": str(vectors) if vectors.exists() else "",
        "mutants": [asdict(m) for m in mutants],
    }  # fmt: skip
    env = {
        **os.environ, "PYTHONPATH": f"{overlay}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(
            [sys.executable, "-m", "luthier.testing.trials"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=env, cwd=golden.ROOT,
        )  # fmt: skip
        assert run.stdin and run.stdout
        run.stdin.write(json.dumps(task))
        run.stdin.close()
        for line in run.stdout:
            result = json.loads(line)
            if "fault" in result:
                raise LuthierError(f"the tests fail without a planted fault: {result['fault']}", where=id_)
            yield result["i"], result["caught"]
        if run.wait():
            said.seek(0)
            raise LuthierError(f"the trials broke off: {' '.join(said.read().split())[-300:]}", where=id_)
