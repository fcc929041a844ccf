# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by the scripts that leave something out.
# shellcheck shell=sh

# box LINE...: what nobody should overlook.
box() {
    stars="**********************************************************************"
    echo "$stars"
    printf '** %s\n' "$@"
    echo "$stars"
} >&2
