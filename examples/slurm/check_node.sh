#!/usr/bin/env bash
# On one node: check_node.sh GPUS FOLDER. One line that names the node for each thing that is wrong.
set -uo pipefail
gpus=$1 folder=$2 node=${SLURMD_NODENAME:-$(hostname)} wrong=0

say() {
    echo "$node: $*" >&2
    wrong=1
}

if ! touch "$folder/$node"; then
    say "cannot write to $folder; the repository must be on a file system that all nodes share"
fi
if ((gpus > 0)); then
    if ! table=$(nvidia-smi --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits); then
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
