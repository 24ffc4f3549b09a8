#!/usr/bin/env bash
# How many requests per second are answered within bounds: by a pair (prefill on one GPU, decode on the other), and by two undivided workers
# on the same two GPUs, which get their best of several chunk sizes. With a Llama of 8B shape and random weights, which
# scripts/model-reference/checkpoint.py creates (python3 with torch and transformers). Writes bench/results/<date>-<GPUs>-goodput.{json,md,svg};
# failures are reported there, and the exit status is then 1. Takes nine minutes at most.
#
#   ./scripts/goodput-results.sh                   two GPUs; from a checkout, or from the archive of `npm run bundle`
#   ./scripts/goodput-results.sh --models DIR      a directory with room for 16 GB; a checkpoint in it is used
#   ./scripts/goodput-results.sh --only pair       or undivided, turns, or several: pair,turns
#   ./scripts/goodput-results.sh --parts DIR       results of earlier calls with this directory are on the page too
#   ./scripts/goodput-results.sh --seconds 300     for all of it; the default is 530
#   ./scripts/goodput-results.sh -- --chunks 512,1024 --pair-chunks 2048 --bypasses 2048:150:512 --rates 10,14 --runs 4 --ttft 400 --itl 12,10
#   ./scripts/goodput-results.sh --device host --small --out DIR      the demo model without a GPU, in half a minute
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

models=""
parts=""
seconds=530
more=()
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --models) models="${2:?--models needs a directory}" ;;
    --parts) parts="${2:?--parts needs a directory}" ;;
    --only) more+=(--only "${2:?--only needs some of pair,undivided,turns}"); line+=" $1 $2" ;;
    --seconds) seconds="${2:?--seconds needs a number}"; line+=" $1 $2" ;;
    --) shift; line+=" -- $*"; more+=("$@"); break ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done

prepare || exit 1
work_folder
deadline=$((SECONDS + seconds))
parts="${parts:-$work/parts}"
mkdir -p "$parts"
status=0

model=models/demo
if [ "$device" = cuda ] && [ ${#small[@]} = 0 ]; then
  llama_8b "${models:-$work}" || exit 1
fi

# The program keeps within its time by itself, and needs some for a last system to end.
left=$((deadline - SECONDS - 25))
program=("$node" dist/bench/pair/goodput.js)
bounded $((left + 30)) "${program[@]}" run --device "$device" --model "$model" --seconds "$left" ${small[@]+"${small[@]}"} \
  --output "$parts/$(date +%s).goodput.json" ${more[@]+"${more[@]}"} || status=1
bounded 30 "${program[@]}" report "$parts" --out "$out" --command "$line" || status=1
exit "$status"
