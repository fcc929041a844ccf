# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by scripts that take options. Their help is the comment at the start of the script.
# shellcheck shell=sh
# shellcheck disable=SC2034 # variables of the scripts that source it

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 64
}

usage() {
    sed -n '3,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit 0
}

# next_option FLAGS WORD...: parses the first word as an option. FLAGS are the options without a
# value. Sets $option, $value and $taken, the number of words to shift. Fails at `--` and when no
# word is left:
#
#   while next_option '--flag' "$@"; do
#       case $option in ... *) unknown_option ;; esac
#       shift "$taken"
#   done
#   [ "${1:-}" != -- ] || shift
next_option() {
    case ${2:---} in
        --) return 1 ;;
        --help | -h) usage ;;
    esac
    option=$2 value='' taken=1
    case " $1 " in
        *" $option "*) return ;;
    esac
    [ $# -gt 2 ] || fail "$option needs a value (see --help)"
    value=$3 taken=2
}

unknown_option() {
    fail "unknown option $option (see --help)"
}
