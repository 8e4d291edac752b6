#!/usr/bin/env bash
# Runs one QEMU guest on a vunet of its own, which ends with it.
#
#   contrib/qemu.sh [VUNET_FLAG...] -- QEMU_OPTION...
#   contrib/qemu.sh --publish 127.0.0.1:2222:22 -- -drive file=guest.img,if=virtio -nographic
#
# The guest's memory has to be shared with vunet, so it is made here: MEMORY=1G. ACCEL=kvm is the default where /dev/kvm
# can be used, else tcg. VUNET and QEMU name the programs, MAC the guest's address, DEVICE further properties of the
# network device, such as mq=on with --queues in the flags and QUEUES=2 here.
#
# QEMU 7.2 without KVM crashes on vhost-user with MSI-X: DEVICE=vectors=0 avoids that.
set -euo pipefail

VUNET=${VUNET:-vunet}
QEMU=${QEMU:-qemu-system-x86_64}
MEMORY=${MEMORY:-1G}
MAC=${MAC:-52:54:00:12:34:56}
QUEUES=${QUEUES:-1}
DEVICE=${DEVICE:-}
if [[ -z ${ACCEL:-} ]]; then
    ACCEL=tcg
    [[ ! -w /dev/kvm ]] || ACCEL=kvm
fi

flags=()
while [[ $# != 0 && $1 != -- ]]; do
    flags+=("$1")
    shift
done
if [[ $# == 0 ]]; then
    echo "usage: contrib/qemu.sh [VUNET_FLAG...] -- QEMU_OPTION..." >&2
    exit 2
fi
shift

directory=$(mktemp -d)
vunet='' qemu=''
end() {
    # shellcheck disable=SC2086 # a number each, or nothing
    kill $vunet $qemu 2>/dev/null || true
    rm -rf "$directory"
}
trap end EXIT
trap 'exit 143' TERM INT HUP

# --one-off: it ends when QEMU does, however that ends.
"$VUNET" --socket-path "$directory/vm.sock" --one-off "${flags[@]}" &
vunet=$!
for _ in {1..100}; do
    [[ ! -S $directory/vm.sock ]] || break
    kill -0 "$vunet" 2>/dev/null || wait "$vunet"
    sleep 0.05
done
[[ -S $directory/vm.sock ]] || { echo "error: vunet made no socket within 5 s" >&2; exit 1; }

options=(-m "$MEMORY" -object "memory-backend-memfd,id=mem,size=$MEMORY,share=on" -machine "q35,memory-backend=mem"
    -accel "$ACCEL" -chardev "socket,id=vunet,path=$directory/vm.sock"
    -netdev "vhost-user,id=net,chardev=vunet,queues=$QUEUES"
    -device "virtio-net-pci,netdev=net,mac=$MAC${DEVICE:+,$DEVICE}")
[[ $ACCEL != kvm ]] || options+=(-cpu host)
"$QEMU" "${options[@]}" "$@" <&0 &
qemu=$!
wait "$qemu"
