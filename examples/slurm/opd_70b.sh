#!/usr/bin/env bash
#SBATCH --job-name=opd-70b
#SBATCH --nodes=8
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
# StableOPD of Llama-3.1-70B from DeepSeek-R1-Distill-Llama-70B, 8 nodes of 8 H100 80 GB: SGLang and training have the GPUs by
# turns, and each node's first rank starts and watches that node's servers.
#
#     sbatch examples/slurm/opd_70b.sh [CONFIG] [key=value ...]
#
# INTERFACE   of the network that the nodes share, for SGLang, rendezvous and NCCL's bootstrap; empty: rollout.host of the config
set -euo pipefail
. "${SLURM_SUBMIT_DIR:-.}/examples/slurm/common.sh"
[[ $# -gt 0 ]] || set -- examples/slurm/opd_70b.yaml
use_interface
check_nodes
# Blocks: tensor parallelism is between the ranks of a node, and servers are on the GPUs that follow from the ranks' order.
train --distribution=block -- "$@" ${INTERFACE:+"rollout.host=$INTERFACE"}
