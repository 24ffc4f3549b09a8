#!/usr/bin/env bash
# The frozen wire against an independent worker: the Python peer (support/peers; on GPUs with torch and NCCL, like vLLM's) with all send
# types in both directions, tensor families, restarts on either end, and the experiment matrix. Every byte is compared, and every wait has
# a deadline, so a hang is a failure that says where. Writes bench/results/<date>-<GPUs>-wire.{json,md} and ends with a summary.
#
#   ./scripts/wire-results.sh                      two GPUs; python3 with torch and msgpack, or PD_TEST_PYTHON
#   ./scripts/wire-results.sh --device host --small --out DIR      a trial run without a GPU, in seconds
#   ./scripts/wire-results.sh --only peer          or --only matrix
#   ./scripts/wire-results.sh --patience 30        deadline of each wait on either end, seconds
#
# From a checkout, or from the archive of `npm run bundle`.
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

patience=()
only=()
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --only) only=(--only "${2:?--only needs peer or matrix}"); line+=" $1 $2" ;;
    --patience) patience=("$1" "${2:?--patience needs seconds}") ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done

prepare || exit 1
work_folder
program=("$node" dist/bench/wire/main.js)

if [ "${only[1]:-peer}" = peer ]; then
  echo "wire-results: the Python peer on $device" >&2
  bounded 200 "${program[@]}" check --device "$device" ${small[@]+"${small[@]}"} ${patience[@]+"${patience[@]}"} \
    --output "$work/peer.json" 2>&1 | tee "$work/peer.log" >&2
fi
if [ "${only[1]:-matrix}" = matrix ]; then
  echo "wire-results: the experiment matrix on $device" >&2
  bounded 120 ./scripts/experiment-matrix.sh --device "$device" --executor host --json \
    >"$work/matrix.json" 2>"$work/matrix.log"
fi

bounded 30 "${program[@]}" report "$work" --out "$out" --command "$line" ${only[@]+"${only[@]}"}
