"""Checkpoints written by several ranks and read by others; every failure here has a real cause."""

import os
import resource
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lfm.checkpoint import folder as checkpoint
from lfm.checkpoint.manifest import read_manifest
from lfm.checkpoint.saver import Saver
from lfm.checkpoint.tensors import load_tensors
from lfm.errors import NonFiniteError, UserError
from lfm.job.ranks import Ranks
from lfm.training.state import check_finite
from tests.ranks import run_on_ranks
from tests.training.tiny_run import manifest_fields, tiny_run


def whole_state():
    """Global tensors of every kind: cut on dim 0, cut on dim 1, whole, frozen, boolean, a scalar."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"rows": (6, 5), "columns": (4, 8), "norm": (7,), "scale": ()}
    state = {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }
    mask = torch.rand(9, 9, generator=generator) < 0.3
    return {**state, "frozen.reservoir": torch.randn(9, 9, generator=generator), "frozen.mask": mask}


def cut(tensor, dim, group):
    """This rank's shard of `tensor`; like a parameter of an engine, a view into other storage."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh=dist.get_process_group_ranks(group))
    local = tensor.chunk(group.size(), dim)[group.rank()]
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)


def share_of(rank, state):
    """Four ranks, two of tensor parallelism: ranks 0 and 1 own one half of the keys, 2 and 3 the other."""
    tensor_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    owner = {"rows": 0, "columns": 1, "norm": 0, "scale": 1, "reservoir": 0, "mask": 1}
    dims = {"rows": 0, "columns": 1}
    share = {}
    for key, tensor in state.items():
        name = key.split(".")[1]
        if owner[name] != rank // 2:
            continue
        if name in dims:
            share[key] = cut(tensor, dims[name], tensor_groups[rank // 2])
        elif rank % 2 == 0:
            share[key] = tensor
    return share


def saver(folder, *, asynchronous, keep=9):
    return Saver(folder, keep=keep, asynchronous=asynchronous, group=dist.new_group(backend="gloo"))


def steps(folder):
    return [int(path.name.removeprefix("step_")) for path in checkpoint.whole_checkpoints(folder)]


def read(folder, step, keys=None):
    path = folder / f"step_{step:08d}"
    manifest = read_manifest(path)
    checkpoint.verify(path, manifest)
    targets = {key: torch.zeros_like(t) for key, t in whole_state().items() if keys is None or key in keys}
    load_tensors(path, manifest, targets)
    return targets, manifest


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), f"{key} differs"


def save_whole(folder, step=1, state=None):
    with Saver(folder, keep=9, asynchronous=False) as alone:
        alone.save(step, whole_state() if state is None else state, manifest_fields(step), b"tokenizer")
    return folder / f"step_{step:08d}"


def _four_ranks_save(rank, folder, asynchronous):
    with saver(folder, asynchronous=asynchronous, keep=2) as together:
        for step in (1, 2, 3):
            share = share_of(rank, whole_state())
            held = together.save(step, share, manifest_fields(step, seed=5 + rank), b"tokenizer")
    return held, together.last_seconds


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_what_four_ranks_save_one_process_reads(asynchronous, tmp_path):
    times = run_on_ranks(_four_ranks_save, 4, tmp_path, asynchronous)
    assert all(held == total if not asynchronous else min(held, total) > 0 for held, total in times)
    assert steps(tmp_path) == [2, 3] and not list(tmp_path.glob(".writing-*"))
    found, manifest = read(tmp_path, 3)
    assert_same(found, whole_state())
    assert (manifest["step"], manifest["config"]["seed"]) == (3, 5)  # of rank 0
    assert manifest["frozen"].keys() == {"frozen.reservoir", "frozen.mask"}
    assert (tmp_path / "step_00000003/tokenizer.json").read_bytes() == b"tokenizer"
    assert {f"__{rank}_0.distcp" for rank in range(4)} | {".metadata", "tokenizer.json"} <= manifest["files"].keys()


def _read_shards(rank, path):
    wanted = whole_state()
    dims = {"master.rows": 0, "master.columns": 1, "exp_avg.columns": 0}
    shards = {key: cut(torch.zeros_like(wanted[key]), dim, dist.group.WORLD) for key, dim in dims.items()}
    # Ranks need not want the same keys.
    alone = {"frozen.reservoir": torch.zeros(9, 9)} if rank == 0 else {"exp_avg.norm": torch.zeros(7)}
    load_tensors(path, read_manifest(path), shards | alone)
    assert_same(alone, {key: wanted[key] for key in alone})
    for key, dim in dims.items():
        assert torch.equal(shards[key].to_local(), wanted[key].chunk(2, dim)[rank])


@pytest.mark.parametrize("writers", [1, 4])
def test_two_ranks_read_shards_cut_alike_or_crosswise(writers, tmp_path):
    if writers == 1:
        save_whole(tmp_path, step=3)
    else:
        run_on_ranks(_four_ranks_save, 4, tmp_path, False)
    run_on_ranks(_read_shards, 2, tmp_path / "step_00000003")


def _train_while_saving(rank, folder):
    state = {f"master.of_{rank}": torch.full((2**20,), 1.0), f"exp_avg.of_{rank}": torch.arange(12.0).reshape(3, 4).t()}
    first, second = manifest_fields(1), manifest_fields(2)
    with saver(folder, asynchronous=True) as together:
        if rank == 0:  # whose save is under way, waiting for rank 1, in all that follows
            together.save(1, state, first, b"")
        for tensor in state.values():
            tensor.mul_(2 if rank == 0 else 1)
        first["counters"]["optimizer_step"] = 99
        for _ in range(50):
            total = torch.full((10_000,), rank + 1.0)
            dist.all_reduce(total)
            assert torch.equal(total, torch.full((10_000,), 3.0))
        assert not (folder / "step_00000001").exists()
        if rank == 1:
            time.sleep(0.3)
            together.save(1, state, first, b"")
        for _ in range(50):  # while both write
            dist.all_reduce(torch.ones(10_000))
            state[f"master.of_{rank}"].fill_(5)
        held = together.save(2, state, second, b"")
        assert (folder / "step_00000001/manifest.json").exists()  # the second save waited for the first
        state[f"master.of_{rank}"].fill_(-1)
    assert (folder / "step_00000002/manifest.json").exists()
    return held


def test_a_background_save_keeps_the_values_of_its_moment(tmp_path):
    run_on_ranks(_train_while_saving, 2, tmp_path)
    for step, value in ((1, 1.0), (2, 5.0)):
        path = tmp_path / f"step_{step:08d}"
        manifest = read_manifest(path)
        checkpoint.verify(path, manifest)
        found = {f"master.of_{rank}": torch.zeros(2**20) for rank in range(2)}
        found |= {f"exp_avg.of_{rank}": torch.zeros(4, 3) for rank in range(2)}
        load_tensors(path, manifest, found)
        for rank in range(2):
            assert torch.equal(found[f"master.of_{rank}"], torch.full((2**20,), value))
        grown = 1 if step == 1 else 2
        assert torch.equal(found["exp_avg.of_0"], torch.arange(12.0).reshape(3, 4).t() * grown)
        assert manifest["counters"]["optimizer_step"] == step


def _one_rank_cannot_write(rank, folder, asynchronous):
    state = {f"master.of_{rank}": torch.ones(2**20)}
    together = saver(folder, asynchronous=asynchronous)
    together.save(1, state, manifest_fields(1), b"")
    together.wait()
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, no_limit[1]))
    with pytest.raises(UserError) as failed:
        together.save(2, state, manifest_fields(2), b"")
        while not together.has_failed:  # every rank comes to see it without asking the others
            time.sleep(0.01)
        together.wait()
    together.wait()  # an error is raised once
    assert not together.has_failed
    resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    dist.barrier()
    assert os.listdir(folder) == ["step_00000001"]
    dist.barrier()
    together.save(3, state, manifest_fields(3), b"")
    together.wait()
    return str(failed.value)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_earlier_checkpoints(asynchronous, tmp_path):
    errors = run_on_ranks(_one_rank_cannot_write, 2, tmp_path, asynchronous)
    assert errors[0] == errors[1]
    assert "step_00000002 could not be written by rank 1: a file is larger than `ulimit -f` allows" in errors[0]
    assert errors[0].endswith("set output=DIR; the checkpoint before, step_00000001, is intact")
    assert steps(tmp_path) == [1, 3]
    for path in checkpoint.whole_checkpoints(tmp_path):
        checkpoint.verify(path, read_manifest(path))


def _need_more_than_the_disk_has(rank, folder):
    free = shutil.disk_usage(folder).free
    # Neither share alone is too large; pages of an expanded tensor do not exist.
    state = {f"master.of_{rank}": torch.ones(1, dtype=torch.uint8).expand(int(free * 0.6))}
    with pytest.raises(UserError) as failed:
        saver(folder, asynchronous=False).save(1, state, manifest_fields(1), b"")
    return str(failed.value)


def test_the_space_that_all_ranks_need_is_looked_for_first(tmp_path):
    errors = run_on_ranks(_need_more_than_the_disk_has, 2, tmp_path)
    assert errors[0] == errors[1] and "free some space" in errors[0]
    assert os.listdir(tmp_path) == []


def _save_beside(rank, folder):
    with pytest.raises(UserError) as failed:
        saver(folder / f"host_{rank}", asynchronous=False).save(1, {f"master.of_{rank}": torch.ones(3)}, {}, b"")
    return str(failed.value)


def test_a_folder_that_the_ranks_do_not_share_is_refused(tmp_path):
    errors = run_on_ranks(_save_beside, 2, tmp_path)
    assert errors[0] == errors[1] and "is not seen by rank 0; set output=DIR" in errors[0]
    assert steps(tmp_path / "host_0") == []


def _file_in_the_way(rank, folder):
    with pytest.raises(UserError) as failed, saver(folder / "file" / "checkpoints", asynchronous=True) as together:
        together.save(1, {"master.x": torch.ones(3)} if rank == 0 else {}, {}, b"")
    return str(failed.value)


def test_a_folder_that_cannot_be_made_is_named_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    errors = run_on_ranks(_file_in_the_way, 2, tmp_path)
    assert errors[0] == errors[1] and "could not be written by rank 0" in errors[0] and "Not a directory" in errors[0]


def _one_rank_cannot_copy(rank, folder):
    device = "meta" if rank == 1 else "cpu"
    with pytest.raises(RuntimeError) as failed, saver(folder, asynchronous=True) as together:
        together.save(1, {f"master.of_{rank}": torch.ones(3, device=device)}, {}, b"")
    return str(failed.value)


def test_a_share_that_cannot_be_copied_to_host_memory_fails_on_all_ranks(tmp_path):
    errors = run_on_ranks(_one_rank_cannot_copy, 2, tmp_path)
    assert errors[0] == errors[1] and "on rank 1: Cannot copy out of meta tensor" in errors[0]
    assert os.listdir(tmp_path) == []


def _one_large_tensor(rank, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    state = {"master.large": torch.ones(2**20), "master.small": torch.ones(3)}
    for step in range(1, 9):  # whichever of the writer's threads takes the large one
        with pytest.raises(UserError, match="there is no earlier checkpoint"):
            save_whole(folder, step, state)


def test_a_write_that_fails_in_a_helper_thread_is_not_lost(tmp_path):
    run_on_ranks(_one_large_tensor, 1, tmp_path)
    assert os.listdir(tmp_path) == []


def _one_rank_is_killed(rank, folder):
    state = {f"master.of_{rank}": torch.ones(2**22)}
    together = saver(folder, asynchronous=True, keep=99)
    for step in range(1, 100):
        together.save(step, state, manifest_fields(step), b"")
        if rank == 0:
            try:
                together.wait()
            except RuntimeError:
                return step
        writing = folder / f".writing-step_{step:08d}"
        while step > 1 and not (folder / f"step_{step:08d}").exists():  # seen too late on a busy host: the next save
            if (writing / "__1_0.distcp").exists() and not (writing / "manifest.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.0005)


def test_a_rank_killed_while_writing_leaves_no_checkpoint_taken_for_whole(tmp_path):
    failed, _ = run_on_ranks(_one_rank_is_killed, 2, tmp_path, lost=(1,))
    assert steps(tmp_path) == list(range(1, failed)) and failed > 1
    for path in checkpoint.whole_checkpoints(tmp_path):
        checkpoint.verify(path, read_manifest(path))
    checkpoint.remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
def test_one_rank_of_four_names_the_damaged_file(harm, tmp_path):
    path = save_whole(tmp_path)
    manifest = read_manifest(path)
    damaged = path / "__0_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content if harm == "flipped" else content[:10])
    if harm == "missing":
        damaged.unlink()
    named = []
    for rank in range(4):
        try:
            checkpoint.verify(path, manifest, rank=rank, world_size=4)
        except UserError as error:
            named.append(str(error))
    assert len(named) == 1 and f"checkpoint file {damaged} " in named[0]


def _one_rank_has_a_number_that_is_none(rank, folder, harm):
    share = {
        "master.whole": torch.full((4,), 3e38),
        "frozen.mask": torch.ones(2).bool(),
        "exp_avg.empty": torch.ones(0),
    }
    shard = cut(torch.tensor([1.0, harm]), 0, dist.group.WORLD)
    ranks = Ranks(rank, 2, dist.new_group(backend="gloo"))
    check_finite(share, tiny_run(folder, folder), 7, ranks)
    with pytest.raises(NonFiniteError) as failed:
        check_finite(share | {"master.shard": shard}, tiny_run(folder, folder), 7, ranks)
    return str(failed.value)


@pytest.mark.parametrize("harm", [float("nan"), float("-inf")])
def test_a_number_that_is_none_on_one_rank_is_told_on_all(harm, tmp_path):
    other, own = run_on_ranks(_one_rank_has_a_number_that_is_none, 2, tmp_path, harm)
    end = "is not finite after the update; this state is not saved, and there is no earlier one"
    assert own == f"step 7: master.shard {end}" and other == f"step 7: a tensor of rank 1 {end}"
