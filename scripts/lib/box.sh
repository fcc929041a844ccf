# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by scripts that may skip something.
# shellcheck shell=sh

# box LINE...: prints lines that must not be overlooked.
box() {
    stars="**********************************************************************"
    echo "$stars"
    printf '** %s\n' "$@"
    echo "$stars"
} >&2
