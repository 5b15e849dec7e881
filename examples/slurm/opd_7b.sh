#!/usr/bin/env bash
#SBATCH --job-name=opd-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# StableOPD of an 8B student from a 32B teacher, one node of 8 H100 80 GB: SGLang and training have the GPUs by turns.
#
#     sbatch examples/slurm/opd_7b.sh [CONFIG] [key=value ...]
#
# 900 s before its time limit the job ends after its step with a checkpoint, is requeued and goes on: more than a step and a
# checkpoint take. The same command after any other end goes on as well.
set -euo pipefail
. "${SLURM_SUBMIT_DIR:-.}/examples/slurm/common.sh"
check_nodes
train -- "${@:-examples/slurm/opd_7b.yaml}"
