# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What a host's kernel has to say of a program that ran in it. Sourced there by programs of these
# folders: scripts/lib/nested.sh copies it to /job.
# shellcheck shell=sh

# troubles: prints the lines of the kernel's log since the last call that report trouble, except
# those that match $expected. Fails if there are none.
troubles() {
    dmesg -c | grep -E 'WARNING:|BUG:|Oops|refcount|leak|hung|blocked until|vfio.*(fail|error)|DMAR: .*([Ff]ault|[Ee]rror|timed out)|AMD-Vi: .*(Event logged|[Ee]rror|timeout)|arm-smmu-v3 .*(error|timeout|event|overflow)' |
        grep -vE "$expected"
}

# pinned: prints the number of pages that are pinned for DMA.
pinned() {
    # Each processor keeps its own count for a while; this adds them up.
    echo 1 >/proc/sys/vm/stat_refresh
    awk '$1 == "nr_foll_pin_acquired" { pins += $2 } $1 == "nr_foll_pin_released" { pins -= $2 } END { print pins }' \
        /proc/vmstat
}
