#!/usr/bin/env bash
# Builds a guest's initramfs: busybox, the transfer tool, the virtio modules and `init`.
#
#   integration/guest/build-initramfs.sh qemu|uml OUTPUT
#
# Modules are numbered in the order `init` loads them, each after what it needs (virtio_ring before
# virtio). User-mode Linux has virtio and its bus built in, and its own modules for the rest.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=../lib/prerequisites.sh
source "$REPO/integration/lib/prerequisites.sh"

MODULES_QEMU=(failover net_failover virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev
    virtio_pci virtio_mmio virtio_net)
MODULES_UML=(failover net_failover virtio_net)

# Copies a module, unpacked if it is packed; one that is built into the kernel is not there to copy.
copy_module() {
    local name=$1 number=$2 to=$3 from
    from=$(find "$MODULE_TREE" \( -name "$name.ko" -o -name "$name.ko.xz" -o -name "$name.ko.zst" \) | head -n 1)
    [[ -n $from ]] || return 0
    to=$to/$(printf '%02d-%s.ko' "$number" "$name")
    case $from in
    *.xz) xz -dc "$from" >"$to" ;;
    *.zst) zstd -qdc "$from" >"$to" ;;
    *) cp "$from" "$to" ;;
    esac
}

build() {
    local kind=$1 output=$2 root number=0 module modules=()
    case $kind in
    qemu)
        guest_kernel
        MODULE_TREE=$KERNEL_MODULES
        modules=("${MODULES_QEMU[@]}")
        ;;
    uml)
        MODULE_TREE=$(find /usr/lib/uml/modules -mindepth 1 -maxdepth 1 -type d 2>/dev/null | sort -V | tail -n 1)
        [[ -n $MODULE_TREE ]] || die "user-mode Linux has no modules below /usr/lib/uml/modules"
        modules=("${MODULES_UML[@]}")
        ;;
    *) die "usage: build-initramfs.sh qemu|uml OUTPUT" ;;
    esac
    guest_busybox
    root=$(mktemp -d)
    mkdir -p "$root"/{bin,dev,proc,sys,etc,tmp,modules}
    cp "$BUSYBOX" "$root/bin/busybox"
    cp "$TARGET_DIR/guest/x86_64-unknown-linux-gnu/release/vunet-transfer" "$root/bin/vunet-transfer"
    cp "$REPO/integration/guest/init" "$root/init"
    cp "$REPO/integration/guest/lease" "$root/bin/lease"
    chmod 0755 "$root/init" "$root/bin/lease"
    for module in "${modules[@]}"; do
        number=$((number + 1))
        copy_module "$module" "$number" "$root/modules"
    done
    [[ -n $(find "$root/modules" -name '*virtio_net.ko') ]] || die "the guest's kernel has no virtio_net module"
    (cd "$root" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc --owner 0:0) >"$output.part"
    mv "$output.part" "$output"
    rm -rf "$root"
}

[[ $# == 2 ]] || die "usage: build-initramfs.sh qemu|uml OUTPUT"
build "$1" "$2"
