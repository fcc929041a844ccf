# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# For the tables of scripts/bench/compare-with-qemu: reads what guest-images/nested-host/compare
# prints, `plan ROUNDS MODE...` and `figure VMM MODE NAME VALUE`, hands counters, which have a dot in
# their names, to the function `count` of the other program, and keeps the rest for rows of medians.

$1 == "plan" { planned = $2; for (i = 3; i <= NF; i++) plan[++plans] = $i }
$1 != "figure" { next }
$4 ~ /\./ { count($2, $3, $4, $5); next }
{ key = $2 " " $3 " " $4; values[key, ++runs[key]] = $5; measured = 1 }

function median(key,    n, i, j, swap, sorted) {
    n = runs[key]
    if (!n) return ""
    for (i = 1; i <= n; i++) sorted[i] = values[key, i] + 0
    for (i = 1; i < n; i++) for (j = i + 1; j <= n; j++)
        if (sorted[j] < sorted[i]) { swap = sorted[i]; sorted[i] = sorted[j]; sorted[j] = swap }
    return n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
}

# A row; the ratio says how much better twostage is (`less`: a smaller value is better). With `other`,
# QEMU's figure is that of another mode.
function row(label, mode, name, unit, scale, digits, less, other,    ours, theirs, ratio) {
    ours = median("twostage " mode " " name); theirs = median("qemu " (other ? other : mode) " " name)
    if (ours == "" || theirs == "" || !ours || !theirs) {
        printf "| %s | %s | %s | |\n", label, shown(ours, unit, scale, digits), shown(theirs, unit, scale, digits)
        return
    }
    ratio = less ? theirs / ours : ours / theirs
    printf "| %s | %s | %s | %.2f |\n", label, shown(ours, unit, scale, digits), shown(theirs, unit, scale, digits), ratio
}

function shown(value, unit, scale, digits) {
    return value == "" ? "no figure" : sprintf("%.*f%s", digits, value / scale, unit)
}

function grouped(value,    text, digits) {
    digits = sprintf("%d", value)
    text = ""
    while (length(digits) > 3) {
        text = "," substr(digits, length(digits) - 2) text
        digits = substr(digits, 1, length(digits) - 3)
    }
    return digits text
}
