#!/usr/bin/env bash
# Runs one crosvm guest on a vunet of its own, which ends with it.
#
#   contrib/crosvm.sh KERNEL DISK [VUNET_FLAG...]
#
# VUNET and CROSVM name the programs.
set -euo pipefail
kernel=${1:?usage: contrib/crosvm.sh KERNEL DISK [VUNET_FLAG...]} disk=${2:?a disk is missing}
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

"${CROSVM:-crosvm}" run --mem 1024 --block "path=$disk" --vhost-user "net,socket=$directory/vm.sock" \
    --params 'root=/dev/vda1 console=ttyS0' "$kernel" <&0 &
guest=$!
wait "$guest"
