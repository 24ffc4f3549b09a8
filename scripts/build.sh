#!/usr/bin/env bash
# Compiles src/, ffi/, bench/ and the programs of scripts/ into dist/. Files that are up to date are left alone, so that a build does not
# disturb programs that run from there. Arguments go to tsc: --noCheck where types are checked anyway.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e dist ] && [ ! -w dist ]; then
  echo "build: dist/ belongs to $(stat -c %U dist) and cannot be written by $(id -un): remove it, or run as that user" >&2
  exit 1
fi
# tsc records what it has compiled, which is wrong once a part of the output has been deleted.
for part in src/cli/worker.js ffi bench scripts support; do
  [ -e "dist/$part" ] || rm -f dist/*.tsbuildinfo
done
exec ./node_modules/.bin/tsc -p tsconfig.build.json "$@"
