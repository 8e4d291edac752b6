//! Places of files: the state directory, the named network in it, the socket's directory.
//!
//! Nothing is made or written. What is asked of a file system may hang, so that it is read in a thread of its own.

use std::io;
use std::os::unix;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::check::{Check, Fix, State, quoted};
use super::privilege::Who;
use super::tree::Tree;
use super::way::Asked;
use crate::network::definition::Kind;
use crate::network::manager::{NetworkError, Networks};
use crate::network::name::NetworkName;
use crate::network::state_dir::{self, StateDir, StateDirError};

/// Bytes of a unix socket's path (`sun_path` of unix(7), less its end).
pub(super) const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Marks a socket that listens, in `/proc/net/unix`.
const LISTENS: u32 = 0x0001_0000;

/// What is known of them.
#[derive(Debug)]
pub(super) struct Places {
    /// Where state is kept; what is there, or nothing yet.
    pub(super) state: Result<StatePlace, StateDirError>,
    /// The named network that is asked for; in words, why there is none.
    pub(super) network: Option<Result<Kind, String>>,
    /// The sockets.
    pub(super) sockets: Vec<Socket>,
}

/// The state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StatePlace {
    path: PathBuf,
    /// Its owner and mode, if it is there.
    there: Option<(u32, u32)>,
}

/// Where a socket is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    path: PathBuf,
    /// What is wrong with it.
    fault: Option<Fault>,
    /// What for.
    purpose: Purpose,
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// The VM's, as it was asked for.
    Vm,
    /// The same where nobody asked for one: it is where this user's sockets usually are.
    Usual,
    /// The control API's.
    Control,
}

impl Purpose {
    fn flag(self) -> &'static str {
        match self {
            Purpose::Vm | Purpose::Usual => "--socket-path",
            Purpose::Control => "--control",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Purpose::Vm | Purpose::Usual => "socket",
            Purpose::Control => "control socket",
        }
    }
}

/// What is wrong with a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// No socket can have it.
    NotAPath,
    /// Its directory is not there.
    NoDirectory,
    /// It cannot be written to.
    Denied(io::ErrorKind),
    /// Something else is there.
    NotASocket,
    /// Somebody listens there.
    InUse,
    /// Nobody listens there, and vunet is to connect.
    Nobody,
}

impl Places {
    pub(super) fn read(tree: &Tree, asked: &Asked) -> Places {
        let state = state_dir::locate(asked.state_dir.as_deref());
        let looked = state.and_then(|path| Ok((StateDir::look(path.clone())?, path)));
        let network = asked
            .network
            .as_ref()
            .map(|name| find(looked.as_ref().ok().and_then(|(dir, _)| dir.as_ref()), name));
        let state = looked.map(|(_, path)| {
            let there = std::fs::metadata(&path).ok().map(|meta| (meta.uid(), meta.mode() & 0o7777));
            StatePlace { path, there }
        });
        Places { state, network, sockets: sockets_of(tree, asked) }
    }
}

fn find(state: Option<&StateDir>, name: &NetworkName) -> Result<Kind, String> {
    let Some(state) = state else { return Err(format!("there is no network {name} yet")) };
    match Networks::new(state.clone()).find(name) {
        Ok(network) => Ok(network.kind),
        Err(NetworkError::Unknown { .. }) => {
            Err(format!("there is no network {name} in {}", state.path().display()))
        }
        Err(error) => {
            let source =
                std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            Err(format!("{error}{source}"))
        }
    }
}

fn sockets_of(tree: &Tree, asked: &Asked) -> Vec<Socket> {
    let listening = tree.text("/proc/self/net/unix").unwrap_or_default();
    let of = |purpose: Purpose, path: &Path, connects| Socket {
        fault: fault(path, connects, &listening),
        path: path.to_owned(),
        purpose,
    };
    let vm = match &asked.socket {
        Some((path, connects)) => Some(of(Purpose::Vm, path, *connects)),
        None => usual().map(|path| of(Purpose::Usual, &path, false)),
    };
    let control = asked.control.as_ref().map(|path| of(Purpose::Control, path, false));
    vm.into_iter().chain(control).collect()
}

/// Where this user's sockets usually are (XDG Base Directory Specification 0.8).
fn usual() -> Option<PathBuf> {
    let usual = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    usual.map(|usual| usual.join("vunet.sock"))
}

fn fault(path: &Path, connects: bool, listening: &str) -> Option<Fault> {
    let is_address =
        unix::net::SocketAddr::from_pathname(path).is_ok_and(|addr| addr.as_pathname().is_some());
    if !is_address {
        return Some(Fault::NotAPath);
    }
    let is_live = listens(listening, path);
    if connects {
        return (!is_live).then_some(Fault::Nobody);
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Some(Fault::NoDirectory);
    }
    if let Err(error) = accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        return Some(Fault::Denied(io::Error::from(error).kind()));
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => Some(Fault::NotASocket),
        Ok(_) if is_live => Some(Fault::InUse),
        _ => None,
    }
}

/// Whether `table`, of the form of `/proc/net/unix`, has a socket that listens at `path`, as it was written by whoever bound it.
fn listens(table: &str, path: &Path) -> bool {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    table.lines().skip(1).any(|line| {
        // Address, references, protocol, flags, type, state, inode, path.
        let mut fields = line.split_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok()).unwrap_or(0);
        let bound = fields.nth(3).map(Path::new);
        flags & LISTENS != 0 && bound.is_some_and(|bound| bound == path || bound == absolute)
    })
}

/// The state directory.
pub(super) fn state_dir(places: Option<&Places>, who: Who) -> Check {
    const NAME: &str = "state directory";
    let Some(places) = places else {
        return Check::late(
            NAME,
            State::Missing,
            "look whether its file system hangs, or give --state-dir DIR on a local disk",
        );
    };
    let error = match &places.state {
        Ok(StatePlace { path, there: Some((uid, mode)) }) => {
            let says = format!(
                "{} of user {uid}, mode {mode:04o}, on a file system with room and locks",
                path.display()
            );
            return Check::ok(NAME, says);
        }
        Ok(StatePlace { path, there: None }) => {
            return Check::ok(NAME, format!("{} is not there yet, and can be made", path.display()));
        }
        Err(error) => error,
    };
    // What to do follows, which is said apart here.
    let words = error.to_string();
    let says = words.split_once("; ").map_or(&*words, |(says, _)| says);
    let says = says.strip_prefix("state directory ").unwrap_or(says).to_owned();
    let elsewhere =
        "give --state-dir DIR, an absolute path on a local disk with a MiB free, of this user's own";
    let fix = match error {
        StateDirError::NotOurs { todo, .. } if *todo != state_dir::MAKE_IT_OURS => {
            Fix::advice(format!("{todo}, or give --state-dir DIR"))
        }
        StateDirError::NotOurs { path, .. } => {
            let path = quoted(path);
            Fix::AsRoot(vec![format!("chown {}:{} {path}", who.uid, who.gid), format!("chmod 0700 {path}")])
        }
        StateDirError::Denied(path) => {
            Fix::root(format!("install -d -m 0700 -o {} -g {} {}", who.uid, who.gid, quoted(path)))
        }
        _ => Fix::advice(elsewhere),
    };
    Check::missing(NAME, says, fix)
}

/// The named network that is asked for; for one of a holder, whether its door can have its name.
pub(super) fn network(places: Option<&Places>, asked: &Asked) -> Vec<Check> {
    const NAME: &str = "network";
    let (Some(places), Some(name)) = (places, &asked.network) else { return Vec::new() };
    match &places.network {
        Some(Ok(kind)) => vec![Check::ok(NAME, format!("{name}, of mode {}", kind.mode()))],
        Some(Err(says)) => {
            let place =
                asked.state_dir.as_ref().map_or(String::new(), |dir| format!(" --state-dir {}", quoted(dir)));
            let create = format!("vunet network create {name} --mode nat{place}");
            vec![Check::missing(NAME, says.clone(), Fix::AsUser(vec![create]))]
        }
        None => Vec::new(),
    }
}

/// The sockets' paths; where none is asked for, the directory of this user's sockets.
pub(super) fn sockets(places: Option<&Places>, who: Who) -> Vec<Check> {
    match places {
        Some(places) => places.sockets.iter().map(|at| socket(at, who)).collect(),
        None => {
            let advice = "look whether the file system of --socket-path or --control hangs";
            vec![Check::late("socket", State::Missing, advice)]
        }
    }
}

fn socket(Socket { path, fault, purpose }: &Socket, who: Who) -> Check {
    let (name, flag, is_usual) = (purpose.name(), purpose.flag(), *purpose == Purpose::Usual);
    let shown = path.display();
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (says, fix) = match fault {
        None if is_usual => {
            return Check::ok(name, format!("XDG_RUNTIME_DIR has room for it, such as {shown}"));
        }
        None => return Check::ok(name, format!("{shown} can be had")),
        Some(Fault::NotAPath) => {
            let says = format!(
                "{shown}: no unix socket can have this path, at most {SOCKET_PATH_BYTES_MAX} bytes without NUL"
            );
            (says, Fix::advice(format!("give a shorter {flag}, such as one in XDG_RUNTIME_DIR")))
        }
        Some(Fault::NoDirectory) => {
            let says = format!("{shown}: its directory is not there");
            (says, Fix::AsUser(vec![format!("mkdir -p -m 0700 {}", quoted(folder))]))
        }
        Some(Fault::Denied(io::ErrorKind::PermissionDenied)) => {
            let says = format!("{shown}: this user may not write to its directory");
            let own = format!("give {flag} in a directory of this user's, such as XDG_RUNTIME_DIR");
            let chown = || Fix::root(format!("chown {} {}", who.uid, quoted(folder)));
            (says, if is_usual { chown() } else { Fix::advice(own) })
        }
        Some(Fault::Denied(kind)) => (
            format!("{shown}: its directory takes no socket ({kind})"),
            Fix::advice(format!("give another {flag}")),
        ),
        Some(Fault::NotASocket) => (
            format!("{shown}: something is there that is no socket"),
            Fix::advice(format!("remove it, or give another {flag}")),
        ),
        Some(Fault::InUse) => {
            let says = format!("{shown}: another process listens there");
            (says, Fix::advice(format!("end it (ss -xlp shows it), or give another {flag}")))
        }
        Some(Fault::Nobody) => {
            let says =
                format!("{shown}: nobody seems to listen there yet; vunet tries again until somebody does");
            return Check::warn(name, says, Fix::advice("start the VM"));
        }
    };
    let check = Check::missing(name, says, fix);
    if is_usual { check.not_needed() } else { check }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    use super::super::tree::planted;
    use super::*;

    fn who() -> Who {
        Who::parse("Uid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\n")
    }

    fn places(state: Result<StatePlace, StateDirError>) -> Places {
        Places { state, network: None, sockets: Vec::new() }
    }

    fn state_of(error: StateDirError) -> (State, String, String) {
        let check = state_dir(Some(&places(Err(error))), who());
        (check.state, check.says, check.fix.unwrap().line(true))
    }

    #[test]
    fn a_state_directory_that_will_not_do_is_made_this_users() {
        let path = || PathBuf::from("/var/lib/vunet");
        let (state, says, fix) = state_of(StateDirError::NotOurs {
            path: path(),
            why: "its mode 0777".to_owned(),
            todo: state_dir::MAKE_IT_OURS,
        });
        assert_eq!(state, State::Missing);
        assert!(says.contains("/var/lib/vunet") && says.contains("0777"), "{says}");
        assert_eq!(fix, "chown 1000:100 /var/lib/vunet && chmod 0700 /var/lib/vunet");
        let services =
            StateDirError::NotOurs { path: path(), why: "-".to_owned(), todo: "run this as that user" };
        assert_eq!(state_of(services).2, "run this as that user, or give --state-dir DIR", "it stays theirs");
        let (_, _, fix) = state_of(StateDirError::Denied("/srv/my state".into()));
        assert_eq!(fix, "install -d -m 0700 -o 1000 -g 100 '/srv/my state'");
        let (_, says, fix) = state_of(StateDirError::Nowhere);
        assert!(
            says.contains("neither XDG_STATE_HOME nor HOME") && fix.contains("--state-dir DIR"),
            "{says} {fix}"
        );
        assert_eq!(state_dir(None, who()).state, State::Missing, "it hangs");
        let there = StatePlace { path: path(), there: Some((1000, 0o700)) };
        let ok = state_dir(Some(&places(Ok(there))), who());
        assert!(ok.state == State::Ok && ok.says.contains("of user 1000, mode 0700"), "{}", ok.says);
        let fresh = StatePlace { path: path(), there: None };
        assert_eq!(state_dir(Some(&places(Ok(fresh))), who()).state, State::Ok);
    }

    /// State, words and remedy of a socket that is asked for.
    fn socket_at(path: &Path, connects: bool) -> Check {
        let asked = Asked { socket: Some((path.to_owned(), connects)), ..Asked::plain() };
        let state = Ok(StatePlace { path: PathBuf::from("/s"), there: None });
        let places = Places { sockets: sockets_of(&Tree::of_host(), &asked), ..places(state) };
        sockets(Some(&places), who()).remove(0)
    }

    #[test]
    fn the_control_socket_is_judged_as_the_vms() {
        let folder = tempfile::tempdir().unwrap();
        let asked = |name: &str| Asked { control: Some(folder.path().join(name)), ..Asked::plain() };
        let check = |name: &str| socket(sockets_of(&Tree::of_host(), &asked(name)).last().unwrap(), who());
        assert_eq!((check("ctl").name, check("ctl").state), ("control socket", State::Ok));
        assert_eq!(check("no/ctl").state, State::Missing);
        let _listener = UnixListener::bind(folder.path().join("ctl")).unwrap();
        let taken = check("ctl");
        assert_eq!(taken.state, State::Missing);
        assert!(taken.fix.unwrap().line(true).contains("another --control"));
    }

    #[test]
    fn sockets_need_a_short_path_and_a_directory() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(socket_at(&at("s"), false).state, State::Ok);
        let prefix = at("").as_os_str().len();
        assert_eq!(socket_at(&at(&"x".repeat(SOCKET_PATH_BYTES_MAX - prefix)), false).state, State::Ok);
        let long = socket_at(&at(&"x".repeat(SOCKET_PATH_BYTES_MAX - prefix + 1)), false);
        assert!(long.state == State::Missing && long.says.contains("at most 107 bytes"), "{}", long.says);
        let nowhere = socket_at(&at("no/s"), false);
        assert_eq!(nowhere.fix.unwrap().line(true), format!("mkdir -p -m 0700 {}", at("no").display()));
        std::fs::write(at("file"), "").unwrap();
        assert!(socket_at(&at("file"), false).says.contains("no socket"));
    }

    #[test]
    fn a_socket_that_somebody_listens_on_is_in_use_and_a_dead_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let live = socket_at(&path, false);
        assert!(
            live.state == State::Missing && live.says.contains("another process listens"),
            "{}",
            live.says
        );
        assert_eq!(socket_at(&path, true).state, State::Ok, "to connect to");
        drop(listener);
        assert_eq!(socket_at(&path, false).state, State::Ok, "it is replaced");
        assert_eq!(socket_at(&path, true).state, State::Warn);
    }

    #[test]
    fn listeners_are_told_from_connections_in_the_kernels_table() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 7 /run/a\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 8 /run/b\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 9\n";
        assert!(listens(table, Path::new("/run/a")));
        assert!(!listens(table, Path::new("/run/b")) && !listens(table, Path::new("/run/c")));
    }

    #[test]
    fn the_network_that_is_asked_for_is_found_or_to_be_made() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let (_files, tree) = planted(&[]);
        let network: NetworkName = "lab".parse().unwrap();
        let state_dir = Some(folder.path().to_owned());
        let asked = Asked { network: Some(network), state_dir, ..Asked::plain() };
        let read = Places::read(&tree, &asked);
        let check = super::network(Some(&read), &asked).remove(0);
        assert_eq!(check.state, State::Missing);
        let command = format!("vunet network create lab --mode nat --state-dir {}", folder.path().display());
        assert_eq!(check.fix.unwrap().line(true), command);
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing was made");
    }
}
