# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by the scripts that fetch from Debian: packages of suites that the system does not use,
# unpacked into the user's cache. The system's packages and apt lists are not touched. The mirror is
# the system's; Debian's archive keyring verifies the indexes, the indexes verify the packages.
# shellcheck shell=sh

cache=${XDG_CACHE_HOME:-$HOME/.cache}/twostage
private_apt_state=$cache/apt
debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# The architectures of the packages: the first is the default, `PACKAGE:ARCHITECTURE` names
# another's.
private_apt_architectures=amd64

# print_cached PATH TEST...: prints the path and exits if the test, a command, succeeds. Otherwise
# takes the lock and tests again, as a parallel run may have fetched it meanwhile.
print_cached() {
    cached=$1
    shift
    for lock in : lock_private_apt; do
        $lock
        if "$@"; then
            echo "$cached"
            exit 0
        fi
    done
}

# print_compiled DIRECTORY: prints the directory of a kernel and exits if it has been compiled.
# Otherwise takes the lock, as a parallel run may be compiling it, and looks again.
print_compiled() {
    for lock in : lock_compiling; do
        $lock
        if [ -e "$1/release" ]; then
            echo "$1"
            exit 0
        fi
    done
}

lock_compiling() {
    mkdir -p "$cache"
    exec 8>"$cache/build-kernel.lock"
    flock 8
}

# The system's Debian release, such as trixie.
debian_release() {
    # shellcheck disable=SC1091 # a file of every Debian
    (. /etc/os-release && echo "$VERSION_CODENAME")
}

# The address of the system's Debian mirror.
debian_mirror() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | grep -m 1 'debian/\?$'
}

# Parallel runs share the state: waits for the lock and holds it until this process exits.
lock_private_apt() {
    mkdir -p "$cache"
    exec 9>"$cache/apt.lock"
    flock 9
}

# persistently COMMAND ARGUMENT...: tries three times, as the network fails and mirrors change.
persistently() {
    for pause in 5 30; do
        "$@" && return
        echo "failed, retrying in $pause s: $*" >&2
        sleep "$pause"
    done
    "$@"
}

# private_apt COMMAND ARGUMENT...: apt-get or apt-cache with the sources of `private_apt_open`.
private_apt() {
    command=$1
    shift
    "$command" -qq -o Dir::Etc::sourcelist=/dev/null \
        -o Dir::Etc::sourceparts="$private_apt_state/sources.list.d" \
        -o Dir::State::lists="$private_apt_state/lists" -o Dir::Cache="$private_apt_state/cache" \
        -o APT::Architectures="$private_apt_architectures" -o APT::Sandbox::User="$(id -un)" \
        -o Acquire::Languages=none "$@"
}

# private_apt_open SUITE...: fetches the indexes of these suites only.
private_apt_open() {
    private_apt_close
    mkdir -p "$private_apt_state/sources.list.d" "$private_apt_state/lists/partial" \
        "$private_apt_state/cache/archives/partial"
    mirror=$(debian_mirror) || {
        echo "error: the system's apt sources name no Debian mirror" >&2
        return 1
    }
    for private_apt_suite in "$@"; do
        echo "deb [arch=$private_apt_architectures signed-by=$debian_keyring] $mirror $private_apt_suite main"
    done >"$private_apt_state/sources.list.d/suites.list"
    persistently private_apt apt-get -o APT::Update::Error-Mode=any update >&2
}

# Removes indexes and archives.
private_apt_close() {
    rm -rf "$private_apt_state"
}

# download_packages PACKAGE...: into the current directory.
download_packages() {
    persistently private_apt apt-get download "$@" >&2
}

# unpack_with_dependencies DIRECTORY WORD...: unpacks what `apt-get install WORD...` would install,
# which excludes what the system has.
unpack_with_dependencies() {
    unpacked_into=$1
    shift
    persistently private_apt apt-get install -y --no-install-recommends --download-only \
        -o Debug::NoLocking=1 "$@" >&2
    mkdir -p "$unpacked_into"
    for archive in "$private_apt_state/cache/archives"/*.deb; do
        dpkg-deb -x "$archive" "$unpacked_into"
    done
}

# unpack_with_libraries DIRECTORY WORD...: the same as if nothing were installed: all dependencies
# down to the C library. `print_with_libraries` starts such programs.
unpack_with_libraries() {
    : >"$private_apt_state/nothing-installed"
    unpack_into=$1
    shift
    unpack_with_dependencies "$unpack_into" -o Dir::State::status="$private_apt_state/nothing-installed" "$@"
}

# print_with_libraries DIRECTORY PROGRAM [WORD...]: prints a script that starts a program unpacked
# there. It is for bash, as dash drops variables such as Cargo's CARGO_BIN_EXE_a-b from the
# environment.
print_with_libraries() {
    libraries=$1/usr/lib/x86_64-linux-gnu
    program_there=$1/$2
    shift 2
    echo '#!/bin/bash'
    echo "exec $libraries/ld-linux-x86-64.so.2 --library-path $libraries $program_there $* \"\$@\""
}

# package_versions ARCHIVE...: prints a line with name and version of each.
package_versions() {
    for archive in "$@"; do
        dpkg-deb -f "$archive" Package Version | sed 's/^[A-Za-z]*: //' | paste -sd ' '
    done
}

# newest_package PATTERN: prints the highest-versioned package name that matches this extended
# regular expression, if any.
newest_package() {
    private_apt apt-cache pkgnames | grep -xE "$1" | sort -V | tail -n 1
}

# find_package PATTERN SUITE...: opens the first suite with a package that matches the pattern, and
# sets $package_found and $package_suite.
find_package() {
    find_pattern=$1
    shift
    for package_suite in "$@"; do
        private_apt_open "$package_suite"
        package_found=$(newest_package "$find_pattern")
        [ -z "$package_found" ] || return 0
    done
    echo "error: no package $find_pattern for $private_apt_architectures in: $*" >&2
    return 1
}

# can_change_root: whether in_root can work for this user; says why not.
can_change_root() {
    user=--map-root-user
    [ "$(id -u)" != 0 ] || user=
    # shellcheck disable=SC2086 # one word or none
    unshare $user --mount true 2>/dev/null || {
        echo "error: 'unshare $user --mount' fails: this user may make no namespaces, which compiling for another" \
            "Debian needs: run it as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone," \
            "kernel.apparmor_restrict_unprivileged_userns)" >&2
        return 1
    }
}

# in_root DIRECTORY COMMAND...: runs a command of the Debian unpacked there, with DIRECTORY as the
# root directory, and with this system's devices and processes.
in_root() {
    user=--map-root-user
    [ "$(id -u)" != 0 ] || user=
    # shellcheck disable=SC2016,SC2086 # for the other shell; one word or none
    unshare $user --mount sh -c 'mount --rbind /dev "$1/dev" && mount --rbind /proc "$1/proc" &&
        exec chroot "$@"' sh "$@"
}
