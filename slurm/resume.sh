#!/usr/bin/env bash
# Go on with a run that was stopped or gave up: removes STOP and the counts of failures, says why it stood still.
#
#   slurm/resume.sh RUN_DIR
set -euo pipefail
RA3_PROJECT=${RA3_PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export RA3_PROJECT
# shellcheck source=slurm/lib.sh
source "$RA3_PROJECT/slurm/lib.sh"

ra3 launch "$@" --resume
