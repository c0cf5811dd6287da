#!/usr/bin/env bash
# Any command on N ranks of this machine, with torchrun.
#   launch/torchrun.sh 2 train --config configs/quickstart.yaml --task_name reverse
set -euo pipefail
ranks=${1:?number of ranks}; shift
# A rank's share of the cores, for what runs on the CPU (offloaded optimizer states, data). The launcher would give it one.
share=$(($(nproc) / ranks)); export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
exec torchrun --nproc_per_node "$ranks" --master_port "${MASTER_PORT:-29500}" -m trace_dist "$@"
