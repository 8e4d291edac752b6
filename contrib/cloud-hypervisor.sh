#!/usr/bin/env bash
# Runs one cloud-hypervisor guest on a vunet of its own.
#
#   contrib/cloud-hypervisor.sh KERNEL DISK [VUNET_FLAG...]
#
# num_queues counts rings, two for each of vunet's --queues. The guest's memory has to be shared.
set -euo pipefail
kernel=${1:?usage: contrib/cloud-hypervisor.sh KERNEL DISK [VUNET_FLAG...]} disk=${2:?a disk is missing}
shift 2

directory=$(mktemp -d)
vunet=
trap '[[ -z $vunet ]] || kill "$vunet" 2>/dev/null; rm -rf "$directory"' EXIT
vunet --socket-path "$directory/vm.sock" --one-off "$@" &
vunet=$!

# It tries for some seconds to connect, so nobody has to wait for the socket here.
cloud-hypervisor --kernel "$kernel" --disk "path=$disk" --cmdline 'root=/dev/vda1 console=hvc0' \
    --cpus boot=1 --memory size=1G,shared=on \
    --net "vhost_user=true,socket=$directory/vm.sock,mac=52:54:00:12:34:56,num_queues=2,queue_size=256"
