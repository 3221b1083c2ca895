import contextlib
import io
import re
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lfm.errors import UserError
from lfm.job import health
from lfm.job.health import Report, check, refuse_unfit, slow_links
from lfm.job.process import Process
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
SUMMARY = r"health: {} rank(s|) on 1 host, torch 2\.\S+, cpu"


def checked(rank: int, world_size: int, fingerprints: tuple[str, ...]) -> tuple[str, float]:
    """Summary, or the error with its type; and the seconds that it took."""
    process = Process(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
    start = time.perf_counter()
    try:
        found = check(process, CPU, fingerprint=fingerprints[rank])
    except (UserError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    return found, time.perf_counter() - start


def test_ranks_that_agree_are_summed_up_in_a_line():
    found = run_on_ranks(checked, 4, 4, ("same",) * 4)
    assert len({summary for summary, _ in found}) == 1
    line = found[0][0].splitlines()[0]
    assert re.fullmatch(SUMMARY.format(4) + r", gloo; all-reduce 1 MiB \d+\.\d GB/s", line), line


def printed(rank: int) -> tuple[str, str]:
    """Summary and what the check printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        summary, _ = checked(rank, 2, ("same",) * 2)
    return summary, out.getvalue()


def test_only_rank_0_prints_the_summary():
    (summary, first), (_, second) = run_on_ranks(printed, 2)
    assert first == summary + "\n" and second == ""


def test_a_rank_with_another_configuration_is_named_on_every_rank():
    for message, _ in run_on_ranks(checked, 3, 3, ("a", "b", "a")):
        assert re.fullmatch(
            r"UserError: rank 1 \(host \S+\) has configuration \(fingerprint\) b and rank 0 \(host \S+\) has a; .*",
            message,
        ), message


def test_when_rank_0_is_the_odd_one_it_is_named():
    for message, _ in run_on_ranks(checked, 3, 3, ("b", "a", "a")):
        assert message.startswith("UserError: rank 0 (host ") and " has a; " in message, message


def test_one_process_needs_no_group():
    assert not dist.is_initialized()
    found, _ = checked(0, 1, ("one",))
    assert re.fullmatch(SUMMARY.format(1), found), found


def wrong_network(rank: int, world_size: int) -> str:
    """What `check` says where rank 1's sums arrive with one bit changed."""
    exact = dist.all_reduce

    def flip_a_bit(tensor, *arguments, **keywords):
        exact(tensor, *arguments, **keywords)
        if rank == 1:
            tensor[12345] ^= 1

    dist.all_reduce = flip_a_bit
    return checked(rank, world_size, ("same",) * world_size)[0]


def test_an_all_reduce_that_changes_a_bit_is_found_and_its_rank_named():
    for message in run_on_ranks(wrong_network, 3, 3):
        assert re.match(r"RuntimeError: rank 1 \(host \S+\): an all-reduce of known numbers over 3 ranks", message), (
            message
        )


def wrong_arithmetic(rank: int, world_size: int) -> str:
    """What `check` says where rank 2 multiplies with an error of a last place."""
    exact = torch.bmm

    def off_by_one(a, b):
        product = exact(a, b)
        product[-1, 200, 100] += rank == 2
        return product

    torch.bmm = off_by_one
    return checked(rank, world_size, ("same",) * world_size)[0]


def test_a_device_that_multiplies_wrong_is_named():
    for message in run_on_ranks(wrong_arithmetic, 3, 3):
        assert re.match(r"RuntimeError: rank 2 \(host \S+\): the CPU computed a matrix product .*float32", message), (
            message
        )


REPORTS = [Report(rank, f"node{rank // 4}", "gpu", {"torch": "2.13.0", "world size": 8}) for rank in range(8)]


def test_other_versions_and_busy_gpus_are_refused():
    refuse_unfit(REPORTS)
    other = replace(REPORTS[5], agreed={"torch": "2.11.0", "world size": 8})
    with pytest.raises(
        UserError, match=r"rank 5 \(host node1\) has torch 2\.11\.0 and rank 0 \(host node0\) has 2\.13"
    ):
        refuse_unfit([*REPORTS[:5], other, *REPORTS[6:]])
    with pytest.raises(UserError, match=r"rank 7 \(host node1\): cuda:3 has 2 of 80 GiB free"):
        refuse_unfit([*REPORTS[:7], replace(REPORTS[7], taken="cuda:3 has 2 of 80 GiB free")])


def test_a_slow_link_is_named_among_links_of_its_kind():
    # Into ranks 0 and 4 from the other node; the network is ten times slower than what joins the GPUs of a node.
    rates = [30e9, 300e9, 300e9, 300e9, 30e9, 300e9, 300e9, 300e9]
    assert slow_links(REPORTS, rates) == []
    rates[6] = 40e9
    assert slow_links(REPORTS, rates) == [
        "rank 6 (host node1) receives 40.00 GB/s from rank 5 (host node1), where such links have 300.00 GB/s"
    ]
    rates[6], rates[4] = 300e9, 1e9
    (only,) = slow_links(REPORTS, rates)
    assert only.startswith("rank 4 (host node1) receives 1.00 GB/s from rank 3 (host node0)")


@pytest.mark.gpu
@pytest.mark.alone
def test_a_gpu_whose_memory_is_taken_is_refused():
    device = torch.device("cuda")
    check(Process(), device, fingerprint="one")
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.empty(int(free - (health.FREE_SHARE - 0.1) * total), dtype=torch.uint8, device=device)
    with pytest.raises(UserError, match=r"rank 0 \(host \S+\): cuda.* GiB free; end what else runs on it"):
        check(Process(), device, fingerprint="one")
    del taken
