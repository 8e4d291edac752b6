#!/usr/bin/env bash
# Shows vunet at work: boots a real Linux guest in QEMU on a vhost-user socket and, step by step, what
# that guest can do. Ends 0 only if every step held.
#
#   integration/demo.sh [--shell]
#
# --shell leaves you at the guest's console afterwards. Needs Debian (or a relative) on x86-64 with a
# Rust toolchain; installs what else is missing with apt-get, and says so. The programs are built as
# you; network namespaces need root, so the rest runs through sudo, but vunet and QEMU themselves run
# as an ordinary user without capabilities.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
for library in prerequisites world backend guest qemu; do
    # shellcheck source=/dev/null
    source "$REPO/integration/lib/$library.sh"
done

usage() { die "usage: integration/demo.sh [--shell]"; }

prepare() {
    prerequisites_install demo
    have_tools qemu-system-x86_64 ip setpriv dnsmasq cpio cc || die "missing: $LACKING"
    build_programs
    guest_kernel
    guest_busybox
}

run() {
    lab_begin demo
    stage_programs
    qemu_stage
    world_up
    backend_start
    local verdict=0
    backend_show_privilege || verdict=1
    qemu_start pc ''
    guest_steps lease gateway name download upload world || verdict=1
    if [[ $SHELL_WANTED == yes ]]; then
        guest_shell
    else
        guest_stop
    fi
    backend_stop
    [[ $verdict == 0 ]] || die "a step failed"
    say "all steps held"
}

SHELL_WANTED=no
for argument in "$@"; do
    case $argument in
    --shell) SHELL_WANTED=yes ;;
    *) usage ;;
    esac
done
[[ $SHELL_WANTED == no || -t 0 ]] || die "--shell needs a terminal"

if [[ -z ${VUNET_PREPARED:-} ]]; then
    prepare
fi
if ! is_root; then
    say "network namespaces need root: going on through sudo"
    exec sudo VUNET_PREPARED=1 ${CARGO_TARGET_DIR:+CARGO_TARGET_DIR="$CARGO_TARGET_DIR"} \
        ${VUNET_BIN:+VUNET_BIN="$VUNET_BIN"} "$REPO/integration/demo.sh" "$@"
fi
run
