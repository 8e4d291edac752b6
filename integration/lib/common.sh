# shellcheck shell=bash
# What every script here stands on: messages, a run directory, processes that are ended by pid, and
# waiting with a bound.
#
# A script calls `lab_begin NAME` once. From then on each process started with `spawn` and each undo
# given to `on_exit` is undone, last first, however the script ends; a process also dies by the
# kernel's hand if the script itself is killed (PR_SET_PDEATHSIG).

REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
export PATH="$PATH:/usr/sbin:/sbin"
# Tools are asked for words that are compared, so they must not be translated.
export LC_ALL=C

export TARGET_DIR=${CARGO_TARGET_DIR:-$REPO/target}
RUN_DIR=
# Set by who has printed the line that must be the last.
LAB_SILENT=
UNDO=()

say() { printf '%s\n' "$*"; }
note() { printf '  %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Milliseconds of a clock that only counts up while the script runs.
now_ms() {
    local t=${EPOCHREALTIME//[.,]/}
    printf '%s' "$((t / 1000))"
}

is_root() { [[ $(id -u) == 0 ]]; }

# Runs a command with root's rights: directly, or through sudo.
as_root() {
    if is_root; then
        "$@"
    else
        sudo "$@"
    fi
}

# Whether `as_root` can work: as root, with sudo that asks nothing, or with a person to ask.
can_be_root() {
    is_root && return 0
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null || { [[ -t 0 ]] && sudo -v; }
}

# Makes the run directory and arms the clean-up.
lab_begin() {
    RUN_DIR=$(mktemp -d "/tmp/vunet-$1-XXXXXX")
    chmod 0755 "$RUN_DIR"
    trap lab_end EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# Remembers a command to run at the end.
on_exit() { UNDO+=("$*"); }

lab_end() {
    local status=$? i
    trap - EXIT INT TERM HUP
    set +e
    for ((i = ${#UNDO[@]} - 1; i >= 0; i--)); do
        eval "${UNDO[i]}"
    done
    if [[ -n $LAB_SILENT ]]; then
        rm -rf "$RUN_DIR"
    elif [[ -n ${VUNET_KEEP_LOGS:-} || ($status != 0 && $status != 130) ]]; then
        say "logs are kept in $RUN_DIR"
        find "$RUN_DIR" -type f -size +16M -delete
        rm -f "$RUN_DIR"/initramfs* "$RUN_DIR"/vmlinuz*
    else
        rm -rf "$RUN_DIR"
    fi
    exit "$status"
}

# spawn NAME COMMAND...: starts a daemon with its output in $RUN_DIR/NAME.log and sets SPAWNED to its
# pid. Commands must exec, so that the pid is the daemon's own.
spawn() {
    local name=$1
    shift
    setpriv --pdeathsig KILL -- "$@" </dev/null >>"$RUN_DIR/$name.log" 2>&1 &
    SPAWNED=$!
    on_exit "end_process $SPAWNED"
}

# end_process PID [SIGNAL]: ends a child and waits for it, with SIGKILL after 5 seconds. Silent, as bash
# tells of every child that a signal ended.
end_process() {
    local pid=$1 signal=${2:-TERM} i
    {
        kill -s "$signal" "$pid" || true
        for ((i = 0; i < 100; i++)); do
            is_running "$pid" || break
            sleep 0.05
        done
        kill -s KILL "$pid" || true
        wait "$pid" || true
    } 2>/dev/null
}

# Whether a process exists and is not a zombie.
is_running() {
    local state
    state=$(awk '/^State:/ {print $2}' "/proc/$1/status" 2>/dev/null) || return 1
    [[ -n $state && $state != Z ]]
}

# wait_until SECONDS COMMAND...: polls until the command holds; fails when the time is up.
wait_until() {
    local deadline=$(($(now_ms) + $1 * 1000))
    shift
    until "$@"; do
        (($(now_ms) < deadline)) || return 1
        sleep 0.05
    done
}

# Shows the end of a log of this run, indented.
show_log() {
    local file=$RUN_DIR/$1.log
    [[ -s $file ]] || return 0
    say "  last lines of $1:"
    tail -n "${2:-20}" "$file" | tr -d '\r' | sed 's/^/    | /'
}
