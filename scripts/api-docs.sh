#!/usr/bin/env bash
# The reference of the public API (src/index.ts), as HTML from its docstrings, into dist-docs/. TypeDoc reads sources with a TypeScript older
# than ours: both come from the npm registry, once, into a cache of their own.
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

# Types are tsc's to check. A type that a signature mentions and src/index.ts does not export is an error, as any warning is.
exec node "$folder/node_modules/typedoc/bin/typedoc" --tsconfig tsconfig.build.json --entryPoints src/index.ts \
  --name pd-worker --includeVersion --readme docs/embedding.md --disableSources \
  --skipErrorChecking --excludeInternal --treatWarningsAsErrors --logLevel Warn --out dist-docs
