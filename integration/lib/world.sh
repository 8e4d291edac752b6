# shellcheck shell=bash
# The world a guest reaches: two network namespaces joined by a veth pair.
#
#   $HOST_NS  192.0.2.1  ----  192.0.2.2  $WORLD_NS  198.51.100.10 on its loopback
#
# vunet runs in $HOST_NS. $WORLD_NS holds dnsmasq (192.0.2.2), which knows web.world.test, and the web
# server and datagram sink of the transfer tool; 198.51.100.10 lies a hop beyond the link.
#
# May touch: the two namespaces it makes, and what /etc/netns says of them.

WORLD_DNS=192.0.2.2
WORLD_HOST=198.51.100.10
WORLD_NAME=web.world.test
export WORLD_DNS WORLD_HOST WORLD_NAME

# world_up: makes both namespaces and starts the world's servers.
world_up() {
    HOST_NS=vunet-host-$$
    WORLD_NS=vunet-world-$$
    on_exit "ip netns delete $WORLD_NS 2>/dev/null"
    on_exit "ip netns delete $HOST_NS 2>/dev/null"
    ip netns add "$HOST_NS"
    ip netns add "$WORLD_NS"
    ip -n "$HOST_NS" link add uplink type veth peer name host netns "$WORLD_NS"
    ip -n "$HOST_NS" address add 192.0.2.1/24 dev uplink
    ip -n "$HOST_NS" link set lo up
    ip -n "$HOST_NS" link set uplink up
    ip -n "$HOST_NS" route add default via 192.0.2.2
    ip -n "$WORLD_NS" address add 192.0.2.2/24 dev host
    ip -n "$WORLD_NS" address add "$WORLD_HOST/32" dev lo
    ip -n "$WORLD_NS" link set lo up
    ip -n "$WORLD_NS" link set host up
    # A new namespace refuses ICMP datagram sockets to everyone until this is set.
    in_host sh -c 'echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range'
    spawn dnsmasq ip netns exec "$WORLD_NS" dnsmasq --keep-in-foreground --conf-file=/dev/null \
        --user="$(id -un)" --pid-file= --no-resolv --no-hosts --bind-interfaces \
        --listen-address="$WORLD_DNS" --local=/world.test/ --address="/$WORLD_NAME/$WORLD_HOST"
    spawn web ip netns exec "$WORLD_NS" "$TRANSFER" serve 0.0.0.0:80
    spawn sink ip netns exec "$WORLD_NS" "$TRANSFER" udp-sink 0.0.0.0:9
    if ! wait_until 10 world_answers; then
        show_log dnsmasq
        show_log web
        die "the world's servers did not come up"
    fi
}

# Makes the world's name server the resolver of the host's namespace (ip-netns(8)).
world_is_resolver() {
    on_exit "rm -rf /etc/netns/$HOST_NS"
    mkdir -p "/etc/netns/$HOST_NS"
    echo "nameserver $WORLD_DNS" >"/etc/netns/$HOST_NS/resolv.conf"
}

# Runs a command in the namespace vunet lives in.
in_host() { ip netns exec "$HOST_NS" "$@"; }

# Whether the name server and the web server answer as seen from the host.
world_answers() {
    in_host timeout 5 "$TRANSFER" resolve "$WORLD_NAME" "$WORLD_DNS" >/dev/null \
        && in_host timeout 5 "$TRANSFER" peer "$WORLD_HOST:80" >/dev/null
}
