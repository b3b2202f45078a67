#!/usr/bin/env bash
# Reinforcement learning: the E-step (--stage variational) or RLVR (--stage rlvr, when nothing is said).
# Every replica of the model generates, then trains; with parallel.generation_replicas=N in the configuration the last N
# only generate while the others train, in the same allocation.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 slurm/rlvr.sh RUN_DIR --stage variational --arm ra3 --round 1
#
# Nodes, GPUs, time, account and partition come from sbatch's options and SBATCH_* variables; see docs/slurm.md.
#SBATCH --job-name=ra3-rlvr
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

[[ " $* " == *" --stage "* ]] || set -- "$@" --stage rlvr
ra3_job "$@"
