#!/usr/bin/env bash
# Real guests against vunet: Linux in QEMU through everything that happens to a virtual machine,
# user-mode Linux, and DPDK's virtio-user.
#
#   integration/real-guests.sh [--long] [SCENARIO...]      all of them by default; --list names them
#
# Each scenario runs as a process of its own with a world, a vunet and a run directory of its own, within
# a bound, and counts as one test. Needs root (through sudo otherwise); vunet, QEMU and user-mode Linux run
# as an ordinary user without capabilities. --long raises the repetitions of `reconnects` and `kills`.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
for library in prerequisites results world backend guest qemu uml dpdk; do
    # shellcheck source=/dev/null
    source "$REPO/integration/lib/$library.sh"
done

# Name|tools it needs|what it shows
SCENARIOS='qemu|qemu-system-x86_64|a QEMU guest: lease within 2 s, DNS, 64 MiB each way, ping, no privilege
qemu-reboots|qemu-system-x86_64|the same after the guest reboots itself and after a reset of the machine
qemu-vunet-killed|qemu-system-x86_64|the same after kill -9 of vunet, with reconnect=1
qemu-returns|qemu-system-x86_64|the same after QEMU was killed and another came to the same vunet
qemu-is-server|qemu-system-x86_64|the same with QEMU listening and vunet --client
qemu-microvm|qemu-system-x86_64|the same on a microvm, whose virtio device is on MMIO
qemu-script|qemu-system-x86_64|the same by contrib/qemu.sh, which ends vunet with QEMU
published|qemu-system-x86_64|a client in the world reaches a server in the guest, which sees the client'"'"'s address
network|qemu-system-x86_64 nft|two QEMU guests on a named network find each other by name, and the world
network-rootless|qemu-system-x86_64|the same without privilege; the death of one'"'"'s vunet takes nothing from the other
bridge|qemu-system-x86_64|a QEMU guest in bridge mode: a lease of the LAN'"'"'s own DHCP server, the world; the bridge stays
packet-nat|qemu-system-x86_64|a QEMU guest whose packets are translated to a fixed address on the LAN: DNS, 64 MiB each way, ping, a published port
packet-nat-dhcp|qemu-system-x86_64|the same behind an address that vunet leases of the LAN'"'"'s DHCP server, and gives back
cut-uploads|qemu-system-x86_64|an upload cut by the death of guest or vunet never looks complete
uml|linux.uml|user-mode Linux: lease, DNS, 64 MiB each way; --one-off ends with it
dpdk-txonly|dpdk-testpmd|a flood of UDP from DPDK: its counters agree with vunet'"'"'s
dpdk-plain|dpdk-testpmd|the same without mergeable buffers
dpdk-in-order|dpdk-testpmd|the same with in-order rings
dpdk-flowgen|dpdk-testpmd|many flows from DPDK, then the counters
dpdk-to-guest|dpdk-testpmd|datagrams to a published port reach DPDK, then the counters
reconnects|qemu-system-x86_64|front-ends come and go: no growth of descriptors, threads or memory
kills|qemu-system-x86_64|vunet killed and restarted again and again under one guest'"'"'s transfers'

# Those that run by name or with --long only: the others show nearly as much.
SCENARIOS_LONG='packet-nat'

SCENARIO_SECONDS_MAX=300
LONG_SCENARIO_SECONDS_MAX=3600
LEASE_MS_MAX=2000
STEPS_EACH='lease gateway name download upload upload_open world'

# Starts vunet and a QEMU guest on it.
boot_qemu() {
    backend_start
    qemu_start pc "${1:-}"
}

# Every step, in the guest that is up.
every_step() {
    # shellcheck disable=SC2086 # one word a step
    guest_steps $STEPS_EACH
}

# shellcheck disable=SC2154 # a key, not a variable
# The lease must have come within LEASE_MS_MAX.
lease_was_quick() {
    ((STEP_MS[lease] <= LEASE_MS_MAX)) && return 0
    say "FAIL  lease within $LEASE_MS_MAX ms: took ${STEP_MS[lease]} ms"
    return 1
}

scenario_qemu() {
    backend_start
    backend_show_privilege
    qemu_start pc ''
    guest_steps link
    every_step
    lease_was_quick
    guest_steps peer
    guest_stop
    backend_end
}

scenario_qemu-reboots() {
    boot_qemu
    every_step
    local order
    for order in 'console_send reboot' 'qemu_order system_reset'; do
        say "  the guest boots again: $order"
        console_mark
        $order
        guest_await_boot
        every_step
        lease_was_quick
    done
    guest_stop
    backend_end
}

scenario_qemu-vunet-killed() {
    boot_qemu ',reconnect=1'
    every_step
    say "  kill -9 of vunet, and its restart over the stale socket"
    backend_stop KILL
    backend_start
    wait_until 10 backend_is_attached
    # First with the lease of before, then with a new one.
    guest_steps gateway name download upload world
    every_step
    guest_stop
    backend_end
}

scenario_qemu-returns() {
    boot_qemu
    every_step
    say "  kill -9 of QEMU, and another QEMU"
    end_process "$GUEST_PID" KILL
    console_close
    qemu_start pc ''
    every_step
    guest_stop
    backend_end
}

scenario_qemu-is-server() {
    backend_start --client
    qemu_start pc ',server=on,wait=off'
    every_step
    guest_stop
    backend_end
}

scenario_qemu-microvm() {
    backend_start
    qemu_start microvm ''
    every_step
    guest_stop
    backend_end
}

# The example that starts both, in the namespace that vunet has in other scenarios.
scenario_qemu-script() {
    local status=0
    console_open qemu
    install -m 0755 "$REPO/contrib/qemu.sh" "$RUN_DIR/qemu.sh"
    : >"$RUN_DIR/qemu.log"
    ip netns exec "$HOST_NS" setpriv --reuid "$LAB_UID" --regid "$LAB_GID" --clear-groups --no-new-privs --inh-caps=-all \
        --bounding-set=-all --pdeathsig KILL -- env VUNET="$RUN_DIR/vunet" MEMORY="$QEMU_MEMORY" ACCEL=tcg,thread=multi \
        DEVICE=vectors=0,romfile= TMPDIR="$SOCKET_DIR" "$RUN_DIR/qemu.sh" --dns-server "$WORLD_DNS" -- \
        -cpu max -nodefaults -no-user-config -display none -serial stdio -kernel "$RUN_DIR/vmlinuz" \
        -initrd "$RUN_DIR/initramfs-qemu" -append "console=ttyS0 quiet panic=-1 vunet.name=$WORLD_NAME vunet.host=$WORLD_HOST" \
        <&"$CONSOLE_FD" >>"$RUN_DIR/qemu.log" 2>&1 &
    GUEST_PID=$!
    on_exit "end_process $GUEST_PID"
    guest_await_boot
    guest_steps lease gateway name download
    console_send poweroff
    if ! wait_until 20 guest_is_gone; then
        say "FAIL  the script ended with its guest"
        return 1
    fi
    wait "$GUEST_PID" || status=$?
    [[ $status == 0 && -z $(find "$SOCKET_DIR" -mindepth 1) ]] \
        || { say "FAIL  the script ended cleanly: status $status, $(find "$SOCKET_DIR" -mindepth 1)"; return 1; }
    if pgrep -f "^$RUN_DIR/vunet " >/dev/null; then
        say "FAIL  vunet ended with the guest"
        return 1
    fi
    show_step ok 'vunet ended with the guest' 0 ''
}

# The guest serves, and a client in the world compares what it fetched and sent.
scenario_published() {
    backend_start --publish 192.0.2.1:8080:80
    qemu_start pc ''
    guest_steps lease serve
    world_reaches 192.0.2.1:8080
    guest_steps download upload
    guest_stop
    backend_end
}

# world_reaches ADDRESS:PORT: the guest's server, from the world; the guest sees its client's own address.
world_reaches() {
    local order answer begun
    for order in "peer $1" "download $1 67108864" "upload $1 67108864"; do
        begun=$(now_ms)
        # shellcheck disable=SC2086 # one word an argument
        if ! answer=$(timeout 90 ip netns exec "$WORLD_NS" "$TRANSFER" $order); then
            say "FAIL  from the world, $order: $answer"
            show_log vunet
            return 1
        fi
        show_step ok "from the world: ${order%% *}" "$(($(now_ms) - begun))" "$answer"
        [[ $order != peer* || $answer == 192.0.2.2:* ]] || die "the guest saw $answer in place of the client"
    done
}

# shellcheck disable=SC2034 # what is set here is read by the libraries
# network_guest root|user NAME OTHER FLAG...: vunet and a QEMU guest NAME on the network `lab`.
network_guest() {
    local who=$1 name=$2 other=$3 chardev=''
    shift 3
    BACKEND_NAME=vunet-$name QEMU_NAME=qemu-$name SOCKET=$SOCKET_DIR/$name.sock
    GUEST_MAC=52:54:00:12:34:0${name#vm}
    VUNET_GUEST_APPEND="vunet.hostname=$name vunet.neighbour=$other.lab.vunet.internal"
    if [[ $who == root ]]; then
        # QEMU, which is an ordinary user's, cannot open what root made.
        chardev=',server=on,wait=off'
        set -- --client "$@"
    fi
    backend_start_on_network "$who" --network lab --state-dir "$STATE_DIR" "$@"
    qemu_start pc "$chardev"
    guest_steps lease serve
    guest_park "$name"
}

# network_command root|user WORD...: `vunet network` in the host's namespace.
network_command() {
    local who=$1 as_user=()
    shift
    [[ $who == root ]] || as_user=(setpriv --reuid "$LAB_UID" --regid "$LAB_GID" --clear-groups --no-new-privs
        --inh-caps=-all --bounding-set=-all)
    in_host "${as_user[@]}" "$RUN_DIR/vunet" network "$@" --state-dir "$STATE_DIR"
}

# two_on_a_network root|user CREATE_FLAG...: both find each other and the world; then one's vunet dies.
two_on_a_network() {
    local who=$1 name
    shift
    STATE_DIR=$RUN_DIR/state
    mkdir "$STATE_DIR"
    [[ $who == root ]] || chown "$LAB_UID:$LAB_GID" "$STATE_DIR"
    chmod 0700 "$STATE_DIR"
    world_is_resolver
    network_command "$who" create lab "$@"
    network_guest "$who" vm1 vm2
    network_guest "$who" vm2 vm1
    for name in vm1 vm2; do
        guest_take "$name"
        say "  $name:"
        guest_steps neighbour gateway download upload world
    done
    network_command "$who" list
    say "  kill -9 of the vunet of vm1:"
    guest_take vm1
    backend_stop KILL
    end_process "$GUEST_PID" KILL
    console_close
    guest_take vm2
    guest_steps gateway download world
    guest_stop
    backend_end
    network_command "$who" remove lab
}

scenario_network() { two_on_a_network root --mode nat; }
scenario_network-rootless() { two_on_a_network user --rootless; }

# lan_up: the host's link becomes a port of a bridge, and the world leases addresses to whoever is on it.
lan_up() {
    ip -n "$HOST_NS" link add br0 type bridge
    ip -n "$HOST_NS" link set br0 up
    ip -n "$HOST_NS" address del 192.0.2.1/24 dev uplink
    ip -n "$HOST_NS" link set uplink master br0
    ip -n "$HOST_NS" address add 192.0.2.1/24 dev br0
    ip -n "$HOST_NS" route replace default via 192.0.2.2
    spawn lan ip netns exec "$WORLD_NS" dnsmasq --keep-in-foreground --conf-file=/dev/null --user="$(id -un)" \
        --pid-file= --port=0 --no-ping --dhcp-authoritative --log-facility=- --interface=host \
        --dhcp-range=192.0.2.100,192.0.2.150,600 --dhcp-option=option:router,192.0.2.2 \
        --dhcp-option=option:dns-server,"$WORLD_DNS" --dhcp-leasefile="$RUN_DIR/lan.leases"
    wait_until 10 grep -q 'DHCP, IP range' "$RUN_DIR/lan.log" || die "the LAN's DHCP server did not come up"
}

# The guest is a station of the LAN: no vunet answers it, and the world sees its own address.
scenario_bridge() {
    local answer before after
    lan_up
    before=$(in_host ip -o link show | cut -d : -f 2)
    # QEMU, which is an ordinary user's, cannot open what root made: it listens.
    backend_start_on_network root --client --mode bridge --uplink bridge=br0
    qemu_start pc ',server=on,wait=off'
    guest_steps link
    every_step
    guest_steps peer serve
    answer=$(awk -v mac="$GUEST_MAC" '$2 == mac {print $3}' "$RUN_DIR/lan.leases")
    if [[ $answer != 192.0.2.1[0-5][0-9] ]]; then
        say "FAIL  the LAN's server leased to $GUEST_MAC: $(cat "$RUN_DIR/lan.leases")"
        return 1
    fi
    show_step ok "leased by the LAN's server" 0 "$answer"
    timeout 90 ip netns exec "$WORLD_NS" "$TRANSFER" download "$answer:80" 8388608
    guest_stop
    backend_end
    after=$(in_host ip -o link show | cut -d : -f 2)
    [[ $before == "$after" ]] || die "links of the host were ${before//$'\n'/} and are ${after//$'\n'/}"
}

# translated NAT_ADDRESS [FLAG...]: vunet holds NAT_ADDRESS, or one it leases, on the LAN, and a guest is hidden behind it.
translated() {
    local address=$1 before after
    shift
    lan_up
    before=$(in_host ip -o link show | cut -d : -f 2)
    backend_start_on_network root --client --mode nat --uplink bridge=br0 --nat packet --nat-address "$address" \
        --mac "$GUEST_MAC" --dns-server "$WORLD_DNS" --publish 8080:80 "$@"
    qemu_start pc ',server=on,wait=off'
    guest_steps link
    every_step
    lease_was_quick
    [[ $address != dhcp ]] || address=$(leased_by_vunet)
    address=${address%/*}
    guest_steps serve
    hidden_behind "$address"
    world_reaches "$address:8080"
    guest_stop
    backend_end
    after=$(in_host ip -o link show | cut -d : -f 2)
    [[ $before == "$after" ]] || die "links of the host were ${before//$'\n'/} and are ${after//$'\n'/}"
}

scenario_packet-nat() { translated 192.0.2.50/24 --nat-gateway 192.0.2.2; }

scenario_packet-nat-dhcp() {
    translated dhcp
    if ! wait_until 5 grep -q 'DHCPRELEASE' "$RUN_DIR/lan.log"; then
        say "FAIL  the address was given back: $(tail -n 3 "$RUN_DIR/lan.log")"
        return 1
    fi
    show_step ok 'the address was given back' 0 ''
}

# The one address the LAN's server has leased: vunet's, as the guest has its lease of vunet.
leased_by_vunet() {
    local leases
    leases=$(awk -v guest="$GUEST_MAC" '$2 != guest {print $3}' "$RUN_DIR/lan.leases")
    [[ $leases =~ ^192\.0\.2\.1[0-5][0-9]$ && $(wc -l <"$RUN_DIR/lan.leases") == 1 ]] \
        || die "the LAN's server leased: $(cat "$RUN_DIR/lan.leases")"
    printf '%s' "$leases"
}

# hidden_behind ADDRESS: what the world sees of the guest is that address, and a MAC address that is not the guest's.
hidden_behind() {
    local seen known
    guest_steps peer
    seen=$(console_since_mark | awk '/^VUNET-STEP peer ok/ {print $5}')
    known=$(ip -n "$WORLD_NS" -4 neighbour show to "$1")
    if [[ $seen != "$1:"* || $known != *lladdr* ]] || ip -n "$WORLD_NS" neighbour show | grep -qi "$GUEST_MAC"; then
        say "FAIL  hidden behind $1: the world saw $seen, its neighbours $(ip -n "$WORLD_NS" neighbour show)"
        return 1
    fi
    show_step ok 'hidden behind one address' 0 "$known"
}

# The death of the guest, of vunet and of its process by SIGTERM: the server must see a reset.
scenario_cut-uploads() {
    local death
    boot_qemu ',reconnect=1'
    for death in 'backend_stop KILL' 'backend_stop TERM' 'end_process_of_guest'; do
        guest_steps lease hold
        : >"$RUN_DIR/web.log"
        say "  an upload is cut: $death"
        $death
        wait_until 15 upload_was_judged || true
        if ! grep -q '^upload cut after [1-9]' "$RUN_DIR/web.log"; then
            say "FAIL  the server saw a reset: it saw $(tail -n 1 "$RUN_DIR/web.log")"
            show_log vunet
            return 1
        fi
        show_step ok 'the server saw a reset' 0 "$(tail -n 1 "$RUN_DIR/web.log")"
        if [[ $death == backend_stop* ]]; then
            backend_start
            wait_until 10 backend_is_attached
        fi
    done
    console_close
    backend_end
}

upload_was_judged() { grep -q '^upload' "$RUN_DIR/web.log"; }

end_process_of_guest() { end_process "$GUEST_PID" KILL; }

scenario_uml() {
    uml_stage
    backend_start --one-off
    uml_start
    guest_steps link
    every_step
    lease_was_quick
    guest_stop
    if ! wait_until 10 backend_is_gone; then
        say "FAIL  vunet --one-off ended with its front-end"
        return 1
    fi
    show_step ok 'vunet --one-off ended' 0 ''
}

# dpdk_flood DEVICE_OPTIONS TESTPMD_OPTION...: three seconds of frames, then the counters compared.
dpdk_flood() {
    backend_start
    dpdk_start "$@"
    sleep 3
    dpdk_stop
    counters_agree
    sink_got_some
}

# shellcheck disable=SC2054 # commas belong to testpmd's options
TXONLY=(--forward-mode=txonly --auto-start "--tx-ip=10.0.2.2,$WORLD_HOST" --tx-udp=4000,9 --txpkts=64)

scenario_dpdk-txonly() { dpdk_flood ',mrg_rxbuf=1,in_order=0' "${TXONLY[@]}"; }
scenario_dpdk-plain() { dpdk_flood ',mrg_rxbuf=0,in_order=0' "${TXONLY[@]}"; }
scenario_dpdk-in-order() { dpdk_flood ',mrg_rxbuf=1,in_order=1' "${TXONLY[@]}"; }

# flowgen's flows go to 198.18.0.0/15, which the world takes in.
scenario_dpdk-flowgen() {
    backend_start
    ip -n "$WORLD_NS" route add local 198.18.0.0/15 dev lo
    dpdk_start ',mrg_rxbuf=1' --forward-mode=flowgen --auto-start --flowgen-flows=256
    sleep 3
    dpdk_stop
    counters_agree
}

# testpmd answers ARP in mode icmpecho, so vunet finds it and delivers what comes to the published port.
scenario_dpdk-to-guest() {
    backend_start --guest-ip 10.0.2.2 --publish udp:192.0.2.1:7000:7000
    dpdk_start ',mrg_rxbuf=1' --forward-mode=icmpecho --auto-start
    # What comes before the guest has answered ARP may be dropped, but is counted.
    ip netns exec "$WORLD_NS" "$TRANSFER" udp-send 192.0.2.1:7000 1
    sleep 0.5
    ip netns exec "$WORLD_NS" "$TRANSFER" udp-send 192.0.2.1:7000 500
    sleep 0.5
    dpdk_stop
    counters_agree
    local delivered dropped
    delivered=$(($(backend_counter payload_to_guest_bytes) / 64))
    dropped=$(backend_counter no_flow || true)
    if ((delivered < 400 || delivered + ${dropped:-0} != 501)); then
        say "FAIL  501 datagrams reached the guest or were counted: $delivered did, ${dropped:-0} were"
        show_log vunet
        return 1
    fi
    show_step ok 'datagrams reached the guest' 0 "$delivered of 501, the others counted"
}

# counters_agree: ends vunet and compares what it counted with what testpmd did.
counters_agree() {
    local from to
    backend_end
    from=$(backend_counter frames_from_guest)
    to=$(backend_counter frames_to_guest)
    if [[ $from == "$DPDK_TX" && $to == "$DPDK_RX" && $((from + to)) != 0 ]]; then
        show_step ok 'counters agree' 0 "$from frames from the guest, $to to it"
        return 0
    fi
    say "FAIL  counters agree: testpmd gave $DPDK_TX and took $DPDK_RX, vunet counted ${from:-none} and ${to:-none}"
    show_log vunet
    show_log testpmd 40
    return 1
}

# Whether datagrams of the flood came out at the far end.
sink_got_some() {
    local got
    got=$(tail -n 1 "$RUN_DIR/sink.log")
    if [[ ! $got =~ ^[1-9] ]]; then
        say "FAIL  the flood reached the world: the sink counted ${got:-nothing}"
        return 1
    fi
    show_step ok 'the flood reached the world' 0 "$got datagrams"
}

# QEMUs that connect, negotiate and leave; between them nothing of vunet may grow.
scenario_reconnects() {
    local count=20 i before after
    [[ -z ${VUNET_LONG:-} ]] || count=1000
    backend_start
    for ((i = 0; i < 5; i++)); do one_front_end; done
    before=$(backend_footprint)
    for ((i = 0; i < count; i++)); do one_front_end; done
    after=$(backend_footprint)
    footprint_held "$before" "$after"
    show_step ok "$count front-ends came and went" 0 "descriptors, threads, KiB: $before, then $after"
    qemu_start pc ''
    every_step
    guest_stop
    backend_end
}

# A machine that never runs: its QEMU connects, negotiates and quits. The order to quit waits in its input.
one_front_end() {
    timeout 20 setpriv --reuid "$LAB_UID" --regid "$LAB_GID" --clear-groups qemu-system-x86_64 -S -accel tcg \
        -m 64M -object memory-backend-memfd,id=mem,size=64M,share=on -machine q35,memory-backend=mem \
        -nodefaults -display none -monitor stdio -chardev "socket,id=vunet,path=$SOCKET" \
        -netdev vhost-user,id=net,chardev=vunet -device virtio-net-pci,netdev=net,vectors=0,romfile= \
        <<<quit >>"$RUN_DIR/qemu-passing.log" 2>&1
    is_running "$BACKEND_PID" || { say "FAIL  vunet outlives its front-ends"; show_log vunet; return 1; }
}

# backend_footprint: descriptors, threads and resident KiB of vunet.
backend_footprint() {
    local status=/proc/$BACKEND_PID/status
    sleep 0.5
    printf '%s %s %s' "$(find "/proc/$BACKEND_PID/fd" -mindepth 1 | wc -l)" \
        "$(awk '/^Threads:/ {print $2}' "$status")" "$(awk '/^VmRSS:/ {print $2}' "$status")"
}

# Descriptors and threads as before; resident memory within 1 MiB, as allocators keep some pages.
footprint_held() {
    local fds threads kib fds_after threads_after kib_after
    read -r fds threads kib <<<"$1"
    read -r fds_after threads_after kib_after <<<"$2"
    ((fds_after <= fds && threads_after <= threads && kib_after <= kib + 1024)) && return 0
    say "FAIL  nothing grows: descriptors, threads, KiB were $1 and are $2"
    return 1
}

scenario_kills() {
    local count=5 i
    [[ -z ${VUNET_LONG:-} ]] || count=200
    boot_qemu ',reconnect=1'
    guest_steps lease churn
    for ((i = 1; i <= count; i++)); do
        # Anywhere in a transfer.
        sleep "0.$((RANDOM % 10))"
        backend_stop KILL
        backend_start
        if ! wait_until 10 backend_is_attached; then
            say "FAIL  QEMU came back after kill $i"
            show_log vunet
            return 1
        fi
        guest_steps name >"$RUN_DIR/steps.log" || { cat "$RUN_DIR/steps.log"; return 1; }
    done
    show_step ok "$count kills survived" 0 ''
    guest_steps calm
    every_step
    guest_stop
    backend_end
}

# Runs one scenario in this process, which ends with it.
run_scenario() {
    lab_begin "$1"
    stage_programs
    [[ $1 == uml || $1 == dpdk-* ]] || qemu_stage
    world_up
    "scenario_$1"
    say "held: $1"
}

# Runs the scenarios named, or all, each in a process of its own.
run_all() {
    local name tools about wanted=" $* " seconds=$SCENARIO_SECONDS_MAX
    [[ -z ${VUNET_LONG:-} ]] || seconds=$LONG_SCENARIO_SECONDS_MAX
    while IFS='|' read -r name tools about; do
        [[ $# == 0 || $wanted == *" $name "* ]] || continue
        [[ $# != 0 || -n ${VUNET_LONG:-} || " $SCENARIOS_LONG " != *" $name "* ]] || continue
        say ''
        say "$name: $about"
        # shellcheck disable=SC2086 # one word a tool
        if ! have_tools ip setpriv dnsmasq cpio $tools; then
            result_lacking 1 "real guest: $name" "missing: $LACKING"
        elif timeout --kill-after=20 "$seconds" "$REPO/integration/real-guests.sh" --alone "$name" </dev/null; then
            result passed 1 "real guest: $name"
        else
            result failed 1 "real guest: $name"
        fi
    done <<<"$SCENARIOS"
}

prepare() {
    prerequisites_install test
    build_programs
    guest_kernel
    guest_busybox
}

case ${1:-} in
--list)
    cut -d '|' -f 1,3 <<<"$SCENARIOS" | tr '|' '\t'
    exit 0
    ;;
--alone)
    run_scenario "$2"
    exit 0
    ;;
--long)
    export VUNET_LONG=1
    shift
    ;;
esac
for argument in "$@"; do
    grep -q "^$argument|" <<<"$SCENARIOS" || die "no scenario $argument: see --list"
done
[[ -n ${VUNET_PREPARED:-} ]] || prepare
if ! is_root; then
    say "network namespaces need root: going on through sudo"
    exec sudo VUNET_PREPARED=1 ${VUNET_LONG:+VUNET_LONG=1} ${CI:+CI="$CI"} \
        ${VUNET_RESULTS:+VUNET_RESULTS="$VUNET_RESULTS"} ${VUNET_BIN:+VUNET_BIN="$VUNET_BIN"} \
        ${CARGO_TARGET_DIR:+CARGO_TARGET_DIR="$CARGO_TARGET_DIR"} "$REPO/integration/real-guests.sh" "$@"
fi
SUMMING=${VUNET_RESULTS:-}
lab_begin guests
results_begin
run_all "$@"
[[ -n $SUMMING ]] || results_end
