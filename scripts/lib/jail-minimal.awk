# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# For scripts/check/jail-minimal: reads the reasons, what was seen in each run (RUN.uses), and
# docs/security.md, and prints the latter with the last column of its table made anew. Tells on
# standard error what is allowed without being seen, and the other way round.

function wrong(text) {
    print "jail-minimal: error: " text >"/dev/stderr"
    status = 1
}

# A kind's filter allows what those need that it starts.
function starts(kind, other) {
    return kind == "main" && other !~ /^(main|restart)$/ || kind == "vCPU" && (other == "device" || other == "disk") ||
        kind == "device" && other == "disk"
}

BEGIN { FS = "\t" }

FILENAME ~ /reasons$/ {
    reason[$1, $2] = $3
    next
}

FILENAME ~ /\.uses$/ {
    if (FNR == 1) {
        run = FILENAME
        sub(/.*\//, "", run)
        sub(/\.uses$/, "", run)
        runs[++many] = run
    }
    seen[$1, $2, run] = 1
    made[$1, $2] = 1
    next
}

!match($0, /^\| [^|]* \| `[A-Za-z_0-9]*`/) {
    print
    next
}

{
    split($0, cells, / \| /)
    threads = substr(cells[1], 3)
    name = cells[2]
    gsub(/`/, "", name)
    key = name
    sub(/.* /, "", key)
    count = split(threads, kinds, ", ")
    where = ""
    if (threads == "any") {
        for (pair in made) {
            split(pair, parts, SUBSEP)
            if (parts[2] == key)
                where = where runs_of(parts[1], key)
            allowed[parts[1], key] = 1
        }
        text = listed(where)
        if (text == "")
            text = excuse("any", name)
    } else {
        text = ""
        for (i = 1; i <= count; i++) {
            kind = kinds[i] == "restart" ? "main" : kinds[i]
            allowed[kind, key] = 1
            where = where runs_of(kind, key)
            needless = !made[kind, key]
            for (j = 1; j <= count; j++)
                if (starts(kind, kinds[j]))
                    needless = 0
            if (needless) {
                why = excuse(kinds[i], name)
                text = text (text == "" ? "" : "; ") (count > 1 ? kinds[i] ": " : "") why
            }
        }
        found = listed(where)
        text = found (found != "" && text != "" ? "; " : "") text
    }
    printf "%s | %s | %s | %s |\n", cells[1], cells[2], cells[3], text
}

# The runs in which that kind of thread makes the call.
function runs_of(kind, key,    n, text) {
    for (n = 1; n <= many; n++)
        if ((kind, key, runs[n]) in seen)
            text = text " " runs[n]
    return text
}

# Each of them once, and few of them.
function listed(where,    n, text, count) {
    for (n = 1; n <= many; n++)
        if (index(where " ", " " runs[n] " ")) {
            if (++count <= 3)
                text = text (text == "" ? "" : ", ") "`" runs[n] "`"
        }
    if (count == many)
        return "every run"
    return text (count > 3 ? " and others" : "")
}

function excuse(kind, name,    call) {
    call = name
    sub(/ .*/, "", call)
    excused[kind, call] = 1
    if ((kind, call) in reason)
        return "no run: " reason[kind, call]
    wrong(kind ": " name " is allowed, and no run makes it")
    return "-"
}

END {
    for (pair in made) {
        split(pair, parts, SUBSEP)
        if (!(pair in allowed))
            wrong(parts[1] ": " parts[2] " is made, and not allowed")
    }
    for (pair in reason)
        if (!(pair in excused) && reason[pair] !~ /^(when|where) /) {
            split(pair, parts, SUBSEP)
            print "jail-minimal: a run makes " parts[2] " on " parts[1] ": it needs no reason" >"/dev/stderr"
        }
    exit status
}
