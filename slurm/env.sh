# shellcheck shell=bash
# Sourced by the job scripts in the repository's root: where the ranks meet, which Python, settings of NCCL, OpenMP and
# CUDA.  Leaves `python`, a command as an array, for them.
#
# What only this site needs (modules, network interfaces, CONTAINER_EXEC) goes in slurm/site.sh, or the file that LFM_SITE
# names; it is sourced first.  Variables that it or the user has set are kept.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] ||
    fail "not inside a Slurm allocation; submit with: sbatch ${BASH_SOURCE[1]:-slurm/train_3b.sh}"

if [[ -n ${LFM_SITE:-} ]]; then
    [[ -f $LFM_SITE ]] || fail "LFM_SITE=$LFM_SITE does not exist; correct it, or unset it to use slurm/site.sh if there is one"
    # shellcheck source=/dev/null
    source "$LFM_SITE"
elif [[ -f slurm/site.sh ]]; then
    # shellcheck source=/dev/null
    source slurm/site.sh
fi

# The python of the container (CONTAINER_EXEC="apptainer exec --nv image.sif"), else that of `make setup`.
if [[ -n ${CONTAINER_EXEC:-} ]]; then
    read -ra python <<<"$CONTAINER_EXEC"
    command -v "${python[0]}" >/dev/null || fail "CONTAINER_EXEC starts with ${python[0]}, which is not on this node; install it or load its module in slurm/site.sh"
    python+=("${LFM_PYTHON:-python}")
else
    python=("${LFM_PYTHON:-$PWD/.venv/bin/python}")
    command -v "${python[0]}" >/dev/null || fail "${python[0]} does not exist; run make setup, or set LFM_PYTHON or CONTAINER_EXEC"
fi
# A container brings the environment, the code is this checkout's.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Lines reach the log when they are printed.
export PYTHONUNBUFFERED=1

# The ranks meet on the first node, which is this one.  The port lies below the range from which systems hand out ports on
# their own; jobs that share a node begin with different ones and take the next that nobody listens on.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT
# What another launcher left in the submitting shell would be taken for this job's.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

# Since Slurm 22.05 srun no longer takes this from sbatch, and every rank would be left with one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Threads of the ranks of a node must not outnumber its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# NCCL says what failed.  NCCL_NVLS_ENABLE and NCCL's other choices stay as the user or site.sh has them.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# GPU numbers are those of nvidia-smi, so that a GPU that the health check names can be found.
export CUDA_DEVICE_ORDER="${CUDA_DEVICE_ORDER:-PCI_BUS_ID}"
# Kernels are compiled once a node, and not by all ranks into one home folder on the network.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}"
