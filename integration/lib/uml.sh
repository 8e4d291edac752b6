# shellcheck shell=bash
# Starts a user-mode Linux guest on vunet's socket, as the same ordinary user. Its kernel drives
# vhost-user itself (`virtio_uml`), so it is a front-end no one here wrote.

# uml_stage: builds the initramfs and the shim without which UML fails on processors with AMX.
uml_stage() {
    [[ ! -s $RUN_DIR/initramfs-uml ]] || return 0
    "$REPO/integration/guest/build-initramfs.sh" uml "$RUN_DIR/initramfs-uml"
    cc -shared -fPIC -O2 -Wall -Wextra -o "$RUN_DIR/xsave-shim.so" "$REPO/integration/guest/xsave-shim.c" -ldl
    chmod 0644 "$RUN_DIR/initramfs-uml" "$RUN_DIR/xsave-shim.so"
}

# uml_start: boots the guest and waits for its init.
uml_start() {
    console_open uml
    # Its processes are its children and traced by it: they end with it.
    spawn_guest uml env LD_PRELOAD="$RUN_DIR/xsave-shim.so" HOME="$SOCKET_DIR" linux.uml mem=512M \
        initrd="$RUN_DIR/initramfs-uml" rdinit=/init virtio_uml.device="$SOCKET:1" con=null con0=fd:0,fd:1 \
        quiet panic=-1 uml_dir="$SOCKET_DIR" \
        vunet.name="$WORLD_NAME" vunet.host="$WORLD_HOST"
    guest_await_boot
}
