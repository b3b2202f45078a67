#!/usr/bin/env bash
# Submit what is not DONE and not queued of a run: twice in a row submits nothing twice.
#
#   slurm/chain.sh RUN_DIR [--dry-run]                 a run that was launched before
#   slurm/chain.sh CONFIG --nodes 4 [--dry-run] ...     a new one; `ra3 launch --help` lists the options
set -euo pipefail
RA3_PROJECT=${RA3_PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export RA3_PROJECT
# shellcheck source=slurm/lib.sh
source "$RA3_PROJECT/slurm/lib.sh"

ra3 launch "$@"
