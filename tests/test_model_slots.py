"""Slots that nothing shipped fills yet: Parts written here fill layer, stack, linear and head."""

import sys
import textwrap

import pytest
import torch

from luthier import catalogue
from luthier.errors import LuthierError
from luthier.model import LuthierConfig, LuthierForCausalLM, Spec, build_model
from luthier.testing import checks_for, run_check

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
PARTS = {
    "sandwich": (
        "layer",
        """
        class Layer(nn.Module):
            def __init__(self, spec):
                super().__init__()
                self.mixer, self.ffn = spec.part("mixer"), spec.part("ffn")
                self.norms = nn.ModuleList(spec.part("norm") for _ in range(4))
                self.name = "metric/depth." + str(spec.layer)

            def forward(self, x, at):
                aux = {self.name: torch.tensor(1.0)}
                for i, branch in enumerate((self.mixer, self.ffn)):
                    y, more = branch(self.norms[2 * i](x, at)[0], at)
                    x = x + self.norms[2 * i + 1](y, at)[0]
                    add_aux(aux, more)
                kept = x if at.keep_BT is None else x[at.keep_BT]
                return x, {"loss/size": 1e-3 * kept.square().mean()} | aux if self.training else aux
    """,
    ),
    "looped": (
        "stack",
        """
        class Stack(nn.Module):
            def __init__(self, spec):
                super().__init__()
                def make():
                    return spec.at(0).part("layer")
                self.steps = nn.ModuleList(spec.shared("block", make) for _ in range(spec.config.num_hidden_layers))

            def forward(self, x, at):
                aux = {}
                for step in self.steps:
                    x, more = at.run(step, x, at)
                    add_aux(aux, more)
                return x, aux
    """,
    ),
    "low_rank": (
        "linear",
        """
        class Linear(nn.Module):
            initial = {"shift": 0.5}

            def __init__(self, n_in, n_out):
                super().__init__()
                self.down, self.up = nn.Linear(n_in, 2, bias=False), nn.Linear(2, n_out, bias=False)
                self.shift = nn.Parameter(torch.zeros(n_out))

            def forward(self, x):
                return self.up(self.down(x)) + self.shift
    """,
    ),
}
BUILD = {"sandwich": "Layer(spec)", "looped": "Stack(spec)", "low_rank": "Linear(*spec.sizes)"}


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory):
    """Three Parts of another package, enrolled as entry points would enrol them."""
    folder = tmp_path_factory.mktemp("parts")
    sys.path.insert(0, str(folder))
    known = catalogue.cards()
    for name, (slot, body) in PARTS.items():
        source = f'"""{name}: a test."""\nimport torch\nfrom torch import nn\nfrom luthier.kit.parts import add_aux\n'
        source += "from luthier.shapes import Part\n" + textwrap.dedent(body)
        slots = '("linear", "head")' if slot == "linear" else f'("{slot}",)'
        source += f"\nclass Own(Part):\n    slots = {slots}\n    def build(self, spec):\n        return {BUILD[name]}\n"
        path = folder / f"own_{name}.py"
        path.write_text(source)
        known[f"own.{name}"] = catalogue.read(path, f"own.{name}", f"own_{name}")
    yield
    sys.path.remove(str(folder))
    for name in PARTS:
        del known[f"own.{name}"]


def ids(*shape):
    return torch.randint(1, 31, shape, generator=torch.Generator().manual_seed(1))


PROMISES = ("causality", "padding invariance", "cached is uncached", "reload is equal", "aux is summed once",
            "gradients reach every parameter", "builds on meta")  # fmt: skip


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("name", ["sandwich", "low_rank"])
def test_contract(name, promise):
    entry = catalogue.card(f"own.{name}")
    run_check(entry.id, next(c for c in checks_for(entry) if c.name == promise))


def test_shared_layers_are_one_and_saved_once(tmp_path):
    from safetensors import safe_open

    model = build_model(SIZES | {"slots": {"stack": "own.looped"}}).eval()
    steps = model.model.layers.steps
    assert steps[0] is steps[1] is steps[2]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert [n for n in names if "steps.1" in n or "steps.2" in n] == []
    again = LuthierForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers.steps[0] is again.model.layers.steps[2]
    assert torch.equal(again(ids(2, 7)).logits, model(ids(2, 7)).logits)


def test_a_looped_stack_adds_up_aux_and_hidden_states():
    model = build_model(SIZES | {"slots": {"stack": "own.looped", "layer": "own.sandwich"}})
    out = model(ids(2, 7), output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 4
    sizes = [1e-3 * h.square().mean() for h in out.hidden_states[1:3]]
    assert out.aux["loss/size"] > sum(sizes)


def test_linear_fills_projections_and_head_fills_the_head():
    model = build_model(
        SIZES | {"slots": {"linear": "own.low_rank", "head": "own.low_rank"}, "tie_word_embeddings": False}
    )
    names = {name for name, _ in model.named_parameters()}
    assert {"model.layers.0.self_attn.q_proj.shift", "model.layers.2.mlp.down_proj.up.weight", "lm_head.shift"} <= names
    assert torch.all(model.lm_head.shift == 0.5) and model.lm_head.shift.shape == (31,)
    only = build_model(SIZES | {"slots": {"linear@1": "own.low_rank"}})
    assert [hasattr(layer.mlp.up_proj, "shift") for layer in only.model.layers] == [False, True, False]


def test_a_head_of_its_own_is_not_tied():
    with pytest.raises(LuthierError, match="tie_word_embeddings"):
        build_model(SIZES | {"slots": {"head": "own.low_rank"}})


def test_spec():
    spec = Spec(LuthierConfig(**SIZES), "ffn", 1)
    assert spec.depth == 0.5 and spec.at(2).depth == 1.0 and spec.at(None).depth is None
    assert spec.shared("a", torch.nn.Identity) is spec.at(0).shared("a", torch.nn.ReLU)
    with pytest.raises(LuthierError, match="nothing fills the slot 'hat'"):
        spec.part("hat")
