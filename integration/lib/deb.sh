# shellcheck shell=bash
# Builds the Debian package of what is built in target/release, with cargo-deb.
#
# May touch: target/package, target/tools.

CARGO_DEB_VERSION=3.8.0
DEB_SECONDS_MAX=600

# deb_tool: sets CARGO_DEB to the cargo-deb of the pinned version, which is built below target/tools if it is not installed.
deb_tool() {
    local candidate
    for candidate in "$(command -v cargo-deb || true)" "$TARGET_DIR/tools/bin/cargo-deb"; do
        [[ -x $candidate && $("$candidate" --version) == *" $CARGO_DEB_VERSION" ]] || continue
        CARGO_DEB=$candidate
        return 0
    done
    note "building cargo-deb $CARGO_DEB_VERSION into target/tools"
    timeout "$DEB_SECONDS_MAX" cargo install --quiet --locked --force "cargo-deb@$CARGO_DEB_VERSION" --no-default-features \
        --profile dev --root "$TARGET_DIR/tools" --target-dir "$TARGET_DIR/tools/build" || return 1
    CARGO_DEB=$TARGET_DIR/tools/bin/cargo-deb
}

# deb_contents: makes the manual pages and completions that the package holds, by the program itself.
deb_contents() {
    local vunet=$TARGET_DIR/release/vunet place=$REPO/target/package
    rm -rf "$place/man" "$place/completions"
    mkdir -p "$place/completions"
    "$vunet" man --dir "$place/man"
    "$vunet" completions bash >"$place/completions/vunet"
    "$vunet" completions zsh >"$place/completions/_vunet"
    "$vunet" completions fish >"$place/completions/vunet.fish"
}

# deb_build: sets DEB to the package.
deb_build() {
    (cd "$REPO" && cargo build --release --locked --quiet --package vunet) || return 1
    deb_tool || return 1
    deb_contents || return 1
    DEB=$REPO/target/package/vunet.deb
    (cd "$REPO" && timeout "$DEB_SECONDS_MAX" "$CARGO_DEB" deb --quiet --no-build --strip --locked --package vunet --output "$DEB") \
        || return 1
}
