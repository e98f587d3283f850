#!/usr/bin/env bash
# Trains through torchrun, on this host alone or as one of several, and starts again what ends early (see retry.sh).
#
#   launch/torchrun.sh configs/demo/lm.toml
#   NPROC_PER_NODE=8 launch/torchrun.sh CONFIG.toml parallel.zero=2
#
# On several hosts, which must share the folders of the data and of the output, once on each with its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host-a launch/torchrun.sh CONFIG.toml
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host-a launch/torchrun.sh CONFIG.toml
#
#   NPROC_PER_NODE     processes on this host; default: one for each GPU, or one
#   NNODES=1           how many hosts
#   NODE_RANK=0        which of them this one is; the others meet at 0, and torchrun numbers the processes itself
#   MASTER_ADDR        address of host 0
#   MASTER_PORT=29500  a free port there; on one host any free one is taken
#   LOCAL_ADDR         address at which the others reach this host; default: its name
#   RETRIES, RETRY_SECONDS, GRACE_SECONDS: retry.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=retry.sh
. "$(dirname "$0")/retry.sh"
need torchrun
read_config "$@"

options=(--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --nnodes="${NNODES:=1}" --nproc_per_node="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}")
if [ "$NNODES" = 1 ]; then
    # A name of this host that does not resolve must not matter where nobody else calls.
    options+=(--standalone --local_addr="${LOCAL_ADDR:-localhost}")
else
    [ -n "${MASTER_ADDR:-}" ] || die "NNODES is $NNODES and MASTER_ADDR is not set; name host 0"
    # torchrun would guess from its host's name whether it is host 0.
    is_host=$((${NODE_RANK:=0} == 0))
    options+=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_conf="is_host=$is_host")
    [ -z "${LOCAL_ADDR:-}" ] || options+=(--local_addr="$LOCAL_ADDR")
fi
retry torchrun "${options[@]}" -m megakrause train "$@"
