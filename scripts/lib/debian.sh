# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by the scripts that fetch from Debian: packages of suites that the system does not use,
# unpacked into the user's cache. The system's packages and apt lists stay as they are. The mirror is
# the one the system uses; Debian's archive keyring verifies its indexes, the indexes the packages.
# shellcheck shell=sh

cache=${XDG_CACHE_HOME:-$HOME/.cache}/twostage
private_apt_state=$cache/apt
# What packages there are: the first is the machine's own, `PACKAGE:ARCHITECTURE` names another's.
private_apt_architectures=amd64

# The address of the system's Debian mirror.
debian_mirror() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | grep -m 1 'debian/\?$'
}

# Parallel runs share the state: waits until no other has it, and keeps it until this process ends.
lock_private_apt() {
    mkdir -p "$cache"
    exec 9>"$cache/apt.lock"
    flock 9
}

# persistently COMMAND ARGUMENT...: tries three times what a network or a mirror in motion can spoil.
persistently() {
    for pause in 5 30; do
        "$@" && return
        echo "failed; again in $pause s: $*" >&2
        sleep "$pause"
    done
    "$@"
}

# private_apt COMMAND ARGUMENTS...: apt-get or apt-cache with the sources of `private_apt_open`.
private_apt() {
    command=$1
    shift
    "$command" -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$private_apt_state/sources.list.d" \
        -o Dir::State::lists="$private_apt_state/lists" -o Dir::Cache="$private_apt_state/cache" \
        -o APT::Architectures="$private_apt_architectures" -o APT::Sandbox::User="$(id -un)" \
        -o Acquire::Languages=none "$@"
}

# private_apt_open SUITE...: reads the indexes of these suites, and of no other.
private_apt_open() {
    private_apt_close
    mkdir -p "$private_apt_state/sources.list.d" "$private_apt_state/lists/partial" \
        "$private_apt_state/cache/archives/partial"
    mirror=$(debian_mirror) || {
        echo "error: the system's apt sources name no Debian mirror" >&2
        return 1
    }
    for private_apt_suite in "$@"; do
        echo "deb [arch=$private_apt_architectures signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $private_apt_suite main"
    done >"$private_apt_state/sources.list.d/suites.list"
    persistently private_apt apt-get -o APT::Update::Error-Mode=any update >&2
}

# Forgets indexes and archives.
private_apt_close() {
    rm -rf "$private_apt_state"
}

# download_packages PACKAGE...: into the current directory.
download_packages() {
    persistently private_apt apt-get download "$@" >&2
}

# unpack_with_dependencies DIRECTORY WORD...: the packages that `apt-get install WORD...` would install.
# Those that the system has are not among them.
unpack_with_dependencies() {
    unpacked_into=$1
    shift
    persistently private_apt apt-get install -y --no-install-recommends --download-only -o Debug::NoLocking=1 "$@" >&2
    mkdir -p "$unpacked_into"
    for archive in "$private_apt_state/cache/archives"/*.deb; do
        dpkg-deb -x "$archive" "$unpacked_into"
    done
}

# unpack_with_libraries DIRECTORY WORD...: the same as though the system had nothing: down to the C library, with
# which `print_with_libraries` starts them.
unpack_with_libraries() {
    : >"$private_apt_state/nothing-installed"
    unpack_into=$1
    shift
    unpack_with_dependencies "$unpack_into" -o Dir::State::status="$private_apt_state/nothing-installed" "$@"
}

# print_with_libraries DIRECTORY PROGRAM [WORD...]: a script that starts a program which has been unpacked there.
# For bash: Cargo's CARGO_BIN_EXE_a-b reach a compiler through it alone, as dash forgets variables of such names.
print_with_libraries() {
    libraries=$1/usr/lib/x86_64-linux-gnu
    program_there=$1/$2
    shift 2
    echo '#!/bin/bash'
    echo "exec $libraries/ld-linux-x86-64.so.2 --library-path $libraries $program_there $* \"\$@\""
}

# package_versions ARCHIVE...: name and version of each, a line each.
package_versions() {
    for archive in "$@"; do
        dpkg-deb -f "$archive" Package Version | sed 's/^[A-Za-z]*: //' | paste -sd ' '
    done
}

# newest_package PATTERN: the package of the highest version whose name matches this extended regular
# expression, or nothing.
newest_package() {
    private_apt apt-cache pkgnames | grep -xE "$1" | sort -V | tail -n 1
}
