#!/usr/bin/env bash
# Mid-training on a cluster: the whole chain of a run, or one stage of it in this job.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=08:00:00 slurm/midtrain.sh configs/qwen2.5-1.5b.yaml
#       submits a job per stage, each shaped like this one, and ends
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 slurm/midtrain.sh RUN_DIR --stage sft --arm ra3 --round 1
#       one stage here; it is saved, requeued and resumed until it is done
#
# Nodes, GPUs, time, account and partition come from sbatch's options and SBATCH_* variables; see docs/slurm.md.
#SBATCH --job-name=ra3-midtrain
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
