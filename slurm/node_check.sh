#!/usr/bin/env bash
# The check of one node before a start: node_check.sh ANSWERS CANARY. Takes seconds; the job reads ANSWERS/<node>.
#
# "FAIL reason" for what keeps the node out, "end" when all was looked at. RA3_EXPECT_GPUS, RA3_CHECK_TMP_GB (1) and
# RA3_CHECK_RUN_GB (1) say what is expected.
set -uo pipefail
answers=$1 canary=$2
node=${SLURMD_NODENAME:-$(hostname -s)}
partial=$answers/.$node.partial

free_gb() { df --output=avail -B1G "$1" 2>/dev/null | tail -n 1 | tr -d ' '; }

check() {
    echo "clock $(date +%s)"
    # The folder all nodes share, with the content the job has just written.
    [[ "$(cat "$answers/canary" 2>&1)" == "$canary" ]] || echo "FAIL $answers is not what the first node sees"
    local here=${TMPDIR:-/tmp} gb
    gb=$(free_gb "$here")
    [[ ${gb:-0} -ge ${RA3_CHECK_TMP_GB:-1} ]] || echo "FAIL $here has ${gb:-no} GB free"
    gb=$(free_gb "$answers")
    [[ ${gb:-0} -ge ${RA3_CHECK_RUN_GB:-1} ]] || echo "FAIL $answers has ${gb:-no} GB free"
    [[ ${RA3_EXPECT_GPUS:-0} -eq 0 ]] || check_gpus
    echo end
}

check_gpus() {
    local found errors line
    if ! found=$(timeout 60 nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits 2>&1); then
        echo "FAIL nvidia-smi: ${found//$'\n'/ }"
        return
    fi
    local -a gpus=()
    mapfile -t gpus <<< "$found"
    [[ ${#gpus[@]} -ge $RA3_EXPECT_GPUS ]] || echo "FAIL ${#gpus[@]} of $RA3_EXPECT_GPUS GPUs"
    for line in "${gpus[@]}"; do
        errors=${line##*, }
        [[ ! $errors =~ ^[0-9]+$ || $errors -eq 0 ]] || echo "FAIL GPU ${line%%,*} has $errors uncorrected memory errors"
    done
    # Errors after which a GPU needs a reset: double-bit, link, fallen off the bus, contained and uncontained memory.
    found=$(dmesg --since '1 hour ago' 2>/dev/null | grep -oE 'NVRM: Xid .*: (48|74|79|94|95|119|120),' | tail -n 1)
    [[ -z $found ]] || echo "FAIL $found"
}

check > "$partial" && mv "$partial" "$answers/$node"
