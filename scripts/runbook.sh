#!/usr/bin/env bash
# Runs the lines of docs/operations.md ("With vLLM's configuration") word for word: proxy, producer on GPU 0, consumer on GPU 1, no
# --device. Then sends its four prompts, and prints a table of what its readers check. Exit status 0 if everything passed.
#
#   ./scripts/runbook.sh                 on two GPUs; without a GPU the same lines serve on the host
#   ./scripts/runbook.sh --free-ports    if the runbook's ports are in use
#
# From a checkout, or from the archive of `npm run bundle`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
run_program runbook "$@"
