# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is for the scripts that source it
# Starts a guest, speaks with its `init` over the console, and judges the steps it reports.
#
# A guest's console is a fifo in and a log out. `guest_steps` sends one line, waits for the answer
# that carries its token, and shows each step as it ends. Starting the guest itself is `qemu.sh`'s or
# `uml.sh`'s.

GUEST_PID=
CONSOLE_LOG=
CONSOLE_MARK=0
STEP_TOKEN=0
declare -A STEP_TITLES=(
    [link]='link up'
    [lease]='lease obtained'
    [gateway]='gateway pinged'
    [name]='name resolved'
    [download]='64 MiB downloaded'
    [upload]='64 MiB uploaded, half-closed'
    [upload_open]='64 MiB uploaded, kept open'
    [world]='world host pinged'
    [peer]='address seen by the world'
    [serve]='server started'
    [neighbour]='neighbour found by its names'
    [known]='name of the settings resolved'
)
declare -A STEP_MS=()
STEPS_ALL='lease gateway name download upload upload_open world'

# What is known of the guest, put aside under a name while another is spoken with, and taken up again.
GUEST_STATE='GUEST_PID CONSOLE_NAME CONSOLE_FIFO CONSOLE_LOG CONSOLE_MARK CONSOLE_FD BACKEND_PID BACKEND_NAME SOCKET'
declare -A PARKED=()
guest_park() { local variable; for variable in $GUEST_STATE; do PARKED[$1.$variable]=${!variable:-}; done; }
guest_take() { local variable; for variable in $GUEST_STATE; do printf -v "$variable" %s "${PARKED[$1.$variable]}"; done; }

# console_open NAME: makes the console's fifo and log, and holds the fifo open for writing.
console_open() {
    CONSOLE_NAME=$1
    CONSOLE_FIFO=$RUN_DIR/$1.fifo
    CONSOLE_LOG=$RUN_DIR/$1.log
    CONSOLE_MARK=0
    rm -f "$CONSOLE_FIFO"
    mkfifo "$CONSOLE_FIFO"
    : >"$CONSOLE_LOG"
    exec {CONSOLE_FD}<>"$CONSOLE_FIFO"
}

console_close() {
    [[ -z ${CONSOLE_FD:-} ]] || exec {CONSOLE_FD}>&-
    CONSOLE_FD=
}

console_send() { printf '%s\n' "$*" >&"$CONSOLE_FD"; }

# What the console said since the mark.
console_since_mark() { tail -c +$((CONSOLE_MARK + 1)) "$CONSOLE_LOG" | tr -d '\r'; }
console_says() { console_since_mark | grep -aq "$1"; }
console_mark() { CONSOLE_MARK=$(stat -c %s "$CONSOLE_LOG"); }

# guest_says_or_died PATTERN: whether waiting on can end.
guest_says_or_died() { console_says "$1" || ! is_running "$GUEST_PID"; }

# guest_await PATTERN SECONDS WHAT: waits for a line on the console; shows both logs if none comes.
guest_await() {
    wait_until "$2" guest_says_or_died "$1" || true
    console_says "$1" && return 0
    if is_running "$GUEST_PID"; then
        say "FAIL  $3: not within $2 s"
    else
        say "FAIL  $3: the guest has ended"
    fi
    show_log "$CONSOLE_NAME"
    show_log "$BACKEND_NAME"
    return 1
}

# guest_await_boot: waits until the guest's init takes orders.
guest_await_boot() {
    local begun
    begun=$(now_ms)
    guest_await '^VUNET-READY' 120 'guest booted' || return 1
    show_step ok 'guest booted' "$(($(now_ms) - begun))" ''
    console_since_mark | grep -a '^VUNET-NOTE' | sed 's/^/  /' || true
}

# show_step ok|FAIL TITLE MS DETAIL
show_step() { printf '%-5s %-30s %6d ms  %s\n' "$1" "$2" "$3" "$4"; }

# guest_steps NAME...: runs steps in the guest, shows each, and fails if one failed. Leaves the times
# in STEP_MS.
guest_steps() {
    local shown=0 deadline=$(($(now_ms) + 90000 * $#)) line
    STEP_TOKEN=$((STEP_TOKEN + 1))
    console_mark
    console_send "steps $STEP_TOKEN $*"
    while :; do
        while IFS= read -r line; do
            shown=$((shown + 1))
            step_line "$line"
        done < <(console_since_mark | grep -a '^VUNET-STEP .*' | sed '$!b; /ms/!d' | tail -n +$((shown + 1)))
        console_says "^VUNET-DONE $STEP_TOKEN [0-9]" && (($(step_lines) <= shown)) && break
        if ! is_running "$GUEST_PID" || (($(now_ms) > deadline)); then
            guest_await "^VUNET-DONE $STEP_TOKEN" 1 "steps $*"
            return 1
        fi
        sleep 0.1
    done
    line=$(console_since_mark | grep -a "^VUNET-DONE $STEP_TOKEN " | head -n 1)
    [[ $line == "VUNET-DONE $STEP_TOKEN $# 0" ]] && return 0
    show_log "$BACKEND_NAME"
    return 1
}

step_lines() { console_since_mark | grep -ac '^VUNET-STEP' || true; }

# Shows one `VUNET-STEP NAME VERDICT 123ms DETAIL`.
step_line() {
    local name verdict took detail
    read -r _ name verdict took detail <<<"$1"
    took=${took%ms}
    STEP_MS[$name]=$took
    show_step "$verdict" "${STEP_TITLES[$name]:-$name}" "$took" "$detail"
}

# guest_stop: asks the guest to power off, and ends it if it does not.
guest_stop() {
    [[ -n $GUEST_PID ]] || return 0
    console_send poweroff || true
    wait_until 10 guest_is_gone || true
    end_process "$GUEST_PID"
    GUEST_PID=
    console_close
}

guest_is_gone() { ! is_running "$GUEST_PID"; }

# guest_shell: joins the terminal to the guest's console until the guest powers off.
guest_shell() {
    local saved feeder reader
    saved=$(stty -g)
    # shellcheck disable=SC2064 # the settings of now
    trap "stty '$saved'; exit 130" INT
    console_mark
    tail -c +$((CONSOLE_MARK + 1)) -f "$CONSOLE_LOG" &
    reader=$!
    on_exit "end_process $reader"
    console_send shell
    stty raw -echo
    cat <&0 >&"$CONSOLE_FD" &
    feeder=$!
    on_exit "end_process $feeder"
    while is_running "$GUEST_PID"; do
        sleep 0.2
    done
    stty "$saved"
    end_process "$feeder"
    end_process "$reader"
    say ''
}
