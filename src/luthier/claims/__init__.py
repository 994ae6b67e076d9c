"""What the papers say, made executable: one file a method, `claims/<stage>_<name>.py`, exporting `CLAIM`.

    CLAIM = Claim(
        id="tune.lift",
        sentence="At an equal budget LIFT's mask gives a lower loss than a random mask.",
        relation="below", effect=0.02, unit="nats per token", control="tune.random of the same share",
        seeds=5, minutes=3, run=run,
    )

    def run(seed: int, ctx: Ctx) -> dict[str, float]:
        return {"method": 2.31, "control": 2.40, "cost/steps": 60}

`run` gives the paired observations of one seed: `method`, and one or more keys that begin with
`control` ("control", "control/random mask"), all in the claim's unit; keys that begin with `cost/`
say what it took (steps, tokens, forwards, bytes), as means over the seeds; those that begin with `also/` are
differences that are published with their interval beside the verdict, and judged by nobody; other keys are kept.
The claim holds only if it holds against every control. The effect is declared here, before the run.
"""

from luthier.claims._claim import Claim, OutOfReach, claim, claims
from luthier.claims._judge import judge
from luthier.claims._reproduce import reproduce

__all__ = ["Claim", "OutOfReach", "claim", "claims", "judge", "reproduce"]
