#!/usr/bin/env bash
# Formatting, lint, layers, dead exports, types, build and every test that guards behaviour, in at most five minutes on two cores; long tests
# are in scripts/test-all.sh. Ends with one line: "test: N passed, N failed".
# Arguments go to vitest: ./scripts/test.sh test/unit
#
# With CI=true it is a failure if a Debian package that the tests need cannot be installed; otherwise those tests are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
./scripts/install.sh || exit 1

results="$(mktemp -d)"
trap 'rm -rf "$results"' EXIT
broken=0

step() {
  local name="$1"
  echo "test: $name"
  shift
  "$@" && return
  broken=$((broken + 1))
  echo "test: failed: $name"
}

if ! ./scripts/debian-packages.sh peer; then
  if [ "${CI:-}" = true ]; then
    broken=$((broken + 1))
    echo "test: failed: the Debian packages of the Python peer"
  else
    echo "test: the tests with a Python peer are skipped"
  fi
fi
# Meant for two cores: these run in parallel with the compiler.
(
  broken=0
  step "formatting and lint" ./node_modules/.bin/biome check --error-on-warnings .
  step "layers" ./node_modules/.bin/tsx scripts/layers.ts
  step "dead exports" ./node_modules/.bin/knip --no-progress --treat-config-hints-as-errors
  exit "$broken"
) &
checks=$!
step "types" ./node_modules/.bin/tsc -p tsconfig.json
step "types of the page" ./node_modules/.bin/tsc -p ui/tsconfig.json
step "build" ./scripts/build.sh --noCheck
wait "$checks"
broken=$((broken + $?))
echo "test: vitest"
PD_TEST_SKIP_BUILD=1 PD_TEST_PART=test ./node_modules/.bin/vitest run --project unit --project main --reporter=default --reporter=json \
  --reporter=./scripts/stray-errors.mjs --outputFile.json="$results/vitest.json" "$@"
status=$?
node scripts/test-summary.mjs test "$results/vitest.json" "$status" 0 "$broken"
