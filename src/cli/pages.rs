//! Manual pages and shell completions, made of the argument parser, so that they know what it knows.
//!
//! Each command has a page of its own, as the pages of its kind do: `vunet(1)`, `vunet-network(1)`,
//! `vunet-network-create(1)`. The first one has what `--help` says beyond flags besides: examples, the file of
//! settings, signals, exit codes.
//!
//! Read first: man-pages(7), groff_man(7).

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use roff::{Inline, Roff, roman};
use thiserror::Error;

use super::{EXAMPLES, EXIT_CODES, Line};

/// Why there is no page.
#[derive(Debug, Error)]
pub enum PageError {
    /// No such command.
    #[error("vunet has no command '{0}': vunet --help lists them")]
    NoCommand(String),
    /// It cannot be written.
    #[error("cannot write {what}")]
    Write {
        /// The page, or where it goes.
        what: String,
        /// The system's refusal.
        source: io::Error,
    },
}

impl PageError {
    /// The code to end the process with.
    pub fn exit_code(&self) -> u8 {
        match self {
            PageError::NoCommand(_) => 2,
            PageError::Write { .. } => 1,
        }
    }
}

fn writing(what: impl Into<String>) -> impl FnOnce(io::Error) -> PageError {
    move |source| PageError::Write { what: what.into(), source }
}

/// The whole command line, as all pages see it.
fn built() -> Command {
    let mut command = Line::command().disable_help_subcommand(true);
    command.build();
    command
}

/// The commands of `command` that people are shown.
fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|command| !command.is_hide_set())
}

/// Writes the manual page of the command with these words behind `vunet`, in the language of man(7).
///
/// # Errors
/// [`PageError`].
pub fn man(words: &[String], out: &mut dyn Write) -> Result<(), PageError> {
    let mut command = &built();
    for word in words {
        let found = shown(command).find(|command| command.get_name() == word);
        command = found.ok_or_else(|| PageError::NoCommand(words.join(" ")))?;
    }
    page(command, out).map_err(writing("the manual page"))
}

/// Writes the pages of all commands into the folder `dir`, which is made if there is none; their paths.
///
/// # Errors
/// [`PageError::Write`].
pub fn man_all(dir: &Path) -> Result<Vec<PathBuf>, PageError> {
    fs::create_dir_all(dir).map_err(writing(dir.display().to_string()))?;
    let mut written = Vec::new();
    let root = built();
    let mut left = vec![&root];
    while let Some(command) = left.pop() {
        let path = dir.join(format!("{}.1", display_name(command)));
        let mut text = Vec::new();
        let file = page(command, &mut text).and_then(|()| fs::write(&path, text));
        file.map_err(writing(path.display().to_string()))?;
        written.push(path);
        left.extend(shown(command));
    }
    Ok(written)
}

/// `vunet-network-create`.
fn display_name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn page(command: &Command, out: &mut dyn Write) -> io::Result<()> {
    let is_root = display_name(command) == command.get_name();
    // The examples keep their lines in a section of their own.
    let man = Man::new(command.clone().after_long_help(Resettable::Reset))
        .manual("vunet manual")
        .source(format!("vunet {}", env!("CARGO_PKG_VERSION")));
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    if shown(command).next().is_some() {
        man.render_subcommands_section(out)?;
    }
    if !is_root {
        return more("SEE ALSO", &["vunet(1)"]).to_writer(out);
    }
    examples().to_writer(out)?;
    for (title, paragraphs) in MORE {
        more(title, paragraphs).to_writer(out)?;
    }
    more("EXIT STATUS", &[EXIT_CODES]).to_writer(out)
}

/// What the page of `vunet` says beyond its flags.
const MORE: [(&str, &[&str]); 4] = [
    (
        "CONFIGURATION FILE",
        &[
            "The file of --config is TOML. Its keys are the names of the flags above, without the dashes in front, and \
             their values what stands behind the flags: texts or numbers, arrays of them for flags that can be repeated, \
             true or false for flags without a value. It has no sections. A flag on the command line takes the place of its \
             key, but a switch that is true in the file stays on, and flags that exclude each other do so wherever they stand; what \
             the file lacks has the flag's default.",
            "Unknown keys and wrong values end vunet with code 2 before anything is opened, and are named.",
        ],
    ),
    (
        "SIGNALS",
        &[
            "SIGTERM and SIGINT end vunet: links and sockets of its own are removed, and the guest's connections are reset.",
            "SIGHUP has the file of --config read again. log-level, dns-host (not on a named network, nor with no-dns), limit-from-guest, limit-to-guest and published ports (publish, tcp-ports, udp-ports) \
             change at once. Where any other setting would change, a port cannot be published, or the file is wrong, an \
             error in the log says which, and nothing changes. Without --config, SIGHUP ends the process.",
        ],
    ),
    (
        "ENVIRONMENT",
        &[
            "LISTEN_FDS and LISTEN_PID pass the socket that the VM connects to, as socket activation of a service manager \
             does (sd_listen_fds(3)); it stands for --fd.",
            "NOTIFY_SOCKET and WATCHDOG_USEC have a service manager told that vunet is ready, reloads, ends and is alive \
             (sd_notify(3)).",
            "VUNET_CONTROL is the socket that vunet ctl and vunet top ask where --control is not given.",
            "STATE_DIRECTORY, of a service manager (systemd.exec(5)), or else XDG_STATE_HOME, of a user other than root, says where the state \
             of --state-dir is kept.",
        ],
    ),
    (
        "FILES",
        &[
            "/etc/vunet/NAME.toml has the settings of the service vunet@NAME. /var/lib/vunet, or vunet in $XDG_STATE_HOME, keeps \
             named networks and leases.",
        ],
    ),
];

fn more(title: &str, paragraphs: &[&str]) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", [title]);
    for paragraph in paragraphs {
        roff.control("PP", []).text([roman(*paragraph)]);
    }
    roff
}

/// The examples of `--help`, line by line as they are.
fn examples() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXAMPLES"]).control("nf", []);
    for line in EXAMPLES.lines().skip(1) {
        // An empty line of its own would end the table of lines.
        let inline: Inline = roman(if line.is_empty() { " " } else { line });
        roff.text([inline]);
    }
    roff.control("fi", []);
    roff
}

/// Writes the completions of a shell.
///
/// # Errors
/// [`PageError::Write`].
pub fn completions(shell: Shell, out: &mut dyn Write) -> Result<(), PageError> {
    // Into memory first, as the generator ends the process where writing fails.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Line::command(), "vunet", &mut text);
    if shell == Shell::Bash {
        text = with_values_behind_equals_signs(&text);
    }
    out.write_all(&text).map_err(writing("the completions"))
}

/// The line of bash's completions that says which word is in front of the one to be completed.
const WORD_BEFORE: &str = "    prev=\"$3\"\n";

/// The same completions, which know `--mode=h` as they know `--mode h`: bash makes three words of it.
fn with_values_behind_equals_signs(script: &[u8]) -> Vec<u8> {
    let more = "    if [[ \"${cur}\" == \"=\" ]] ; then
        cur=\"\"
    elif [[ \"${prev}\" == \"=\" && ${COMP_CWORD} -ge 2 ]] ; then
        prev=\"${COMP_WORDS[COMP_CWORD-2]}\"
    fi
";
    let script = String::from_utf8_lossy(script);
    script.replacen(WORD_BEFORE, &format!("{WORD_BEFORE}{more}"), 1).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(words: &[&str]) -> String {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let mut page = Vec::new();
        man(&words, &mut page).unwrap();
        // Dashes are escaped, so that they can be copied.
        String::from_utf8(page).unwrap().replace("\\-", "-")
    }

    /// Every command that people are shown, with its words.
    fn commands(command: &Command, words: &[&str], found: &mut Vec<(Vec<String>, Command)>) {
        found.push((words.iter().map(|&word| word.to_owned()).collect(), command.clone()));
        for sub in shown(command) {
            commands(sub, &[words, &[sub.get_name()]].concat(), found);
        }
    }

    fn all() -> Vec<(Vec<String>, Command)> {
        let mut found = Vec::new();
        commands(&built(), &[], &mut found);
        found
    }

    #[test]
    fn every_page_names_every_flag_and_command() {
        assert!(all().len() > 6, "commands are found");
        for (words, command) in all() {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let page = text(&words);
            for arg in command.get_arguments() {
                let name = match arg.get_long() {
                    Some(long) => format!("--{long}"),
                    None => arg.get_value_names().map(|names| names[0].to_string()).unwrap_or_default(),
                };
                assert!(!name.is_empty(), "{words:?}: {arg:?}");
                let is_there = page.contains(&name);
                assert_eq!(is_there, !arg.is_hide_set(), "{words:?}: {name}");
            }
            for sub in shown(&command) {
                assert!(
                    page.contains(&format!("vunet-{}", [&words[..], &[sub.get_name()]].concat().join("-")))
                );
            }
        }
    }

    #[test]
    fn the_first_page_has_the_examples_line_by_line_and_says_what_ends_and_changes_it() {
        let page = text(&[]);
        for part in [
            ".SH EXAMPLES\n",
            ".SH SIGNALS\n",
            ".SH \"CONFIGURATION FILE\"\n",
            ".SH \"EXIT STATUS\"\n",
            "SIGHUP",
            "LISTEN_FDS",
            "VUNET_CONTROL",
        ] {
            assert!(page.contains(part), "'{part}' is not in: {page}");
        }
        let examples = page.split(".SH EXAMPLES\n.nf\n").nth(1).and_then(|rest| rest.split(".fi\n").next());
        let lines = EXAMPLES.lines().count() - 1;
        assert_eq!(examples.map(|text| text.lines().count()), Some(lines), "{page}");
    }

    #[test]
    fn the_first_page_names_what_can_change_live() {
        let page = text(&[]);
        let signals = page.split(".SH SIGNALS").nth(1).unwrap();
        for key in super::super::reload::live_keys() {
            assert!(signals.contains(key), "{key} is not in SIGNALS of the page");
        }
    }

    #[test]
    fn a_command_that_is_none_is_refused_by_name() {
        let words = ["network", "make"].map(str::to_owned);
        let error = man(&words, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("'network make'"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn all_pages_are_written_under_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let written = man_all(&dir.path().join("man1")).unwrap();
        assert_eq!(written.len(), all().len());
        for page in ["vunet.1", "vunet-network-create.1", "vunet-man.1"] {
            assert!(written.contains(&dir.path().join("man1").join(page)), "{page} is not in {written:?}");
        }
        let blocked = dir.path().join("file");
        fs::write(&blocked, "").unwrap();
        assert!(matches!(man_all(&blocked), Err(PageError::Write { .. })));
    }

    #[test]
    fn completions_of_each_shell_know_every_flag_and_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let mut script = Vec::new();
            completions(shell, &mut script).unwrap();
            let script = String::from_utf8(script).unwrap();
            for (words, command) in all() {
                let flags = command.get_arguments().filter(|arg| !arg.is_hide_set());
                for flag in flags.filter_map(|arg| arg.get_long().map(str::to_owned)) {
                    // fish and others write them without the dashes.
                    assert!(script.contains(&flag), "{shell}: {flag} of {words:?}");
                }
                for word in words {
                    assert!(script.contains(&word), "{shell}: {word}");
                }
            }
        }
    }
}
