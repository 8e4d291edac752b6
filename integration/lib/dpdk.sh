# shellcheck shell=bash
# Runs DPDK's testpmd on vunet's socket: virtio-user, a vhost-user front-end and virtio driver no one
# here wrote, which makes frames in memory as fast as they are taken.
#
# Its memory is a memfd (--no-huge), so no hugepages are reserved and the machine's stay as they are.

GATEWAY_MAC=02:ab:cd:00:00:01
DPDK_MAC=52:54:00:00:00:01

# dpdk_start DEVICE_OPTIONS TESTPMD_OPTION...: starts testpmd; orders go to $DPDK_FD, output to
# testpmd.log.
dpdk_start() {
    local device=$1
    shift
    rm -f "$RUN_DIR/testpmd.fifo"
    mkfifo "$RUN_DIR/testpmd.fifo"
    exec {DPDK_FD}<>"$RUN_DIR/testpmd.fifo"
    : >"$RUN_DIR/testpmd.log"
    # stdbuf: what it prints must not wait in its buffer.
    setpriv --pdeathsig KILL -- stdbuf -oL dpdk-testpmd -l 0-1 --no-pci --no-huge -m 256 --single-file-segments \
        --file-prefix="vunet$$" --no-telemetry \
        --vdev="virtio_user0,path=$SOCKET,queues=1,mac=$DPDK_MAC$device" \
        -- -i --total-num-mbufs=8192 --eth-peer=0,$GATEWAY_MAC "$@" \
        <&"$DPDK_FD" >>"$RUN_DIR/testpmd.log" 2>&1 &
    DPDK_PID=$!
    on_exit "end_process $DPDK_PID"
    if ! wait_until 30 dpdk_says 'packet forwarding - ports=1'; then
        say "FAIL  testpmd started: not within 30 s"
        show_log testpmd
        show_log vunet
        return 1
    fi
}

dpdk_order() { printf '%s\n' "$*" >&"$DPDK_FD"; }
dpdk_says() { grep -aq -- "$1" "$RUN_DIR/testpmd.log"; }

# dpdk_stop: stops forwarding, lets the last frames through, reads the port's counters into DPDK_RX and
# DPDK_TX (frames testpmd took and gave), and ends testpmd.
dpdk_stop() {
    dpdk_order stop
    wait_until 10 dpdk_says '^Done\.' || true
    sleep 1
    dpdk_order show port stats all
    wait_until 10 dpdk_says 'NIC statistics for port 0' || true
    sleep 0.5
    DPDK_RX=$(dpdk_counter RX-packets)
    DPDK_TX=$(dpdk_counter TX-packets)
    dpdk_order quit
    wait_until 10 dpdk_is_gone || true
    end_process "$DPDK_PID"
    exec {DPDK_FD}>&-
    [[ -n $DPDK_RX && -n $DPDK_TX ]] && return 0
    say "FAIL  testpmd counted: it showed no counters"
    show_log testpmd
    return 1
}

dpdk_is_gone() { ! is_running "$DPDK_PID"; }

# A counter of the port's statistics as last shown.
dpdk_counter() {
    sed -n '/NIC statistics for port 0/,/####$/p' "$RUN_DIR/testpmd.log" \
        | sed -n "s/.*$1: *\([0-9]*\).*/\1/p" | tail -n 1
}
