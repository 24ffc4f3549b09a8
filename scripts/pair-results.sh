#!/usr/bin/env bash
# Compares a pair (prefill on one GPU, decode on another) with an undivided worker: are the tokens the same, and how much later is the first?
# With the demo model and with a Llama of 8B shape and random weights, which scripts/model-reference/checkpoint.py creates (python3 with
# torch and transformers). First the runbook's four prompts (two-gpu.sh), then bench/pair. Writes
# bench/results/<date>-<GPUs>-pair.{json,md}; failures are reported there, and the exit status is then 1.
#
#   ./scripts/pair-results.sh                      two GPUs; from a checkout, or from the archive of `npm run bundle`
#   ./scripts/pair-results.sh --models DIR         a directory with room for 16 GB; a checkpoint in it is used
#   ./scripts/pair-results.sh --only demo          or --only llama-8b; --send-types PUT,GET: instead of native and all three
#   ./scripts/pair-results.sh --device host --only demo --small --out DIR      a trial run without a GPU, in a minute
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

models=""
names=(demo llama-8b)
types=()
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --models) models="${2:?--models needs a directory}" ;;
    --only) names=("${2:?--only needs demo or llama-8b}"); line+=" $1 $2" ;;
    --send-types) types=("$1" "${2:?--send-types needs some of native,PUT,PUT_ASYNC,GET}"); line+=" $1 $2" ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done

prepare || exit 1
work_folder
program=("$node" dist/bench/pair/main.js)
status=0

for name in "${names[@]}"; do
  model=models/demo
  if [ "$name" = llama-8b ] && ! llama_8b "${models:-$work}"; then
    status=1
    continue
  fi
  if [ "$device" = cuda ] && [ ${#small[@]} = 0 ]; then
    echo "pair-results: four prompts, $name" >&2
    bounded 120 ./scripts/two-gpu.sh --model "$model" >"$work/$name.four.txt" 2>&1 || status=1
    tail -1 "$work/$name.four.txt" >&2
  fi
  echo "pair-results: $name" >&2
  bounded 400 "${program[@]}" check --device "$device" --model "$model" --name "$name" \
    ${small[@]+"${small[@]}"} ${types[@]+"${types[@]}"} --output "$work/$name.pair.json" 2>&1 | tee "$work/$name.log" >&2 || status=1
done
bounded 30 "${program[@]}" report "$work" --out "$out" --command "$line" || status=1
exit "$status"
