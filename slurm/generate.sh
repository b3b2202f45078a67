#!/usr/bin/env bash
# Rationale generation: the elements of an array share the shards; each restarts alone.
#
#   sbatch --array=0-15 --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 slurm/generate.sh RUN_DIR --arm ra3 --round 1
#   sbatch slurm/convert.sh RUN_DIR --stage generate --arm ra3 --round 1 --join      when all elements are done
#
# Nodes, GPUs, time, account and partition come from sbatch's options and SBATCH_* variables; see docs/slurm.md.
#SBATCH --job-name=ra3-generate
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

[[ " $* " == *" --stage "* ]] || set -- "$@" --stage generate
ra3_job "$@"
