#!/usr/bin/env bash
# One labelling job on Slurm: a Ray cluster on the nodes of the job, the command on the first of them, the same command
# again after a preemption or at the end of the time limit. From a shell in which `dataengine` is found:
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=12:00:00 deploy/slurm.sh \
#       label s3://bucket/root canny_edge sam_instance CLIP-B16 --device cuda --workers 32
#
# What stands before the script's name is for Slurm (partition, account, GPUs, time, see `man sbatch`), what stands
# after it for dataengine. One node is enough. The root must be an object store or a shared file system.
#
#SBATCH --job-name=dataengine
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --signal=B:TERM@120
#
# --no-kill: the job survives the loss of a worker node; the engine gives its shards to the others.
# --signal:  this script (B) gets SIGTERM two minutes before the time limit. At a preemption too, if the cluster is set
#            up with PreemptParameters=send_user_signal; if not, the steps are told to end at once, and what the
#            workers had not yet put in staging is made again.
set -euo pipefail

: "${SLURM_JOB_ID:?run it with sbatch, or inside an allocation}"
readonly DRAIN_SECONDS=60 # how long the command may take to finish or spill its batches; it needs 30
readonly START_SECONDS=180

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Ports, a folder and a token for each job, so that jobs that share a machine do not meet. The token is made here and
# handed to the steps in their environment: without it, anybody who reaches the port could run code as you.
port=$((20000 + SLURM_JOB_ID % 5000 * 2))
folder="${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID"
RAY_ADDRESS="$head:$port"
RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export folder port START_SECONDS

# Ray takes seconds to listen; a worker that asks too early would give up. $1: the process without which it is in vain.
await_head() {
    until ray health-check --address "$RAY_ADDRESS" 2>/dev/null; do
        if ! kill -0 "$1" 2>/dev/null || [ "$SECONDS" -gt "$START_SECONDS" ]; then
            echo "no Ray at $RAY_ADDRESS after $SECONDS seconds" >&2
            return 1
        fi
        sleep 1
    done
}

# What every node runs: the first one the head, the others workers that join it. Ray would count the machine's cores;
# the job may own fewer. --block keeps Ray inside the step, so that Slurm ends it with the job.
# shellcheck disable=SC2329 # called by name, on the nodes
node() {
    set -euo pipefail
    if [ "$SLURM_NODEID" -eq 0 ]; then
        exec ray start --log-color=false --head --port="$port" --num-cpus="$SLURM_CPUS_ON_NODE" --temp-dir="$folder" \
            --dashboard-host=127.0.0.1 --ray-client-server-port=$((port + 1)) --block
    fi
    await_head $$
    exec ray start --log-color=false --address="$RAY_ADDRESS" --num-cpus="$SLURM_CPUS_ON_NODE" --block
}
export -f await_head node

# One task on each node. Without --cpu-bind=none the whole of Ray would sit on the one core of its task.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap --no-kill \
    --kill-on-bad-exit=0 --cpu-bind=none bash -c node &
cluster=$!
command=""
told=""

# shellcheck disable=SC2329 # called by the trap
stop() { # the command alone: it has batches to put away, and needs the cluster for it
    told=yes
    echo "told to end; draining" >&2
    if [ -n "$command" ]; then kill -TERM "$command" 2>/dev/null || true; fi
}
trap stop TERM INT

finish() {
    kill -TERM "$cluster" 2>/dev/null || true
    wait "$cluster" 2>/dev/null || true
    rm -rf "$folder"
}
trap finish EXIT

await_head "$cluster"
code=143
if [ -z "$told" ]; then
    echo "dataengine $* on $SLURM_JOB_NUM_NODES nodes, try $((${SLURM_RESTART_COUNT:-0} + 1))" >&2
    dataengine "$@" &
    command=$!
    code=0
    wait "$command" || code=$?
    if [ -n "$told" ]; then
        # The signal ended the wait, not the command. One that does not end in time is killed: what it has committed
        # is whole, and staging keeps most of the rest.
        timeout "$DRAIN_SECONDS" tail --pid="$command" --follow /dev/null || kill -KILL "$command" || true
        code=0
        wait "$command" || code=$?
    fi
    echo "dataengine ended with $code" >&2
fi
if [ -n "$told" ] && [ "$code" -ne 0 ]; then
    finish
    scontrol requeue "$SLURM_JOB_ID" # ends this script too; the next try resumes from what is committed
fi
exit "$code"
