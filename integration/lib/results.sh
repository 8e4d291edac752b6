# shellcheck shell=bash
# Counts what ran. Each result is one line of the file $VUNET_RESULTS: verdict, count, name, reason, with
# tabs between. The scripts share that file, so test.sh can sum up what its parts did.

# results_begin: makes the file unless a caller already has.
results_begin() {
    [[ -z ${VUNET_RESULTS:-} ]] || return 0
    VUNET_RESULTS=$(mktemp)
    export VUNET_RESULTS
    on_exit "rm -f $VUNET_RESULTS"
    on_exit results_cut
}

# results_cut: a script that ended before its results did says so, and its totals, all the same.
results_cut() {
    [[ -z $LAB_SILENT ]] || return 0
    result failed 1 "$(basename -- "$0")" 'was cut short'
    results_end
}

# result passed|failed|skipped COUNT NAME [REASON]
result() {
    [[ $2 != 0 ]] || return 0
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$VUNET_RESULTS"
    [[ $1 == passed ]] || say "$1: $3${4:+ ($4)}"
}

# result_lacking COUNT NAME WHAT: a skip for what the machine lacks. Where CI=true nothing may be lacking,
# and it counts as a failure.
result_lacking() {
    if [[ ${CI:-} == true ]]; then
        result failed "$1" "$2" "$3, and CI=true allows no skip"
    else
        result skipped "$1" "$2" "$3"
    fi
}

# results_sum VERDICT: how many have that verdict.
results_sum() { awk -F '\t' -v verdict="$1" '$1 == verdict {n += $2} END {print n + 0}' "$VUNET_RESULTS"; }

# results_end: says what failed and what was skipped, grouped by why, then the totals as the last line. Fails
# if anything failed or nothing ran.
results_end() {
    local passed failed skipped
    passed=$(results_sum passed)
    failed=$(results_sum failed)
    skipped=$(results_sum skipped)
    say ''
    awk -F '\t' '$1 != "passed" {
        key = $1 FS $4
        if (!(key in count)) order[++keys] = key
        count[key] += $2
        names[key] = names[key] (names[key] != "" ? "\n    " : "") $3
    } END {
        for (i = 1; i <= keys; i++) {
            split(order[i], part, FS)
            printf "%d %s%s:\n    %s\n", count[order[i]], part[1], (part[2] != "" ? ", " part[2] : ""), names[order[i]]
        }
    }' "$VUNET_RESULTS"
    # The totals are the last line, so the clean-up must not speak of logs.
    # shellcheck disable=SC2034 # read by lab_end
    LAB_SILENT=yes
    say "$passed passed, $failed failed, $skipped skipped"
    [[ $failed == 0 && $passed != 0 ]]
}
