#!/usr/bin/env bash
# How fast the proxy alone is, on a machine with 16 cores or more and no need of a GPU: what a request and a streamed token take it with each
# feature, how many streams one core bears, what more processes bring, and what it adds to requests of all sizes, beside nginx and HAProxy
# where there are any. Writes bench/results/<date>-host-proxy.{md,json}. Takes under eight minutes; exit status 1 if anything failed.
#
#   ./scripts/proxy-results.sh [--out DIR] [--only features,streams,workers,grid] [--peers DIR] [--small]
#
# --peers: a folder with the programs nginx and haproxy, and in lib/ the libraries that this machine lacks for them. --small: a trial run.
# From a checkout, or from the archive of `npm run bundle`.
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

more=()
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --only) more+=("$1" "${2:?--only needs names of parts}"); line+=" $1 $2" ;;
    --peers) more+=("$1" "$(realpath "${2:?--peers needs a folder}")") ;;
    --device) usage ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done

prepare || exit 1
exec "$node" dist/bench/proxy/speed.js --out "$out" --command "$line" ${small[@]+"${small[@]}"} ${more[@]+"${more[@]}"}
