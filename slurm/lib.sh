# shellcheck shell=bash
# Sourced by the scripts beside it. What is decided is decided in Python (ra3_megatron/launch); this finds it.
#
# RA3_PROJECT       folder with slurm/ and ra3_megatron/; set for the jobs of a chain, else where the script lies
# RA3_HOST_PYTHON   Python of login node and job: needs no torch, only pyyaml, omegaconf, psutil, typer (default: the
#                   one that launched the run, for its snapshot; the project's .venv; else python3)

ra3() {
    local python=${RA3_HOST_PYTHON:-}
    if [[ -z $python && $RA3_PROJECT == */launch/code && -r $RA3_PROJECT/../python ]]; then
        python=$(< "$RA3_PROJECT/../python")
    fi
    if [[ -z $python ]]; then
        python=$RA3_PROJECT/.venv/bin/python
        [[ -x $python ]] || python=python3
    fi
    # Without PYTHONSAFEPATH the working folder would come first, and a checkout there would run in place of the snapshot.
    PYTHONSAFEPATH=1 PYTHONPATH="$RA3_PROJECT${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m ra3_megatron "$@"
}

# The inside of a job. exec: Slurm signals this process, and Python can take signals while it waits.
ra3_job() {
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        echo "error: this script is for sbatch: sbatch slurm/${0##*/} ..., or slurm/chain.sh RUN_DIR" >&2
        exit 2
    fi
    # A signal before Python listens would end the job; the processes save by the clock all the same.
    trap '' USR1
    ra3 job "$@"
}
