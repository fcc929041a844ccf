# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by scripts/check/linux-checks*, which run Linux guests in the combinations that matter. A
# failure does not stop the others. A run that hangs is retried once, and the summary says so.
# shellcheck shell=sh
# shellcheck source-path=SCRIPTDIR
. scripts/lib/box.sh

# The statuses after which a run is retried. 124: timeout; 125: the nested host died.
retried='124 125'
# The status of a run that passes.
wanted=0
failures=
retries=
took=
reasons=

# fails NAME: records the failure and the likely reasons in the last attempt's output, which the
# summary repeats.
fails() {
    failures="$failures '$1'"
    reasons="$reasons=== linux: $1: likely reasons:
$(grep -aE '^(FAIL|error|warning|linux-guest|nested)|stale|LEFT|panicked|RETRY|[Ee]rror:' "$output" | tail -n 8)
--- its last lines:
$(tail -n 4 "$output")
"
}

# keeping COMMAND...: runs it and appends its output to $output.
keeping() {
    { "$@" </dev/null 2>&1; echo $? >"$output_status"; } | tee -a "$output"
    return "$(cat "$output_status")"
}

# attempt NAME COMMAND...
attempt() {
    name=$1
    shift
    echo "=== linux: $name"
    started=$(date +%s)
    : >"$output"
    keeping "$@"
    status=$?
    case " $retried " in *" $status "*)
        box "RETRY: '$name' exited with status $status" 2>&1 | tee -a "$output"
        retries="$retries '$name' (status $status)"
        keeping "$@"
        status=$?
        ;;
    esac
    seconds=$(($(date +%s) - started))
    echo "=== linux: $name: status $status, $seconds s"
    took="$took$(printf '%6d s  %s' "$seconds" "$name")
"
    [ "$status" = "$wanted" ] || fails "$name"
}

# beside FILE NAME COMMAND...: an attempt in the background; FILE.* are its files. `wait_for FILE`
# collects the result.
beside() {
    beside_file=$1
    shift
    (
        failures='' retries='' took='' reasons=''
        output=$beside_file.output output_status=$beside_file.status
        attempt "$@" >"$beside_file.log" 2>&1
        printf '%s\n' "$failures" >"$beside_file.failures"
        printf '%s\n' "$retries" >"$beside_file.retries"
        printf '%s\n' "$took" >"$beside_file.took"
        printf '%s' "$reasons" >"$beside_file.reasons"
    ) &
    echo "$!" >"$beside_file.process"
}

# wait_for FILE: waits for what `beside` started and prints its output.
wait_for() {
    wait "$(cat "$1.process")"
    cat "$1.log"
    # Missing files: it did not finish.
    failures="$failures$(cat "$1.failures" || echo " '$1'")"
    retries="$retries$(cat "$1.retries")"
    took="$took$(cat "$1.took")
"
    reasons="$reasons$(cat "$1.reasons")
"
}

# unless_off PREPARE...: to be called first. Exits if NESTED=off, or if PREPARE, a command, fails.
unless_off() {
    if [ "${NESTED:-}" = off ]; then
        box "NESTED=off: Linux guests were NOT run, and what only they test is NOT tested."
        exit 0
    fi
    if ! "$@"; then
        box "Cannot prepare Linux guests (the reason is above): they were NOT run." \
            "NESTED=off skips them."
        exit 1
    fi
    output=$(mktemp) && output_status=$(mktemp) || exit 1
    all_started=$(date +%s)
}

# finish: prints the summary and exits.
finish() {
    rm -f "$output" "$output_status"
    echo "=== linux: times:"
    printf '%s%6d s  total\n' "$took" $(($(date +%s) - all_started))
    [ -z "$retries" ] || box "RETRIED:$retries"
    if [ -n "$failures" ]; then
        printf '%s' "$reasons"
        echo "linux: FAILED:$failures" >&2
        exit 1
    fi
    echo "linux: all passed"
}
