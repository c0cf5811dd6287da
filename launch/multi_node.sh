#!/usr/bin/env bash
# Any command on every GPU of the machines in a hostfile, with DeepSpeed over pdsh and ssh without a password.
#   launch/multi_node.sh launch/hostfile train --config configs/quickstart.yaml
# The checkout, the virtual environment and the run folder must lie at the same path on every machine (a shared file
# system). Variables that every machine needs go into a file .deepspeed_env in the home folder, one NAME=VALUE a line.
# Without GPUs: DS_ACCELERATOR=cpu, and GLOO_SOCKET_IFNAME with the name of the interface that joins the machines.
set -euo pipefail
hostfile=${1:?hostfile, see launch/hostfile.example}; shift
port=${MASTER_PORT:-29500}
place=()
if [ "${LAUNCHER:-pdsh}" = openmpi ]; then # mpirun tells its ranks no place to meet
  head_node=$(awk '!/^#/ && NF { print $1; exit }' "$hostfile")
  place=(--launcher_args="-x MASTER_ADDR=$head_node -x MASTER_PORT=$port")
fi
exec deepspeed --hostfile "$hostfile" --launcher "${LAUNCHER:-pdsh}" "${place[@]}" --master_port "$port" --module trace_dist "$@"
