# shellcheck shell=bash
# Builds and runs vunet as the tests and the demo do: as an ordinary user without any capability, in
# the namespace $HOST_NS of `world.sh`.
#
# $VUNET_BIN names a vunet to use in place of the one built here.

# The ordinary user: whoever called sudo, or nobody.
LAB_UID=65534
LAB_GID=65534
if [[ ${SUDO_UID:-0} != 0 ]]; then
    LAB_UID=$SUDO_UID
    LAB_GID=$SUDO_GID
fi
BACKEND_PID=
# Its log is known by this name.
BACKEND_NAME=vunet

# build_programs: builds vunet and the static transfer tool, as whoever runs the script.
build_programs() {
    command -v cargo >/dev/null || die "cargo is missing: install a Rust toolchain (https://rustup.rs)"
    if [[ -z ${VUNET_BIN:-} ]]; then
        say "building vunet (cargo build --release)"
        (cd "$REPO" && cargo build --release --locked --quiet --package vunet) || return 1
    fi
    # A target directory of its own, as other flags would rebuild everything; and a named target, so
    # that the flags spare build scripts.
    (cd "$REPO" && RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --quiet \
        --package vunet-transfer --target x86_64-unknown-linux-gnu --target-dir "$TARGET_DIR/guest")
}

# stage_programs: puts what the ordinary user runs where that user can read it.
stage_programs() {
    cp "${VUNET_BIN:-$TARGET_DIR/release/vunet}" "$RUN_DIR/vunet"
    cp "$TARGET_DIR/guest/x86_64-unknown-linux-gnu/release/vunet-transfer" "$RUN_DIR/vunet-transfer"
    TRANSFER=$RUN_DIR/vunet-transfer
    SOCKET_DIR=$RUN_DIR/sockets
    mkdir "$SOCKET_DIR"
    chown "$LAB_UID:$LAB_GID" "$SOCKET_DIR"
    chmod 0700 "$SOCKET_DIR"
    SOCKET=$SOCKET_DIR/vunet.sock
    export TRANSFER SOCKET
}

# spawn_as_user NAME COMMAND...: `spawn`, as the ordinary user, in $HOST_NS.
spawn_as_user() {
    local name=$1
    shift
    spawn "$name" ip netns exec "$HOST_NS" setpriv --reuid "$LAB_UID" --regid "$LAB_GID" --clear-groups \
        --no-new-privs --inh-caps=-all --bounding-set=-all --pdeathsig KILL -- "$@"
}

# backend_start [FLAG...]: starts vunet; the log is vunet.log. In server mode waits for the socket.
backend_start() {
    spawn_as_user "$BACKEND_NAME" "$RUN_DIR/vunet" --socket-path "$SOCKET" --dns-server "$WORLD_DNS" "$@"
    backend_started "$@"
}

# backend_start_on_network root|user FLAG...: the same on a named network, whose DNS is the network's.
backend_start_on_network() {
    local who=$1
    shift
    if [[ $who == root ]]; then
        spawn "$BACKEND_NAME" ip netns exec "$HOST_NS" "$RUN_DIR/vunet" --socket-path "$SOCKET" "$@"
    else
        spawn_as_user "$BACKEND_NAME" "$RUN_DIR/vunet" --socket-path "$SOCKET" "$@"
    fi
    backend_started "$@"
}

backend_started() {
    BACKEND_PID=$SPAWNED
    [[ " $* " != *" --client "* ]] || return 0
    if ! wait_until 10 backend_listens; then
        show_log "$BACKEND_NAME"
        die "vunet made no socket within 10 s"
    fi
}

# Whether vunet's own socket is there; a stale one of a dead process has another inode.
backend_listens() {
    is_running "$BACKEND_PID" || return 1
    [[ -S $SOCKET ]] && grep -q "00010000.* $SOCKET\$" "/proc/$BACKEND_PID/net/unix"
}

# backend_stop [SIGNAL]: ends vunet.
backend_stop() {
    [[ -n $BACKEND_PID ]] || return 0
    end_process "$BACKEND_PID" "${1:-TERM}"
    BACKEND_PID=
}

# backend_end: ends vunet by SIGTERM and fails unless it ended at once with 0 and removed its socket.
backend_end() {
    local begun pid=$BACKEND_PID status=0
    begun=$(now_ms)
    kill -s TERM "$pid" 2>/dev/null || true
    wait_until 5 backend_is_gone || true
    if is_running "$pid"; then
        say "FAIL  vunet ended on SIGTERM: not within 5 s"
        return 1
    fi
    wait "$pid" || status=$?
    BACKEND_PID=
    if [[ $status != 0 || -S $SOCKET ]]; then
        say "FAIL  vunet ended cleanly: status $status, socket $([[ -S $SOCKET ]] && echo left behind || echo removed)"
        show_log "$BACKEND_NAME"
        return 1
    fi
    show_step ok 'vunet ended on SIGTERM' "$(($(now_ms) - begun))" ''
}

backend_is_gone() { ! is_running "$BACKEND_PID"; }

# Whether a front-end holds a connection to the vunet that runs now. The kernel lists an accepted socket in
# the namespace of the side that connected, which is this script's.
backend_is_attached() { grep -q "0001 03 .* $SOCKET\$" "/proc/$$/net/unix"; }

# backend_counter NAME: a counter of the line vunet logs when it ends.
backend_counter() {
    sed 's/\x1b\[[0-9;]*m//g' "$RUN_DIR/$BACKEND_NAME.log" | grep -o "\b$1=[0-9]*" | tail -n 1 | cut -d = -f 2
}

# backend_show_privilege: shows, as a step, whether vunet runs as no root and without any capability.
backend_show_privilege() {
    local uid capabilities
    uid=$(awk '/^Uid:/ {print $2, $3, $4, $5}' "/proc/$BACKEND_PID/status")
    capabilities=$(awk '/^Cap(Prm|Eff|Bnd|Inh|Amb):/ {print $2}' "/proc/$BACKEND_PID/status" | sort -u | xargs)
    if [[ $uid == "$LAB_UID $LAB_UID $LAB_UID $LAB_UID" && $LAB_UID != 0 && $capabilities =~ ^0+$ ]]; then
        show_step ok 'vunet runs unprivileged' 0 "user $LAB_UID, no capability"
    else
        show_step FAIL 'vunet runs unprivileged' 0 "user ids $uid, capabilities $capabilities"
        return 1
    fi
}
