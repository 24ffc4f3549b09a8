#!/usr/bin/env bash
# The runbook's lines as docs/operations.md has them ("With vLLM's configuration"), word for word: proxy, producer on GPU 0, consumer on
# GPU 1, no --device. Then its four prompts, and a table of what its readers look at. Exit status 0 where all of it is as it should be.
#
#   ./scripts/runbook.sh                 on two GPUs; on a machine without one the same lines serve on the host
#   ./scripts/runbook.sh --free-ports    where the runbook's ports are taken
#
# From a checkout, or from the archive of `npm run bundle`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
run_program runbook "$@"
