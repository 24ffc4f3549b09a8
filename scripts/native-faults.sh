#!/usr/bin/env bash
# The native hand-over under faults, on two GPUs, in some three minutes: kill -9 of either end and of both at once, and SIGSTOP (then SIGCONT) of
# either, before, while and after KV is written; producer and consumer on one GPU; what the self-test of the path says; NCCL over sockets; direct refused. Each answer is
# compared with an undivided worker's, and every book must be at zero again. Then bench/gpu/direct.js: writes that come late, into poisoned blocks.
#
#   ./scripts/native-faults.sh                        from a checkout, or from the archive of `npm run bundle`
#   ./scripts/native-faults.sh --only faults,one-gpu  some of faults, one-gpu, sockets, refused, late
#   ./scripts/native-faults.sh --only faults,one-gpu,late --consumer-device cuda:0     on one GPU
#   ./scripts/native-faults.sh --executor host        the host computes; with stand-ins for CUDA and NCCL no GPU is needed
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

only=faults,one-gpu,sockets,refused,late
executor=cuda
consumer_device=cuda:1
while [ $# -gt 0 ]; do
  case "$1" in
    --only) only="${2:?--only needs names of parts}" ;;
    --executor) executor="${2:?--executor needs cuda or host}" ;;
    --consumer-device) consumer_device="${2:?--consumer-device needs cuda:N}" ;;
    *) usage ;;
  esac
  shift 2
done

prepare || exit 1
status=0
[ "$only" = late ] || bounded 240 "$node" dist/scripts/native-faults.js --executor "$executor" --consumer-device "$consumer_device" --only "$only" || status=1
case ",$only," in
  *,late,*) PD_SMALL="${PD_SMALL:-1}" bounded 120 "$node" dist/bench/gpu/direct.js grant faults || status=1 ;;
esac
exit "$status"
