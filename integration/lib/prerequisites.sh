#!/usr/bin/env bash
# Installs what the demo and the tests need and this machine lacks. Sourced by the scripts, or run by
# hand: integration/lib/prerequisites.sh demo|test
#
# Two kinds. Tools are installed with apt-get (through sudo when not root), each with its reason said
# first. The guests' kernel and busybox, and daemons of the tests, are only downloaded and unpacked below
# target/guest-cache, so that neither the machine's boot set-up nor its own busybox or servers change.
#
# May touch: the machine's packages, target/guest-cache.

[[ $(type -t say) == function ]] || {
    set -euo pipefail
    # shellcheck source-path=SCRIPTDIR source=common.sh
    source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
}

GUEST_CACHE=$TARGET_DIR/guest-cache
APT_SECONDS_MAX=900

# command or file|package|why
TOOLS_DEMO='qemu-system-x86_64|qemu-system-x86|runs the Linux guest
ip|iproute2|makes the network namespaces
setpriv|util-linux|runs vunet as an ordinary user
dnsmasq|dnsmasq-base|answers DNS in the world
cpio|cpio|packs the guest'"'"'s initramfs
cc|gcc|links what cargo builds
/usr/include/stdlib.h|libc6-dev|is the C library to link with
xz|xz-utils|unpacks compressed kernel modules'
TOOLS_TEST='shellcheck|shellcheck|checks these scripts
sysctl|procps|sets a namespace'"'"'s kernel parameters
dig|bind9-dnsutils|asks every record type in the namespace guest
iperf3|iperf3|loads the namespace guest
curl|curl|fetches in the namespace guest
ping|iputils-ping|pings from the namespace guest
traceroute|traceroute|traces routes from the namespace guest
mtr|mtr-tiny|traces them too
tracepath|iputils-tracepath|finds the MTU of a path
dhclient|isc-dhcp-client|is a DHCP client of the namespace guest
udhcpc|udhcpc|is another DHCP client
strace|strace|counts system calls
tshark|tshark|reads captures
tcpdump|tcpdump|reads them too
nft|nftables|makes hosts that refuse or stall
iptables-legacy|iptables|filters as hosts with old tables do
ssh|openssh-client|logs in from the namespace guest
git|git|clones and pushes through the NAT
nc.openbsd|netcat-openbsd|half-closes connections
nghttpd|nghttp2-server|serves HTTP/2 to the namespace guest
h2load|nghttp2-client|asks for many HTTP/2 streams at once
/usr/lib/x86_64-linux-gnu/libwrap.so.0|libwrap0|is a library of sshd
/usr/lib/x86_64-linux-gnu/libseccomp.so.2|libseccomp2|is a library of chronyd
/usr/lib/x86_64-linux-gnu/libgnutls.so.30|libgnutls30|is a library of chronyd
linux.uml|user-mode-linux|is a guest kernel with a front-end of its own
dpdk-testpmd|dpdk-dev|is a front-end with a driver of its own
/lib/systemd/systemd|systemd|runs the units
systemd-analyze|systemd|checks the units
groff|groff-base|checks the manual pages
man|man-db|shows them
virt-xml-validate|libvirt-clients|checks the libvirt example
libvirtd|libvirt-daemon|starts it
/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so|libvirt-daemon-driver-qemu|is how that starts QEMU
xmllint|libxml2-utils|is what that stands on
python3|python3-minimal|runs the hook for KubeVirt
dpkg-shlibdeps|dpkg-dev|finds what the package depends on
strip|binutils|leaves debug information out of the package'

# Daemons whose packages would start them on this machine: unpacked below target/guest-cache, where the tests
# look for them, and not installed.
DAEMONS_TEST='sshd|openssh-server|lets the namespace guest log in
chronyd|chrony|tells the namespace guest the time
promtool|prometheus|checks metrics'

# prerequisites_list demo|test: the tools of a purpose, one a line.
prerequisites_list() {
    case $1 in
    demo) printf '%s\n' "$TOOLS_DEMO" ;;
    test) printf '%s\n%s\n' "$TOOLS_DEMO" "$TOOLS_TEST" ;;
    *) die "prerequisites are listed for demo and test, not $1" ;;
    esac
}

# have_tool COMMAND|FILE: whether it is there.
have_tool() {
    case $1 in
    /*) [[ -e $1 ]] ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

# have_tools COMMAND|FILE...: whether all are there; sets LACKING to those that are not.
have_tools() {
    local tool
    LACKING=
    for tool in "$@"; do
        have_tool "$tool" || LACKING+="${LACKING:+, }$tool"
    done
    [[ -z $LACKING ]]
}

# Runs apt-get with root's rights, quietly and within a bound; its log is shown when it fails.
apt_as_root() {
    local log
    log=$(mktemp)
    if ! as_root env DEBIAN_FRONTEND=noninteractive timeout "$APT_SECONDS_MAX" \
        apt-get -o DPkg::Lock::Timeout=300 -q "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" | sed 's/^/    | /' >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# Refreshes the package lists once a run.
apt_refresh() {
    [[ -z ${APT_REFRESHED:-} ]] || return 0
    APT_REFRESHED=1
    note "refreshing apt's package lists"
    apt_as_root update || warn "apt-get update failed; going on with the lists there are"
}

have_daemon() {
    have_tool "$1" || [[ -x /usr/sbin/$1 || -x $GUEST_CACHE/$2/usr/sbin/$1 || -x $GUEST_CACHE/$2/usr/bin/$1 ]]
}

# Unpacks the daemons of the tests that are missing; who needs one says so when it is not there.
daemons_unpack() {
    local daemon package why
    while IFS='|' read -r daemon package why; do
        ! have_daemon "$daemon" "$package" || continue
        note "downloading $package into target/guest-cache (nothing is installed): $daemon $why"
        # In a shell of its own, which alone ends if that fails.
        (unpack_package "$package" "$GUEST_CACHE/$package") || warn "could not unpack $package"
    done <<<"$DAEMONS_TEST"
}

# prerequisites_install demo|test: installs the tools that are missing. Never fails by itself: who
# needs a tool asks `have_tools`, and says what it could not do without.
prerequisites_install() {
    tools_install "$1"
    [[ $1 != test ]] || daemons_unpack
}

tools_install() {
    local tool package why packages=()
    while IFS='|' read -r tool package why; do
        ! have_tool "$tool" || continue
        [[ ${#packages[@]} != 0 ]] || say "installing what is missing with apt-get:"
        note "$package: ${tool##*/} $why"
        packages+=("$package")
    done < <(prerequisites_list "$1")
    [[ ${#packages[@]} != 0 ]] || return 0
    if ! command -v apt-get >/dev/null || ! can_be_root; then
        warn "cannot install: this needs apt-get, and root or sudo"
        return 0
    fi
    apt_refresh
    # One by one if all at once fails: a package this release lacks must not take the others with it.
    if ! apt_as_root install -y --no-install-recommends "${packages[@]}"; then
        for package in "${packages[@]}"; do
            apt_as_root install -y --no-install-recommends "$package" || warn "could not install $package"
        done
    fi
    hash -r
}

# unpack_package PACKAGE DIRECTORY: downloads a package and unpacks it there, installing nothing.
unpack_package() {
    local package=$1 directory=$2 scratch options=()
    command -v apt-get >/dev/null || die "$package is needed and there is no apt-get to download it with"
    ! is_root || options=(-o APT::Sandbox::User=root)
    scratch=$(mktemp -d)
    if ! (cd "$scratch" && timeout "$APT_SECONDS_MAX" apt-get "${options[@]}" -q download "$package") \
        >"$scratch/log" 2>&1; then
        apt_refresh
        (cd "$scratch" && timeout "$APT_SECONDS_MAX" apt-get "${options[@]}" -q download "$package") \
            >"$scratch/log" 2>&1 || {
            sed 's/^/    | /' "$scratch/log" >&2
            die "could not download the package $package"
        }
    fi
    rm -rf "$directory" "$directory.part"
    mkdir -p "$directory.part"
    dpkg -x "$scratch"/*.deb "$directory.part"
    mv "$directory.part" "$directory"
    rm -rf "$scratch"
}

# guest_busybox: sets BUSYBOX to a static busybox, downloaded if need be.
guest_busybox() {
    BUSYBOX=$GUEST_CACHE/busybox/bin/busybox
    [[ -x $BUSYBOX ]] && return 0
    BUSYBOX=$GUEST_CACHE/busybox/usr/bin/busybox
    [[ -x $BUSYBOX ]] && return 0
    note "downloading busybox-static into target/guest-cache: the guest's user space"
    unpack_package busybox-static "$GUEST_CACHE/busybox"
    BUSYBOX=$(find "$GUEST_CACHE/busybox" -path '*bin/busybox' -type f | head -n 1)
    [[ -x $BUSYBOX ]] || die "busybox-static holds no busybox"
}

# guest_kernel: sets KERNEL and KERNEL_MODULES to Debian's cloud kernel, downloaded if need be.
guest_kernel() {
    local package
    if [[ ! -d $GUEST_CACHE/kernel ]]; then
        package=$(cloud_kernel_package)
        [[ -n $package ]] || { apt_refresh; package=$(cloud_kernel_package); }
        [[ -n $package ]] || die "apt knows no linux-image-cloud-amd64: is this Debian on x86-64?"
        note "downloading $package into target/guest-cache: the guest's kernel (nothing is installed)"
        unpack_package "$package" "$GUEST_CACHE/kernel"
    fi
    KERNEL=$(find "$GUEST_CACHE/kernel" -path '*/boot/vmlinuz-*' | head -n 1)
    KERNEL_MODULES=$(find "$GUEST_CACHE/kernel" -path '*/lib/modules/*' -name kernel -type d | head -n 1)
    [[ -n $KERNEL && -n $KERNEL_MODULES ]] || die "$GUEST_CACHE/kernel is incomplete: remove it and try again"
}

# The package the meta package stands for, if the lists know it.
cloud_kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null \
        | awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ {print $2; exit}'
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    prerequisites_install "${1:-test}"
    while IFS='|' read -r tool package _; do
        have_tools "$tool" || warn "still missing: $tool (package $package)"
    done < <(prerequisites_list "${1:-test}")
    while IFS='|' read -r tool package _; do
        have_daemon "$tool" "$package" || warn "still missing: $tool (package $package)"
    done <<<"$DAEMONS_TEST"
fi
