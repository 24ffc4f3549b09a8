#!/usr/bin/env bash
# What clients see of a producer, a consumer and a proxy beside one undivided worker, with the same prompts; on the
# host also the proxy alone.
# Writes bench/results/<date>-<device>[-<model>]-serve.md. Takes some minutes, on a machine that has nothing else to do.
#
#   ./scripts/serve-results.sh [--device host|cuda] [--model DIR] [--executor host|cuda] [--out DIR] [-- flags of pd-bench serve]
#
# With --device cuda the undivided worker has cuda:0 to itself; when it has ended, the producer gets cuda:0 and the consumer cuda:1.
# From a build, or from the archive of `npm run bundle`, where it needs neither npm nor Node.
set -euo pipefail
line="./scripts/serve-results.sh"
cd "$(dirname "$0")/.."

device=host
executor=""
model=models/demo
name=""
out=bench/results
common=()
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device="${2:?--device needs host or cuda}"; line+=" $1 $2"; shift 2 ;;
    --executor) executor="${2:?--executor needs host or cuda}"; common+=("$1" "$2"); line+=" $1 $2"; shift 2 ;;
    --model) model="${2:?--model needs a folder}"; name="$(basename "$2")"; common+=("$1" "$2" --served-model-name "$name"); line+=" $1 $name"; shift 2 ;;
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --) line+=" $*"; shift; break ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
[ -f "$model/config.json" ] || { echo "serve-results: --model: there is no config.json in $model" >&2; exit 2; }
load=(--num-requests 48 --prompt-tokens 256 --output-tokens 32 --slo-ttft 1s --slo-itl 100ms "$@")

if [ -x ./node ]; then
  node=./node
  built="version $(./bin/pd-worker --version)"
else
  node=node
  built="$(git rev-parse --short HEAD)"
  # What an earlier build left will do.
  ./scripts/build.sh >&2 || [ -f dist/bench/proxy/main.js ]
fi

work="$(mktemp -d)"
pids=()
stop() {
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  pids=()
}
trap 'stop; rm -rf "$work"' EXIT

# until_said FILE PATTERN PID: the first match in what the program has said
until_said() {
  local i found
  for ((i = 0; i < 1200; i++)); do
    found="$(grep -oE "$2" "$1" | head -1)" && [ -n "$found" ] && { echo "$found"; return; }
    kill -0 "$3" 2>/dev/null || break
    sleep 0.25
  done
  echo "serve-results: not ready:" >&2
  tail -n 15 "$work"/*.log >&2
  return 1
}

first_device="$device"
[ "$device" = cuda ] && first_device=cuda:0
results="$work/results.txt"
measure() { # NAME URL TOKENIZER: the same text seeds for both systems, so the same prompts
  local width
  for width in 1 8; do
    echo "$1, $width at once" >&2
    { echo "### $1, $width at once"; echo; echo '```'; } >>"$results"
    ./bin/pd-bench serve --url "$2" --tokenize-url "$3" --concurrency "$width" --text-seed "$((1000 + width))" \
      "${load[@]}" | sed 's|^http://[^,]*, ||' | tee -a "$results" >&2
    { echo '```'; echo; } >>"$results"
  done
}

./bin/pd-worker --role both --host 127.0.0.1 --port 0 --device "$first_device" "${common[@]}" >"$work/both.log" 2>&1 &
pids+=($!)
url="$(until_said "$work/both.log" 'Running on http://[0-9.:]+' $!)"
measure 'one undivided worker' "${url##* }" "${url##* }"
stop

./bin/pd-launch --free-ports --json --device "$device" -- --kv-load-failure fail "${common[@]}" >"$work/launch.json" 2>"$work/launch.log" &
pids+=($!)
until_said "$work/launch.json" '^\{"proxy".*' $! >"$work/addresses.json"
address() { "$node" -p "const a = JSON.parse(require('fs').readFileSync('$work/addresses.json', 'utf8')); $1"; }
measure 'producer, consumer and proxy' "$(address a.proxy.url)" "$(address 'a.consumers[0].url')"
stop

if [ "$device" = host ]; then # it is the same whatever workers compute on, and takes two minutes
  echo 'the proxy alone' >&2
  { echo '### the proxy alone'; echo; echo '```'; } >>"$results"
  "$node" dist/bench/proxy/main.js >>"$results"
  { echo; "$node" dist/bench/proxy/main.js --stream | tail -n +2; echo '```'; } >>"$results"
fi

gpus=""
if [ "$device" != host ]; then
  # "2 x NVIDIA H200, driver 580.159.04": all of the machine, of which two were used
  gpus="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sort | uniq -c |
    sed -E 's/^ *([0-9]+) (.*), (.*)$/\1 x \2, driver \3; /' | tr -d '\n')" || true
  gpus="${gpus:-GPUs that nvidia-smi does not name; }"
fi
describe='const c = JSON.parse(require("fs").readFileSync(0, "utf8"));
  `${c.architectures?.[0] ?? c.model_type}, ${c.num_hidden_layers} layers, hidden size ${c.hidden_size}, vocabulary of ${c.vocab_size}`'

file="$out/$(date -u +%F)-$device${name:+-$name}-serve.md"
mkdir -p "$out"
{
  echo "# What clients see, $(date -u +%F)"
  echo
  echo "$gpus$(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Node $("$node" --version);" \
    "load average at the end $(cut -d' ' -f1-3 /proc/loadavg). \`$line\`, at $built."
  echo
  echo "Model ${name:-demo}: $("$node" -p "$describe" <"$model/config.json"); computed on ${executor:-$device}."
  echo
  cat "$results"
} >"$file"
echo "$file"
