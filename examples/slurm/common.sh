# shellcheck shell=bash
# Sourced by the recipes beside it; they are submitted from the repository's root, on a file system that all nodes share.
#
# IMAGE       container image for pyxis/enroot (a .sqsh file, or nvcr.io#...); empty: the nodes' own environment
# MOUNTS      of the container, beside the repository: models, data, runs
# SETUP       what every task does first, such as: . .venv/bin/activate
# REQUEUES    how often a job may start again after a lost rank, another failure that nobody foresaw, or its time limit
IMAGE=${IMAGE:-}
MOUNTS=${MOUNTS:-}
SETUP=${SETUP:-}
REQUEUES=${REQUEUES:-20}

# Exit codes of megatron-opd: bad input; the run stopped itself. Both would do so again. And what nobody foresaw, as the other ranks of one
# that is lost see it: that may go well the next time.
# shellcheck disable=SC2034  # CRASHED is for the recipes
readonly REFUSED=2 STOPPED=1 CRASHED=70

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit $REFUSED
[[ -f examples/slurm/common.sh ]] || {
    echo "$SLURM_SUBMIT_DIR: not the repository's root; cd there, then sbatch examples/slurm/..." >&2
    exit $REFUSED
}

# Of this job, seen by all of its nodes: what its tasks ended with.
SCRATCH=$PWD/runs/.job-${SLURM_JOB_ID:?}
mkdir -p "$SCRATCH"
trap 'rm -rf "$SCRATCH"' EXIT

# NCCL: a rank that is lost ends the others' collectives after the timeout, rather than never; flight recorder for the post-mortem.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_FR_BUFFER_SIZE=2000
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Tensor parallelism overlaps communication with computation only where kernels are issued in one order.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Nothing is fetched in the middle of a job by hundreds of ranks at once.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# Sets `step` to the words that run COMMAND as a job step, in the container if there is one: make_step OPTIONS... -- COMMAND...
make_step() {
    # --kill-on-bad-exit: one lost task would leave the others waiting for it.
    step=(srun --kill-on-bad-exit=1)
    while [[ $1 != -- ]]; do
        step+=("$1")
        shift
    done
    shift
    if [[ -n $IMAGE ]]; then
        step+=("--container-image=$IMAGE" "--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}" "--container-workdir=$PWD")
    fi
    # What a task ends with by itself tells more than srun's code, which is that of the tasks that were killed after it. Signals go to all
    # of a task's processes; this one outlives them to note the code, unless the job has ended by then.
    # shellcheck disable=SC2016  # for the task's shell to expand
    step+=(bash -c "${SETUP:+$SETUP && }"'trap : USR1 TERM; "$@"; code=$?; { echo $code >"$0/$SLURM_STEP_ID.$SLURM_PROCID"; } 2>/dev/null; exit $code' "$SCRATCH" "$@")
}

# Several nodes need one network for what is not the fabric's: rendezvous, control, SGLang. INTERFACE names it. NCCL finds the fabric
# itself (InfiniBand, or a cloud's plugin); it takes this one for its bootstrap alone, where its own choice, the first interface that is
# up, may be one that only this node has (docker0). Gloo would take the address of the node's name, which may be a loopback.
use_interface() {
    INTERFACE=${INTERFACE:-}
    if [[ $INTERFACE ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    fi
}

# Every node has its GPUs, free and without uncorrected errors, and writes to the shared folder. A node that does not is named before
# hundreds of GPUs wait for it.
check_nodes() {
    # Not ended by the first node that fails: all are named.
    make_step --kill-on-bad-exit=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 -- \
        bash examples/slurm/check_node.sh "${SLURM_GPUS_PER_NODE:-0}" "$SCRATCH"
    "${step[@]}"
    rm -f "$SCRATCH"/*
}

# train SRUN_OPTIONS... -- CONFIG [key=value ...]    then end, or start again where that helps
train() {
    local options=() code=0 training signalled
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    make_step "${options[@]}" -- megatron-opd train "$@"
    "${step[@]}" &  # not a function: a signal to it must be one to srun
    training=$!
    # Slurm's --signal=B:USR1@... comes to this shell; srun passes it on to all tasks, which end after their step, with 75.
    signalled=''
    trap 'signalled=1; kill -USR1 "$training"' USR1
    wait "$training" || code=$?
    while [[ $signalled ]]; do  # it is the wait that the signal has ended
        signalled=''
        code=0
        wait "$training" || code=$?
    done
    trap - USR1
    finish "$code"
}

# finish CODE: end, or start again where that helps. What the tasks themselves ended with tells more than CODE.
finish() {
    local final
    final=$(cat "$SCRATCH"/*.* 2>/dev/null | grep -xE -m1 "$STOPPED|$REFUSED") || true
    if [[ $final ]]; then
        echo "job $SLURM_JOB_ID: ended with $final, which starting again would not change"
        exit "$final"
    elif (($1)); then
        requeue "$1"
    else
        echo "job $SLURM_JOB_ID: done"
    fi
    exit "$1"
}

requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= REQUEUES)); then
        echo "job $SLURM_JOB_ID: ended with $1 after $restarts restarts; REQUEUES is $REQUEUES" >&2
    else
        echo "job $SLURM_JOB_ID: ended with $1; requeued, restart $((restarts + 1)) of $REQUEUES"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60  # the requeue ends this shell; its exit code would count as the job's
    fi
}
