#!/usr/bin/env bash
# What clients see of a producer, a consumer and a proxy beside one undivided worker, with the same prompts, and the proxy alone.
# Writes bench/results/<date>-<device>-serve.md. Needs a build; takes some minutes, on a machine that has nothing else to do.
#
#   ./scripts/serve-results.sh [--device host|cuda] [--model DIR] [--executor host|cuda] [--out DIR] [-- flags of pd-bench serve]
set -euo pipefail
line="./scripts/serve-results.sh${*:+ $*}"
cd "$(dirname "$0")/.."

device=host
out=bench/results
common=()
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device="${2:?--device needs host or cuda}"; shift 2 ;;
    --model | --executor) common+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --) shift; break ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
load=(--num-requests 48 --prompt-tokens 256 --output-tokens 32 --slo-ttft 1s --slo-itl 100ms "$@")

work="$(mktemp -d)"
pids=()
stop() {
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  pids=()
}
trap 'stop; rm -rf "$work"' EXIT

# until FILE PATTERN PID: the first match in what the program has said
until_said() {
  local i found
  for ((i = 0; i < 1200; i++)); do
    found="$(grep -oE "$2" "$1" | head -1)" && [ -n "$found" ] && { echo "$found"; return; }
    kill -0 "$3" 2>/dev/null || break
    sleep 0.25
  done
  echo "serve-results: not ready:" >&2
  tail -5 "$1" >&2
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
      "${load[@]}" | sed 's|^http://[^,]*, ||' >>"$results"
    { echo '```'; echo; } >>"$results"
  done
}

./bin/pd-worker --role both --host 127.0.0.1 --port 0 --device "$first_device" "${common[@]}" >"$work/both.log" 2>&1 &
pids+=($!)
url="$(until_said "$work/both.log" 'Running on http://[0-9.:]+' $!)"
measure 'one undivided worker' "${url##* }" "${url##* }"
stop

./bin/pd-launch --free-ports --json --device "$device" "${common[@]}" -- --kv-load-failure fail >"$work/launch.json" 2>"$work/launch.log" &
pids+=($!)
until_said "$work/launch.json" '^\{"proxy".*' $! >"$work/addresses.json"
address() { node -p "const a = JSON.parse(require('fs').readFileSync('$work/addresses.json', 'utf8')); $1"; }
measure 'producer, consumer and proxy' "$(address a.proxy.url)" "$(address 'a.consumers[0].url')"
stop

echo 'the proxy alone' >&2
./node_modules/.bin/tsc -p bench/tsconfig.json >&2 || [ -f dist/bench/proxy.js ]
{ echo '### the proxy alone'; echo; echo '```'; } >>"$results"
node dist/bench/proxy.js >>"$results"
{ echo; node dist/bench/proxy.js --stream | tail -n +2; echo '```'; } >>"$results"

file="$out/$(date -u +%F)-$device-serve.md"
mkdir -p "$out"
{
  echo "# What clients see, $(date -u +%F)"
  echo
  echo "$(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Node $(node --version);" \
    "load average at the end $(cut -d' ' -f1-3 /proc/loadavg). \`$line\`, at $(git rev-parse --short HEAD)."
  echo
  cat "$results"
} >"$file"
echo "$file"
