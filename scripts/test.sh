#!/usr/bin/env bash
# Formatting, lint, types, build and every test. Ends with one line: "test: N passed, N failed".
# Arguments go to vitest: ./scripts/test.sh test/unit
set -uo pipefail
cd "$(dirname "$0")/.."
./scripts/install.sh || exit 1

# The Python peer of the tests: without these packages, and where they cannot be had, its tests are skipped.
if ! /usr/bin/python3 -c 'import msgpack, zmq' 2>/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "test: installing python3-msgpack and python3-zmq"
  if ! { timeout 120 apt-get install -y -qq --no-install-recommends python3-msgpack python3-zmq ||
    { timeout 120 apt-get update -qq && timeout 120 apt-get install -y -qq --no-install-recommends python3-msgpack python3-zmq; }; } \
    >/dev/null 2>&1; then
    echo "test: they could not be installed (offline?): the tests with a Python peer are skipped"
  fi
fi

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
