#!/usr/bin/env bash
# Generates the reference of the public API (src/index.ts) from its docstrings, as HTML in dist-docs/. TypeDoc needs an older TypeScript
# than ours: both come from the npm registry, once, into a separate cache.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/install.sh

packages=(typedoc@0.28.20 typescript@6.0.3)
folder="${XDG_CACHE_HOME:-$HOME/.cache}/pd-worker/$(IFS=-; echo "${packages[*]//@/-}")"
if [ ! -e "$folder/node_modules/typedoc/bin/typedoc" ]; then
  echo "api-docs: ${packages[*]}"
  mkdir -p "$folder"
  npm install --prefix "$folder" --no-save --no-audit --no-fund --no-update-notifier --loglevel=error "${packages[@]}"
fi

# tsc checks the types. Any warning is an error, such as a type that a signature mentions but src/index.ts does not export.
exec node "$folder/node_modules/typedoc/bin/typedoc" --tsconfig tsconfig.build.json --entryPoints src/index.ts \
  --name pd-worker --includeVersion --readme docs/embedding.md --disableSources \
  --skipErrorChecking --excludeInternal --treatWarningsAsErrors --logLevel Warn --out dist-docs
