#!/usr/bin/env bash
# Runs the unit tests, all tests of scripts/test.sh, the demo, or clients of OpenAI's API (test/wide/clients) on another version of Node, or makes the archive with it inside.
# That version comes from the npm registry and is kept in a cache.
#
#   ./scripts/node-version.sh 24 unit
#   ./scripts/node-version.sh 24 tests
#   ./scripts/node-version.sh 24 demo
#   ./scripts/node-version.sh 24 bundle --level 9
#   PD_BASE_URL=http://127.0.0.1:10002 ./scripts/node-version.sh 22 clients
#   ./scripts/node-version.sh --others      lists the supported versions other than the one that runs here
set -euo pipefail
cd "$(dirname "$0")/.."
versions=(20 22 24)

if [ "${1:-}" = --others ]; then
  here="$(node -p 'process.versions.node.split(".")[0]')"
  for version in "${versions[@]}"; do [ "$version" = "$here" ] || echo "$version"; done
  exit 0
fi
version="${1:?which version of Node}"
part="${2:?unit, tests, demo, bundle or clients}"
shift 2

package="node-linux-$(node -p process.arch)"
folder="${XDG_CACHE_HOME:-$HOME/.cache}/pd-worker/node-$version"
bin="$folder/node_modules/$package/bin"
if [ ! -x "$bin/node" ]; then
  echo "node-version: $package@$version"
  mkdir -p "$folder"
  npm install --prefix "$folder" --no-save --no-audit --no-fund --no-update-notifier --loglevel=error "$package@$version"
fi
export PATH="$bin:$PATH"
echo "node-version: $(node --version)"
case "$part" in
  unit) PD_TEST_SKIP_BUILD=1 exec node node_modules/vitest/vitest.mjs run --project unit test/unit ;;
  tests) PD_TEST_SKIP_BUILD=1 exec node node_modules/vitest/vitest.mjs run --project unit --project main ;;
  demo) exec ./scripts/demo.sh ;;
  bundle) exec npm run --silent bundle -- "$@" ;;
  clients)
    # Away from the checkout: what they depend on is no part of it.
    folder="${XDG_CACHE_HOME:-$HOME/.cache}/pd-worker/clients"
    mkdir -p "$folder"
    if ! cmp -s test/wide/clients/package-lock.json "$folder/package-lock.json"; then
      rm -rf "$folder/node_modules"
      cp test/wide/clients/package{,-lock}.json "$folder"
      if ! (cd "$folder" && npm ci --no-audit --no-fund --no-update-notifier --loglevel=error); then
        rm "$folder/package-lock.json"
        exit 1
      fi
    fi
    cp test/wide/clients/*.mjs "$folder"
    exec node --test "$folder"/{openai,ai,langchain}.mjs
    ;;
  *) echo "node-version: unit, tests, demo, bundle or clients, not $part" >&2; exit 2 ;;
esac
