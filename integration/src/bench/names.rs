//! Texts without the directories in them: what is committed must not tell where it was made.

/// Where a path ends or begins, besides blanks.
const DELIMITERS: [char; 6] = ['=', ',', '\'', '"', '(', ')'];

/// Calls `rename` on each stretch between blanks and delimiters, and leaves those as they are.
fn each_word(text: &str, rename: impl Fn(&str) -> &str) -> String {
    let is_delimiter = |c: char| c.is_whitespace() || DELIMITERS.contains(&c);
    text.split_inclusive(is_delimiter)
        .map(|part| {
            let word = part.trim_end_matches(is_delimiter);
            format!("{}{}", rename(word), &part[word.len()..])
        })
        .collect()
}

/// What stands behind a path's last slash; a slash at its end is none.
fn file_name(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// Whether a word with a slash is ADDRESS/PREFIX and no path.
fn is_prefix(word: &str) -> bool {
    word.split_once('/').is_some_and(|(address, len)| {
        address.parse::<std::net::IpAddr>().is_ok() && len.bytes().all(|b| b.is_ascii_digit())
    })
}

/// A command line with only the names of files.
pub(super) fn in_command(text: &str) -> String {
    each_word(text, |word| if is_prefix(word) { word } else { file_name(word) })
}

/// A message with only the names of files, as far as their paths are absolute: `MB/s` stays.
pub(super) fn in_message(text: &str) -> String {
    each_word(text, |word| if word.starts_with('/') { file_name(word) } else { word })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_keep_names_of_files_only() {
        let command =
            "/a/b/x --peer 'p=/c/d/passt.avx2 -s {socket} -n 10.0.2.0/24 fd00::/64' --out e/f/ --g=../h";
        let want = "x --peer 'p=passt.avx2 -s {socket} -n 10.0.2.0/24 fd00::/64' --out f --g=h";
        assert_eq!(in_command(command), want);
        assert_eq!(in_command("  two  blanks "), "  two  blanks ");
    }

    #[test]
    fn messages_keep_names_of_files_and_units() {
        let message = "cannot meet the back-end at /a/b/x.sock: 3 MB/s\n(/c/d/passt)";
        assert_eq!(in_message(message), "cannot meet the back-end at x.sock: 3 MB/s\n(passt)");
        assert_eq!(in_message("/"), "");
    }
}
