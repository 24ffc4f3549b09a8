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

# Names of the sources under kernels/, without .cu; what they include counts as source too.
names() { for source in kernels/*.cu kernels/model/*.cu; do source=${source#kernels/}; echo "${source%.cu}"; done; }
included() { ls kernels/model/*.cuh; }

compile() { # name, folder
  mkdir -p "$(dirname "$2/$1")"
  for arch in $ARCHS; do
    "$NVCC" -O3 -std=c++17 -cubin -gencode "arch=compute_$arch,code=sm_$arch" -o "$2/$1.sm_$arch.cubin" "kernels/$1.cu"
  done
  compile_ptx "$1" "$2"
}
compile_ptx() {
  mkdir -p "$(dirname "$2/$1")"
  "$NVCC" -O3 -std=c++17 -ptx -arch "compute_$PTX_ARCH" -o "$2/$1.ptx" "kernels/$1.cu"
}

if [ "${1:-}" = --check ]; then
  for file in $(included) $(for name in $(names); do echo "kernels/$name.cu" "$OUT/$name".*; done); do
    grep -q "\"$(hash_of "$file")\"" kernels/manifest.json || {
      echo "$file is not what kernels/manifest.json says: run scripts/build-kernels.sh" >&2
      exit 1
    }
  done
  if [ -n "$NVCC" ]; then
    aside=$(mktemp -d)
    trap 'rm -rf "$aside"' EXIT
    # as far as PTX: machine code takes a minute
    for name in $(names); do compile_ptx "$name" "$aside"; done
    echo "kernels: hashes fit, sources compile with nvcc $(nvcc_version)"
  else
    echo "kernels: hashes fit (no nvcc here, nothing compiled)"
  fi
  exit 0
fi

[ -n "$NVCC" ] || { echo "nvcc not found: set NVCC" >&2; exit 1; }
for name in $(names); do compile "$name" "$OUT"; done
{
  printf '{\n  "nvcc": "%s",\n  "ptx": "compute_%s",\n  "included": {' "$(nvcc_version)" "$PTX_ARCH"
  comma=
  for file in $(included); do
    printf '%s\n    "%s": "%s"' "$comma" "${file#kernels/}" "$(hash_of "$file")"
    comma=,
  done
  printf '\n  },\n  "kernels": {'
  between=
  for name in $(names); do
    printf '%s\n    "%s": {\n      "source": "%s",\n      "files": {' "$between" "$name" "$(hash_of "kernels/$name.cu")"
    comma=
    for file in "$OUT/$name".*; do
      printf '%s\n        "%s": "%s"' "$comma" "${file#"$OUT"/}" "$(hash_of "$file")"
      comma=,
    done
    printf '\n      }\n    }'
    between=,
  done
  printf '\n  }\n}\n'
} > kernels/manifest.json
echo "kernels: built with nvcc $(nvcc_version)"
