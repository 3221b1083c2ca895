"""How many rows travel where, and the rows themselves, between processes with unequal shares."""

import pytest
import torch
import torch.distributed as dist

from lfm.job.fork import run_ranks
from lfm.job.process import prepare_environment
from lfm.layout.config import ParallelConfig
from lfm.layout.layout import check_layout
from lfm.parallel import groups
from lfm.parallel.exchange import Counts, exchange
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT

WORLD, EXPERTS = 3, 2


def counts(seed):
    """Rows `[source, destination, expert]`: some none, one process that sends nothing, one expert that gets nothing."""
    found = torch.randint(0, 5, (WORLD, WORLD, EXPERTS), generator=torch.Generator().manual_seed(seed))
    if seed == 1:
        found[1] = 0
        found[:, 2, 0] = 0
    return torch.zeros_like(found) if seed == 2 else found


def rows_of(sent, source):
    """Every row tells where it is from, its destination and expert, and its place among its like."""
    found = [[source, d, e, i] for d in range(WORLD) for e in range(EXPERTS) for i in range(sent[source, d, e])]
    return torch.tensor(found, dtype=torch.float32).view(-1, 4)


def there_and_back(process):
    prepare_environment("cpu")
    groups.join(process, torch.device("cpu"), timeout_seconds=60)
    model = RunConfig.load(ROOT / "configs/lfm_debug.yaml", ["model.ffn.num_moe_experts=6"]).model
    sizes = {"global_batch_size": WORLD, "micro_batch_size": 1}
    layout = check_layout(model, ParallelConfig(expert=WORLD, zero_stage=1), WORLD, **sizes)
    group = groups.make_groups(layout, torch.device("cpu")).expert
    me, found = process.rank, []
    for seed in range(4):
        sent = counts(seed)
        announced = Counts(sent[me], group)
        to_each, from_each = announced.read()
        x = rows_of(sent, me).requires_grad_()
        arrived = exchange(x, from_each, to_each, group)
        back = exchange(arrived * 2, to_each, from_each, group)
        back.square().sum().backward()
        found.append([announced.arriving.tolist(), *(t.detach().tolist() for t in (arrived, back, x.grad))])
    dist.barrier()
    groups.leave()
    return found


@pytest.mark.slow
def test_counts_come_before_rows_which_arrive_by_source_and_go_home_with_their_gradients():
    found = run_ranks(there_and_back, WORLD, timeout_seconds=120)
    for seed in range(4):
        sent = counts(seed)
        rows = torch.cat([rows_of(sent, source) for source in range(WORLD)]).tolist()
        for me in range(WORLD):
            arriving, arrived, back, gradient = found[me][seed]
            home = rows_of(sent, me)
            assert arriving == sent[:, me].tolist()
            assert arrived == [row for row in rows if row[1] == me]
            assert back == (2 * home).tolist() and gradient == (8 * home).tolist()
