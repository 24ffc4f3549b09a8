#!/bin/sh
# Builds the CUDA kernels that are shipped: cubin for sm_80, sm_89 and sm_90, and PTX (compute_80) for what comes after.
#
#   scripts/build-kernels.sh            build, and write kernels/manifest.json
#   scripts/build-kernels.sh --check    the shipped files belong to their sources; where nvcc is found, the sources compile anew
set -eu
cd "$(dirname "$0")/.."
ARCHS="80 89 90"
PTX_ARCH=80
OUT=kernels/bin

NVCC=${NVCC:-$(command -v nvcc || true)}
[ -n "$NVCC" ] || { [ -x /usr/local/cuda/bin/nvcc ] && NVCC=/usr/local/cuda/bin/nvcc; } || true

hash_of() { sha256sum "$1" | cut -d' ' -f1; }
nvcc_version() { "$NVCC" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p'; }

compile() { # source, folder
  name=$(basename "$1" .cu)
  for arch in $ARCHS; do
    "$NVCC" -O3 -std=c++17 -cubin -gencode "arch=compute_$arch,code=sm_$arch" -o "$2/$name.sm_$arch.cubin" "$1"
  done
  "$NVCC" -O3 -std=c++17 -ptx -arch "compute_$PTX_ARCH" -o "$2/$name.ptx" "$1"
}

if [ "${1:-}" = --check ]; then
  for source in kernels/*.cu; do
    for file in "$source" "$OUT/$(basename "$source" .cu)".*; do
      grep -q "\"$(hash_of "$file")\"" kernels/manifest.json || {
        echo "$file is not what kernels/manifest.json says: run scripts/build-kernels.sh" >&2
        exit 1
      }
    done
  done
  if [ -n "$NVCC" ]; then
    aside=$(mktemp -d)
    trap 'rm -rf "$aside"' EXIT
    for source in kernels/*.cu; do compile "$source" "$aside"; done
    echo "kernels: hashes fit, sources compile with nvcc $(nvcc_version)"
  else
    echo "kernels: hashes fit (no nvcc here, nothing compiled)"
  fi
  exit 0
fi

[ -n "$NVCC" ] || { echo "nvcc not found: set NVCC" >&2; exit 1; }
mkdir -p "$OUT"
for source in kernels/*.cu; do compile "$source" "$OUT"; done
{
  printf '{\n  "nvcc": "%s",\n  "ptx": "compute_%s",\n  "kernels": {' "$(nvcc_version)" "$PTX_ARCH"
  between=
  for source in kernels/*.cu; do
    name=$(basename "$source" .cu)
    printf '%s\n    "%s": {\n      "source": "%s",\n      "files": {' "$between" "$name" "$(hash_of "$source")"
    comma=
    for file in "$OUT/$name".*; do
      printf '%s\n        "%s": "%s"' "$comma" "$(basename "$file")" "$(hash_of "$file")"
      comma=,
    done
    printf '\n      }\n    }'
    between=,
  done
  printf '\n  }\n}\n'
} > kernels/manifest.json
echo "kernels: built with nvcc $(nvcc_version)"
