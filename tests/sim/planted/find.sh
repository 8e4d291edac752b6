#!/usr/bin/env bash
# Shows that the simulation finds the bugs it should: each patch here is one. In a copy of the tree the engine
# is built with one at a time, and seeds are run until one fails.
#
#   tests/sim/planted/find.sh [PATCH...]
#
# Fails if the engine as it is does not pass, if a patch no longer applies, or if no seed finds its bug. The
# copy and its builds stay in target/planted.

set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd -- "$HERE/../../.." && pwd)
COPY=${CARGO_TARGET_DIR:-$REPO/target}/planted
SECONDS_MAX=600

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# The simulation of the copy as it is now: 0 if all seeds passed, 1 if one failed, else it was not built or
# took too long.
simulate() {
    local -x CARGO_TARGET_DIR=$COPY/target VUNET_SIM_FAILURES_MAX=1
    cargo test --quiet --locked --manifest-path "$COPY/tree/Cargo.toml" --test sim --no-run >"$COPY/log" 2>&1 || return 2
    timeout "$SECONDS_MAX" cargo test --quiet --locked --manifest-path "$COPY/tree/Cargo.toml" --test sim \
        every_byte_and_every_end_is_right_whatever_goes_wrong >"$COPY/log" 2>&1 && return 0
    grep -q 'these failed' "$COPY/log" || return 2
    return 1
}

patches=("$@")
((${#patches[@]} > 0)) || patches=("$HERE"/*.patch)

rm -rf "$COPY/tree"
mkdir -p "$COPY/tree"
(cd "$REPO" && git ls-files -z --cached --others --exclude-standard | xargs -0 tar -cf - --) | tar -xmf - -C "$COPY/tree"

simulate || die "the engine as it is does not pass:" "$(tail -n 20 "$COPY/log")"
missed=0
for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    patch --quiet --directory "$COPY/tree" --strip 1 --fuzz 2 <"$patch" || die "$name no longer applies"
    status=0
    simulate || status=$?
    # Not by copying: a file older than its build would not be built again.
    patch --quiet --directory "$COPY/tree" --strip 1 --fuzz 2 --reverse <"$patch"
    case $status in
        1) printf 'found   %s, by %s\n' "$name" "$(sed -nE 's/.*these failed .*(\[.*\]).*/seeds \1/p' "$COPY/log" | head -n 1)" ;;
        0)
            printf 'MISSED  %s\n' "$name"
            missed=$((missed + 1))
            ;;
        *) die "$name was not run:" "$(tail -n 20 "$COPY/log")" ;;
    esac
done
printf '%s bugs, %s missed\n' "${#patches[@]}" "$missed"
((missed == 0))
