#!/usr/bin/env bash
# Any command on N ranks of this machine, with accelerate.
#   launch/accelerate.sh 2 train --config configs/quickstart.yaml --task_name reverse
set -euo pipefail
ranks=${1:?number of ranks}; shift
device=--multi_gpu
python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || device=--cpu
exec accelerate launch "$device" --num_processes "$ranks" --num_machines 1 --mixed_precision no --dynamo_backend no \
  --main_process_port "${MASTER_PORT:-29500}" -m trace_dist "$@"
