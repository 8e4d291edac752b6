//! Command lines in tests of this room.

use super::{Args, Command, parse};

/// The flags of `line`, behind the program's name.
pub(super) fn whole(line: &str) -> Args {
    let words = ["vunet"].into_iter().chain(line.split_ascii_whitespace());
    match parse(words.map(Into::into)) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{line}: {other:?}"),
    }
}

/// The flags of `line`, behind a socket's path.
pub(super) fn args(line: &str) -> Args {
    whole(&format!("--socket-path vm.sock {line}"))
}

/// Checks that flags that do not go together are refused in words that hold `parts`.
pub(super) fn assert_says(line: &str, parts: &[&str]) {
    let error = args(line).into_config(Ok(Vec::new())).expect_err(line).to_string();
    for part in parts {
        assert!(error.contains(part), "{line}: '{part}' is not in: {error}");
    }
}
