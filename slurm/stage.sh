# shellcheck shell=bash
# What every stage does first; sourced by the sbatch files, with the name of the stage as argument.
#
# PUMA_CODE   folder of the code: the checkout a job is submitted from, or the copy in the run folder
# PUMA_RUN    the run folder, where tools/submit.py set it: stages note there when they start and end

set -uo pipefail
export PUMA_CODE="${PUMA_CODE:-$SLURM_SUBMIT_DIR}"
STAGE=$1
if [ -f "$PUMA_CODE/slurm/site.env" ]; then
    # shellcheck source=/dev/null
    source "$PUMA_CODE/slurm/site.env"
fi
export PYTHONPATH="$PUMA_CODE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

# Append one line to the run's journal: time, stage, job, array task, what happened.
note() {
    [ -n "${PUMA_RUN:-}" ] || return 0
    mkdir -p "$PUMA_RUN/slurm"
    printf '%s\t%s\t%s\t%s\t%s\n' "$(date +%s)" "$STAGE" "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" \
        "${SLURM_ARRAY_TASK_ID:--}" "$1" >>"$PUMA_RUN/slurm/journal.tsv"
}

# Run a single-process stage and end the job with its exit code.
run_stage() {
    note started
    # shellcheck disable=SC2086  # CONTAINER is a command with its options
    ${CONTAINER:-} "$@"
    local code=$?
    note "ended $code"
    exit "$code"
}
