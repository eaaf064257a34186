# shellcheck shell=bash
# Common setup of all stages; the sbatch files source it with the stage name as argument.
#
# PUMA_CODE   code folder: the checkout from which the job was submitted, or its copy in the run folder
# PUMA_RUN    run folder, if set by tools/submit.py: stages record there when they start and end

set -uo pipefail
export PUMA_CODE="${PUMA_CODE:-$SLURM_SUBMIT_DIR}"
STAGE=$1
if [ -f "$PUMA_CODE/slurm/site.env" ]; then
    # shellcheck source=/dev/null
    source "$PUMA_CODE/slurm/site.env"
fi
export PYTHONPATH="$PUMA_CODE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

# Append a line to the run's journal: time, stage, job, array task, event.
note() {
    [ -n "${PUMA_RUN:-}" ] || return 0
    mkdir -p "$PUMA_RUN/slurm"
    printf '%s\t%s\t%s\t%s\t%s\n' "$(date +%s)" "$STAGE" "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" \
        "${SLURM_ARRAY_TASK_ID:--}" "$1" >>"$PUMA_RUN/slurm/journal.tsv"
}

# Run a command in the container, if there is one: a command with its options, or options of srun.
in_container() {
    local start=${CONTAINER:-}
    [[ $start != --* ]] || start="srun --ntasks=1 $start"
    # shellcheck disable=SC2086
    $start "$@"
}

# Run a single-process stage and exit with its exit code.
run_stage() {
    note started
    in_container "$@"
    local code=$?
    note "ended $code"
    exit "$code"
}
