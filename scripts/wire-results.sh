#!/usr/bin/env bash
# The frozen wire beside a worker of another make: the Python peer (support/peers; on GPUs with torch and NCCL, as vLLM's would be) in all
# ways of sending and both directions, tensor families, restarts on either end, and the experiment matrix. Every byte is compared, every
# wait is bounded: a hang is a failure that says where. Writes bench/results/<date>-<GPUs>-wire.{json,md} and ends with a few lines.
#
#   ./scripts/wire-results.sh                      two GPUs; python3 with torch and msgpack, or PD_TEST_PYTHON
#   ./scripts/wire-results.sh --device host --small --out DIR      a few seconds without a GPU: is everything in place?
#   ./scripts/wire-results.sh --only peer          or --only matrix
#   ./scripts/wire-results.sh --patience 30        of each wait, on either end, in seconds
#
# From a checkout, or from the archive of `npm run bundle`, where it needs neither npm nor Node.
set -uo pipefail
line="./scripts/wire-results.sh"
cd "$(dirname "$0")/.."

out=bench/results
device=cuda
small=()
patience=()
only=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --device) device="${2:?--device needs cuda or host}"; line+=" $1 $2"; shift 2 ;;
    --only) only=(--only "${2:?--only needs peer or matrix}"); line+=" $1 $2"; shift 2 ;;
    --small) small=(--small); line+=" $1"; shift ;;
    --patience) patience=("$1" "${2:?--patience needs seconds}"); shift 2 ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

if [ -x ./node ]; then
  program=(./node dist/bench/wire/main.js)
else
  ./scripts/install.sh || exit 1
  [ -n "${PD_SKIP_BUILD:-}" ] || ./scripts/build.sh || exit 1
  program=(node --import tsx bench/wire/main.ts)
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

if [ "${only[1]:-peer}" = peer ]; then
  echo "wire-results: the Python peer on $device" >&2
  timeout --kill-after=10 200 "${program[@]}" check --device "$device" ${small[@]+"${small[@]}"} ${patience[@]+"${patience[@]}"} \
    --output "$work/peer.json" \
    </dev/null 2>&1 | tee "$work/peer.log" >&2
fi
if [ "${only[1]:-matrix}" = matrix ]; then
  echo "wire-results: the experiment matrix on $device" >&2
  PD_SKIP_BUILD=1 timeout --kill-after=10 120 ./scripts/experiment-matrix.sh --device "$device" --executor host --json \
    </dev/null >"$work/matrix.json" 2>"$work/matrix.log"
fi

timeout --kill-after=10 30 "${program[@]}" report "$work" --out "$out" --command "$line" ${only[@]+"${only[@]}"} </dev/null
