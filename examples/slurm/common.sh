# Sourced by the recipes beside it; they are submitted from the repository's root, on a file system that all nodes share.
#
# IMAGE       container image for pyxis/enroot (a .sqsh file, or nvcr.io#...); empty: the nodes' own environment
# MOUNTS      of the container, beside the repository: models, data, runs
# SETUP       what every task does first, such as: . .venv/bin/activate
# REQUEUES    how often a job may start again after a lost rank or its time limit
IMAGE=${IMAGE:-}
MOUNTS=${MOUNTS:-}
SETUP=${SETUP:-}
REQUEUES=${REQUEUES:-20}

readonly REFUSED=2 STOPPED=1  # exit codes of megatron-opd: bad input; the run stopped itself. Both would do so again

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit $REFUSED
[[ -f examples/slurm/common.sh ]] || {
    echo "$SLURM_SUBMIT_DIR: not the repository's root; cd there, then sbatch examples/slurm/..." >&2
    exit $REFUSED
}

# NCCL: a rank that is lost ends the others' collectives after the timeout, rather than never; flight recorder for the post-mortem.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_FR_BUFFER_SIZE=2000
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Tensor parallelism overlaps communication with computation only where kernels are issued in one order.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Responses differ in length at every step: without this the allocator's fragments pile up until memory runs out.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
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
    step+=(bash -c "${SETUP:+$SETUP && }"'exec "$@"' -- "$@")
}

# Every node has its GPUs, free and without uncorrected errors, and writes to the shared folder. A node that does not is named before
# hundreds of GPUs wait for it.
check_nodes() {
    local folder=runs/.nodes-$SLURM_JOB_ID status=0
    mkdir -p "$folder"
    make_step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 -- \
        bash examples/slurm/check_node.sh "${SLURM_GPUS_PER_NODE:-0}" "$folder"
    "${step[@]}" || status=$?
    rm -r "$folder"
    return $status
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
    case $code in
        0) echo "job $SLURM_JOB_ID: done" ;;
        "$STOPPED" | "$REFUSED") echo "job $SLURM_JOB_ID: ended with $code, which starting again would not change" ;;
        *) requeue "$code" ;;
    esac
    exit "$code"
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
