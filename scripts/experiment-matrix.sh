#!/usr/bin/env bash
# Which requests find their KV: ids randomized or not, each send type, keyed by transfer id or by full id. --help lists the options.
#
#   ./scripts/experiment-matrix.sh                    on host memory
#   ./scripts/experiment-matrix.sh --device cuda      producer on cuda:0, consumer on cuda:1
#
# From a checkout, or from the archive of `npm run bundle`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
run_program experiment-matrix "$@"
