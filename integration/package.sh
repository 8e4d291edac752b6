#!/usr/bin/env bash
# What packagers and operators get: manual pages, examples, the Debian package, the systemd units with a guest on them.
#
#   integration/package.sh
#
# The package is installed and removed on a machine of its own (lib/machine.sh): this host's files under an overlay, with
# a systemd of its own; nothing is installed on this host. Needs root (through sudo otherwise).

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
for library in prerequisites results world backend guest qemu machine deb libvirt; do
    # shellcheck source=/dev/null
    source "$REPO/integration/lib/$library.sh"
done

# Exposure that `systemd-analyze security` may find, in tenths: what is left is the network itself.
EXPOSURE_MAX=15
UNITS=/usr/lib/systemd/system
# Where enabled sockets are.
WANTED=/etc/systemd/system/sockets.target.wants

# verify NAME TOOLS COMMAND...: one check, skipped by name where tools are lacking; VERIFIED says whether it passed. Each
# command of it has to succeed, which holds only where the caller asks for no status: never behind `if`, `||` or `&&`.
verify() {
    local name=$1 tools=$2 log=$RUN_DIR/check.log status
    shift 2
    VERIFIED=
    # shellcheck disable=SC2086 # one word a tool
    if ! have_tools $tools; then
        result_lacking 1 "$name" "missing: $LACKING"
        return 0
    fi
    set +e
    (set -e; "$@") >"$log" 2>&1 </dev/null
    status=$?
    set -e
    if [[ $status == 0 ]]; then
        VERIFIED=yes
        result passed 1 "$name"
        say "held: $name"
    else
        sed 's/^/    | /' "$log" >&2
        result failed 1 "$name"
    fi
}

# Every page is in order for groff, and its words are found by man.
manual_pages() {
    local page said
    for page in "$REPO"/target/package/man/*.1; do
        said=$(groff -k -man -ww -z -Tutf8 "$page" 2>&1)
        [[ -z $said ]] || { echo "${page##*/}: $said"; return 1; }
        MANWIDTH=80 man -l "$page" >"$RUN_DIR/page.txt"
        grep -q '^NAME$' "$RUN_DIR/page.txt" || { echo "${page##*/} has no NAME"; return 1; }
    done
}

# Each shell takes its completions, and bash completes with them.
completions() {
    local words
    bash -n "$REPO/target/package/completions/vunet"
    # shellcheck disable=SC1091,SC2034 # made by the program; read by the completion
    words=$(
        source "$REPO/target/package/completions/vunet"
        COMP_WORDS=(vunet --pub) COMP_CWORD=1
        _vunet vunet --pub vunet
        echo "${COMPREPLY[*]}"
    )
    [[ $words == --publish ]] || { echo "bash completes --pub to '$words'"; return 1; }
    ! command -v zsh >/dev/null || zsh -n "$REPO/target/package/completions/_vunet"
    ! command -v fish >/dev/null || fish --no-execute "$REPO/target/package/completions/vunet.fish"
}

libvirt_domain() {
    local domain=$REPO/contrib/libvirt/domain.xml
    virt-xml-validate "$domain" domain
    # The same after KubeVirt's hook, whose interface has to be one more.
    "$REPO/contrib/kubevirt/on-define-domain" --vmi '{"metadata": {"annotations": {"vunet/mac": "52:54:00:00:00:07"}}}' \
        --domain "$(cat "$domain")" >"$RUN_DIR/hooked.xml"
    virt-xml-validate "$RUN_DIR/hooked.xml" domain
    [[ $(grep -o "type=\"vhostuser\"" "$RUN_DIR/hooked.xml" | wc -l) == 2 ]]
    grep -q 'address="52:54:00:00:00:07"' "$RUN_DIR/hooked.xml"
    # A domain that has nothing of it yet.
    "$REPO/contrib/kubevirt/on-define-domain" --vmi '{"metadata": {"annotations": null}}' \
        --domain '<domain type="kvm"><name>a</name><memory>1</memory><os><type>hvm</type></os></domain>' >"$RUN_DIR/bare.xml"
    virt-xml-validate "$RUN_DIR/bare.xml" domain
    grep -q 'mode="shared"' "$RUN_DIR/bare.xml"
}

# What the package says of itself, and what it holds.
package_fields() {
    local contents file
    [[ $(dpkg-deb --field "$DEB" Package) == vunet ]]
    [[ $(dpkg-deb --field "$DEB" Depends) == *libc6* ]]
    contents=$(dpkg-deb --contents "$DEB")
    for file in usr/bin/vunet usr/share/man/man1/vunet.1.gz usr/share/man/man1/vunet-network-create.1.gz \
        usr/share/bash-completion/completions/vunet usr/share/zsh/vendor-completions/_vunet \
        usr/share/fish/vendor_completions.d/vunet.fish usr/lib/systemd/system/vunet@.service \
        usr/lib/systemd/system/vunet@.socket usr/lib/sysusers.d/vunet.conf usr/share/vunet/systemd/link.conf \
        usr/share/vunet/systemd/network.conf usr/share/qemu/vhost-user/50-vunet.json usr/share/doc/vunet/copyright; do
        grep -q " \./$file$" <<<"$contents" || { echo "the package has no $file"; return 1; }
    done
}

package_installs() {
    local version
    cp "$DEB" "$RUN_DIR/vunet.deb"
    # Their packages are as they are on this host.
    in_machine dpkg --install --force-depends /run/lab/vunet.deb
    version=$(in_machine vunet --version)
    [[ $version == "vunet $(dpkg-deb --field "$DEB" Version | sed 's/-[0-9]*$//')" ]] || { echo "$version"; return 1; }
    in_machine man --path vunet-network-create | grep -q vunet-network-create.1
    in_machine test -d /etc/vunet
}

units_hold() {
    in_machine systemd-analyze verify "$UNITS/vunet@.socket" "$UNITS/vunet@.service"
    in_machine systemd-analyze security --offline=true --no-pager --threshold=$EXPOSURE_MAX "$UNITS/vunet@.service"
}

# property NAME [VM]: of its service.
property() { in_machine systemctl show --property "$1" --value "vunet@${2:-vm1}.service"; }

# settings VM TEXT
settings() {
    printf '%s\n' "$2" >"$RUN_DIR/$1.toml"
    in_machine cp "/run/lab/$1.toml" /etc/vunet/
}

# instance VM SETTINGS [DROP_IN]: makes its service ready, with a drop-in of the package.
instance() {
    local place=/run/units/vunet@$1.service.d
    in_machine mkdir -p "$place"
    # No journal runs there; and nobody waits for 30 s, nor for 2.
    printf '[Service]\nStandardError=append:/run/lab/%s.log\nWatchdogSec=5\nRestartSec=0.2\n' "$1" >"$RUN_DIR/lab.conf"
    in_machine cp /run/lab/lab.conf "$place/"
    [[ -z ${3:-} ]] || in_machine install -D -m 0644 "/usr/share/vunet/systemd/$3.conf" "$place/$3.conf"
    in_machine systemctl daemon-reload
    settings "$1" "$2"
}

# Starts the socket only; the service starts when the VM comes.
units_start() {
    in_machine ln -s "$UNITS/vunet@.socket" "$UNITS/vunet@.service" /run/units/
    instance vm1 'control = "/run/vunet/vm1/control"'
    # As the machine begins with no units but the tests', this is for the next start, and for the removal.
    in_machine systemctl --quiet --root=/ enable vunet@vm1.socket
    in_machine test -L "$WANTED/vunet@vm1.socket"
    in_machine systemctl start vunet@vm1.socket
    [[ $(property ActiveState) == inactive ]]
    [[ $(stat -c '%a %G' "$RUN_DIR/run/vm1.sock") == '660 kvm' ]] || { stat "$RUN_DIR/run/vm1.sock"; return 1; }
}

# Whose it is and what it may, as the kernel has it.
service_is_confined() {
    local status
    [[ $(property ActiveState) == active ]] || { in_machine systemctl status vunet@vm1.service; return 1; }
    status=$(in_machine cat "/proc/$(property MainPID)/status")
    grep -Eq '^Uid:\s+6[1-5][0-9]{3}\b' <<<"$status" || { grep Uid <<<"$status"; return 1; }
    [[ $(awk '/^Cap(Prm|Eff|Bnd|Inh|Amb):/ {print $2}' <<<"$status" | sort -u) == 0000000000000000 ]]
    grep -Eq '^NoNewPrivs:\s+1$' <<<"$status"
    grep -Eq '^Seccomp:\s+2$' <<<"$status"
    [[ $(property StatusText) == serving*': a VM is attached' ]]
    # Root may ask it, and nobody else gets there.
    in_machine vunet ctl --control /run/vunet/vm1/control status
    ! in_machine setpriv --reuid nobody --regid nogroup --clear-groups vunet ctl --control /run/vunet/vm1/control status
}

# reload TEXT: with these settings too.
reload() {
    settings vm1 "control = \"/run/vunet/vm1/control\"
$1"
    in_machine systemctl reload vunet@vm1.service
}

# status_says PATTERN: what the service says of itself, once it is active.
# shellcheck disable=SC2053 # it is one
status_says() { [[ $(property ActiveState) == active && $(property StatusText) == $1 ]]; }

service_reloads() {
    reload 'ip-mtu = 9000'
    wait_until 10 status_says 'serving*: a VM is attached; *ip-mtu cannot change while vunet runs*' || { property StatusText; return 1; }
    reload "dns-host = [\"db=$WORLD_HOST\"]
log-level = \"debug\""
    wait_until 10 grep -q 'settings read again.*log-level, dns-host' "$RUN_DIR/vm1.log" || { property StatusText; return 1; }
    wait_until 10 status_says 'serving*: a VM is attached' || { property StatusText; return 1; }
}

watchdog_told() { [[ $(property WatchdogTimestampMonotonic) != "$1" ]]; }
restarted() { [[ $(property NRestarts) == "$1" && $(property ActiveState) == active ]]; }

# It tells that it lives; one that does not any more is killed and started anew.
watchdog_watches() {
    wait_until 10 watchdog_told "$(property WatchdogTimestampMonotonic)"
    in_machine kill -s STOP "$(property MainPID)"
    wait_until 30 restarted 1
}

service_stops() {
    in_machine systemctl stop vunet@vm1.socket vunet@vm1.service
    [[ $(property Result) == success ]] || { property Result; return 1; }
    [[ ! -e $RUN_DIR/run/vm1.sock ]]
}

# in_status VM PATTERN: the fields of its process's status, as the kernel has it.
in_status() { in_machine cat "/proc/$(property MainPID "$1")/status" | awk -v pattern="$2" '$1 ~ pattern {print $2}' | sort -u; }

is_serving() { [[ $(property ActiveState "$1") == active && $(property StatusText "$1") == serving* ]]; }

# serves VM: that it does, after its start.
serves() { is_serving "$1" || { show_log "$1"; return 1; }; }

# One VM's service may not steer another's.
services_are_apart() {
    instance vm2 'control = "/run/vunet/vm2/control"'
    in_machine systemctl start vunet@vm1.service vunet@vm2.service
    serves vm1
    serves vm2
    local user
    user=$(in_status vm2 ^Uid:)
    [[ $user != "$(in_status vm1 ^Uid:)" ]] || { echo "both are $user"; return 1; }
    in_machine setpriv --reuid "$user" --clear-groups vunet ctl --control /run/vunet/vm2/control status
    ! in_machine setpriv --reuid "$user" --clear-groups vunet ctl --control /run/vunet/vm1/control status
}

tried() { (($(property NRestarts vm2) >= $1)); }
came_back() { [[ $(property MainPID vm2) != "$1" ]] && is_serving vm2; }

# Neither wrong settings nor crashes cost the socket, which a VM waits at: once it can be served it is.
the_socket_stays() {
    local pid turn
    trap '[[ $? == 0 ]] || in_machine systemctl status vunet@vm2.service vunet@vm2.socket' EXIT
    in_machine systemctl stop vunet@vm2.service
    settings vm2 'colour = 1'
    spawn vm2-nc nc.openbsd -U "$RUN_DIR/run/vm2.sock"
    wait_until 20 tried 8
    [[ -S $RUN_DIR/run/vm2.sock ]]
    settings vm2 ''
    wait_until 20 came_back 0
    for ((turn = 0; turn < 6; turn++)); do
        pid=$(property MainPID vm2)
        in_machine kill -s KILL "$pid"
        wait_until 20 came_back "$pid"
    done
    in_machine systemctl stop vunet@vm2.socket vunet@vm2.service
}

# Two VMs on one network, by the drop-in, and root beside them.
services_share_a_network() {
    local user vm
    in_machine vunet network create lab
    user=$(in_machine id -u vunet)
    # What a service lacks that is confined more is named.
    instance vm3 'network = "lab"' network
    printf '[Service]\nProcSubset=pid\n' >"$RUN_DIR/lab.conf"
    in_machine cp /run/lab/lab.conf /run/units/vunet@vm3.service.d/zz.conf
    in_machine systemctl daemon-reload
    if in_machine systemctl start vunet@vm3.service; then echo 'it started without /proc/sys'; return 1; fi
    grep -q 'cannot read /proc/sys/kernel/random/boot_id' "$RUN_DIR/vm3.log"
    in_machine systemctl stop vunet@vm3.service
    in_machine rm /run/units/vunet@vm3.service.d/zz.conf
    for vm in vm3 vm4; do
        instance $vm 'network = "lab"' network
        in_machine systemctl start vunet@$vm.service
        serves $vm
        [[ $(in_status $vm ^Uid:) == "$user" && $(in_status $vm ^CapEff:) == 0000000000001000 ]]
    done
    [[ $(in_machine vunet network list | awk '$1 == "lab" {print $NF}') == 2 ]] || { in_machine vunet network inspect lab; return 1; }
    in_machine vunet network create beside --mode host-only
    in_machine vunet network remove beside
    if in_machine vunet network remove lab; then echo 'a network in use was removed'; return 1; fi
    in_machine systemctl restart vunet@vm3.service
    serves vm3
    # Root joins none of them itself, whose files nobody else could use.
    [[ $(in_machine timeout 10 vunet --socket-path /run/root.sock --network lab 2>&1) == *'run this as that user'* ]]
    # The last that is killed leaves the network on the host, and root takes it away.
    in_machine systemctl stop vunet@vm3.service vunet@vm3.socket
    printf '[Service]\nRestart=no\n' >"$RUN_DIR/lab.conf"
    in_machine cp /run/lab/lab.conf /run/units/vunet@vm4.service.d/no-restart.conf
    in_machine systemctl daemon-reload
    in_machine systemctl kill --signal KILL vunet@vm4.service
    wait_until 10 has_failed vm4
    [[ -n $(ip -n "$HOST_NS" -o link show type bridge) ]]
    in_machine vunet network remove lab
    [[ -z $(ip -n "$HOST_NS" -o link show type bridge) ]]
    in_machine systemctl stop vunet@vm4.socket
    # For the purge.
    in_machine vunet network create kept
}

has_failed() { [[ $(property ActiveState "$1") == failed ]]; }

# On a bridge of the host's, where the guest's lease is kept.
service_on_a_link() {
    ip -n "$HOST_NS" link add br0 type bridge
    ip -n "$HOST_NS" link set br0 up
    instance vm5 $'mode = "bridge"\nuplink = "bridge=br0"' link
    in_machine systemctl start vunet@vm5.service
    serves vm5
    [[ $(in_status vm5 ^CapEff:) == 0000000000001000 && $(in_status vm5 ^Uid:) != "$(in_status vm1 ^Uid:)" ]]
    if grep -i lease "$RUN_DIR/vm5.log"; then return 1; fi
    in_machine test -d /var/lib/vunet-vms/vm5/stations
    in_machine systemctl stop vunet@vm5.service vunet@vm5.socket
}

# Removal and purge leave nothing, but for what dpkg and man know of all packages, and the user of services on networks.
package_leaves_nothing() {
    local left
    in_machine sh -c 'rm /etc/vunet/vm?.toml'
    in_machine test -d /var/lib/vunet/networks/kept
    in_machine dpkg --remove vunet
    in_machine test ! -L "$WANTED/vunet@vm1.socket"
    in_machine test -d /var/lib/vunet/networks/kept
    in_machine dpkg --purge vunet
    in_machine test ! -e /etc/vunet
    left=$(in_machine find /run/upper -name '*vunet*' ! -type c ! -path '*/tmp/*' ! -path '*/var/cache/man/*')
    [[ -z $left ]] || { echo "left behind: $left"; return 1; }
    ! in_machine dpkg --status vunet
}

# guest_held NAME STEP...: one check, of steps in the guest.
guest_held() {
    local name=$1
    shift
    if guest_steps "$@"; then
        result passed 1 "$name"
    else
        result failed 1 "$name"
    fi
}

services() {
    guest_on_the_service
    verify 'services are apart' '' services_are_apart
    verify 'neither wrong settings nor crashes cost the socket' nc.openbsd the_socket_stays
    verify 'services share a named network' nft services_share_a_network
    verify 'a service on a bridge' '' service_on_a_link
    verify 'the service stops' '' service_stops
}

# The units with a guest on them: QEMU outside, in the group that the socket is for.
guest_on_the_service() {
    # shellcheck disable=SC2034 # what is set here is read by the libraries
    SOCKET=$RUN_DIR/run/vm1.sock BACKEND_NAME=service
    chmod 0755 "$RUN_DIR/run"
    # shellcheck disable=SC2034 # the same
    LAB_GID=$(getent group kvm | cut -d : -f 3)
    # shellcheck disable=SC2034 # the same
    VUNET_GUEST_APPEND='vunet.neighbour=db.vunet.internal'
    if ! { qemu_start pc ',reconnect=1' && guest_steps lease gateway name download upload world; }; then
        show_log machine
        result failed 1 'a guest on the service'
        return 0
    fi
    result passed 1 'a guest on the service'
    verify 'the service is confined' '' service_is_confined
    verify 'the service reloads' '' service_reloads
    # The name came with the reload.
    guest_held 'the guest sees what was reloaded' known
    verify 'the watchdog watches' '' watchdog_watches
    # The socket was systemd's all the time, so that QEMU came back to the new process.
    guest_held 'the guest after a restart by the watchdog' gateway name known download
    guest_stop
    domain_on_the_service
}

# The same with libvirt starting the example's domain.
domain_on_the_service() {
    local name="libvirt's domain on the service"
    if ! have_tools libvirtd virsh; then
        result_lacking 2 "$name" "missing: $LACKING"
        return 0
    fi
    if ! { libvirt_up && libvirt_start; }; then
        show_log libvirtd
        result failed 1 "$name"
        return 0
    fi
    guest_held "$name" link lease gateway name download upload world
    in_machine systemctl restart vunet@vm1.service
    guest_held "$name after a restart of the service" gateway name download
    guest_stop
}

on_a_machine() {
    local lacks
    lacks=$(machine_lacks)
    have_tools ip unshare nsenter pivot_root systemd-analyze dpkg dnsmasq qemu-system-x86_64 || lacks+=" $LACKING"
    getent group kvm >/dev/null || lacks+=' the group kvm'
    if [[ -n $lacks ]]; then
        result_lacking 17 'package and units on a machine of its own' "missing: $lacks"
        return 0
    fi
    stage_programs
    qemu_stage
    world_up
    machine_up
    verify 'the package installs' '' package_installs
    [[ -n $VERIFIED ]] || return 0
    verify 'the units hold (systemd-analyze)' '' units_hold
    verify 'the units start' '' units_start
    [[ -z $VERIFIED ]] || services
    verify 'the package leaves nothing' '' package_leaves_nothing
    machine_down
}

prepare() {
    prerequisites_install test
    build_programs
    guest_kernel
    guest_busybox
    deb_build
}

run() {
    DEB=$REPO/target/package/vunet.deb
    verify 'manual pages (groff -ww)' 'groff man' manual_pages
    verify 'completions' '' completions
    verify "libvirt's domain (virt-xml-validate)" 'virt-xml-validate xmllint python3' libvirt_domain
    verify "the package's contents" dpkg-deb package_fields
    on_a_machine
}

[[ $# == 0 ]] || die "usage: integration/package.sh"
[[ -n ${VUNET_PREPARED:-} ]] || prepare
if ! is_root; then
    say "network namespaces need root: going on through sudo"
    exec sudo VUNET_PREPARED=1 ${CI:+CI="$CI"} ${VUNET_RESULTS:+VUNET_RESULTS="$VUNET_RESULTS"} \
        ${CARGO_TARGET_DIR:+CARGO_TARGET_DIR="$CARGO_TARGET_DIR"} "$REPO/integration/package.sh"
fi
SUMMING=${VUNET_RESULTS:-}
lab_begin package
results_begin
run
[[ -n $SUMMING ]] || results_end
