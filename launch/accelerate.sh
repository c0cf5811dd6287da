#!/usr/bin/env bash
# Any command on N ranks of this machine, with accelerate. --multi_gpu is its word for several processes: without a GPU
# they compute on the CPU.
#   launch/accelerate.sh 2 train --config configs/quickstart.yaml --task_name reverse
set -euo pipefail
ranks=${1:?number of ranks}; shift
exec accelerate launch --multi_gpu --num_processes "$ranks" --num_machines 1 --mixed_precision no --dynamo_backend no \
  --main_process_port "${MASTER_PORT:-29500}" -m trace_dist "$@"
