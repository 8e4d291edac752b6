#!/usr/bin/env bash
# Runs one crosvm guest on a vunet of its own.
#
#   contrib/crosvm.sh KERNEL DISK [VUNET_FLAG...]
set -euo pipefail
kernel=${1:?usage: contrib/crosvm.sh KERNEL DISK [VUNET_FLAG...]} disk=${2:?a disk is missing}
shift 2

directory=$(mktemp -d)
vunet=
trap '[[ -z $vunet ]] || kill "$vunet" 2>/dev/null; rm -rf "$directory"' EXIT
vunet --socket-path "$directory/vm.sock" --one-off "$@" &
vunet=$!
for _ in {1..100}; do
    [[ ! -S $directory/vm.sock ]] || break
    sleep 0.05
done

crosvm run --mem 1024 --block "path=$disk" --vhost-user "net,socket=$directory/vm.sock" \
    --params 'root=/dev/vda1 console=ttyS0' "$kernel"
