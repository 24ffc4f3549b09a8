#!/usr/bin/env bash
# The runbook's set-up on two GPUs, on its ports: proxy 10002 (discovery 30002), producer 8081 (KV 8082) on cuda:0, consumer 8083
# (KV 8084) on cuda:1. It sends the four prompts, KV moves from GPU to GPU, and each text is compared with an undivided worker's.
#
#   ./scripts/two-gpu.sh                    checks, then stops everything; exit status 0 if all four pass
#   ./scripts/two-gpu.sh --keep             checks, then serves until Ctrl-C
#   ./scripts/two-gpu.sh --model DIR --send-type GET      more options: --help
#   ./scripts/two-gpu.sh --executor host    the host computes, and KV still moves from GPU to GPU
#   ./scripts/two-gpu.sh --host ::1 ipv6    on these addresses in turn; ipv6 is this machine's own, not loopback
#
# It ends with a table: each address, the result of its prompts, and which address NCCL's bootstrap chose, according to NCCL.
#
# The GPUs compute with 2,048 KV blocks each and --batch-invariant, so that two workers fit on cuda:0 and texts are exactly equal.
#
# From a checkout, or from the archive of `npm run bundle`.
set -euo pipefail
cd "$(dirname "$0")/.."
export SCRIPT_NAME=two-gpu.sh
. scripts/common.sh
run_program demo --device cuda --runbook-ports "$@"
