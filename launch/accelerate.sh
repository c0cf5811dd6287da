#!/usr/bin/env bash
# Any command on N ranks of this machine, with accelerate. --multi_gpu is its word for several processes: without a GPU
# they compute on the CPU.
#   launch/accelerate.sh 2 train --config configs/quickstart.yaml --task_name reverse
set -euo pipefail
ranks=${1:?number of ranks}; shift
# A rank's share of the cores, for what runs on the CPU (offloaded optimizer states, data). The launcher would give it one.
share=$(($(nproc) / ranks)); export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
exec accelerate launch --multi_gpu --num_processes "$ranks" --num_machines 1 --mixed_precision no --dynamo_backend no \
  --gpu_ids all --main_process_port "${MASTER_PORT:-29500}" -m trace_dist "$@"
