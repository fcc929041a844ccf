# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Prints the tables of scripts/bench/compare-with-qemu: medians over rounds, and sums of counters.
# Reads the lines of guest-images/nested-host/compare with medians.awk; counters are named
# MOMENT.SOURCE.KIND. Figures that `plan ROUNDS MODE...` announced and that are missing are listed at
# the end.

function count(vmm, mode, name, value) {
    split(name, part, ".")
    counted[mode] = counted[vmm, mode, part[1]] = 1
    when = vmm " " mode " " part[1] " "
    what = part[2]; kind = part[3]
    if (what == "kvm_exit") sums[when "exits"] += value
    else if (what == "kvm_userspace_exit") {
        sums[when "user"] += value
        sums[when (kind == 2 ? "ports" : kind == 6 ? "mmio" : "others")] += value
    } else if (what == "kvm_apic_accept_irq") {
        # The local timer of Linux has vector 0xec.
        sums[when (kind == 236 ? "timer" : "interrupts")] += value
    } else if (what == "descriptors" && kind == "all") sums[when "descriptors"] += value
    else if (what == "descriptors" && kind == "wait") sums[when "waits"] += value
    else if (what == "virtual-IOMMU" && kind ~ /^(context_cache|iotlb|device_tlb|interrupt_entry_cache|wait|pasid_iotlb|pasid_cache|pasid_device_tlb|page_group_response)$/) {
        sums[when "descriptors"] += value
        if (kind == "wait") sums[when "waits"] += value
    } else if (what == "host-calls") {
        sums[when "calls"] += value
        if (kind == "HWPT_INVALIDATE") sums[when "flushes"] += value
    }
}

function number(key) { return grouped(sums[key]) }

function counters(label, mode, name, ours) {
    printf "| %s | %s | %s | %s | %s |\n", label, number("twostage " mode " boot " name),
        ours ? "" : number("qemu " mode " boot " name), number("twostage " mode " write-4k " name),
        ours ? "" : number("qemu " mode " write-4k " name)
}

# What one unmap of the writes costs with a side core, without, and in QEMU.
function per_unmap(label, what,    i, n, column, key, line) {
    n = split("twostage side,twostage strict,qemu strict", column, ",")
    line = "| " label
    for (i = 1; i <= n; i++) {
        key = column[i] " write-4k "
        line = line " | " (sums[key "waits"] ? sprintf("%.2f", sums[key what] / sums[key "waits"]) : "")
    }
    print line " |"
}

# Lists the missing figures of each mode.
function lacking(    p, v, vmm, mode, n, names, i, got, text, any) {
    n = split("boot-s own-kib resident-kib write-4k read-4k write-1m read-1m", names, " ")
    for (p = 1; p <= plans; p++) for (v = 1; v <= 2; v++) {
        vmm = v == 1 ? "twostage" : "qemu"
        mode = plan[p]; text = ""
        if (vmm == "qemu" && mode ~ /side$/) continue
        if (sub(/^count-/, "", mode)) {
            if (!((vmm, mode, "boot") in counted)) text = " counters of the boot"
            if (!((vmm, mode, "write-4k") in counted)) text = text (text ? "," : "") " counters of the writes"
        } else {
            for (i = 1; i <= n; i++) {
                got = runs[vmm " " mode " " names[i]] + 0
                if (got < planned) text = text (text ? ", " : " ") names[i] " (" got " of " planned ")"
            }
            if (mode == "strict" || mode == "side") {
                got = runs[vmm " " mode " invalidation-us"] + 0
                if (got < planned) text = text (text ? ", " : " ") "invalidation-us (" got " of " planned ")"
            }
        }
        if (!text) continue
        if (!any++) print ""
        print "LACKING of " vmm ", " mode ":" text
    }
    if (!plans && !NR) print "LACKING: everything, as nothing was run"
}

# A row for each mode that was planned; the last has no figure of QEMU's but that of strict.
function rows(label, name, unit, scale, digits, less,    m) {
    for (m = 1; m <= 4; m++) if (modes[m] in planned_modes)
        row(label ", " titles[m], modes[m], name, unit, scale, digits, less, m == 4 ? "strict" : "")
}

function tables() {
    print "| medians | twostage | QEMU | factor |"
    print "|---|---|---|---|"
    rows("boot to init", "boot-s", " s", 1, 2, 1)
    rows("resident memory without the guest's", "own-kib", " MiB", 1024, 1, 1)
    rows("resident memory with the guest's", "resident-kib", " MiB", 1024, 1, 1)
    rows("4 KiB writes", "write-4k", "/s", 1, 0, 0)
    rows("4 KiB reads", "read-4k", "/s", 1, 0, 0)
    rows("1 MiB writes", "write-1m", " MiB/s", 1, 0, 0)
    rows("1 MiB reads", "read-1m", " MiB/s", 1, 0, 0)
    row("one strict unmap", "strict", "invalidation-us", " µs", 1, 1, 1)
    if ("side" in planned_modes)
        row("one strict unmap, a side core", "side", "invalidation-us", " µs", 1, 1, 1, "strict")
    row("unmaps of a 4 KiB write", "strict", "invalidations-per-write", "", 1, 0, 1)
}

END {
    split("off,lazy,strict,side", modes, ",")
    split("off,lazy,strict,strict and a side core", titles, ",")
    for (m = 1; m <= plans; m++) planned_modes[plan[m]]
    if (measured) tables()
    for (m = 2; m <= 4; m++) {
        mode = modes[m]
        if (!counted[mode]) continue
        printf "\n| counters, %s | boot: twostage | QEMU | 10,000 writes of 4 KiB: twostage | QEMU |\n", titles[m]
        print "|---|---|---|---|---|"
        # QEMU has none with a side core.
        ours = m == 4
        counters("VM exits", mode, "exits", ours)
        counters("... to user space", mode, "user", ours)
        counters("... for port I/O", mode, "ports", ours)
        counters("... for MMIO", mode, "mmio", ours)
        counters("invalidation descriptors", mode, "descriptors", ours)
        counters("... waits", mode, "waits", ours)
        counters("host calls", mode, "calls", 1)
        counters("... HWPT_INVALIDATE", mode, "flushes", 1)
        counters("interrupts, without the timer", mode, "interrupts", ours)
        counters("timer interrupts", mode, "timer", ours)
    }
    if (counted["side"]) {
        print "\n| exits for each strict unmap of a write | twostage, a side core | twostage | QEMU |"
        print "|---|---|---|---|"
        per_unmap("all, with those of the write itself", "exits")
        per_unmap("... to user space", "user")
        per_unmap("... for MMIO", "mmio")
    }
    lacking()
}
