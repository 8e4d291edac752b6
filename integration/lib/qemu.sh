# shellcheck shell=bash
# shellcheck disable=SC2054 # commas belong to QEMU's options
# Starts a Linux guest in QEMU on vunet's socket, as the same ordinary user.
#
# Always TCG: the kernel's KVM is not everywhere, and the truth is the same. `vectors=0` because QEMU
# 7.2 crashes with vhost-user and MSI-X without KVM.

QEMU_MEMORY=512M
# Its console and its monitor are known by this name, where there are several.
QEMU_NAME=qemu
# QEMU calls a MAC-less device 52:54:00:12:34:56; named here so that logs can be compared.
GUEST_MAC=52:54:00:12:34:56

# qemu_stage: builds the initramfs and puts it and the kernel where the ordinary user can read them.
qemu_stage() {
    [[ ! -s $RUN_DIR/initramfs-qemu ]] || return 0
    guest_kernel
    "$REPO/integration/guest/build-initramfs.sh" qemu "$RUN_DIR/initramfs-qemu"
    cp "$KERNEL" "$RUN_DIR/vmlinuz"
    chmod 0644 "$RUN_DIR/vmlinuz" "$RUN_DIR/initramfs-qemu"
}

# qemu_start pc|microvm CHARDEV_OPTIONS [DEVICE_OPTIONS]: boots the guest and waits for its init.
qemu_start() {
    local machine=$1 chardev=$2 device=${3:-} options append
    append="console=ttyS0 quiet panic=-1 vunet.name=$WORLD_NAME vunet.host=$WORLD_HOST ${VUNET_GUEST_APPEND:-}"
    case $machine in
    pc)
        options=(-machine q35,memory-backend=mem
            -device "virtio-net-pci,netdev=net,mac=$GUEST_MAC,vectors=0,romfile=$device")
        ;;
    microvm)
        # It has no timer to measure the TSC with.
        append+=" tsc_early_khz=1000000"
        options=(-machine microvm,memory-backend=mem -global virtio-mmio.force-legacy=false
            -device "virtio-net-device,netdev=net,mac=$GUEST_MAC$device")
        ;;
    *) die "no such machine: $machine" ;;
    esac
    console_open "$QEMU_NAME"
    qemu_monitor_open
    spawn_guest "$QEMU_NAME" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 1 -m "$QEMU_MEMORY" \
        -object "memory-backend-memfd,id=mem,size=$QEMU_MEMORY,share=on" "${options[@]}" \
        -nodefaults -no-user-config -display none -serial stdio \
        -chardev "pipe,id=monitor,path=$SOCKET_DIR/$QEMU_NAME.monitor" -mon chardev=monitor \
        -chardev "socket,id=vunet,path=$SOCKET$chardev" -netdev vhost-user,id=net,chardev=vunet \
        -kernel "$RUN_DIR/vmlinuz" -initrd "$RUN_DIR/initramfs-qemu" -append "$append"
    guest_await_boot
}

# spawn_guest NAME COMMAND...: starts a guest on the open console, as the ordinary user.
spawn_guest() {
    local name=$1
    shift
    : >"$RUN_DIR/$name.log"
    setpriv --reuid "$LAB_UID" --regid "$LAB_GID" --clear-groups --no-new-privs --inh-caps=-all \
        --bounding-set=-all --pdeathsig KILL -- "$@" <&"$CONSOLE_FD" >>"$RUN_DIR/$name.log" 2>&1 &
    GUEST_PID=$!
    on_exit "end_process $GUEST_PID"
}

# The monitor is a pair of fifos; what it answers goes to a log of its name.
qemu_monitor_open() {
    local pipe=$SOCKET_DIR/$QEMU_NAME.monitor
    rm -f "$pipe.in" "$pipe.out"
    mkfifo -m 0600 "$pipe.in" "$pipe.out"
    chown "$LAB_UID:$LAB_GID" "$pipe.in" "$pipe.out"
    exec {MONITOR_FD}<>"$pipe.in"
    spawn "$QEMU_NAME-monitor" cat "$pipe.out"
}

# qemu_order WORDS...: gives QEMU a monitor command.
qemu_order() { printf '%s\n' "$*" >&"$MONITOR_FD"; }
