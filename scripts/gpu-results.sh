#!/usr/bin/env bash
# Everything that only two GPUs can show, in one run of under eight minutes: transfer times in all modes next to the ceilings, engines that
# send crosswise, memory over a thousand requests, kill -9, computation during transfers, kernels and NCCL on one GPU, and the demo from
# GPU to GPU.
# Writes bench/results/<date>-<GPUs>-transfer.{json,md} and ends with a short table. A part that fails or takes too long is
# reported, and the next one runs; the exit status is then 1.
#
#   ./scripts/gpu-results.sh                      two GPUs; from a checkout, or from the archive of `npm run bundle`
#   ./scripts/gpu-results.sh --out DIR            where the results go
#   ./scripts/gpu-results.sh --only transfer,soak --seconds 120
#   ./scripts/gpu-results.sh --device host --small      a trial run without a GPU, in seconds
set -uo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

only=""
# For all parts; each has its own limit, or the remaining time.
seconds=450
while [ $# -gt 0 ]; do
  taken=2
  case "$1" in
    --only) only=",${2:?--only needs names of parts},"; line+=" $1 $2" ;;
    --seconds) seconds="${2:?--seconds needs a number}"; line+=" $1 $2" ;;
    *) results_option "$@" || usage ;;
  esac
  shift "$taken"
done

prepare || exit 1
work_folder
deadline=$((SECONDS + seconds))

# run NAME SECONDS COMMAND...: writes NAME.log and NAME.step; pd-bench also writes NAME.json
run() {
  local name="$1" bound="$2" left=$((deadline - SECONDS)) start=$SECONDS status
  shift 2
  [ -n "$only" ] && case "$only" in *",$name,"*) ;; *) return ;; esac
  [ "$left" -lt "$bound" ] && bound="$left"
  if [ "$bound" -lt 5 ]; then
    echo "no time was left" >"$work/$name.log"
    status=124
  else
    printf '%-14s' "$name" >&2
    bounded "$bound" "$@" >"$work/$name.log" 2>&1
    status=$?
    [ "$status" = 137 ] && status=124
    echo "status $status, $((SECONDS - start)) s" >&2
  fi
  echo "$status $((SECONDS - start))" >"$work/$name.step"
}
part() {
  local name="$1" bound="$2"
  shift 2
  run "$name" "$bound" ./bin/pd-bench "$name" --device "$device" --output "$work/$name.json" "$@"
}

if [ ${#small[@]} -gt 0 ]; then
  buffer=(--kv-buffer-size 64MiB)
  part transfer 60 --shape tiny --tokens 16,256 --rounds 3 "${buffer[@]}"
  part exchange 60 --tensors 50 --tensor-bytes 4KiB --crossing-bytes 1MiB "${buffer[@]}"
  part soak 60 --shape tiny --requests 60 --settled 20 --max-tokens 256 "${buffer[@]}"
  part faults 90 --shape tiny --tokens 256 --deadline 1s --kernel 500ms "${buffer[@]}"
  [ "$device" = host ] || part interference 60 --shape tiny --tokens 256 --time 300ms "${buffer[@]}"
else
  part transfer 200
  part exchange 60
  part faults 90
  [ "$device" = host ] || part interference 60
fi
if [ "$device" != host ]; then
  run device 60 "$node" dist/bench/gpu/device.js ${small[@]+"${small[@]}"}
  run two-gpu 90 ./scripts/two-gpu.sh
elif [ ${#small[@]} = 0 ]; then
  run demo 120 ./scripts/demo.sh
fi
# last, since it may use the remaining time
[ ${#small[@]} -gt 0 ] || part soak 150

./bin/pd-bench report "$work" --out "$out" --command "$line"
