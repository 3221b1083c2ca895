"""Rows to experts and back, against the same rows sorted in one process."""

import pytest
import torch
import torch.distributed as dist

from lfm.job.fork import run_ranks
from lfm.parallel import groups
from lfm.parallel.exchange import Routes, exchange

WORLD, EXPERTS, WIDTH = 3, 2, 4


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
    return torch.tensor(found, dtype=torch.float32).view(-1, WIDTH)


def there_and_back(process):
    groups.join(process, torch.device("cpu"), timeout_seconds=60)
    me, found = process.rank, []
    for seed in range(4):
        sent = counts(seed)
        routes = Routes.to_experts(sent[me].tolist(), sent[:, me].tolist())
        x = rows_of(sent, me).requires_grad_()
        arrived = exchange(x, routes, dist.group.WORLD)
        scale = torch.arange(len(arrived))[:, None] + 1.0
        back = exchange(arrived * scale, routes.back(), dist.group.WORLD)
        back.square().sum().backward()
        found.append([t.detach().tolist() for t in (arrived, back, x.grad)])
    dist.barrier()
    groups.leave()
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(there_and_back, WORLD, timeout_seconds=120)


@pytest.mark.parametrize("seed", range(4))
def test_rows_arrive_by_expert_and_source_and_go_home_with_their_gradients(found, seed):
    sent = counts(seed)
    rows = torch.cat([rows_of(sent, source) for source in range(WORLD)])
    scales = {}
    for me in range(WORLD):
        mine = [row for row in rows.tolist() if row[1] == me]
        mine.sort(key=lambda row: (row[2], row[0], row[3]))
        assert found[me][seed][0] == mine
        scales |= {tuple(row): i + 1.0 for i, row in enumerate(mine)}
    for source in range(WORLD):
        home = rows_of(sent, source)
        scale = torch.tensor([scales[tuple(row)] for row in home.tolist()]).view(-1, 1)
        assert found[source][seed][1] == (home * scale).tolist()
        assert found[source][seed][2] == (2 * home * scale**2).tolist()
