#!/usr/bin/env bash
# Everything that only two GPUs can show, in one go and in under eight minutes: times of transfers in all modes beside the ceilings,
# engines that send crosswise, memory over a thousand requests, kill -9, a computation beside transfers, and the demo from GPU to GPU.
# Writes bench/results/<date>-<GPUs>-transfer.{json,md} and ends with a short table. A part that fails or takes too long is a result
# like others: it is reported, and the next one runs. Exit status 1 where there was one.
#
#   ./scripts/gpu-results.sh                      two GPUs; from a checkout, or from the archive of `npm run bundle`
#   ./scripts/gpu-results.sh --out DIR            where the results go
#   ./scripts/gpu-results.sh --only transfer,soak --seconds 120
#   ./scripts/gpu-results.sh --device host --small      a few seconds without a GPU: is everything in place?
set -uo pipefail
line="./scripts/gpu-results.sh"
cd "$(dirname "$0")/.."

out=bench/results
device=cuda
only=""
small=""
# For all of it; a part gets its own bound or what is left.
seconds=450
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --device) device="${2:?--device needs cuda or host}"; line+=" $1 $2"; shift 2 ;;
    --only) only=",${2:?--only needs names of parts},"; line+=" $1 $2"; shift 2 ;;
    --seconds) seconds="${2:?--seconds needs a number}"; line+=" $1 $2"; shift 2 ;;
    --small) small=1; line+=" $1"; shift ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

if [ ! -x ./node ] && ! { [ -f dist/bench/cli/main.js ] && [ -d node_modules ]; }; then
  ./scripts/install.sh && ./scripts/build.sh || exit 1
fi

deadline=$((SECONDS + seconds))
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# run NAME SECONDS COMMAND...: its output goes to a log and, of pd-bench, its numbers to NAME.json
run() {
  local name="$1" bound="$2" left=$((deadline - SECONDS)) start=$SECONDS status
  shift 2
  [ -n "$only" ] && case "$only" in *",$name,"*) ;; *) return ;; esac
  [ "$left" -lt "$bound" ] && bound="$left"
  if [ "$bound" -lt 5 ]; then
    echo "no time was left for it" >"$work/$name.log"
    status=124
  else
    printf '%-14s' "$name" >&2
    timeout --kill-after=10 "$bound" "$@" >"$work/$name.log" 2>&1 </dev/null
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

if [ -n "$small" ]; then
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
  run two-gpu 90 ./scripts/two-gpu.sh
elif [ -z "$small" ]; then
  run demo 120 ./scripts/demo.sh
fi
# last, as it takes what time there is
[ -n "$small" ] || part soak 150

./bin/pd-bench report "$work" --out "$out" --command "$line"
