//! One thing that was looked at: how it is, and what to do about it.

use std::path::Path;

use serde::Serialize;

/// How a thing is, for the run in question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// The run starts; something of it does not work, or not well.
    Warn,
    /// The run does not start, or is of no use.
    Missing,
}

impl State {
    /// As it is printed.
    pub fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Missing => "missing",
        }
    }
}

/// A path as a word of a shell's command.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@%:=,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Commands for root, one after the other.
    AsRoot(Vec<String>),
    /// Commands for whoever asked.
    AsUser(Vec<String>),
    /// What no command does.
    Advice(String),
}

impl Fix {
    /// One command for root.
    pub fn root(command: impl Into<String>) -> Fix {
        Fix::AsRoot(vec![command.into()])
    }

    /// Settings of the kernel, such as `net.ipv4.ip_forward=1`.
    pub fn sysctl(settings: &[&str]) -> Fix {
        Fix::AsRoot(settings.iter().map(|setting| format!("sysctl -w {setting}")).collect())
    }

    /// Advice.
    pub fn advice(text: impl Into<String>) -> Fix {
        Fix::Advice(text.into())
    }

    /// In one line, to be run by a user who is root or not; words where there is no command.
    pub fn line(&self, is_root: bool) -> String {
        match self {
            Fix::AsRoot(commands) if !is_root => {
                let with_sudo: Vec<String> =
                    commands.iter().map(|command| format!("sudo {command}")).collect();
                with_sudo.join(" && ")
            }
            Fix::AsRoot(commands) | Fix::AsUser(commands) => commands.join(" && "),
            Fix::Advice(text) => text.clone(),
        }
    }

    /// Whether [`Self::line`] can be run as it is: it is a command, and no flags of vunet are left out (`...`).
    pub fn is_command(&self) -> bool {
        match self {
            Fix::AsRoot(commands) | Fix::AsUser(commands) => {
                commands.iter().all(|command| !command.ends_with("..."))
            }
            Fix::Advice(_) => false,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What it is, short.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// The same in words: what was found, and what follows.
    pub says: String,
    /// What to do, if there is anything.
    pub fix: Option<Fix>,
}

impl Check {
    /// As it should be.
    pub fn ok(name: &'static str, says: impl Into<String>) -> Check {
        Check { name, state: State::Ok, says: says.into(), fix: None }
    }

    /// Something of the run does not work.
    pub fn warn(name: &'static str, says: impl Into<String>, fix: Fix) -> Check {
        Check { name, state: State::Warn, says: says.into(), fix: Some(fix) }
    }

    /// The run does not start.
    pub fn missing(name: &'static str, says: impl Into<String>, fix: Fix) -> Check {
        Check { name, state: State::Missing, says: says.into(), fix: Some(fix) }
    }

    /// Nothing could be found out in time.
    pub fn late(name: &'static str, state: State, fix: impl Into<String>) -> Check {
        let says = "no answer in time: whatever was asked hangs".to_owned();
        Check { name, state, says, fix: Some(Fix::advice(fix)) }
    }

    /// The same where the run goes on without it.
    #[must_use]
    pub fn not_needed(self) -> Check {
        Check { state: self.state.min(State::Warn), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_one_word_to_a_shell() {
        assert_eq!(quoted(Path::new("/var/lib/vunet")), "/var/lib/vunet");
        assert_eq!(quoted(Path::new("/a b/$(c)")), "'/a b/$(c)'");
        assert_eq!(quoted(Path::new("/it's")), r"'/it'\''s'");
    }

    #[test]
    fn commands_of_root_are_run_through_sudo_by_others_each_of_them() {
        let fix = Fix::sysctl(&["a.b=1", "c.d='2 3'"]);
        assert_eq!(fix.line(true), "sysctl -w a.b=1 && sysctl -w c.d='2 3'");
        assert_eq!(fix.line(false), "sudo sysctl -w a.b=1 && sudo sysctl -w c.d='2 3'");
        assert_eq!(Fix::AsUser(vec!["x".to_owned()]).line(false), "x");
        assert!(
            fix.is_command()
                && !Fix::advice("y").is_command()
                && !Fix::root("setpriv vunet ...").is_command()
        );
    }
}
