#!/usr/bin/env bash
# On one node: check_node.sh GPUS FOLDER, GPUS as in --gpus-per-node, "8" or "h100:8". One line that names the node for each thing that is wrong.
set -uo pipefail
gpus=${1##*:} folder=$2 node=${SLURMD_NODENAME:-$(hostname)} wrong=0

say() {
    echo "$node: $*" >&2
    wrong=1
}

if ! touch "$folder/$node"; then
    say "cannot write to $folder; the repository must be on a file system that all nodes share"
fi
query=index,memory.used,ecc.errors.uncorrected.volatile.total
if [[ ! $gpus =~ ^[0-9]+$ ]]; then
    say "$1: not a number of GPUs"
elif ((gpus > 0)); then
    table=$(timeout --kill-after=5 30 nvidia-smi --query-gpu=$query --format=csv,noheader,nounits)
    code=$?
    if ((code == 124 || code == 137)); then  # as with a driver that hangs
        say "nvidia-smi has not answered in 30 s"
    elif ((code)); then
        say "nvidia-smi failed"
    else
        found=$(wc -l <<<"$table")
        ((found == gpus)) || say "$found GPUs, not $gpus"
        while IFS=', ' read -r index used errors; do
            ((used < 2000)) || say "GPU $index: $used MiB are in use by somebody else"
            [[ $errors =~ ^[0-9]+$ ]] && ((errors > 0)) && say "GPU $index: $errors uncorrected ECC errors; drain the node"
        done <<<"$table"
    fi
fi
exit $wrong
