#!/usr/bin/env bash
# Any command on N ranks of this machine, with DeepSpeed's launcher.
#   launch/deepspeed.sh 2 train --config configs/quickstart.yaml --task_name reverse
set -euo pipefail
ranks=${1:?number of ranks}; shift
# A rank's share of the cores, for what runs on the CPU (offloaded optimizer states, data).
share=$(($(nproc) / ranks)); export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || export DS_ACCELERATOR=cpu
gpus=(--num_gpus "$ranks")
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ "${DS_ACCELERATOR:-}" != cpu ]; then # with --num_gpus it would take the first ones
  case "$CUDA_VISIBLE_DEVICES" in
    *[!0-9,\ ]*) # names of GPUs, or of parts of them; deepspeed reads numbers alone, what it starts takes both
      start=(launch "$@")
      case "${1:?command}" in run | learn | consolidate) start=("$@") ;; esac # they start their ranks themselves
      exec trace-dist "${start[@]}" --launch.launcher deepspeed --launch.num_ranks "$ranks" ;;
  esac
  gpus=(--include "localhost:$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
fi
exec deepspeed "${gpus[@]}" --master_port "${MASTER_PORT:-29500}" --module trace_dist "$@"
