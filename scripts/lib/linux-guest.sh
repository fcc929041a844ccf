# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by scripts/linux-guest and scripts/linux-guest-arm64: their common options, and how a run
# is judged.
# shellcheck shell=sh
# shellcheck disable=SC2034,SC2154 # variables of the scripts that source it
# shellcheck source-path=SCRIPTDIR
. "$root/scripts/lib/options.sh"

kernel=7.2-cloud cpus=1 memory=256M timeout=120 log='' extra=''
# Seconds without output after which a nested host hangs. A check takes 40 s on an idle machine.
silence=300

# take_guest_option: one of the options that both scripts have; fails for others.
take_guest_option() {
    case $option in
        --kernel) kernel=$value ;;
        --cpus) cpus=$value ;;
        --memory) memory=$value ;;
        --iommu) iommu=$value ;;
        --timeout) timeout=$value ;;
        --log) log=$value ;;
        --extra) extra="$extra $value" ;;
        *) unknown_option ;;
    esac
}

# make_guest WORD...: builds the guest's initramfs; words for make.
make_guest() {
    make --quiet --no-print-directory -C "$root/guest-images/linux" KERNELS="$kernel" "$@" all >&2
}

# default_log DIRECTORY: sets $log unless --log did.
default_log() {
    log=${log:-$1/linux-$kernel-$(date +%Y%m%dT%H%M%S).$$}
}

say() {
    echo "$(basename "$0"): $kernel: $*" >&2
}

# judge STATUS OBJECTS: exits with this status if it is not 0, and with 1 unless every summary of
# the guest says that nothing failed; a guest that reboots prints a summary each time. OBJECTS is
# `objects` if the reports must also say that no host object was left behind, by the guest or at the
# end; `end` if only at the end. Writes LOG/console, the console without carriage returns.
judge() {
    console=$log/console
    tr -d '\r' <"$log/guest.log" >"$console"
    summaries=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$console" || true)
    summary=$(echo "$summaries" | tail -n 1)
    if [ "$1" != 0 ]; then
        say "EXIT STATUS $1 (${summary:-no summary})"
        exit "$1"
    fi
    if [ -z "$summary" ] || echo "$summaries" | grep -qv ' 0 failed,'; then
        say "${summaries:-THE GUEST PRINTED NO SUMMARY}"
        exit 1
    fi
    if [ -n "$2" ] && ! no_objects_left "$2"; then
        say "HOST OBJECTS LEFT BEHIND (see $console)"
        exit 1
    fi
    say "$summary"
}

# no_objects_left OBJECTS: every report at the end of a machine says that nothing was left behind, with
# `objects` also by the guest.
# Linux disables translation when it powers off or restarts, so that what it used is gone from the
# host. Reports that were requested in between (SIGUSR1) do not say what is left.
no_objects_left() {
    awk -v objects="$1" '
        /^interrupt controllers: / { clean = objects == "end" }
        /^host objects: as at the start/ { clean = 1 }
        /^host objects left behind: none/ { ends++; bad += !clean }
        /^host objects LEFT BEHIND/ { bad++ }
        END { exit bad || !ends }' "$console"
}
