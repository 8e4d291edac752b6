#!/usr/bin/env bash
# Runs one cloud-hypervisor guest on a vunet of its own, which ends with it.
#
#   contrib/cloud-hypervisor.sh KERNEL DISK [VUNET_FLAG...]
#
# num_queues counts rings, two for each of vunet's --queues. The guest's memory has to be shared. VUNET and
# CLOUD_HYPERVISOR name the programs.
set -euo pipefail
kernel=${1:?usage: contrib/cloud-hypervisor.sh KERNEL DISK [VUNET_FLAG...]} disk=${2:?a disk is missing}
shift 2

directory=$(mktemp -d)
vunet='' guest=''
end() {
    # shellcheck disable=SC2086 # a number each, or nothing
    kill $vunet $guest 2>/dev/null || true
    rm -rf "$directory"
}
trap end EXIT
trap 'exit 143' TERM INT HUP

# --one-off: it ends when the VM does, however that ends.
"${VUNET:-vunet}" --socket-path "$directory/vm.sock" --one-off "$@" &
vunet=$!
for _ in {1..100}; do
    [[ ! -S $directory/vm.sock ]] || break
    kill -0 "$vunet" 2>/dev/null || wait "$vunet"
    sleep 0.05
done
[[ -S $directory/vm.sock ]] || { echo "error: vunet made no socket within 5 s" >&2; exit 1; }

"${CLOUD_HYPERVISOR:-cloud-hypervisor}" --kernel "$kernel" --disk "path=$disk" --cmdline 'root=/dev/vda1 console=hvc0' \
    --cpus boot=1 --memory size=1G,shared=on \
    --net "vhost_user=true,socket=$directory/vm.sock,mac=52:54:00:12:34:56,num_queues=2,queue_size=256" <&0 &
guest=$!
wait "$guest"
