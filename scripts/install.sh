#!/usr/bin/env bash
# Installs the dependencies unless those in package-lock.json are installed already. Works offline once installed.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted="20.19.0"
if ! command -v node >/dev/null; then
  echo "install: Node $wanted or later is required, and there is no node in PATH (https://nodejs.org)" >&2
  exit 1
fi
if ! node -e '
  const [have, want] = [process.versions.node, process.argv[1]].map((v) => v.split(".").map(Number));
  const first = have.findIndex((part, i) => part !== want[i]);
  process.exit(first < 0 || have[first] > want[first] ? 0 : 1);' "$wanted"; then
  echo "install: Node $wanted or later is required, this is $(node --version) ($(command -v node))" >&2
  exit 1
fi

# npm keeps a list of what it installed: nothing to do if it has every version of the lock file.
if node -e '
  const read = (path) => JSON.parse(require("node:fs").readFileSync(path, "utf8")).packages;
  const [wanted, there] = [read("package-lock.json"), read("node_modules/.package-lock.json")];
  const right = ([path, { version, optional }]) =>
    path === "" || (there[path] ? there[path].version === version : optional === true);
  process.exit(Object.entries(wanted).every(right) ? 0 : 1);' 2>/dev/null; then
  exit 0
fi

echo "install: npm ci"
if ! npm ci --no-audit --no-fund --no-update-notifier --loglevel=error; then
  echo "install: npm ci failed; a first installation needs the package registry" >&2
  exit 1
fi
