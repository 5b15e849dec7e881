#!/usr/bin/env bash
#SBATCH --job-name=opd-70b-disaggregated
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@3600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# As opd_70b.sh, but the last ENGINE_NODES nodes of the job are SGLang's and the others train. A server that ends is started again
# and takes the next weights.
#
#     sbatch examples/slurm/opd_70b_disaggregated.sh [CONFIG] [key=value ...]
#
# ENGINE_NODES     nodes of SGLang
# ENGINES          servers on each of them, of rollout.tp GPUs each
# ENGINE_HOSTS     how the others reach these nodes, by spaces; empty: by the names that Slurm has for them
# ENGINE_PORT      of a node's first server; the others' follow
# INTERFACE        of the network that the nodes share; empty: rollout.host of the config
set -euo pipefail
. "${SLURM_SUBMIT_DIR:-.}/examples/slurm/common.sh"
ENGINE_NODES=${ENGINE_NODES:-4}
ENGINES=${ENGINES:-1}
ENGINE_PORT=${ENGINE_PORT:-30000}
[[ $# -gt 0 ]] || set -- examples/slurm/opd_70b_disaggregated.yaml

training_nodes=$((SLURM_JOB_NUM_NODES - ENGINE_NODES))
((ENGINE_NODES > 0 && training_nodes > 0)) || {
    echo "ENGINE_NODES: $ENGINE_NODES of $SLURM_JOB_NUM_NODES nodes leaves none for servers or for training; change it, or --nodes" >&2
    exit $REFUSED
}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -ra hosts <<<"${ENGINE_HOSTS:-${nodes[*]:training_nodes}}"
((${#hosts[@]} == ENGINE_NODES)) || {
    echo "ENGINE_HOSTS: ${#hosts[@]} names (${hosts[*]}) for ENGINE_NODES=$ENGINE_NODES; give one for each" >&2
    exit $REFUSED
}
urls=()
for host in "${hosts[@]}"; do
    for ((number = 0; number < ENGINES; number++)); do
        urls+=("http://$host:$((ENGINE_PORT + number))")
    done
done
by_commas() { (IFS=, && echo "$*"); }

use_interface
check_nodes
# A key for this job alone, which its owner alone reads: without one anybody on the network could send weights.
key=$SCRATCH/key
(umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$key")
set -- "$@" "rollout.urls=[$(by_commas "${urls[@]}")]" "rollout.api_key_file=$key" ${INTERFACE:+"rollout.host=$INTERFACE"}

# Each task is one of the servers, in the order of the URLs. One that is given up or crashes is no reason to end the others.
# shellcheck disable=SC2016  # for the task's shell to expand
make_step --nodes="$ENGINE_NODES" --ntasks-per-node="$ENGINES" --ntasks=$((ENGINE_NODES * ENGINES)) --overlap \
    --nodelist="$(by_commas "${nodes[@]:training_nodes}")" --distribution=block -- \
    bash -c 'megatron-opd serve "$@" --number "$SLURM_PROCID" || { code=$?; ((code == '$STOPPED' || code == '$CRASHED')) || exit $code; }' serve "$@"
trap 'echo "job $SLURM_JOB_ID: no server is left" >&2; finish 1' USR2
(
    "${step[@]}" || true
    kill -USR2 $$
) &

export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
train --nodes="$training_nodes" --ntasks=$((training_nodes * ${SLURM_NTASKS_PER_NODE:-8})) --overlap \
    --nodelist="$(by_commas "${nodes[@]:0:training_nodes}")" --distribution=block -- "$@"
