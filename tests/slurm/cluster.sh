#!/usr/bin/env bash
# A throw-away Slurm of several pretended nodes on this machine: no systemd, no cgroups, nothing outside its folder.
#
#   cluster.sh start FOLDER    then: export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh stop FOLDER     cancels the jobs, ends the daemons that it started, removes the folder
#
# NODES, CPUS and GPUS (of a node) say what is pretended.  GPUs are counted and nothing more.  Needs slurm-wlm and munge.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

(($# == 2)) && [[ $2 =~ ^/[^[:space:]]+$ ]] || fail "give start or stop, and an absolute folder without spaces"
folder=$2
nodes=${NODES:-4} cpus=${CPUS:-64} gpus=${GPUS:-8}
export SLURM_CONF=$folder/slurm.conf

await() { # what, command ...
    local what=$1 end=$((SECONDS + 30))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "$what did not start: $(tail -qn 5 "$folder"/*.log)"
        sleep 0.1
    done
}

every_node_is_idle() { (($(sinfo -h -N -o %t | grep -c -x idle) == nodes)); }

# The first of a row of ports that nobody listens on: one for slurmctld, one for every slurmd.
free_ports() {
    local first port taken
    while :; do
        first=$((20000 + RANDOM % 12000)) taken=""
        for ((port = first; port <= first + nodes; port++)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then taken=yes; fi
        done
        [[ -n $taken ]] || break
    done
    echo "$first"
}

# Nodes have addresses for names, as the first name of an allocation is where its ranks meet.  Job ids begin with the
# clock: files that are named for a job of an earlier cluster are not taken for those of this one.
write_config() {
    local port i user
    port=$(free_ports)
    user=$(id -un)
    cat <<END
ClusterName=throwaway
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=3600
FirstJobId=$(($(date +%s) % 60000000 + 1))
PartitionName=main Nodes=127.0.0.[1-$nodes] Default=YES MaxTime=INFINITE State=UP
END
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=127.0.0.$i NodeHostname=localhost NodeAddr=127.0.0.$i Port=$((port + i)) CPUs=$cpus" \
            "RealMemory=100000 Gres=gpu:$gpus"
    done
}

start() {
    local tool missing="" i
    for tool in munged slurmctld slurmd sbatch; do
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    [[ -z $missing ]] ||
        fail "missing:$missing; install them with: apt-get install --no-install-recommends slurm-wlm munge"
    mkdir -p "$folder/state"
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    write_config >"$SLURM_CONF"
    for ((i = 0; i < gpus; i++)); do : >"$folder/gpu$i"; done
    echo "NodeName=127.0.0.[1-$nodes] Name=gpu File=$folder/gpu[0-$((gpus - 1))]" >"$folder/gres.conf"
    # --force: the folder may lie under /tmp, which others can write to.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    await munged munge --socket="$folder/munge.socket" --no-input
    slurmctld -c
    await slurmctld scontrol ping
    for ((i = 1; i <= nodes; i++)); do slurmd -N "127.0.0.$i"; done
    await "every slurmd" every_node_is_idle
}

# The process that a pid file names.  The file may have outlived it: it is one of ours if it was started on this folder.
daemon() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -q -x "SLURM_CONF=$SLURM_CONF" &&
        echo "$pid"
}

stop() {
    [[ -f $SLURM_CONF ]] || fail "$folder holds no cluster"
    timeout 10 scancel --full --user="$(id -un)" || true
    local file pid end=$((SECONDS + 15))
    while [[ -n $(timeout 5 squeue -h) ]] && ((SECONDS < end)); do sleep 0.2; done
    # Those that take long to end do so side by side.
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
        if pid=$(daemon "$file"); then kill "$pid"; fi
    done
    for file in "$folder"/*.pid; do
        while daemon "$file" >/dev/null && ((SECONDS < end + 10)); do sleep 0.1; done
    done
    rm -rf -- "$folder"
}

case $1 in
start) start ;;
stop) stop ;;
*) fail "$1 is neither start nor stop" ;;
esac
