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
# Without declarations: no test here reads them.
step "build" ./scripts/build.sh --noCheck --declaration false
# Beside the tests, which wait for much and leave two cores idle now and then; told after them, so that no line stands in the middle of theirs.
(
  renice -n 10 "$BASHPID" >/dev/null
  broken=0
  step "types" ./node_modules/.bin/tsc -p tsconfig.json
  step "types of the page" ./node_modules/.bin/tsc -p ui/tsconfig.json
  step "formatting and lint" ./node_modules/.bin/biome check --error-on-warnings .
  step "layers" ./node_modules/.bin/tsx scripts/layers.ts
  step "dead exports" ./node_modules/.bin/knip --no-progress --treat-config-hints-as-errors
  exit "$broken"
) >"$results/checks.log" 2>&1 &
checks=$!
echo "test: vitest"
PD_TEST_SKIP_BUILD=1 PD_TEST_PART=test ./node_modules/.bin/vitest run --project unit --project main --reporter=default --reporter=json \
  --reporter=./scripts/stray-errors.mjs --outputFile.json="$results/vitest.json" "$@"
status=$?
wait "$checks"
broken=$((broken + $?))
cat "$results/checks.log"
node scripts/test-summary.mjs test "$results/vitest.json" "$status" 0 "$broken"
