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
# --signal:  this script alone (B) gets SIGTERM two minutes before the time limit. At a preemption too where slurm.conf
#            says SlurmctldParameters=preempt_send_user_signal. Where it does not, Slurm ends the workers at once; this
#            script sees that, and what they had not yet put in staging, a minute's work at most, is made again.
set -euo pipefail

: "${SLURM_JOB_ID:?run it with sbatch, or inside an allocation}"
DRAIN_SECONDS="${DRAIN_SECONDS:-60}" # how long the command may take to finish or spill its batches; it needs 30
readonly START_SECONDS=180

# Ports, a folder and a token for each job, so that jobs that share a machine do not meet. The token is made here and
# handed to the steps in their environment: without it, anybody who reaches the port could run code as you.
port=$((20000 + SLURM_JOB_ID % 2500 * 4))
folder="${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID"
RAY_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$port"
RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export START_SECONDS
# Ray's own drain at SIGTERM, for one node of many: here all end together, and the command has drained before.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

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

# The cores are said because Ray would count the machine's, and the job may own fewer. --block keeps Ray inside the job
# step, so that Slurm ends it with the job.
start_ray() { exec ray start --log-color=false --num-cpus="$SLURM_CPUS_ON_NODE" --block "$@"; }

# shellcheck disable=SC2329 # called by name, on the other nodes
worker() {
    set -euo pipefail
    await_head $$
    start_ray --address="$RAY_ADDRESS"
}
export -f await_head start_ray worker

# The head beside the command, in this script's own step: what ends the other steps leaves these two alive to put
# things away.
start_ray --head --port="$port" --temp-dir="$folder" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) \
    --ray-client-server-port=$((port + 2)) &
head=$!
workers=""
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    # One task on each node. Without --cpu-bind=none the whole of Ray would sit on the one core of its task.
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --relative=1 --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 \
        --cpu-bind=none bash -c worker &
    workers=$!
fi
command=""
told=""

# shellcheck disable=SC2329 # called by the trap
stop() { # the command alone: it has batches to put away, and needs the cluster for it
    told=yes
    echo "told to end; draining" >&2
    if [ -n "$command" ]; then kill -TERM "$command" 2>/dev/null || true; fi
}
trap stop TERM INT

# shellcheck disable=SC2329 # called by the trap
finish() { # nothing is at stake any more; Slurm reaps what is left
    if [ -n "$workers" ]; then kill -TERM "$workers" 2>/dev/null || true; fi
    kill -TERM "$head" 2>/dev/null || true
    wait "$head" 2>/dev/null || true
    rm -rf "$folder"
}
trap finish EXIT

await_head "$head"
code=143
if [ -z "$told" ]; then
    echo "dataengine $* on $SLURM_JOB_NUM_NODES nodes, try $((${SLURM_RESTART_COUNT:-0} + 1))" >&2
    dataengine "$@" &
    command=$!
    # Until the command ends, or the head or every worker does: then the job is being preempted or its nodes are gone.
    code=0
    wait -n "$command" "$head" $workers || code=$?
    if [ -z "$told" ] && kill -0 "$command" 2>/dev/null; then stop; fi
    if [ -n "$told" ]; then
        # One that does not end in time is killed: what it has committed is whole, and staging keeps most of the rest.
        timeout "$DRAIN_SECONDS" tail --pid="$command" --follow /dev/null || kill -KILL "$command" || true
        code=0
        wait "$command" || code=$?
    fi
    echo "dataengine ended with $code" >&2
fi
if [ -n "$told" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID" # ends this script too; the next try resumes from what is committed
fi
exit "$code"
