#!/bin/sh
# Builds the CUDA kernels that are shipped: cubin for sm_80, sm_89 and sm_90, and PTX (compute_80) for later ones.
#
#   scripts/build-kernels.sh            build, and write kernels/manifest.json
#   scripts/build-kernels.sh --check    check that the manifest matches the sources and the shipped files
#   scripts/build-kernels.sh --compile  and, if nvcc is found, that the sources compile
#
# The manifest has the hashes of sources and images, and the parameters of each kernel as its source declares them: the product compares
# them with its own tables of kernels when it loads an image (src/device/cuda/kernels.ts).
set -eu
cd "$(dirname "$0")/.."
ARCHS="80 89 90"
PTX_ARCH=80
OUT=kernels/bin

NVCC=${NVCC:-$(command -v nvcc || true)}
[ -n "$NVCC" ] || { [ -x /usr/local/cuda/bin/nvcc ] && NVCC=/usr/local/cuda/bin/nvcc; } || true

hash_of() { sha256sum "$1" | cut -d' ' -f1; }
nvcc_version() { "$NVCC" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p'; }

# Names of the sources under kernels/, without .cu; included files count as source too.
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

# `name|parameters` of each kernel in a source, as declared. If a macro declares them, the name is the macro's: rms_norm_##T.
parameters() {
  kernels=$(tr -d '\\\n' < "$1" | sed 's/extern "C" __global__/\n&/g' | tr -s ' ' |
    sed -n 's/^extern "C" __global__ void \(__launch_bounds__([^)]*) \)\{0,1\}\([A-Za-z0-9_#]*\)(\([^)]*\)) {.*/\2|\3/p')
  [ "$(echo "$kernels" | wc -l)" = "$(grep -o __global__ "$1" | wc -l)" ] || {
    echo "$1 declares a kernel in a form that this script cannot read" >&2
    exit 1
  }
  echo "$kernels"
}

# `name|value` lines as members of a JSON object, indented by $1.
members() {
  sed "s/\(.*\)|\(.*\)/$1\"\1\": \"\2\"/;\$!s/\$/,/"
}

manifest() { # version of nvcc
  printf '{\n  "nvcc": "%s",\n  "ptx": "compute_%s",\n  "included": {\n' "$1" "$PTX_ARCH"
  for file in $(included); do echo "${file#kernels/}|$(hash_of "$file")"; done | members '    '
  printf '  },\n  "kernels": {'
  between=
  for name in $(names); do
    printf '%s\n    "%s": {\n      "source": "%s",\n      "parameters": {\n' "$between" "$name" "$(hash_of "kernels/$name.cu")"
    found=$(parameters "kernels/$name.cu")
    echo "$found" | members '        '
    printf '      },\n      "files": {\n'
    for file in "$OUT/$name".*; do echo "${file#"$OUT"/}|$(hash_of "$file")"; done | members '        '
    printf '      }\n    }'
    between=,
  done
  printf '\n  }\n}\n'
}

if [ "${1:-}" = --check ] || [ "${1:-}" = --compile ]; then
  aside=$(mktemp -d)
  trap 'rm -rf "$aside"' EXIT
  manifest "$(sed -n 's/.*"nvcc": "\(.*\)",/\1/p' kernels/manifest.json)" > "$aside/manifest.json"
  diff kernels/manifest.json "$aside/manifest.json" >&2 || {
    echo "kernels/manifest.json (<) does not match sources and images (>): run scripts/build-kernels.sh" >&2
    exit 1
  }
  if [ "$1" = --compile ] && [ -n "$NVCC" ]; then
    # PTX only: machine code takes a minute
    for name in $(names); do compile_ptx "$name" "$aside"; done
    echo "kernels: the manifest matches, and the sources compile with nvcc $(nvcc_version)"
  else
    echo "kernels: the manifest matches (nothing compiled)"
  fi
  exit 0
fi

[ -n "$NVCC" ] || { echo "nvcc not found: set NVCC" >&2; exit 1; }
for name in $(names); do compile "$name" "$OUT"; done
manifest "$(nvcc_version)" > "$OUT/manifest.json"
mv "$OUT/manifest.json" kernels/manifest.json
echo "kernels: built with nvcc $(nvcc_version)"
