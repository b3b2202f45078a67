#!/usr/bin/env bash
# Where a run stands: done, queued, step, seconds since it was heard of, how the last attempt ended.
#
#   slurm/status.sh RUN_DIR
set -euo pipefail
RA3_PROJECT=${RA3_PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export RA3_PROJECT
# shellcheck source=slurm/lib.sh
source "$RA3_PROJECT/slurm/lib.sh"

ra3 launch "$@" --status
