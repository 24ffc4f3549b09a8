#!/usr/bin/env bash
# The hand-over between ours, measured as the product runs it: KV from connector to connector by every transport, beside the ceilings and the
# frozen wire; and where the time to a first token of a pair goes, beside an undivided worker behind the same proxy.
# Writes bench/results/<date>-<GPUs>-hand-over.{json,md} and ends with its tables. Exit status 1 if anything failed.
#
#   ./scripts/hand-over-results.sh                 two GPUs, in under five minutes; from a checkout, or from the archive of `npm run bundle`
#   ./scripts/hand-over-results.sh --model DIR     the first token with this checkpoint; --model llama-8b creates one of 8B shape with random
#                                                  weights in $TMPDIR first (python3 with torch and transformers, 16 GB). Default: models/demo
#   ./scripts/hand-over-results.sh --only transfer      or --only first-token
#   ./scripts/hand-over-results.sh --device host --small --out DIR      a trial run without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

model=models/demo
only=""
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --model) model="${2:?--model needs a directory or llama-8b}"; line+=" $1 $(basename "$2")" ;;
    --only) only="${2:?--only needs transfer or first-token}"; line+=" $1 $2" ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done

prepare || exit 1
work_folder
program=("$node" dist/bench/pair/hand-over.js)
status=0

# step NAME SECONDS COMMAND...: its output is shown where it fails
step() {
  local name="$1" bound="$2" start=$SECONDS
  shift 2
  bounded "$bound" "$@" >"$work/$name.log" 2>&1 || {
    status=1
    tail -20 "$work/$name.log" >&2
  }
  echo "hand-over-results: $name, $((SECONDS - start)) s" >&2
}

if [ "$only" != transfer ]; then
  tokens=(--name "$(basename "$model")")
  if [ "$model" = llama-8b ]; then
    step checkpoint 150 python3 scripts/model-reference/checkpoint.py --out "$work" --shape llama-8b --tokenizer models/demo
    model="$work/llama-8b"
  fi
  [ ${#small[@]} = 0 ] || tokens+=(--tokens 64 --rounds 3 --warm-up 2)
  step first-token 150 "${program[@]}" breakdown --device "$device" --model "$model" "${tokens[@]}" \
    --output "$work/first-token.breakdown.json"
fi
if [ "$only" != first-token ]; then
  sizes=(--send-type PUT_ASYNC --source paged)
  [ ${#small[@]} = 0 ] || sizes+=(--shape tiny --tokens 16,256 --rounds 3 --in-flight 1,4 --kv-buffer-size 64MiB)
  step transfer 170 ./bin/pd-bench transfer --device "$device" "${sizes[@]}" --output "$work/transfer.json"
fi
bounded 30 "${program[@]}" report "$work" --out "$out" --command "$line" ${only:+--only "$only"} || status=1
exit "$status"
