"""Adapters merge into an adapter: factor by factor, by the ordinary methods, to what PEFT loads."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.checkpoint.adapter import Adapter
from luthier.checkpoint.delta import Delta
from luthier.checkpoint.expert import open_expert
from luthier.checkpoint.reader import Checkpoint
from luthier.cli import main
from luthier.engine.stream import plan_transform, run_transform
from luthier.errors import LuthierError
from luthier.kit.context import Context
from luthier.merge.copa import Copa
from luthier.merge.linear import Linear
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties
from luthier.testing import tiny

WEIGHT = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def folders(tmp_path):
    """A base and three adapters on it."""
    tiny.checkpoint(tmp_path / "base")
    return [adapter(tmp_path, n) for n in range(3)]


def adapter(folder, seed, r=4, **config):
    adapted = get_peft_model(
        model_in(folder), LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "up_proj"], **config)
    )
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=gen) * 0.2)
    adapted.save_pretrained(folder / f"a{seed}")
    return folder / f"a{seed}"


def model_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_sum_of_adapters_by_hand(folders, tmp_path):
    """Each factor is the sum of the experts' factors; PEFT loads it, and it reads back as a delta."""
    out = TaskArithmetic(scale=0.5).apply(experts=folders).save(tmp_path / "out")
    every = [factors(f) for f in folders]
    made = factors(out)
    assert made.keys() == every[0].keys()
    for name in made:
        torch.testing.assert_close(made[name], sum(e[name] for e in every) * 0.5, rtol=1e-6, atol=1e-7)
    mine, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (out, folders[0]))
    assert mine == theirs and not (out / "config.json").exists()
    model = PeftModel.from_pretrained(model_in(tmp_path), str(out)).merge_and_unload()
    a, b = made[WEIGHT.format("A")], made[WEIGHT.format("B")]
    base = model_in(tmp_path).model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, base + 2 * b @ a)
    assert Delta.open(out).changes["model.layers.1.self_attn.q_proj.weight"].scale == 2
    card = (out / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card and "merge.task_arithmetic" in card
    assert "A with A and B with B, not their products" in card
    assert AutoPeftModelForCausalLM.from_pretrained(out) is not None


def test_ties_of_factors_against_the_released_steps(folders, tmp_path):
    """Slow twin over all factors as one vector: keep the largest fifth, elect, average those that agree."""
    out = Ties(density=0.2).apply(experts=folders).save(tmp_path / "out")
    every = [factors(f) for f in folders]
    flat = torch.stack([torch.cat([e[n].flatten() for n in e]) for e in every])
    keep = int(flat.shape[1] * 0.2)
    cut = flat.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
    kept = torch.where(flat.abs() >= cut, flat, 0)
    sign = kept.sum(0).sign()
    agree = kept * (kept.sign() == sign)
    merged = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
    made = torch.cat([factors(out)[n].flatten() for n in every[0]])
    differing = ~torch.isclose(made, merged, atol=1e-6)
    assert differing.float().mean() < 0.002, "rounding of how many a fifth is"
    assert 0.2 < (made != 0).float().mean() < 0.6


def test_weights_by_depth_and_name_reach_factors(folders, tmp_path):
    out = Linear(weights=[{"*": 0.0, "*q_proj*": 1.0}, {"*": 1.0, "*q_proj*": 0.0}]).apply(experts=folders[:2])
    made, (one, two) = factors(out.save(tmp_path / "out")), [factors(f) for f in folders[:2]]
    for name in made:
        assert torch.equal(made[name], (one if "q_proj" in name else two)[name]), name
    out = TaskArithmetic(scale=[1.0, 0.0]).apply(experts=folders[:1]).save(tmp_path / "depth")
    made = factors(out)
    assert all(bool(made[n].any()) == (".layers.0." in n) for n in made)


def test_bytes_depend_on_nothing_else(folders, tmp_path):
    experts = [open_expert(f) for f in folders]
    assert isinstance(experts[0], Adapter) and experts[0].info(WEIGHT.format("A")).role == "attn.q"
    outs = [
        run_transform(Ties(), None, experts, tmp_path / "one", Context(), threads=1),
        run_transform(Ties(), None, experts, tmp_path / "two", Context(), threads=3, memory=1 << 20),
    ]
    one, two = ((o / "adapter_model.safetensors").read_bytes() for o in outs)
    assert one == two
    plan = plan_transform(Ties(), None, experts)
    assert plan.write_bytes == sum(t.nbytes for t in factors(outs[0]).values())
    half = run_transform(Linear(), None, experts, tmp_path / "half", Context(), dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in factors(half).values())
    assert "dtype" not in json.loads((half / "adapter_config.json").read_text())


@pytest.mark.parametrize("use", ["linear", "task_arithmetic"])
def test_in_a_recipe(folders, tmp_path, capsys, use):
    recipe = tmp_path / "r.yaml"
    names = ", ".join(str(f) for f in folders)
    recipe.write_text(f"luthier: 1\nsteps:\n  sum: {{use: merge.{use}, experts: [{names}]}}\n")
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 0
    made, every, count = factors(tmp_path / "out"), [factors(f) for f in folders], 3 if use == "linear" else 1
    torch.testing.assert_close(made[WEIGHT.format("B")], sum(e[WEIGHT.format("B")] for e in every) / count)
    assert main(["plan", str(recipe)]) == 0 and "sum" in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace(str(folders[1]), str(tmp_path / "base")))
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 2
    said = "is an adapter, and" if use == "linear" else "lacks 'base'"
    assert said in capsys.readouterr().err


def test_with_a_base_products_are_merged_and_the_card_says_nothing(folders, tmp_path):
    tiny.checkpoint(tmp_path / "whole", shard="20KB")
    out = TaskArithmetic().apply(base=tmp_path / "whole", experts=folders).save(tmp_path / "made")
    assert "A with A" not in (out / "README.md").read_text()


def test_with_a_base_the_same_adapters_give_a_model(folders, tmp_path):
    out = Linear().apply(base=tmp_path / "base", experts=folders).save(tmp_path / "out")
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED = {
    "alpha": (lambda f: edit(f, lora_alpha=4), "lora_alpha is 4, that of .* 8: their factors cannot be merged"),
    "rsLoRA": (lambda f: edit(f, use_rslora=True), "use_rslora is True"),
    "kind": (lambda f: edit(f, use_dora=True), "use_dora"),
    "base": (lambda f: edit(f, base_model_name_or_path="me/other"), "belongs to 'other'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_whose_factors_mean_something_else_are_refused(folders, tmp_path, case):
    change, words = REFUSED[case]
    change(folders[1])
    with pytest.raises(LuthierError, match=words):
        Linear().apply(experts=folders).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_ranks_targets_models_and_whole_tensors_are_refused(folders, tmp_path):
    for name, other, words in (
        ("rank", adapter(tmp_path, 5, r=2), "r is 2, that of .* 4"),
        ("model", tmp_path / "base", "is an adapter, and .*base is a whole model"),
    ):
        with pytest.raises(LuthierError, match=words):
            Linear().apply(experts=[folders[0], other]).save(tmp_path / name)
    tensors = factors(folders[2])
    del tensors[WEIGHT.format("A")]
    save_file(tensors, folders[2] / "adapter_model.safetensors")
    with pytest.raises(LuthierError, match="has no such tensor"):
        Linear().apply(experts=[folders[0], folders[2]]).save(tmp_path / "targets")
    whole = [adapter(tmp_path, n, modules_to_save=["norm"]) for n in (6, 7)]
    with pytest.raises(LuthierError, match=r"norm.weight' whole, which changes nothing that is known"):
        TaskArithmetic().apply(experts=whole).save(tmp_path / "whole")
    made = factors(Linear().apply(experts=whole).save(tmp_path / "mean"))
    name = "base_model.model.model.norm.weight"
    torch.testing.assert_close(made[name], sum(factors(f)[name] for f in whole) / 2)
    with pytest.raises(LuthierError, match="'base' is missing"):
        Ties().apply(experts=[tmp_path / "base"])


def test_a_method_that_merges_adapters_puts_them_onto_a_base(tmp_path):
    """The whole model is what PEFT makes of the base and the merged adapter, a norm saved whole included."""
    tiny.checkpoint(tmp_path / "base", shard="20KB")
    folders = [adapter(tmp_path, n, modules_to_save=["norm"]) for n in range(3)]
    alone = Copa().apply(experts=folders).save(tmp_path / "adapter")
    merged = Copa().apply(base=tmp_path / "base", experts=folders)
    whole = merged.save(tmp_path / "whole")
    theirs = PeftModel.from_pretrained(model_in(tmp_path), str(alone)).merge_and_unload().state_dict()
    mine = load_file(whole / "model.safetensors")
    assert mine.keys() == theirs.keys() and not (whole / "adapter_config.json").exists()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)
    before = model_in(tmp_path).state_dict()
    assert sum(not torch.equal(mine[n], before[n]) for n in mine) == 9, "two matrices of two layers, and five norms"
    assert merged.plan().write_bytes == sum(t.nbytes for t in mine.values())
    assert json.loads((whole / "config.json").read_text()) == json.loads((tmp_path / "base/config.json").read_text())
    of_b = Copa(scale={"*lora_B*": 2.0}).apply(experts=folders).save(tmp_path / "of B alone")
    assert all(torch.equal(t, factors(alone)[n]) for n, t in factors(of_b).items()), "its scale is B's"
    assert "A with A" not in (alone / "README.md").read_text()  # its own way with factors is in its name
    half = Copa().apply(base=tmp_path / "base", experts=folders, dtype="bf16")
    assert half.plan().write_bytes * 2 == merged.plan().write_bytes
    half = half.save(tmp_path / "half")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in load_file(half / "model.safetensors").items():
        assert torch.equal(tensor, mine[name].bfloat16()), name
    assert not [p for p in whole.iterdir() if p.name.startswith(".scratch")]


def test_what_a_method_that_merges_adapters_refuses(folders, tmp_path):
    base = tmp_path / "base"
    fine = tiny.save(tiny.moved(tiny.llama(), 1), tmp_path / "fine")
    Delta.between(Checkpoint.open(base), Checkpoint.open(fine)).save(tmp_path / "delta")
    for other in ("base", "delta"):
        for given in ({}, {"base": base}):
            words = "is no LoRA adapter; merge.copa merges adapters: luthier extract makes one"
            words = "is a change to a base, and no base is given" if other == "delta" and not given else words
            with pytest.raises(LuthierError, match=words):
                Copa().apply(experts=[folders[0], tmp_path / other], **given).save(tmp_path / "out")
    tensors = factors(folders[2])
    del tensors[WEIGHT.format("B")]
    save_file(tensors, folders[2] / "adapter_model.safetensors")
    with pytest.raises(LuthierError, match="a2.* lora_A and lora_B are missing or do not match"):
        Copa().apply(experts=folders).save(tmp_path / "out")
    tiny.checkpoint(tmp_path / "wide", hidden_size=64)
    with pytest.raises(LuthierError, match="has the shape .*32.*, the base's is .*64"):
        Copa().apply(base=tmp_path / "wide", experts=folders[:2]).plan()
    assert not (tmp_path / "out").exists()


def test_steps_that_give_adapters(folders, tmp_path, capsys, monkeypatch):
    """An adapter that a step made is an expert of the next; a run reports it; what is done is kept."""
    monkeypatch.chdir(tmp_path)
    one = "one: {use: merge.ties, experts: [a0, a1]}"
    for name, base in (("alone", ""), ("whole", "base: base, ")):
        (tmp_path / f"{name}.yaml").write_text(
            f"luthier: 1\nsteps:\n  {one}\n  two: {{use: merge.copa, {base}experts: [one, a2]}}\n"
        )
        assert main(["plan", f"{name}.yaml"]) == 0 and main(["run", f"{name}.yaml"]) == 0
        steps = tmp_path / "runs" / name / "steps"
        first = Ties().apply(experts=["a0", "a1"]).save(tmp_path / f"first-{name}")
        given = {"base": "base"} if base else {}
        second = Copa().apply(experts=[first, "a2"], **given).save(tmp_path / f"second-{name}")
        for mine, theirs in ((steps / "one", first), (steps / "two", second)):
            (mine,), (theirs,) = (list(folder.glob("*.safetensors")) for folder in (mine, theirs))
            assert mine.read_bytes() == theirs.read_bytes()
        capsys.readouterr()
        assert main(["run", f"{name}.yaml"]) == 0 and capsys.readouterr().out.count("done before") == 2


def test_a_recipe_that_gives_tuned_models_for_adapters_is_refused_before_the_tuning(folders, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"luthier: 1\ndata: {{d: {{source: 'text:stdlib'}}}}\nsteps:\n"
        f"  tuned: {{use: tune.full, model: {tmp_path / 'base'}, data: d, train: {{steps: 1}}}}\n"
        f"  sum: {{use: merge.copa, base: {tmp_path / 'base'}, experts: [{folders[0]}, tuned]}}\n"
    )
    assert main(["plan", str(recipe)]) == 2
    assert "r.yaml:5: step 'tuned' gives a whole model, and merge.copa merges LoRA" in capsys.readouterr().err
    recipe.write_text(
        f"luthier: 1\nsteps:\n  sum: {{use: merge.copa, experts: [{folders[0]}], slices: [{{{folders[0]}: [0, 1]}}]}}\n"
    )
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 2
    assert "merges adapters, which have no layers to pick" in capsys.readouterr().err
