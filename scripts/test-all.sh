#!/usr/bin/env bash
# The long tests that scripts/test.sh leaves out: the archive for hosts without Node, the package (packed, installed elsewhere, publint, API
# reference), small benchmarks, other versions of Node, OpenAI's clients, promtool, etcd, Chromium. At most thirty minutes on two cores. Ends with one line:
# "test-all: N passed, N failed"; a part that is not a vitest run counts as one. Needs the npm registry, for the package, the versions of Node, clients and vocabularies.
#
# With CI=true it is a failure if a Debian package that the tests need cannot be installed; otherwise those tests are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
./scripts/install.sh || exit 1

results="$(mktemp -d)"
trap 'rm -rf "$results"' EXIT
passed=0
failed=0

# broken PART [LOG]: it failed; LOG says how, from where vitest begins to tell of failed tests, which is where the case of a property stands, or in
# its last lines.
broken() {
  failed=$((failed + 1))
  echo "test-all: failed: $1"
  [ $# = 2 ] || return
  { grep -m 1 -A 60 'Failed \(Tests\|Suites\)' "$2" || grep -v '✓' "$2" | tail -n 60; } | cut -c1-300 | sed 's/^/test-all: | /'
}

for part in peer promtool etcd browser; do
  if ! ./scripts/debian-packages.sh "$part"; then
    if [ "${CI:-}" = true ]; then broken "the Debian packages for $part"; else echo "test-all: the tests that need them are skipped"; fi
  fi
done
./scripts/build.sh || broken "build"

# The newest runs all that test.sh does: each version is stricter, and whole programs meet it in other ways than their parts do.
others=($(./scripts/node-version.sh --others))
for version in "${others[@]}"; do
  tests=unit
  [ "$version" = "${others[-1]}" ] && tests=tests
  for part in "$tests" demo; do
    echo "test-all: Node $version, $part"
    if ./scripts/node-version.sh "$version" "$part" >"$results/node.log" 2>&1; then
      passed=$((passed + 1))
    else
      broken "Node $version, $part" "$results/node.log"
    fi
  done
done

if command -v promtool >/dev/null; then
  echo "test-all: promtool check metrics, check rules"
  if ./node_modules/.bin/vitest run --project unit test/unit/observability test/unit/deploy.test.ts >"$results/promtool.log" 2>&1; then
    passed=$((passed + 1))
  else
    broken "promtool" "$results/promtool.log"
  fi
fi

echo "test-all: vitest"
PD_TEST_SKIP_BUILD=1 PD_TEST_PART=test-all ./node_modules/.bin/vitest run --project wide --reporter=default --reporter=json \
  --reporter=./scripts/stray-errors.mjs --outputFile.json="$results/vitest.json" "$@"
status=$?
node scripts/test-summary.mjs test-all "$results/vitest.json" "$status" "$passed" "$failed"
