"""Loads summed over processes that train together."""

import torch
import torch.multiprocessing as mp

from luthier.kit.routing import over_ranks, stepped_bias


def _rank(rank: int, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = [torch.tensor([5.0, 0.0, 1.0]), torch.tensor([0.0, 6.0, 0.0])][rank]
    load = over_ranks(mine)
    torch.save({"load": load, "mine": mine, "bias": stepped_bias(torch.zeros(3), load, 0.5)}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_move_the_bias_by_the_load_of_both(tmp_path):
    """5 and 6 and 1: the mean is 4. Each rank alone would have moved experts 0 and 1 apart."""
    mp.spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert found["load"].tolist() == [5.0, 6.0, 1.0]
        assert found["bias"].tolist() == [-0.5, -0.5, 0.5]
        assert found["mine"].tolist() != found["load"].tolist()


def test_alone_it_is_the_load():
    load = torch.tensor([1.0, 2.0])
    assert over_ranks(load).tolist() == [1.0, 2.0]
