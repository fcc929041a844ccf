# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Sourced by the scripts/nested that run twostage in a virtual machine, with the init of
# guest-images/nested-host.
# shellcheck shell=sh
# shellcheck disable=SC2034,SC2154 # variables of the scripts that source it
# shellcheck source-path=SCRIPTDIR
. "$root/scripts/lib/options.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
mkdir -p "$tree/job"
cp "$root/guest-images/nested-host/host-kernel.sh" "$tree/job/"
prepare=$tree/job/prepare
: >"$prepare"
environment=$work/environment
: >"$environment"
timeout=120 silence='' log='' memory=2G cpus=2 binary='' shell='' outputs=''

# quoted WORD: quoted for a shell.
quoted() {
    printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"
}

# on_start FUNCTION WORD...: the nested host's init calls this function of its own before it starts
# the program.
on_start() {
    line=$1
    shift
    for word in "$@"; do
        line="$line $(quoted "$word")"
    done
    echo "$line" >>"$prepare"
}

# add PATH: copies a file or directory to the same absolute path in the nested host.
add() {
    path=$(realpath "$1") || fail "no such file: $1"
    named=$(realpath -s "$1")
    mkdir -p "$tree$(dirname "$path")" "$tree$(dirname "$named")"
    cp -rL "$path" "$tree$(dirname "$path")/"
    [ "$named" = "$path" ] || [ -e "$tree$named" ] || cp -rL "$path" "$tree$named"
}

# add_program FILE: a program and the libraries that it is linked to.
add_program() {
    add "$1"
    for library in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do
        mkdir -p "$tree$(dirname "$library")"
        cp -L "$library" "$tree$library"
    done
}

# take_option: one of the options that both scripts have; fails for others.
take_option() {
    case $option in
        --shell) shell=1 ;;
        --timeout) timeout=$value ;;
        --silence) silence=$value ;;
        --log) log=$value ;;
        --memory) memory=$value ;;
        --cpus) cpus=$value ;;
        --binary) binary=$value ;;
        --file) add_program "$value" ;;
        --env) echo "export ${value%%=*}=$(quoted "${value#*=}")" >>"$environment" ;;
        --scratch) on_start scratch "${value%%=*}" "${value#*=}" ;;
        --tap) on_start tap "${value%%=*}" "${value#*=}" ;;
        --output)
            outputs="$outputs $(realpath -m "$value")"
            mkdir -p "$tree$(dirname "$(realpath -m "$value")")"
            ;;
        *) unknown_option ;;
    esac
}

# take_device_option: the same for machines with devices to assign: an NVMe controller, whose file is
# $nvme, and an edu. $bound lists them, $devices has words for QEMU.
take_device_option() {
    case $option in
        --unbound) bound='' ;;
        --nvme) nvme=$value ;;
        --device) devices="$devices -device $value" ;;
        --vfio) on_start vfio "$value" ;;
        *) take_option ;;
    esac
}

# add_devices: sets $devices to those of the machine, which are bound to vfio-pci, and to more.
add_devices() {
    devices="-device nvme,bus=pcie.0,addr=2,serial=twostage,drive=nvme
        -device edu,bus=pcie.0,addr=3,dma_mask=0xffffffffffffffff $devices"
    for function in $bound; do
        on_start vfio "$function"
    done
    if [ -z "$nvme" ]; then
        nvme=$work/nvme
        truncate -s 64M "$nvme"
    fi
}

# needs_command WORD...: fails without a command line, which only a shell does not need.
needs_command() {
    [ $# -gt 0 ] || [ -n "$shell" ] || fail "twostage's command line comes after --"
}

# add_peer PROGRAM PORT: starts the peer of the Linux guest's network checks in the nested host.
add_peer() {
    add_program "$1"
    on_start peer "$1" "$2"
}

# add_command WORD...: the program, its command line, and the files named there.
add_command() {
    [ -x "$binary" ] || fail "no $binary: build it, or name another with --binary"
    add_program "$binary"
    command=$(quoted "$(realpath "$binary")")
    for word in "$@"; do
        command="$command $(quoted "$word")"
        for piece in $(printf '%s\n' "$word" | tr '=,' '  '); do
            [ ! -f "$piece" ] || add "$piece"
        done
    done
    {
        echo '#!/bin/sh'
        [ -z "${RUST_LOG:-}" ] || echo "export RUST_LOG=$(quoted "$RUST_LOG")"
        cat "$environment"
        echo "exec $command"
    } >"$tree/job/run"
    chmod 755 "$tree/job/run"
    mkdir -p "$tree$PWD"
    terminal=
    if [ -t 0 ] && [ -t 1 ]; then
        terminal=1
    fi
    # Diagnostics before the time is over, except in an interactive shell.
    [ "$timeout" -lt 120 ] || [ -n "$shell" ] || on_start overdue $((timeout - 60))
    {
        echo "directory=$(quoted "$PWD")"
        echo "terminal=$terminal shell=$shell"
        echo "outputs=$(quoted "$outputs")"
    } >>"$prepare"
}

# make_log DIRECTORY PACKAGE...: makes the directory of this run's log, in DIRECTORY unless --log
# names another. `versions` in it lists QEMU, the contents of these files, and the command.
make_log() {
    log=${log:-$1/$(date +%Y%m%dT%H%M%S).$$}
    shift
    mkdir -p "$log"
    : >"$log/host.log"
    : >"$log/guest.log"
    {
        "$qemu" --version | head -n 1
        cat "$@"
        echo "command: $command"
    } >"$log/versions"
}

# end_when_silent: ends QEMU, and makes $work/silent, when the guest has printed nothing for
# $silence seconds. A nested host that hangs shows nothing else.
end_when_silent() {
    size='' since=$(date +%s)
    while sleep 5; do
        before=$size size=$(wc -c <"$log/guest.log")
        [ "$size" = "$before" ] || since=$(date +%s)
        if [ $(($(date +%s) - since)) -ge "$silence" ]; then
            : >"$work/silent"
            kill "$(cat "$work/qemu.pid")"
            return
        fi
    done
}

# pack_nested ARCHIVE...: makes $work/initramfs of the archives and of what has been added.
pack_nested() {
    "$root/guest-images/pack-initramfs" "$tree" "$work/run.cpio"
    cat "$@" "$work/run.cpio" >"$work/initramfs"
    rm "$work/run.cpio"
}

# run_nested QEMU WORD...: boots with $work/initramfs, and exits with the program's status.
run_nested() {
    status=0 watcher=''
    if [ -n "$silence" ]; then
        end_when_silent >/dev/null 2>&1 </dev/null &
        watcher=$!
    fi
    timeout --foreground -k 5 "$timeout" "$@" -nodefaults -display none -no-reboot -smp "$cpus" -m "$memory" \
        -pidfile "$work/qemu.pid" \
        -chardev "file,id=host,path=$log/host.log" \
        -chardev "stdio,id=guest,signal=off,logfile=$log/guest.log" \
        -chardev "file,id=output,path=$work/output.tar" \
        -initrd "$work/initramfs" || status=$?
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true

    if [ -n "$outputs" ] && ! tar -xf "$work/output.tar" -C /; then
        echo "nested: cannot unpack the output files" >&2
    fi

    ended=$(sed -n 's/^nested: .*: exit status \([0-9]*\).*/\1/p' "$log/host.log")
    if [ -z "$ended" ]; then
        if [ -e "$work/silent" ]; then
            echo "nested: NO OUTPUT for $silence s" >&2
            status=124
        elif [ "$status" = 124 ]; then
            echo "nested: NOT ENDED within $timeout s" >&2
        else
            echo "nested: THE NESTED HOST DIED (QEMU's status $status)" >&2
            status=125
        fi
        echo "nested: the last lines of $log/host.log and guest.log:" >&2
        tail -n 5 "$log/host.log" "$log/guest.log" >&2
        exit "$status"
    fi
    echo "nested: consoles in $log" >&2
    exit "$ended"
}
