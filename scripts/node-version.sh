#!/usr/bin/env bash
# Runs the unit tests, or the demo, on another version of Node, which comes from the npm registry and is kept in a cache.
#
#   ./scripts/node-version.sh 24 unit
#   ./scripts/node-version.sh 24 demo
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
part="${2:?unit or demo}"

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
  unit) PD_TEST_SKIP_BUILD=1 exec node node_modules/vitest/vitest.mjs run --project unit ;;
  demo) exec ./scripts/demo.sh ;;
  *) echo "node-version: unit or demo, not $part" >&2; exit 2 ;;
esac
