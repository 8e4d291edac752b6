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
        usr/lib/systemd/system/vunet@.socket usr/share/qemu/vhost-user/50-vunet.json usr/share/doc/vunet/copyright; do
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

# property NAME: of the service.
property() { in_machine systemctl show --property "$1" --value vunet@vm1.service; }

# Starts the socket only; the service starts when the VM comes.
units_start() {
    in_machine ln -s "$UNITS/vunet@.socket" "$UNITS/vunet@.service" /run/units/
    in_machine mkdir -p /run/units/vunet@vm1.service.d
    # No journal runs there; and nobody waits for 30 s.
    in_machine sh -c 'printf "[Service]\nStandardError=append:/run/lab/service.log\nWatchdogSec=5\n" >/run/units/vunet@vm1.service.d/lab.conf'
    echo 'control = "/run/vunet/vm1/control"' >"$RUN_DIR/vm1.toml"
    in_machine cp /run/lab/vm1.toml /etc/vunet/
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
    printf 'control = "/run/vunet/vm1/control"\n%s\n' "$1" >"$RUN_DIR/vm1.toml"
    in_machine cp /run/lab/vm1.toml /etc/vunet/
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
    wait_until 10 grep -q 'settings read again.*log-level, dns-host' "$RUN_DIR/service.log" || { property StatusText; return 1; }
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

# Removal and purge leave nothing, but for what dpkg and man know of all packages.
package_leaves_nothing() {
    local left
    in_machine rm /etc/vunet/vm1.toml
    in_machine dpkg --remove vunet
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
    verify 'the service stops' '' service_stops
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
        result_lacking 13 'package and units on a machine of its own' "missing: $lacks"
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
    [[ -z $VERIFIED ]] || guest_on_the_service
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
