#!/usr/bin/env bash
# Everything that shows vunet right: format, lints, unit and property and device tests, the namespace
# guest, real guests, the package and its services, and the documentation's build.
#
#   integration/test.sh [--long]
#
# --long adds what takes longer: the ignored tests, two queue pairs, 1,000 reconnects, hundreds of kills. Installs what is
# missing with apt-get, and says so. What the machine still lacks is skipped by name; with CI=true it
# fails. The last line is `N passed, N failed, N skipped`; the exit code is 0 only if nothing failed.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib/common.sh"
for library in prerequisites results backend; do
    # shellcheck source=/dev/null
    source "$REPO/integration/lib/$library.sh"
done

PART_SECONDS_MAX=1200
LONG_PART_SECONDS_MAX=14400

# part TITLE: begins a part, and says how long the one before took.
part() {
    part_end
    PART_BEGUN=$(now_ms)
    PART_TITLE=$1
    say ''
    say "== $1"
}

part_end() {
    [[ -z ${PART_TITLE:-} ]] || say "   $PART_TITLE: $((($(now_ms) - PART_BEGUN + 500) / 1000)) s"
    PART_TITLE=
}

# bounded COMMAND...: within the bound of a part.
bounded() { timeout --kill-after=30 "$SECONDS_MAX" "$@"; }

# check NAME COMMAND...: one check, which passes if the command does.
check() {
    local name=$1
    shift
    if bounded "$@"; then
        result passed 1 "$name"
    else
        result failed 1 "$name"
    fi
}

# cargo_tests NAME ARGUMENT...: runs tests and counts each one, with nextest where it is installed. What
# tests skip for want of a tool they write to $VUNET_SKIP_LOG; such a test counts as skipped.
cargo_tests() {
    local name=$1 log=$RUN_DIR/cargo-tests.log status=0
    shift
    export VUNET_SKIP_LOG=$RUN_DIR/skips
    : >"$VUNET_SKIP_LOG"
    if cargo nextest --version >/dev/null 2>&1; then
        bounded cargo nextest run --locked --no-fail-fast --color never --status-level fail \
            --config-file "$REPO/integration/lib/nextest.toml" ${LONG:+--run-ignored all} \
            ${TESTS:+--filterset "$TESTS"} "$@" 2>&1 | tee "$log" || status=$?
        count_nextest "$name" "$log" "$status"
    else
        # Which targets, if none are named.
        [[ " $* " == *' --test '* ]] || set -- --all-targets "$@"
        bounded cargo test --locked --no-fail-fast --color never "$@" -- \
            ${LONG:+--include-ignored} 2>&1 | tee "$log" || status=$?
        count_cargo_test "$name" "$log" "$status"
    fi
}

# nextest sums up in one line: `Summary [..] 10 tests run: 8 passed, 1 failed, 1 timed out, 2 skipped`.
count_nextest() {
    local name=$1 log=$2 status=$3 summary passed failed ignored
    summary=$(grep -E '^ +Summary \[' "$log" | tail -n 1 || true)
    passed=$(summary_count passed "$summary")
    failed=$(($(summary_count failed "$summary") + $(summary_count 'timed out' "$summary")))
    ignored=$(summary_count skipped "$summary")
    count_tests "$name" "$passed" "$failed" "$ignored" "$status"
}

# The number before a word, or 0.
summary_count() { sed -nE "s/.*[^0-9]([0-9]+) $1.*/\1/p;t;s/.*/0/p" <<<"$2"; }

# cargo test has a line for each binary: `test result: ok. 10 passed; 0 failed; 1 ignored; ..`.
count_cargo_test() {
    local name=$1 log=$2 status=$3 passed failed ignored
    read -r passed failed ignored < <(awk '/^test result:/ {
        for (i = 2; i <= NF; i++) {
            if ($i ~ /^passed/) p += $(i - 1)
            if ($i ~ /^failed/) f += $(i - 1)
            if ($i ~ /^ignored/) g += $(i - 1)
        }
    } END {print p + 0, f + 0, g + 0}' "$log")
    count_tests "$name" "$passed" "$failed" "$ignored" "$status"
}

# count_tests NAME PASSED FAILED IGNORED STATUS: a run that failed without a failed test (a build, a
# time-out) is one failure.
count_tests() {
    local name=$1 passed=$2 failed=$3 ignored=$4 status=$5 line skips=0
    while IFS= read -r line; do
        skips=$((skips + 1))
        line=${line#SKIPPED }
        # With CI=true such a test has failed by itself and is counted so.
        [[ ${CI:-} == true ]] || result skipped 1 "$name: ${line%%: *}" "${line#*: }"
    done < <(sort -u "$VUNET_SKIP_LOG")
    result passed $((passed > skips ? passed - skips : 0)) "$name"
    result failed "$failed" "$name" 'see above'
    result skipped "$ignored" "$name" "${TESTS:+counted above, or }ignored tests run with --long"
    if [[ $status != 0 && $failed == 0 ]]; then
        result failed 1 "$name" "ended with status $status before its tests were done"
    elif [[ $status == 0 && $((passed + ignored)) == 0 ]]; then
        result failed 1 "$name" 'no test ran'
    fi
}

shell_scripts() {
    (cd "$REPO" && shellcheck -x .ci/run integration/*.sh integration/lib/*.sh integration/guest/*.sh \
        integration/guest/init integration/guest/lease tests/sim/planted/find.sh \
        contrib/*.sh contrib/debian/* contrib/kubevirt/entry-point)
}

check_sources() {
    part 'format, lints, shell scripts'
    check 'format (cargo fmt --check)' cargo fmt --all --check
    check 'lints (cargo clippy -D warnings)' cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
    if ! have_tools shellcheck; then
        result_lacking 1 'shell scripts (shellcheck)' "missing: $LACKING"
    elif shell_scripts; then
        result passed 1 'shell scripts (shellcheck)'
    else
        result failed 1 'shell scripts (shellcheck)'
    fi
}

check_crates() {
    part 'unit, property and device tests'
    # Many of them wait for what ten seconds bring, so more run at once than there are processors.
    NEXTEST_TEST_THREADS=$((2 * $(nproc))) cargo_tests 'crate tests' --workspace --exclude vunet-integration
    check 'documentation examples' cargo test --quiet --locked --doc --package vunet
    if [[ -n ${LONG:-} ]]; then
        check 'the simulation finds planted bugs' tests/sim/planted/find.sh
    fi
}

# Tests that reach unsafe code, the crates' under the packet NAT's tables or vunet's own in device and uplink, built once more
# with AddressSanitizer: a test whose process misuses memory or leaks it fails. A target directory of its own, as for all
# other flags, and a named target, which spares build scripts. The bootstrap word has a stable compiler take the flag.
check_sanitizer() {
    local target=x86_64-unknown-linux-gnu
    part 'AddressSanitizer'
    if [[ -z $(find "$(rustc --print sysroot)/lib/rustlib/$target/lib" -name 'librustc*_rt.asan.a') ]]; then
        result_lacking 1 'AddressSanitizer' "the Rust toolchain has no runtime of it for $target"
        return 0
    fi
    RUSTFLAGS=-Zsanitizer=address RUSTC_BOOTSTRAP=1 cargo_tests 'AddressSanitizer' --package vunet \
        --target "$target" --target-dir "$TARGET_DIR/sanitizer" \
        ${LONG:+--lib} --test flow_table --test packet_nat --test device --test uplink
}

# The namespace guest needs root: the tests are built as you and run through sudo.
check_namespaces() {
    local pairs
    part 'namespace guest'
    if ! can_be_root; then
        result_lacking 1 'namespace guest' 'needs root or sudo'
        return 0
    fi
    if ! is_root; then
        export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='sudo --preserve-env'
    fi
    export VUNET_BIN=${VUNET_BIN:-$TARGET_DIR/release/vunet}
    cargo_tests 'namespace guest' --package vunet-integration
    # The same again with a worker for each of several queue pairs, but for what has to do with no queue, or shows it with
    # one as well; with --long for each of two, too.
    for pairs in ${LONG:+2} 4; do
        TESTS='not test(/^(link|programs|benchmark|capture|conntrack|doctor|dns|features|lease|policy|host_changes|lan_uplinks|limits|networks)::/)' VUNET_ARGS="--queues $pairs" VUNET_GUEST_ARGS="--queues $pairs" \
            cargo_tests "namespace guest, $pairs queue pairs" --package vunet-integration --test netns
    done
    # What the NAT carries, whichever of the two it is. How a host forbids echo sockets is a matter of one.
    TESTS='test(/^(transfer|programs|icmp)::/) - test(/a_host_that_forbids_echo_sockets/)' VUNET_NAT=packet \
        cargo_tests 'namespace guest, packets translated' --package vunet-integration --test netns
    unset CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER
}

check_real_guests() {
    local before
    part 'real guests'
    if ! can_be_root; then
        result_lacking 1 'real guests' 'needs root or sudo'
        return 0
    fi
    before=$(wc -l <"$VUNET_RESULTS")
    if have_tools qemu-system-x86_64; then
        check 'the demo' "$REPO/integration/demo.sh"
    else
        result_lacking 1 'the demo' "missing: $LACKING"
    fi
    # Each scenario counts itself; the script's own failure counts only if none did.
    if ! "$REPO/integration/real-guests.sh" ${LONG:+--long} \
        && ! tail -n +$((before + 1)) "$VUNET_RESULTS" | grep -q '^failed'; then
        result failed 1 'real guests' 'ended before its scenarios were done'
    fi
}

check_package() {
    local before
    part 'package and services'
    if ! can_be_root; then
        result_lacking 1 'package and services' 'needs root or sudo'
        return 0
    fi
    before=$(wc -l <"$VUNET_RESULTS")
    # Each check counts itself; the script's own failure counts only if none did.
    if ! bounded "$REPO/integration/package.sh" \
        && ! tail -n +$((before + 1)) "$VUNET_RESULTS" | grep -q '^failed'; then
        result failed 1 'package and services' 'ended before its checks were done'
    fi
}

check_documentation() {
    part 'documentation'
    check 'documentation (cargo doc, warnings as errors)' env RUSTDOCFLAGS='-D warnings' \
        cargo doc --quiet --locked --workspace --no-deps
}

main() {
    lab_begin test
    results_begin
    cd "$REPO"
    part 'prerequisites and build'
    prerequisites_install test
    build_programs || {
        result failed 1 'build'
        results_end
        return 1
    }
    check_sources
    check_crates
    check_sanitizer
    check_namespaces
    check_real_guests
    check_package
    check_documentation
    part_end
    results_end
}

LONG=
SECONDS_MAX=$PART_SECONDS_MAX
for argument in "$@"; do
    case $argument in
    --long)
        LONG=yes
        SECONDS_MAX=$LONG_PART_SECONDS_MAX
        ;;
    *) die "usage: integration/test.sh [--long]" ;;
    esac
done
main
