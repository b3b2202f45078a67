#!/usr/bin/env bash
# Work of one process between the others: --stage import, prepare, prepare-base or export; or the end of a
# generation whose shards an array has made (--stage generate --join).
#
#   sbatch --nodes=1 --time=01:00:00 slurm/convert.sh RUN_DIR --stage export
#
# Nodes, GPUs, time, account and partition come from sbatch's options and SBATCH_* variables; see docs/slurm.md.
#SBATCH --job-name=ra3-convert
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

# In a job $0 is a copy in Slurm's own folder; Slurm knows where the script came from.
if [[ -z ${RA3_PROJECT:-} && -n ${SLURM_JOB_ID:-} ]]; then
    [[ "$(scontrol show job --oneliner "$SLURM_JOB_ID")" =~ \ Command=([^\ ]+)/slurm/[^/]+\.sh ]] && RA3_PROJECT=${BASH_REMATCH[1]}
fi
RA3_PROJECT=${RA3_PROJECT:-$(cd "$(dirname "$0")/.." && pwd)}
export RA3_PROJECT
# shellcheck source=slurm/lib.sh
source "$RA3_PROJECT/slurm/lib.sh"

ra3_job "$@"
