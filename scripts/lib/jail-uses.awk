# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Reads what `strace -f --decode-pids=comm -e raw=ioctl` prints of twostage, and of what started it.
# Prints, once each, which kind of thread made which system call under its filter: KIND, a tab, the
# name; for an ioctl its request.
#
# A thread has the filter of the one that started it until it has installed its own. The first one
# there is only says how threads are started (no_processes).

function kind_of(comm) {
    if (comm ~ /^vcpu[0-9]+$/) return "vCPU"
    if (comm == "edu-dma" || comm ~ /-wor[ker]*$/) return "device"
    if (comm == "disk") return "disk"
    if (comm == "output") return "output"
    if (comm == "side-core") return "side core"
    if (comm == "signals") return "signals"
    if (comm == "smmu-events" || comm == "page-requests") return "events"
    if (comm ~ /^queue /) return "queue"
    if (comm == "twostage" || comm == "release") return "main"
    return "?" comm
}

# The thread `child` was started by `parent`.
function started(parent, child,    n, lines, i) {
    filters[child] = filters[parent]
    kind[child] = kind[parent]
    known[child] = 1
    n = split(early[child], lines, "\n")
    delete early[child]
    for (i = 1; i < n; i++)
        look(lines[i])
}

function look(line,    tid, comm, call, at) {
    at = index(line, "> ")
    tid = line + 0
    comm = substr(line, index(line, "<") + 1, at - index(line, "<") - 1)
    call = substr(line, at + 2)
    if (call ~ /^\+\+\+/) {
        delete known[tid]
        delete filters[tid]
        delete kind[tid]
        return
    }
    # The first of all has no starter.
    if (!known[tid] && first)
        known[first = tid] = 1
    if (!known[tid]) {
        early[tid] = early[tid] line "\n"
        return
    }
    made(tid, comm, call)
}

function made(tid, comm, call,    name, resumed) {
    resumed = call ~ /^<\.\.\. /
    name = call
    sub(/^<\.\.\. /, "", name)
    sub(/[( ].*/, "", name)
    # A thread was killed before strace could read which call it is in.
    if (name == "???")
        return
    if (!resumed && filters[tid] >= 2 && name != "") {
        if (name == "ioctl") {
            split(call, words, /[(,] */)
            name = words[3]
        }
        if (!seen[kind[tid], name]++)
            print kind[tid] "\t" name
    }
    if (call ~ /<unfinished \.\.\.>$/)
        return
    # SECCOMP_SET_MODE_FILTER, with an argument.
    if (name == "seccomp" && call ~ / = 0$/) {
        if (filters[tid] >= 2 || ++filters[tid] == 2)
            kind[tid] = kind_of(comm)
    }
    if (name ~ /^(clone3?|fork|vfork)$/ && match(call, / = [1-9][0-9]*/))
        started(tid, substr(call, RSTART + 3, RLENGTH - 3) + 0)
}

BEGIN { first = 1 }
/^[0-9]+<[^>]*> / { look($0) }
