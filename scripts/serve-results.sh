#!/usr/bin/env bash
# What clients see of a producer, a consumer and a proxy, and of one undivided worker, with the same prompts; on the host also the proxy
# alone, and how one client's body affects another's stream. Exit status 1 if anything failed.
# Writes bench/results/<date>-<device>[-<model>]-serve.md. Takes ten minutes, on a machine that does nothing else.
#
#   ./scripts/serve-results.sh [--device host|cuda] [--model DIR] [--executor host|cuda] [--out DIR] [-- flags of pd-bench serve]
#
# With --device cuda the undivided worker has cuda:0 to itself; then the producer gets cuda:0 and the consumer cuda:1.
# From a checkout, or from the archive of `npm run bundle`.
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

device=host
model=models/demo
more=()
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --executor) more+=("$1" "${2:?--executor needs host or cuda}"); line+=" $1 $2" ;;
    --model) model="${2:?--model needs a folder}"; name="$(basename "$2")"; more+=(--name "$name"); line+=" $1 $name" ;;
    --small) usage ;;
    --) line+=" $*"; shift; break ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done
[ -f "$model/config.json" ] || { echo "serve-results: --model: $model has no config.json" >&2; exit 2; }

prepare || exit 1
exec "$node" dist/bench/clients/main.js --device "$device" --model "$model" --out "$out" --command "$line" \
  ${more[@]+"${more[@]}"} -- "$@"
