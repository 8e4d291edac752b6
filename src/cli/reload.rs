//! Settings that change while the backend runs: the file of `--config` is read again, and what can change live
//! does, all of it or nothing.
//!
//! [`LIVE`] is the table of what can. Every other key is refused by its name if its value is another than at
//! the start, so that nobody believes in a change that did not happen.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::config_file::Settings;
use super::{Args, check, settings};
use crate::config::{Config, DnsConfig, Lan, LimitSpec, LiveConfig};

/// How the new value of one key is judged, and where it goes if it is right.
type Judge = fn(&Args, &Running, &mut LiveConfig) -> Result<(), ReloadError>;

/// The keys that can change while the backend runs.
const LIVE: &[(&str, Judge)] = &[
    ("log-level", log_level),
    ("dns-host", dns_host),
    ("publish", publish),
    ("tcp-ports", publish),
    ("udp-ports", publish),
    ("limit-from-guest", limit_from_guest),
    ("limit-to-guest", limit_to_guest),
];

/// Why a reload is refused; nothing of it was applied.
#[derive(Debug, Error)]
pub enum ReloadError {
    /// The file, or its settings together with the command line.
    #[error("{0}")]
    Settings(String),
    /// A setting that stands from the start on.
    #[error(
        "{}: {key} cannot change while vunet runs (it is {old}, the file says {new}): put it back, or restart vunet",
        path.display()
    )]
    Fixed {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it stands at.
        old: String,
        /// What it would be.
        new: String,
    },
    /// A setting that could change, but not for this backend.
    #[error("{key} cannot change while vunet runs: {why}; put it back, or restart vunet")]
    NotHere {
        /// The key.
        key: &'static str,
        /// Why not.
        why: &'static str,
    },
}

/// What new values are judged by.
#[derive(Clone, Debug)]
struct Running {
    lan: Lan,
    dns: DnsConfig,
    is_on_network: bool,
    follows_flows: bool,
}

/// Reads the file of a running backend again.
#[derive(Clone, Debug)]
pub struct Reloader {
    /// With what the backend runs by now.
    file: SettingsFile,
    running: Running,
}

/// The keys that can change while the backend runs.
#[cfg(test)]
pub(super) fn live_keys() -> impl Iterator<Item = &'static str> {
    LIVE.iter().map(|(key, _)| *key)
}

/// The file of a command line, and what it and the flags say.
#[derive(Clone, Debug)]
pub struct SettingsFile {
    pub(super) line: Vec<OsString>,
    pub(super) path: PathBuf,
    pub(super) standing: Settings,
}

impl SettingsFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What reads it again for the backend of `config`.
    pub fn reloader(self, config: &Config) -> Reloader {
        let running = Running {
            lan: config.lan,
            dns: config.dns.clone(),
            is_on_network: config.network.is_some(),
            follows_flows: config.link.as_ref().is_none_or(|link| link.translate.is_some()),
        };
        Reloader { file: self, running }
    }
}

impl Reloader {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Reads the file again; what is to change, which the backend then runs by.
    ///
    /// # Errors
    /// [`ReloadError`]; the backend goes on as it was.
    pub fn reload(&mut self) -> Result<LiveConfig, ReloadError> {
        let mut args = settings(&self.file.line).map_err(|error| ReloadError::Settings(error.text()))?;
        let now = args.take_file().map(|file| file.standing).unwrap_or_default();
        let mut live = LiveConfig::default();
        for (key, new) in &now {
            let old = self.file.standing.get(key).map(Vec::as_slice).unwrap_or_default();
            if old == new.as_slice() {
                continue;
            }
            match LIVE.iter().find(|(name, _)| name == key) {
                Some((_, judge)) => judge(&args, &self.running, &mut live)?,
                None => {
                    return Err(ReloadError::Fixed {
                        path: self.file.path.clone(),
                        key: key.clone(),
                        old: shown(old),
                        new: shown(new),
                    });
                }
            }
        }
        self.file.standing = now;
        Ok(live)
    }
}

/// The values of a key for an error.
fn shown(values: &[OsString]) -> String {
    let texts: Vec<_> = values.iter().map(|value| value.to_string_lossy()).collect();
    if texts.is_empty() { "not set".to_owned() } else { texts.join(", ") }
}

fn log_level(args: &Args, _: &Running, live: &mut LiveConfig) -> Result<(), ReloadError> {
    live.log_level = Some(args.log_level.clone());
    Ok(())
}

/// What a key of limits says, where it can be kept.
fn limit(
    key: &'static str,
    spec: Option<LimitSpec>,
    running: &Running,
) -> Result<Option<LimitSpec>, ReloadError> {
    let spec = spec.unwrap_or_default();
    if spec.flows.is_some() && !running.follows_flows {
        return Err(ReloadError::NotHere { key, why: "on a link nobody follows flows=" });
    }
    Ok(Some(spec))
}

fn limit_from_guest(args: &Args, running: &Running, live: &mut LiveConfig) -> Result<(), ReloadError> {
    live.limit_from_guest = limit("limit-from-guest", args.limit_from_guest, running)?;
    Ok(())
}

fn limit_to_guest(args: &Args, running: &Running, live: &mut LiveConfig) -> Result<(), ReloadError> {
    live.limit_to_guest = limit("limit-to-guest", args.limit_to_guest, running)?;
    Ok(())
}

fn dns_host(args: &Args, running: &Running, live: &mut LiveConfig) -> Result<(), ReloadError> {
    let refuse = |why| Err(ReloadError::NotHere { key: "dns-host", why });
    if running.is_on_network {
        return refuse("guests of its network were kept from the names there were");
    }
    if !running.dns.enabled {
        return refuse("nothing answers DNS");
    }
    let dns = check::dns(args, &running.dns.domain, running.lan.gateway);
    live.dns = Some(dns.map_err(|error| ReloadError::Settings(error.to_string()))?);
    Ok(())
}

/// Ports of all keys that publish, as no host port may be published twice. Whether ports lead to this guest at all, and
/// whether the host has them, shows when they are published.
fn publish(args: &Args, _: &Running, live: &mut LiveConfig) -> Result<(), ReloadError> {
    let ports = check::published(args);
    live.publish = Some(ports.map_err(|error| ReloadError::Settings(error.to_string()))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::config_file::settings_of;
    use crate::cli::{Command, Line, parse};

    /// A backend whose file says `text`.
    fn started(text: &str, flags: &str) -> (tempfile::TempDir, Reloader) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        fs::write(&path, text).unwrap();
        let line = format!("vunet --config {} {flags}", path.display());
        let parsed = parse(line.split_whitespace().map(Into::into));
        let Ok(Command::Run(mut args)) = parsed else { panic!("{line}: {parsed:?}") };
        let file = args.take_file().expect("--config is given");
        let (config, _) = args.into_config(Ok(Vec::new())).unwrap();
        (dir, file.reloader(&config))
    }

    fn again(dir: &tempfile::TempDir, reloader: &mut Reloader, text: &str) -> Result<LiveConfig, String> {
        fs::write(dir.path().join("vm.toml"), text).unwrap();
        reloader.reload().map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_that_can_change_is_a_setting() {
        let command = Line::command();
        for (key, _) in LIVE {
            assert!(settings_of(&command).any(|arg| arg.get_long() == Some(key)), "{key}");
        }
    }

    #[test]
    fn what_can_change_does_and_is_compared_with_next_time() {
        let (dir, mut reloader) = started("socket-path = 'vm.sock'\n", "");
        assert_eq!(again(&dir, &mut reloader, "socket-path = 'vm.sock'\n"), Ok(LiveConfig::default()));
        let text = "socket-path = 'vm.sock'\nlog-level = 'debug'\ndns-host = ['db=10.0.2.9']\n";
        let live = again(&dir, &mut reloader, text).unwrap();
        assert_eq!(live.log_level.as_deref(), Some("debug"));
        let hosts = live.dns.unwrap().hosts;
        assert_eq!(hosts[0], ("db.vunet.internal".to_owned(), "10.0.2.9".parse().unwrap()));
        assert_eq!(again(&dir, &mut reloader, text), Ok(LiveConfig::default()), "as it is");
        // Back to the defaults.
        let live = again(&dir, &mut reloader, "socket-path = 'vm.sock'\n").unwrap();
        assert_eq!(live.log_level.as_deref(), Some("info"));
        assert_eq!(live.dns.unwrap().hosts[0].0, "host.vunet.internal");
    }

    #[test]
    fn limits_come_change_and_go() {
        let (dir, mut reloader) = started("socket-path = 'vm.sock'\nlimit-to-guest = 'rate=1mbit'\n", "");
        let text = "socket-path = 'vm.sock'\nlimit-from-guest = 'rate=5mbit,flows=9'\n";
        let live = again(&dir, &mut reloader, text).unwrap();
        assert_eq!(live.limit_from_guest, Some("rate=5mbit,flows=9".parse().unwrap()));
        assert_eq!(live.limit_to_guest, Some(LimitSpec::default()), "back to none");
        assert_eq!(live.keys(), ["limit-from-guest", "limit-to-guest"]);
        let text = "socket-path = 'vm.sock'\nlimit-from-guest = 'rate=much'\n";
        let error = again(&dir, &mut reloader, text).unwrap_err();
        assert!(error.contains("limit-from-guest") && error.contains("much"), "{error}");
    }

    #[test]
    fn flows_stay_unlimited_on_a_link() {
        let bridge = "socket-path = 'vm.sock'\nmode = 'bridge'\nuplink = 'bridge=br0'\n";
        let (dir, mut reloader) = started(bridge, "");
        let text = format!("{bridge}limit-to-guest = 'flows=9'\n");
        let error = again(&dir, &mut reloader, &text).unwrap_err();
        assert!(error.contains("limit-to-guest") && error.contains("flows"), "{error}");
        let text = format!("{bridge}limit-to-guest = 'packets=9'\n");
        assert!(again(&dir, &mut reloader, &text).is_ok());
    }

    #[test]
    fn every_other_key_is_refused_by_name_and_takes_the_rest_with_it() {
        let (dir, mut reloader) = started("socket-path = 'vm.sock'\n", "");
        let text = "socket-path = 'vm.sock'\nlog-level = 'debug'\nip-mtu = 9000\n";
        let error = again(&dir, &mut reloader, text).unwrap_err();
        for part in ["vm.toml", "ip-mtu", "1500", "9000", "restart"] {
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
        let live = again(&dir, &mut reloader, "socket-path = 'vm.sock'\nlog-level = 'debug'\n").unwrap();
        assert_eq!(live.log_level.as_deref(), Some("debug"), "it had not been applied");
        for (text, part) in [
            ("", "socket-path"),
            ("socket-path = 'vm.sock'\none-off = true\n", "one-off"),
            ("socket-path = 'vm.sock'\ndns-host = 'db=10.0.2.9'\n", "array"),
            ("socket-path = 'vm.sock'\nlog-level = 'loud'\n", "log-level"),
            ("socket-path = 'vm.sock'\ncolour = 'red'\n", "colour"),
            ("socket-path = vm.sock\n", ":1: "),
        ] {
            let error = again(&dir, &mut reloader, text).unwrap_err();
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
    }

    #[test]
    fn a_flag_of_the_command_line_stands_whatever_the_file_says() {
        let (dir, mut reloader) = started("socket-path = 'vm.sock'\n", "--log-level warn --ip-mtu 1400");
        let text = "socket-path = 'vm.sock'\nlog-level = 'debug'\nip-mtu = 9000\n";
        assert_eq!(again(&dir, &mut reloader, text), Ok(LiveConfig::default()));
    }

    #[test]
    fn ports_of_all_keys_together_are_published_and_none_twice() {
        let (dir, mut reloader) = started("socket-path = 'vm.sock'\npublish = ['80:80']\n", "");
        let text = "socket-path = 'vm.sock'\npublish = ['80:80']\ntcp-ports = ['81']\nudp-ports = ['80']\n";
        let live = again(&dir, &mut reloader, text).unwrap();
        let ports: Vec<_> = live.publish.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["tcp:0.0.0.0:80:80", "tcp:0.0.0.0:81:81", "udp:0.0.0.0:80:80"]);
        let text = "socket-path = 'vm.sock'\npublish = ['80:80']\ntcp-ports = ['80']\n";
        let error = again(&dir, &mut reloader, text).unwrap_err();
        assert!(error.contains("publish each host port once"), "{error}");
        let live = again(&dir, &mut reloader, "socket-path = 'vm.sock'\n").unwrap();
        assert_eq!(live.publish, Some(Vec::new()));
    }

    #[test]
    fn names_stay_where_nothing_answers_for_them() {
        let (dir, mut reloader) = started("socket-path = 'vm.sock'\nno-dns = true\n", "");
        let text = "socket-path = 'vm.sock'\nno-dns = true\ndns-host = ['db=10.0.2.9']\n";
        let error = again(&dir, &mut reloader, text).unwrap_err();
        assert!(error.contains("dns-host") && error.contains("nothing answers DNS"), "{error}");
    }
}
