# shellcheck shell=bash
# Starts the domain of contrib/libvirt by a libvirtd of its own in the machine of `machine.sh`, on the service there.
#
# The domain is the example itself but for what the lab lacks or wants otherwise: KVM, a disk, a console to speak with.
# `vectors=0` for the reason that `qemu.sh` gives.

# libvirt_domain_for_lab FILE: writes it.
libvirt_domain_for_lab() {
    local boot override
    boot="<kernel>/run/lab/vmlinuz</kernel><initrd>/run/lab/initramfs-qemu</initrd><cmdline>console=ttyS0 quiet panic=-1"
    boot+=" vunet.name=$WORLD_NAME vunet.host=$WORLD_HOST</cmdline>"
    override="<qemu:override><qemu:device alias='net0'><qemu:frontend><qemu:property name='vectors' type='unsigned'"
    override+=" value='0'/></qemu:frontend></qemu:device></qemu:override>"
    sed -e "s|<domain type='kvm'>|<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>|" \
        -e '/<cpu /d' -e '/<disk /,/<\/disk>/d' -e "s|hvm</type>|&$boot|" -e "s|</domain>|$override&|" \
        -e "s|<console type='pty'/>|<serial type='pipe'><source path='/run/lab/libvirt'/></serial>|" \
        "$REPO/contrib/libvirt/domain.xml" >"$1"
}

# libvirt_up: starts libvirtd. It runs QEMU as the user that Debian's libvirt-daemon-system would have made, in the group
# that the service's socket is for.
libvirt_up() {
    in_machine getent group libvirt-qemu >/dev/null || in_machine groupadd --system libvirt-qemu
    in_machine getent passwd libvirt-qemu >/dev/null \
        || in_machine useradd --system --no-create-home --gid kvm --groups libvirt-qemu libvirt-qemu
    cat >"$RUN_DIR/qemu.conf" <<EOF
dynamic_ownership = 0
stdio_handler = "file"
security_driver = "none"
namespaces = []
cgroup_controllers = []
EOF
    in_machine mkdir -p /etc/libvirt
    in_machine cp /run/lab/qemu.conf /etc/libvirt/
    spawn libvirtd nsenter --target "$MACHINE_PID" --mount --uts --ipc --pid --cgroup --net -- libvirtd
    wait_until 20 in_machine virsh --quiet list >/dev/null 2>&1
}

# libvirt_start: has libvirt start the domain, and waits for the guest's init.
libvirt_start() {
    local fifo=$RUN_DIR/libvirt
    console_open libvirt
    # QEMU's pipes: what it reads is our console's fifo, what it writes goes to the log.
    mkfifo "$fifo.out"
    ln "$CONSOLE_FIFO" "$fifo.in"
    chown "$(in_machine id -u libvirt-qemu)" "$fifo.in" "$fifo.out"
    spawn libvirt cat "$fifo.out"
    libvirt_domain_for_lab "$RUN_DIR/domain.xml"
    in_machine virsh --quiet define /run/lab/domain.xml
    in_machine timeout 60 virsh --quiet start vm1
    # As this script's namespace numbers it.
    GUEST_PID=$(pgrep --full --newest '^[^ ]*qemu-system-x86_64 -name guest=vm1,')
    on_exit "end_process $GUEST_PID"
    guest_await_boot
}
