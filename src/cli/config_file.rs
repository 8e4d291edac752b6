//! Settings from a file (`--config FILE.toml`): every flag has its key there, of the flag's own name.
//!
//! The keys are taken from the argument parser itself, so that no flag can be without one, and a file becomes
//! the flags it stands for: its values are read by the code that reads the command line. A flag on the command
//! line takes the place of its key, a repeatable one of all the key's values.
//!
//! Read first: TOML 1.0.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use rustix::fs::OFlags;
use thiserror::Error;
use toml::{Table, Value};

use crate::limits::CONFIG_FILE_BYTES_MAX;

/// Flags that are no settings: they say where settings come from, or that the process prints and ends.
const NO_SETTINGS: [&str; 4] = ["config", "print-capabilities", "help", "version"];

/// What a setting stands at, in the words of the command line, by its key; a switch that is off is `false`.
pub(super) type Settings = BTreeMap<String, Vec<OsString>>;

/// Why a file of settings is refused.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("--config {}: cannot read it ({source}): give a file that this user can read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// It is a folder, a pipe or a device.
    #[error("--config {}: not a file: it is read again at each SIGHUP, so give one", .0.display())]
    NotAFile(PathBuf),
    /// It is too long to be one.
    #[error(
        "--config {}: more than {CONFIG_FILE_BYTES_MAX} bytes, which no file of settings needs: is it the right \
         one?", .0.display()
    )]
    TooLong(PathBuf),
    /// It is no TOML.
    #[error("{}:{line}: {message}: write KEY = VALUE lines as TOML has them", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Why, in the parser's words.
        message: String,
    },
    /// A key that no flag has.
    #[error(
        "{}: {key}: no such setting{}: keys are the long flags of vunet --help, without the dashes in front",
        path.display(), near(nearest.as_deref())
    )]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The most similar one there is.
        nearest: Option<String>,
    },
    /// A value of a wrong type.
    #[error("{}: {key} = {value}: expected {expected}", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What it is to be.
        expected: &'static str,
    },
    /// A value that the flag does not take.
    #[error("{}: {key} = {value}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Why not.
        reason: String,
    },
}

fn near(nearest: Option<&str>) -> String {
    nearest.map(|key| format!(" (there is {key})")).unwrap_or_default()
}

/// The flags of `command` that are settings.
pub(super) fn settings_of(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| arg.get_long().is_some_and(|key| !NO_SETTINGS.contains(&key)))
}

/// What the settings stand at.
pub(super) fn standing(command: &Command, matches: &ArgMatches) -> Settings {
    let value = |arg: &Arg| {
        let raw = matches.get_raw(arg.get_id().as_str()).into_iter().flatten();
        (arg.get_long().unwrap_or_default().to_owned(), raw.map(OsString::from).collect())
    };
    settings_of(command).map(value).collect()
}

/// The command line that `line`, of which the parser made `given`, and the settings of the file `path` are
/// together: the program's name, the file's settings, the flags.
///
/// # Errors
/// [`FileError`].
pub(super) fn merged(
    command: &Command,
    line: &[OsString],
    given: &ArgMatches,
    path: &Path,
) -> Result<Vec<OsString>, FileError> {
    let table = read(path)?;
    let mut words: Vec<OsString> = line.first().cloned().into_iter().collect();
    for (key, value) in &table {
        let in_file = InFile { path, key, value };
        let arg = settings_of(command).find(|arg| arg.get_long() == Some(key));
        let arg = arg.ok_or_else(|| in_file.unknown(command))?;
        let own = in_file.words(arg)?;
        in_file.judge(command, &own)?;
        if given.value_source(arg.get_id().as_str()) != Some(ValueSource::CommandLine) {
            words.extend(own.into_iter().map(OsString::from));
        }
    }
    words.extend(line.iter().skip(1).cloned());
    Ok(words)
}

fn read(path: &Path) -> Result<Table, FileError> {
    let refused = |source| FileError::Read { path: path.to_owned(), source };
    let is_file = |found: Metadata| {
        if found.is_file() { Ok(()) } else { Err(FileError::NotAFile(path.to_owned())) }
    };
    // Looked at before it is opened, as that does something to devices, and after, as it may be another by then. Opening
    // a pipe would wait for its other end.
    is_file(path.metadata().map_err(refused)?)?;
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(refused)?;
    is_file(file.metadata().map_err(refused)?)?;
    let mut text = Vec::new();
    file.take(CONFIG_FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(refused)?;
    if text.len() as u64 > CONFIG_FILE_BYTES_MAX {
        return Err(FileError::TooLong(path.to_owned()));
    }
    let at = |offset: usize, message: &str| FileError::Syntax {
        path: path.to_owned(),
        line: 1 + text[..offset.min(text.len())].iter().filter(|&&byte| byte == b'\n').count(),
        message: message.trim_end().replace('\n', "; "),
    };
    let utf8 = std::str::from_utf8(&text).map_err(|error| at(error.valid_up_to(), "not UTF-8"))?;
    utf8.parse::<Table>().map_err(|error| {
        let span = error.span().unwrap_or_default();
        match (error.message(), utf8.get(span.clone())) {
            // The parser does not say which.
            (message @ "duplicate key", Some(key)) => at(span.start, &format!("{message} {key}")),
            (message, _) => at(span.start, message),
        }
    })
}

/// One line of a file.
struct InFile<'a> {
    path: &'a Path,
    key: &'a str,
    value: &'a Value,
}

impl InFile<'_> {
    /// The flags it stands for.
    fn words(&self, arg: &Arg) -> Result<Vec<String>, FileError> {
        let flag = |text: String| format!("--{}={text}", self.key);
        match (arg.get_action(), self.value) {
            (ArgAction::SetTrue, Value::Boolean(true)) => Ok(vec![format!("--{}", self.key)]),
            (ArgAction::SetTrue, Value::Boolean(false)) => Ok(Vec::new()),
            (ArgAction::SetTrue, _) => Err(self.expected("true or false")),
            (ArgAction::Append, Value::Array(values)) => {
                let text = |value| scalar(value).map(flag).ok_or_else(|| self.expected(ARRAY));
                values.iter().map(text).collect()
            }
            (ArgAction::Append, _) => Err(self.expected(ARRAY)),
            (_, value) => match scalar(value) {
                Some(text) => Ok(vec![flag(text)]),
                None => Err(self.expected("a text or a number")),
            },
        }
    }

    /// Has the parser read each value by itself, as it says of a whole line only what is first wrong in it.
    fn judge(&self, command: &Command, words: &[String]) -> Result<(), FileError> {
        for word in words {
            let line = ["vunet", word];
            match command.clone().try_get_matches_from(line) {
                Ok(_) => {}
                // Of flags together; the whole line is judged later.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict
                    ) => {}
                Err(error) => {
                    let value = word.split_once('=').map_or("true", |(_, value)| value);
                    return Err(FileError::Value {
                        path: self.path.to_owned(),
                        key: self.key.to_owned(),
                        value: format!("{value:?}"),
                        reason: reason(&error),
                    });
                }
            }
        }
        Ok(())
    }

    fn expected(&self, expected: &'static str) -> FileError {
        FileError::Type {
            path: self.path.to_owned(),
            key: self.key.to_owned(),
            value: short(self.value),
            expected,
        }
    }

    fn unknown(&self, command: &Command) -> FileError {
        // What the parser would say of such a flag.
        let error = command.clone().try_get_matches_from(["vunet", &format!("--{}", self.key)]).err();
        let nearest = error.and_then(|error| match error.get(ContextKind::SuggestedArg) {
            Some(ContextValue::String(flag)) => Some(flag.trim_start_matches('-').to_owned()),
            _ => None,
        });
        let nearest = nearest.filter(|nearest| !NO_SETTINGS.contains(&nearest.as_str()));
        FileError::UnknownKey { path: self.path.to_owned(), key: self.key.to_owned(), nearest }
    }
}

const ARRAY: &str = "an array of texts, such as [\"…\", \"…\"], as the flag can be repeated";

/// A value as it is written on the command line.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A value for an error: a table's contents say nothing there.
fn short(value: &Value) -> String {
    match value {
        Value::Table(_) => "a section".to_owned(),
        value => value.to_string(),
    }
}

/// Why the parser refuses a value, without the flag and the value that it puts in front.
fn reason(error: &clap::Error) -> String {
    if let Some(source) = std::error::Error::source(error) {
        return source.to_string();
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) if !valid.is_empty() => {
            format!("expected one of {}", valid.join(", "))
        }
        _ => "the flag does not take it".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::{Error, Line, settings};

    /// Every setting with a value that is not its default, as TOML and as the flags it stands for. A flag that is
    /// not here fails the tests below.
    const SAMPLES: &[(&str, &str, &[&str])] = &[
        ("state-dir", "'/s'", &["--state-dir=/s"]),
        ("socket-path", "'vm.sock'", &["--socket-path=vm.sock"]),
        ("fd", "7", &["--fd=7"]),
        ("control", "'vm.control'", &["--control=vm.control"]),
        ("metrics", "'127.0.0.1:9100'", &["--metrics=127.0.0.1:9100"]),
        ("pcap", "'vm.pcapng'", &["--pcap=vm.pcapng"]),
        ("pcap-snaplen", "128", &["--pcap-snaplen=128"]),
        ("pcap-max-bytes", "1000000", &["--pcap-max-bytes=1000000"]),
        ("client", "true", &["--client"]),
        ("one-off", "true", &["--one-off"]),
        ("network", "'lab'", &["--network=lab"]),
        ("mode", "'host-only'", &["--mode=host-only"]),
        ("uplink", "'tap=vm0'", &["--uplink=tap=vm0"]),
        ("nat", "'packet'", &["--nat=packet"]),
        ("nat-address", "'192.0.2.50/24'", &["--nat-address=192.0.2.50/24"]),
        ("nat-gateway", "'192.0.2.2'", &["--nat-gateway=192.0.2.2"]),
        ("nat-ports", "'50000-60000'", &["--nat-ports=50000-60000"]),
        ("vlan", "7", &["--vlan=7"]),
        ("trust-guest", "true", &["--trust-guest"]),
        ("mac", "'52:54:00:00:00:09'", &["--mac=52:54:00:00:00:09"]),
        ("ip-mtu", "9000", &["--ip-mtu=9000"]),
        ("subnet", "'10.9.0.0/16'", &["--subnet=10.9.0.0/16"]),
        ("gateway", "'10.9.0.254'", &["--gateway=10.9.0.254"]),
        ("guest-ip", "'10.9.9.9'", &["--guest-ip=10.9.9.9"]),
        ("no-dhcp", "true", &["--no-dhcp"]),
        ("publish", "['8080:80', 'udp:53:53']", &["--publish=8080:80", "--publish=udp:53:53"]),
        ("tcp-ports", "['8081:81']", &["--tcp-ports=8081:81"]),
        ("udp-ports", "['54:54', '55']", &["--udp-ports=54:54", "--udp-ports=55"]),
        ("limit-from-guest", "'rate=10mbit,flows=50'", &["--limit-from-guest=rate=10mbit,flows=50"]),
        ("limit-to-guest", "'packets=9000'", &["--limit-to-guest=packets=9000"]),
        ("allow-host-loopback", "true", &["--allow-host-loopback"]),
        ("udp-mapping", "'endpoint-independent'", &["--udp-mapping=endpoint-independent"]),
        ("udp-filtering", "'address-dependent'", &["--udp-filtering=address-dependent"]),
        (
            "dns-server",
            "['192.0.2.1', '192.0.2.2:5353']",
            &["--dns-server=192.0.2.1", "--dns-server=192.0.2.2:5353"],
        ),
        ("dns-domain", "'lan'", &["--dns-domain=lan"]),
        (
            "dns-host",
            "['db=10.9.0.7', 'a.b=10.9.0.8']",
            &["--dns-host=db=10.9.0.7", "--dns-host=a.b=10.9.0.8"],
        ),
        ("no-dns", "true", &["--no-dns"]),
        ("log-level", "'debug'", &["--log-level=debug"]),
        ("log-format", "'json'", &["--log-format=json"]),
        ("queues", "4", &["--queues=4"]),
        ("pin", "'1,4-6'", &["--pin=1,4-6"]),
        ("busy-poll-us", "50", &["--busy-poll-us=50"]),
        ("no-peek-off", "true", &["--no-peek-off"]),
    ];

    fn words(flags: &[&str]) -> Vec<OsString> {
        ["vunet"].iter().chain(flags).map(OsString::from).collect()
    }

    /// What the settings stand at on a command line of `flags`, with a file that says `text`.
    fn with_file(text: &str, flags: &[&str]) -> Result<Settings, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        fs::write(&path, text).unwrap();
        let config = format!("--config={}", path.display());
        let line = words(&[&[config.as_str()], flags].concat());
        settings(&line).map(|mut args| args.take_file().unwrap().standing)
    }

    /// The same of flags alone.
    fn of_flags(flags: &[&str]) -> Settings {
        let command = Line::command();
        standing(&command, &command.clone().try_get_matches_from(words(flags)).unwrap())
    }

    fn error(text: &str) -> String {
        let error = with_file(text, &[]).expect_err(text);
        assert_eq!(error.exit_code(), 2, "{text}");
        error.to_string()
    }

    #[test]
    fn every_flag_has_its_key_which_means_what_the_flag_does() {
        let samples: BTreeMap<_, _> =
            SAMPLES.iter().map(|&(key, toml, flags)| (key, (toml, flags))).collect();
        let mut tried = 0;
        for arg in settings_of(&Line::command()) {
            let key = arg.get_long().unwrap();
            let (toml, flags) = samples.get(key).unwrap_or_else(|| panic!("SAMPLES has no --{key}: add it"));
            let standing = with_file(&format!("{key} = {toml}\n"), &[]).expect(key);
            assert_eq!(standing, of_flags(flags), "{key}");
            assert_ne!(standing[key], of_flags(&[])[key], "{key}: the sample is the default");
            tried += 1;
        }
        assert_eq!(tried, SAMPLES.len(), "a sample is of no flag");
    }

    #[test]
    fn what_is_no_setting_is_exactly_what_reads_settings_or_prints_and_ends() {
        let mut command = Line::command();
        command.build();
        let left: Vec<_> = command.get_arguments().filter_map(Arg::get_long).collect();
        for key in NO_SETTINGS {
            assert!(left.contains(&key), "{key} is no flag");
            assert!(error(&format!("{key} = true\n")).contains("no such setting"), "{key}");
        }
        assert_eq!(left.len(), SAMPLES.len() + NO_SETTINGS.len());
    }

    #[test]
    fn all_settings_can_stand_in_one_file() {
        let whole: String = SAMPLES.iter().map(|(key, toml, _)| format!("{key} = {toml}\n")).collect();
        let flags: Vec<&str> = SAMPLES.iter().flat_map(|(.., flags)| *flags).copied().collect();
        assert_eq!(with_file(&whole, &[]).unwrap(), of_flags(&flags));
    }

    #[test]
    fn flags_of_the_command_line_take_the_place_of_the_files() {
        let file = "ip-mtu = 9000\ndns-host = ['a=10.0.2.8', 'b=10.0.2.9']\nmac = '52:54:00:00:00:09'\n";
        let flags = ["--ip-mtu", "1400", "--dns-host", "c=10.0.2.7"];
        let expected = of_flags(&[&flags[..], &["--mac=52:54:00:00:00:09"]].concat());
        assert_eq!(with_file(file, &flags).unwrap(), expected);
    }

    #[test]
    fn a_switch_can_be_written_as_off() {
        assert_eq!(with_file("one-off = false\nno-dns = false\n", &[]).unwrap(), of_flags(&[]));
    }

    #[test]
    fn errors_name_file_key_value_and_reason() {
        for (text, parts) in [
            ("mac = 'x'\n", &["vm.toml: mac = \"x\": ", "not a MAC", "52:54:00:12:34:56"][..]),
            ("mac = 7\n", &["vm.toml: mac = \"7\": ", "not a MAC"]),
            ("mode = 'routed'\n", &["mode = \"routed\": expected one of nat, host-only"]),
            ("queues = 0\n", &["queues = \"0\": ", "1..=16"]),
            ("publish = ['80:80', '90:x']\n", &["publish = \"90:x\": ", "not a port"]),
            ("publish = '80:80'\n", &["publish = \"80:80\": expected an array"]),
            ("publish = [80]\n", &["publish = \"80\": expected [tcp:|udp:]"]),
            (
                "dns-server = [['192.0.2.1']]\n",
                &["dns-server = [[\"192.0.2.1\"]]: expected an array of texts"],
            ),
            ("client = 'yes'\n", &["client = \"yes\": expected true or false"]),
            ("ip-mtu = true\n", &["ip-mtu = true: expected a text or a number"]),
            ("ip-mtu = 1.5\n", &["ip-mtu = 1.5: expected a text or a number"]),
            ("ip_mtu = 1500\n", &["vm.toml: ip_mtu: no such setting (there is ip-mtu)"]),
            ("colour = 'red'\n", &["vm.toml: colour: no such setting: keys are the long flags"]),
            ("[dns]\nhost = []\n", &["vm.toml: dns: no such setting"]),
            ("[mac]\nx = 1\n", &["mac = a section: expected a text"]),
            ("ip-mtu = 1\nip-mtu = 2\n", &["vm.toml:2: duplicate key ip-mtu:"]),
            ("mac = 52:54\n", &["vm.toml:1: ", "KEY = VALUE"]),
        ] {
            let error = error(text);
            for part in parts {
                assert!(error.contains(part), "{text:?}: '{part}' is not in: {error}");
            }
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn what_is_no_file_of_settings_is_refused_without_waiting_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let refuse = |path: &Path, part: &str| {
            let line = words(&["--config", path.to_str().unwrap()]);
            let error = settings(&line).expect_err(part).to_string();
            assert!(error.contains("--config") && error.contains(part), "'{part}' is not in: {error}");
        };
        refuse(&dir.path().join("none"), "No such file");
        refuse(dir.path(), "not a file");
        refuse(Path::new("/dev/zero"), "not a file");
        let long = dir.path().join("long");
        let text = "#".repeat(usize::try_from(CONFIG_FILE_BYTES_MAX).unwrap());
        fs::write(&long, &text).unwrap();
        assert!(settings(&words(&["--config", long.to_str().unwrap()])).is_ok(), "as long as may be");
        fs::write(&long, text + "#").unwrap();
        refuse(&long, "more than 1048576 bytes");
        let raw = dir.path().join("raw");
        fs::write(&raw, b"# a\nmac = '\xff'\n").unwrap();
        let error = settings(&words(&["--config", raw.to_str().unwrap()])).unwrap_err().to_string();
        assert!(error.contains("raw:2: not UTF-8"), "{error}");
    }
}
