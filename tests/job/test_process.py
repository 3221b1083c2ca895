import pytest

from lfm.errors import UserError
from lfm.job.process import Process

TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "node3", "MASTER_PORT": "29500"},
}
DEEPSPEED = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},
    **{"MASTER_ADDR": "node3", "MASTER_PORT": "29500"},
}
SLURM = {
    **{"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
    **{"SLURM_NTASKS_PER_NODE": "4", "MASTER_ADDR": "node3", "MASTER_PORT": "29500"},
}
FORMS = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "srun": SLURM}


@pytest.mark.parametrize("form", FORMS)
def test_each_launcher_says_which_process_this_is(form):
    found = Process.from_environment(FORMS[form])
    assert found == Process(5, 8, local_rank=1, local_world_size=4, address="node3", port=29500)


def test_the_variables_of_a_bare_scheduler_are_enough():
    bare = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert Process.from_environment(bare).local_world_size == 8


def test_torchrun_inside_a_slurm_step_is_torchrun():
    assert Process.from_environment(SLURM | TORCHRUN | {"RANK": "6"}).rank == 6


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script, outside of srun
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["nothing", "a batch script", "one task"],
)
def test_without_a_launcher_there_is_one_process(environment):
    assert Process.from_environment(environment) == Process()


def test_one_process_under_a_launcher_keeps_the_rendezvous():
    found = Process.from_environment(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert found == Process(address="node3", port=29500)


REFUSED = {
    "no rank": (TORCHRUN | {"RANK": ""}, r"variable RANK='' is not a number; start through torchrun"),
    "a rank in words": (SLURM | {"SLURM_PROCID": "first"}, r"variable SLURM_PROCID='first' is not a number"),
    "a negative rank": (TORCHRUN | {"RANK": "-1"}, r"variable RANK='-1' is not a number"),
    "a rank too large": (TORCHRUN | {"RANK": "8"}, r"RANK=8 is not below WORLD_SIZE=8; ranks count from 0"),
    "tasks in words": (SLURM | {"SLURM_NTASKS": "8x"}, r"variable SLURM_NTASKS='8x' is not a number"),
    "no address": (TORCHRUN | {"MASTER_ADDR": ""}, r"WORLD_SIZE=8 but MASTER_ADDR is not set; .* export MASTER_ADDR"),
    "no port": (SLURM | {"MASTER_PORT": ""}, r"variable MASTER_PORT='' is not a number"),
    "one process, no port": (
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"},
        r"variable MASTER_PORT='http' is not a number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_incomplete_or_malformed_variables_are_refused(case):
    environment, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        Process.from_environment(environment)
