#!/usr/bin/env bash
# Trains through the deepspeed launcher, and starts again what ends early (see retry.sh). It runs on one host and starts
# the others of HOSTFILE itself, through pdsh and ssh without a password; torchrun.sh is started on each host instead.
#
#   launch/deepspeed.sh configs/demo/lm.toml
#   HOSTFILE=hosts launch/deepspeed.sh CONFIG.toml parallel.zero=3      # hosts has lines like: host-a slots=8
#
#   NPROC_PER_NODE     processes on each host; default: the slots of HOSTFILE, or one for each GPU, or one. Given,
#                      deepspeed ignores CUDA_VISIBLE_DEVICES
#   HOSTFILE           hosts, which must share the folders of the data and of the output; default: this one alone
#   MASTER_PORT=29500  a port that is free on the first host
#   RETRIES, RETRY_SECONDS, GRACE_SECONDS: retry.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=retry.sh
. "$(dirname "$0")/retry.sh"
need deepspeed
read_config "$@"

# deepspeed would take a missing file for none, and train on this host alone.
[ -z "${HOSTFILE:-}" ] || [ -f "$HOSTFILE" ] || die "HOSTFILE: $HOSTFILE is no file"
options=(--hostfile="${HOSTFILE:-none}" --master_port="${MASTER_PORT:-29500}")
if [ -n "${NPROC_PER_NODE:-}" ]; then
    options+=(--num_gpus="$NPROC_PER_NODE")
elif [ -z "${HOSTFILE:-}" ] && [ "$gpus" = 0 ]; then
    options+=(--num_gpus=1) # its own count is of NUMA nodes
fi

# On one host deepspeed ends with 0 even when the process between it and the workers was killed.
finished() { [ -n "${HOSTFILE:-}" ] || [ "$(newest_step)" -ge "$steps" ]; }

# As torchrun has it: else each process takes all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
retry deepspeed "${options[@]}" --module megakrause train "$@"
