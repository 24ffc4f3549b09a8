#!/usr/bin/env bash
# Installs dependencies, once per package-lock.json. Offline from then on.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted="20.19.0"
if ! command -v node >/dev/null; then
  echo "install: Node $wanted or later is needed, and there is no node in PATH (https://nodejs.org)" >&2
  exit 1
fi
if ! node -e '
  const [have, want] = [process.versions.node, process.argv[1]].map((v) => v.split(".").map(Number));
  const first = have.findIndex((part, i) => part !== want[i]);
  process.exit(first < 0 || have[first] > want[first] ? 0 : 1);' "$wanted"; then
  echo "install: Node $wanted or later is needed, this is $(node --version) ($(command -v node))" >&2
  exit 1
fi

hash="$(node -p 'require("node:crypto").createHash("sha256").update(require("node:fs").readFileSync("package-lock.json")).digest("hex")')"
stamp=node_modules/.pd-installed
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ]; then exit 0; fi

# Installed by hand, with everything the lock file asks for: nothing to do either.
if [ ! -f "$stamp" ] && [ -d node_modules ] && npm ls --all >/dev/null 2>&1; then
  echo "$hash" >"$stamp" 2>/dev/null || true
  exit 0
fi

echo "install: npm ci"
if ! npm ci --no-audit --no-fund --loglevel=error; then
  echo "install: npm ci failed; a first installation needs the package registry" >&2
  exit 1
fi
echo "$hash" >"$stamp"
