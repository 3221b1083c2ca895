#!/usr/bin/env bash
# Makes a data set's shards on one node, from the repository's root:
#
#   LFM_CONFIG=configs/data/NAME.yaml sbatch slurm/prepare_shards.sh [key=value ...]
#
# A killed or requeued job starts anew and leaves nothing half-made behind; one that finds its data set made ends at once.
# No signal is asked for: give it the time it needs.
#
#SBATCH --job-name=prepare_shards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${LFM_ROOT:-.}"
if [[ ! -f slurm/env.sh ]]; then
    echo "error: $PWD is not the repository's root; submit from there, or set LFM_ROOT to it" >&2
    exit 2
fi
source slurm/env.sh

[[ -n ${LFM_CONFIG:-} ]] || fail "LFM_CONFIG is not set; give it the data set's file, such as configs/data/stdlib_8k.yaml"
[[ -f $LFM_CONFIG ]] || fail "LFM_CONFIG=$LFM_CONFIG does not exist; configs/data/ holds the shipped ones"

exec "${python[@]}" -m data_pipeline.prepare --config "$LFM_CONFIG" "$@"
