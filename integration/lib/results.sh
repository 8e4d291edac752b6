# shellcheck shell=bash
# Counts what ran. Each result is one line of the file $VUNET_RESULTS: verdict, count, name, reason, with
# tabs between. The scripts share that file, so test.sh can sum up what its parts did.

# results_begin: makes the file unless a caller already has.
results_begin() {
    [[ -z ${VUNET_RESULTS:-} ]] || return 0
    VUNET_RESULTS=$(mktemp)
    export VUNET_RESULTS
    on_exit "rm -f $VUNET_RESULTS"
}

# result passed|failed|skipped COUNT NAME [REASON]. Where CI=true nothing may be skipped for what the
# machine lacks: a skip counts as a failure there.
result() {
    local verdict=$1 reason=${4:-}
    if [[ $verdict == skipped && ${CI:-} == true ]]; then
        verdict=failed
        reason="must not be skipped with CI=true: $reason"
    fi
    printf '%s\t%s\t%s\t%s\n' "$verdict" "$2" "$3" "$reason" >>"$VUNET_RESULTS"
    [[ $verdict == passed ]] || say "$verdict: $3${reason:+ ($reason)}"
}

# results_sum VERDICT: how many have that verdict.
results_sum() { awk -F '\t' -v verdict="$1" '$1 == verdict {n += $2} END {print n + 0}' "$VUNET_RESULTS"; }

# results_end: says what failed and what was skipped and why, then the totals as the last line. Fails
# if anything failed or nothing ran.
results_end() {
    local passed failed skipped
    passed=$(results_sum passed)
    failed=$(results_sum failed)
    skipped=$(results_sum skipped)
    say ''
    awk -F '\t' '$1 != "passed" && $2 > 0 {
        printf "%s: %s%s%s\n", $1, $3, ($2 > 1 ? " (" $2 " tests)" : ""), ($4 != "" ? ": " $4 : "")
    }' "$VUNET_RESULTS"
    say "$passed passed, $failed failed, $skipped skipped"
    [[ $failed == 0 && $passed != 0 ]]
}
