#!/usr/bin/env bash
# Compiles src/, ffi/, bench/ and the programs of scripts/ into dist/. What is up to date is left alone, so a build disturbs no program that runs from there.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e dist ] && [ ! -w dist ]; then
  echo "build: dist/ belongs to $(stat -c %U dist) and cannot be written by $(id -un): remove it, or run as that user" >&2
  exit 1
fi
# What has been compiled is noted beside the output: without the output the note is worth nothing.
[ -e dist/src/cli/worker.js ] && [ -e dist/ffi ] || rm -f dist/*.tsbuildinfo
exec ./node_modules/.bin/tsc -p tsconfig.build.json
