#!/usr/bin/env bash
# Any command on N ranks of this machine, with torchrun.
#   launch/torchrun.sh 2 train --config configs/quickstart.yaml --task_name reverse
set -euo pipefail
ranks=${1:?number of ranks}; shift
exec torchrun --nproc_per_node "$ranks" --master_port "${MASTER_PORT:-29500}" -m trace_dist "$@"
