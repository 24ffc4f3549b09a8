#!/usr/bin/env bash
# Which requests find their KV: ids randomized or not, each way of sending, keyed by transfer id or by full id. --help lists the options.
#
#   ./scripts/experiment-matrix.sh                    on host memory
#   ./scripts/experiment-matrix.sh --device cuda      producer on cuda:0, consumer on cuda:1
#
# In a checkout it installs and builds first; in the archive of `npm run bundle` it needs neither npm nor Node.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -x ./node ]; then
  exec ./node dist/scripts/experiment-matrix.js "$@"
fi
./scripts/install.sh
[ -n "${PD_SKIP_BUILD:-}" ] || ./scripts/build.sh
exec node --import tsx scripts/experiment-matrix.ts "$@"
