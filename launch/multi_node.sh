#!/usr/bin/env bash
# Any command on the hosts of a hostfile, started on the first of them. It takes ssh without a password.
#   launch/multi_node.sh launch/hostfile train --config configs/quickstart.yaml
#   LAUNCHER=torchrun launch/multi_node.sh launch/hostfile run --config configs/quickstart.yaml
# LAUNCHER: deepspeed (over pdsh), torchrun or accelerate (over ssh); openmpi is DeepSpeed over mpirun.
# Every host is told PATH, PYTHONPATH, DS_*, OMP_*, GLOO_*, NCCL_*, HF_* and others (docs/clusters.md), and, by DeepSpeed, what a
# file .deepspeed_env in the home folder says. The checkout, the virtual environment and the run folder lie at the same path
# everywhere. To look first: trace-dist launch --dry_run true train --config ... --launch.hostfile launch/hostfile ...
set -euo pipefail
hostfile=${1:?hostfile, see launch/hostfile.example}; shift
if [ "${LAUNCHER:-}" = openmpi ]; then # mpirun tells its ranks no place to meet
  head_node=$(awk '{ sub(/#.*/, "") } NF { print $1; exit }' "$hostfile")
  port=${MASTER_PORT:-29500}
  forward="-x PATH"
  for name in DS_ACCELERATOR OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
    [ -z "${!name:-}" ] || forward="$forward -x $name"
  done
  exec deepspeed --hostfile "$hostfile" --launcher openmpi --master_port "$port" \
    --launcher_args="-x MASTER_ADDR=$head_node -x MASTER_PORT=$port $forward" --module trace_dist "$@"
fi
ranks=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$hostfile" | awk '{ ranks += $1 } END { print ranks }')
start=(launch "$@")
case "${1:?command}" in run | learn | consolidate) start=("$@") ;; esac # they start their stages on the hosts themselves
exec trace-dist "${start[@]}" --launch.launcher "${LAUNCHER:-deepspeed}" --launch.hostfile "$hostfile" --launch.num_ranks "$ranks"
