# shellcheck shell=bash
# A machine of its own, as far as packages and services can tell: this host's files under an overlay, so that what is
# installed there is never installed here, and a systemd of its own as its first process.
#
# `machine_lacks` says what is missing for it. `machine_up` starts it in the namespaces of $HOST_NS, with the
# folder $RUN_DIR/run as its /run/vunet, so that VMs outside can connect to sockets within. All of it ends with the script.
#
# May touch: mounts of its own namespace, one cgroup that it removes.

MACHINE_PID=
MACHINE_UNSHARE=
MACHINE_CGROUP=

# The unified hierarchy of cgroups, wherever this host has it.
machine_cgroups() {
    local place
    for place in /sys/fs/cgroup /sys/fs/cgroup/unified; do
        [[ ! -f $place/cgroup.procs || ! -f $place/cgroup.controllers ]] || { printf %s "$place"; return 0; }
    done
    return 1
}

# machine_lacks: what this host lacks for it, or nothing.
machine_lacks() {
    grep -qw overlay /proc/filesystems || printf 'overlayfs in the kernel'
    machine_cgroups >/dev/null || printf 'the unified cgroup hierarchy'
}

# machine_enter: the first steps within, as the first process of new mount and process namespaces: the overlay becomes
# the root. Called by `machine_up` only.
machine_enter() {
    local root=$RUN_DIR/root
    mount --make-rprivate /
    mkdir -p "$root" "$RUN_DIR/over"
    mount -t tmpfs -o mode=0755 machine "$RUN_DIR/over"
    mkdir "$RUN_DIR/over/upper" "$RUN_DIR/over/work"
    mount -t overlay -o "lowerdir=/,upperdir=$RUN_DIR/over/upper,workdir=$RUN_DIR/over/work" machine "$root"
    mount -t proc proc "$root/proc"
    # What is changed there would be changed for this host.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    # But for what is the network namespace's alone.
    mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
    mount -o remount,bind,rw "$root/proc/sys/net"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=0755 run "$root/run"
    mkdir "$root/run/vunet" "$root/run/lab" "$root/run/upper"
    mount --bind "$RUN_DIR/run" "$root/run/vunet"
    mount --bind "$RUN_DIR" "$root/run/lab"
    mount --bind "$RUN_DIR/over/upper" "$root/run/upper"
    rm -f "$root/etc/resolv.conf"
    echo "nameserver $WORLD_DNS" >"$root/etc/resolv.conf"
    cd "$root" || exit
    pivot_root . .
    umount -l .
    # Nothing of this host's own units: what it starts is what the test asks for.
    mkdir /run/units
    for target in sysinit basic sockets shutdown; do
        printf '[Unit]\nDescription=%s\n' "$target" >"/run/units/$target.target"
    done
    printf '[Unit]\nDescription=the machine\nDefaultDependencies=no\n' >/run/units/machine.target
    export container=lab SYSTEMD_UNIT_PATH=/run/units SYSTEMD_GENERATOR_PATH=/nonexistent \
        SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nonexistent
    exec /lib/systemd/systemd --system --unit=machine.target --log-target=console --show-status=no --crash-reboot=no
}

# machine_up: starts it, and waits until its systemd answers.
machine_up() {
    MACHINE_CGROUP=$(machine_cgroups)/vunet-machine-$$
    mkdir -p "$MACHINE_CGROUP" "$RUN_DIR/run"
    on_exit machine_cgroup_remove
    spawn machine bash -c "echo \$\$ >'$MACHINE_CGROUP/cgroup.procs' && exec \"\$@\"" machine \
        ip netns exec "$HOST_NS" unshare --mount --pid --uts --ipc --cgroup --fork --kill-child=KILL \
        bash -c "set -euo pipefail; $(declare -f machine_enter); RUN_DIR='$RUN_DIR' WORLD_DNS='$WORLD_DNS'; machine_enter"
    MACHINE_UNSHARE=$SPAWNED
    if ! wait_until 20 machine_answers; then
        show_log machine
        die "the machine did not come up"
    fi
}

# Whether its systemd takes orders; finds it, the first process in the namespaces that were made.
machine_answers() {
    local pid
    # What was spawned has become `unshare`, whose child is the first process.
    pid=$(pgrep --parent "$MACHINE_UNSHARE" || true)
    [[ -n $pid ]] || return 1
    MACHINE_PID=$pid
    in_machine systemctl list-units >/dev/null 2>&1
}

# in_machine COMMAND...: runs it there, as root.
in_machine() { nsenter --target "$MACHINE_PID" --mount --uts --ipc --pid --cgroup --net -- "$@"; }

machine_down() {
    [[ -z $MACHINE_PID ]] || end_process "$MACHINE_UNSHARE" KILL
    MACHINE_PID=
}

machine_cgroup_remove() {
    local i
    for ((i = 0; i < 40; i++)); do
        find "$MACHINE_CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null
        [[ -d $MACHINE_CGROUP ]] || return 0
        sleep 0.05
    done
}
