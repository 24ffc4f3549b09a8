#!/usr/bin/env bash
# Compiles src/ and ffi/ into dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e dist ] && [ ! -w dist ]; then
  echo "build: dist/ belongs to $(stat -c %U dist) and cannot be written by $(id -un): remove it, or run as that user" >&2
  exit 1
fi
exec ./node_modules/.bin/tsc -p tsconfig.build.json
