# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by the scripts that run the Linux test guest: how a run is judged.
# shellcheck shell=sh

say() {
    echo "$(basename "$0"): $*" >&2
}

# judge NAME STATUS LOG: ends with this run's status, 0 only if every summary of the guest says that nothing
# failed. A guest that starts again has a summary each time. Leaves the console in LOG/console, without
# carriage returns.
judge_guest() {
    name=$1 status=$2 console=$3/console
    tr -d '\r' <"$3/guest.log" >"$console"
    summaries=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$console" || true)
    summary=$(echo "$summaries" | tail -n 1)
    if [ "$status" != 0 ]; then
        say "$name: ENDED WITH STATUS $status (${summary:-no summary})"
        exit "$status"
    fi
    if [ -z "$summary" ] || echo "$summaries" | grep -qv ' 0 failed,'; then
        say "$name: ${summaries:-THE GUEST CAME TO NO SUMMARY}"
        exit 1
    fi
}

# judge_host_objects NAME LOG: fails unless each report of a machine's end says that the guest left nothing behind.
# Linux switches translation off when it powers off or restarts: what it used is gone from the host. Reports that
# somebody asked for meanwhile do not say what is left.
judge_host_objects() {
    if ! awk '
        /^interrupt controllers: / { clean = 0 }
        /^host objects: as at the start/ { clean = 1 }
        /^host objects left behind: none/ { ends++; bad += !clean }
        /^host objects LEFT BEHIND/ { bad++ }
        END { exit bad || !ends }' "$2/console"; then
        say "$1: HOST OBJECTS ARE LEFT (see $2/console)"
        exit 1
    fi
}
