#!/usr/bin/env bash
# Formatting, lint, types, build and every test. Ends with one line: "test: N passed, N failed".
# Arguments go to vitest: ./scripts/test.sh test/unit
set -uo pipefail
cd "$(dirname "$0")/.."
./scripts/install.sh || exit 1

results="$(mktemp -d)"
trap 'rm -rf "$results"' EXIT
broken=0

step() {
  echo "test: $1"
  shift
  "$@" || broken=$((broken + 1))
}

step "formatting and lint" ./node_modules/.bin/biome check --error-on-warnings .
step "types" ./node_modules/.bin/tsc -p tsconfig.json
step "build" ./scripts/build.sh
echo "test: vitest"
PD_TEST_SKIP_BUILD=1 ./node_modules/.bin/vitest run --reporter=default --reporter=json \
  --outputFile.json="$results/vitest.json" "$@"
status=$?
node scripts/test-summary.mjs "$results/vitest.json" "$status" "$broken"
