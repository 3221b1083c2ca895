#!/usr/bin/env bash
# Trains LFM-3B on a cluster, from the repository's root:
#
#   sbatch slurm/train_3b.sh [key=value ...]
#   LFM_CONFIG=configs/lfm_3b_8gpu.yaml sbatch --nodes=1 slurm/train_3b.sh name=first
#
# The resources below are those of configs/lfm_3b_32gpu.yaml, 4 nodes of 8 GPUs; options before the script's name replace
# them.  Before the time limit the run saves, and the job goes back into the queue: see docs/slurm.md.
#
#SBATCH --job-name=lfm_3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# 5 minutes before the limit: time for the step in hand, for 34 GiB of checkpoint at 0.3 GiB/s, and for Slurm, whose
# signals come up to half a minute early and whose end comes on time.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

forwarder="" signals=0
forward() {
    signals=$((signals + 1))
    [[ -z $forwarder ]] || return 0
    echo "slurm: signal from Slurm, asking every rank to save and end"
    # More than once, as a rank that is still starting ignores it.
    while :; do
        scancel --quiet --signal=USR1 "$SLURM_JOB_ID.0" 2>/dev/null || true
        sleep 10
    done &
    forwarder=$!
}
trap forward USR1
trap '[[ -z $forwarder ]] || kill "$forwarder"' EXIT

cd "${LFM_ROOT:-.}"
if [[ ! -f slurm/env.sh ]]; then
    echo "error: $PWD is not the repository's root; submit from there, or set LFM_ROOT to it" >&2
    exit 2
fi
source slurm/env.sh

config=${LFM_CONFIG:-configs/lfm_3b_32gpu.yaml}
max_restarts=${LFM_MAX_RESTARTS:-20}
[[ -f $config ]] || fail "LFM_CONFIG=$config does not exist; configs/ holds the shipped ones"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "LFM_MAX_RESTARTS=$max_restarts is not a whole number; give one, 0 for no restarts"

pretrain=("${python[@]}" launch/pretrain.py --config "$config" "$@")
ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}
restarts=${SLURM_RESTART_COUNT:-0}
# A mistake in the configuration ends here, in one sentence and not in one a rank.
folder=$("${pretrain[@]}" --folder --world-size "$ranks" | tail -n 1)
echo "slurm: job $SLURM_JOB_ID, restart $restarts: $ranks ranks on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT, run folder $folder"

# One task a GPU and no launcher between: launchers end by the signal instead of passing it on.  A rank starts with the
# signal ignored, until it can answer it.  When one rank ends, the others have time to say why.  `srun` runs in the
# background, as bash handles signals only in `wait`.
srun --label --export=ALL --kill-on-bad-exit=0 --wait=120 \
    bash -c 'trap "" USR1; exec "$@"' rank "${pretrain[@]}" &
step=$!
while :; do
    seen=$signals code=0
    wait "$step" || code=$?
    ((signals != seen)) || break # the signal ended the wait, not the step
done

if ((code != 0)); then
    echo "slurm: the ranks failed with exit code $code; not requeued" >&2
    exit "$code"
fi
# The run leaves this file when a signal stopped it, its checkpoint is whole and it has steps to go.
if [[ ! -f $folder/stopped ]]; then
    echo "slurm: the run is complete"
    exit 0
fi
read -r last cause <"$folder/stopped"
if [[ $cause == SIGINT ]]; then
    echo "slurm: stopped by SIGINT and saved after step $last; not requeued"
    exit 0
fi
((restarts < max_restarts)) || {
    echo "error: saved after step $last, but this was restart $restarts and LFM_MAX_RESTARTS=$max_restarts; submit again to go on" >&2
    exit 1
}
scontrol requeue "$SLURM_JOB_ID" || {
    echo "error: saved after step $last, but Slurm does not requeue job $SLURM_JOB_ID; submit again to go on" >&2
    exit 1
}
echo "slurm: stopped by $cause and saved after step $last; back in the queue"
