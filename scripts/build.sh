#!/usr/bin/env bash
# Compiles src/, ffi/, bench/ and the programs of scripts/ into dist/. What is up to date is left alone, so that a build does not disturb a
# program that runs from there.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e dist ] && [ ! -w dist ]; then
  echo "build: dist/ belongs to $(stat -c %U dist) and cannot be written by $(id -un): remove it, or run as that user" >&2
  exit 1
fi
# tsc keeps a note of what it has compiled, which is wrong once a part of the output is gone.
for part in src/cli/worker.js ffi bench scripts support; do
  [ -e "dist/$part" ] || rm -f dist/*.tsbuildinfo
done
exec ./node_modules/.bin/tsc -p tsconfig.build.json
