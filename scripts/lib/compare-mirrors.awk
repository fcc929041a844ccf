# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Prints the tables of scripts/bench/compare-with-qemu --mirrors. Reads the lines of
# guest-images/nested-host/compare with medians.awk: times in microseconds, the number of `calls-SIZE`
# that a counter SIZE.SOURCE.KIND is of, and counters: ioctls of the host by their numbers, exits to
# user space, the time until the VMM has KVM run the vCPU again (vmm), and that in ioctls; exits by
# their reasons, of which 6 is MMIO.

function count(vmm, mode, name, value) {
    split(name, part, ".")
    # The console is ports.
    if (part[2] == "kvm_userspace_exit" || part[2] ~ /^vmm/) {
        if (part[3] != 6) return
        what = part[2] == "kvm_userspace_exit" ? "exits" : part[2]
    } else if (part[3] == 15235 || part[3] == 15237 || part[3] == 15247) what = "maps"
    else if (part[3] == 15238) what = "unmaps"
    else what = part[2]
    sums[vmm " " part[1] " " what (part[2] == "ioctl-us" ? "-us" : "")] += value
    counted[vmm " " part[1]]++
}

# How many a map and its unmap take. Of what is not there, there were none.
function each(vmm, size, what,    calls) {
    calls = median(vmm " mirrors calls-" size)
    return counted[vmm " " size] && calls ? sums[vmm " " size " " what] / calls : ""
}

# The time outside the host's ioctls that map and unmap.
function own(vmm, size) {
    return counted[vmm " " size] ? each(vmm, size, "vmm-us") - each(vmm, size, "maps-us") - each(vmm, size, "unmaps-us") : ""
}

function counters(label, size, what, digits,    ours, theirs) {
    compared(label, each("twostage", size, what), each("qemu", size, what), digits)
}

function compared(label, ours, theirs, digits,    factor) {
    factor = ours && theirs ? sprintf("%.2f", theirs / ours) : ""
    printf "| %s | %s | %s | %s |\n", label, shown(ours, "", 1, digits), shown(theirs, "", 1, digits), factor
}

# What is missing.
function lacking(    v, vmm, s, what) {
    for (v = 1; v <= 2; v++) for (s = 1; s <= sizes; s++) {
        vmm = v == 1 ? "twostage" : "qemu"
        what = ""
        if (runs[vmm " mirrors map-" size[s]] < planned) what = " times"
        if (!((vmm " " size[s] " maps") in sums)) what = what " counters"
        if (what) print "LACKING of " vmm ", " label[s] ":" what
    }
}

END {
    sizes = split("4k 4k-many 2m 2m-many 1g 1g-many 1g-scattered 1g-scattered-many", size, " ")
    many = grouped(median("twostage mirrors calls-others"))
    for (s = 1; s <= sizes; s++) {
        label[s] = size[s]
        sub(/^4k/, "4 KiB", label[s]); sub(/^2m/, "2 MiB", label[s]); sub(/^1g/, "1 GiB", label[s])
        sub(/-scattered/, ", scattered", label[s]); sub(/-many/, ", beside " many " others", label[s])
    }
    print "| medians | twostage | QEMU | factor |"
    print "|---|---|---|---|"
    row("boot to init", "mirrors", "boot-s", " s", 1, 2, 1)
    for (s = 1; s <= sizes; s++) row("map of " label[s], "mirrors", "map-" size[s], " ms", 1000, 2, 1)
    for (s = 1; s <= sizes; s++) row("unmap of " label[s], "mirrors", "unmap-" size[s], " ms", 1000, 2, 1)
    print "\n| a map and its unmap | twostage | QEMU | factor |"
    print "|---|---|---|---|"
    for (s = 1; s <= sizes; s++) {
        counters(label[s] ": IOAS_MAP or IOAS_COPY", size[s], "maps", 1)
        counters("... IOAS_UNMAP", size[s], "unmaps", 1)
        counters("... exits to user space for MMIO", size[s], "exits", 1)
        counters("... in the host's IOAS_MAP or IOAS_COPY, µs", size[s], "maps-us", 0)
        counters("... in its IOAS_UNMAP, µs", size[s], "unmaps-us", 0)
        compared("... in the VMM besides, of these exits, µs", own("twostage", size[s]), own("qemu", size[s]), 0)
    }
    lacking()
}
