#!/usr/bin/env bash
# A command that goes on with the hosts that are there: the same line on each of one to three hosts.
#   launch/elastic.sh node-1 8 train --config configs/quickstart.yaml
# node-1 is where they meet, and must live; 8 are the ranks per host. When a host is lost, or another one comes, all ranks begin
# anew from the newest checkpoint, on as many ranks as there are then. Nothing is forwarded: each host has its own environment.
set -euo pipefail
meet=${1:?host where they meet}; ranks=${2:?ranks per host}; shift 2
# A rank's share of the cores, for what runs on the CPU (offloaded optimizer states, data). The launcher would give it one.
share=$(($(nproc) / ranks)); export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}"
exec torchrun --nnodes "${NNODES:-1:3}" --nproc_per_node "$ranks" --max_restarts "${MAX_RESTARTS:-10}" --rdzv_backend c10d \
  --rdzv_endpoint "$meet:${MASTER_PORT:-29500}" --rdzv_id "${JOB_ID:-trace-dist}" -m trace_dist "$@" --launch.num_ranks 1
