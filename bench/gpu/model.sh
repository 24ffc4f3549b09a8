#!/bin/sh
# All checks and times of the model on one GPU: random shapes against the host, single kernels, logits and times against transformers.
#
#   bench/gpu/model.sh RESULTS        a folder; NODE and MODELS (a folder with room for 20 GB) may be set
#
# From the archive of `npm run bundle`, or from a build (scripts/build.sh). Each part runs in its own process, as a kernel that
# fails ends its process.
set -u
cd "$(dirname "$0")/../.."
RESULTS=$1
[ -x ./node ] && NODE=${NODE:-./node}
NODE=${NODE:-node}
MODELS=${MODELS:-$(mktemp -d)}
mkdir -p "$RESULTS"
run() { PD_RESULTS="$RESULTS/$1.json" timeout "$2" "$NODE" dist/bench/gpu/model.js "$MODELS" "$1" 2>&1 | tee "$RESULTS/$1.txt"; }
run random 120
run kernels 60
PYTHONUNBUFFERED=1 timeout 240 python3 scripts/model-reference/reference.py --out "$MODELS" --large 2>&1 |
  grep -v -i -e warn -e 'it/s' | tee "$RESULTS/reference.txt"
run logits 150
run times 150
# memory errors, if the tool is installed: slow, so few random models
if command -v compute-sanitizer > /dev/null; then
  PD_RANDOM_MODELS=2 timeout 100 compute-sanitizer --tool memcheck --print-limit 5 "$NODE" dist/bench/gpu/model.js "$MODELS" random 2>&1 |
    tee "$RESULTS/sanitizer.txt" | tail -15
fi
