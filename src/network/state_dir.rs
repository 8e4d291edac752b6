//! The state directory: where definitions and leases of named networks live.
//!
//! `--state-dir` says where, else a service manager by `$STATE_DIRECTORY`; else it is `/var/lib/vunet` for root and
//! `$XDG_STATE_HOME/vunet` or `~/.local/state/vunet` for everybody else. Each network has a folder of its own:
//! `networks/NAME/`.
//!
//! Leases are an SQLite file in WAL mode, whose processes share memory through a mapped file and lock with
//! POSIX locks. So a directory on a file system of the network, of another host (9p, virtiofs) or in user
//! space is refused, whatever it says it can do; so is one in memory, which forgets at reboot what the
//! guests still believe. Nobody else may write there: who can, hands out the addresses.
//!
//! Read first: SQLite, "Write-Ahead Logging", 6 and 8; XDG Base Directory Specification 0.8; statfs(2).

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat, statfs, statvfs};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};
use thiserror::Error;

use super::name::NetworkName;

/// Where root keeps state.
pub const ROOT_STATE_DIR: &str = "/var/lib/vunet";
/// What is to be done about a directory that is not this user's alone.
pub const MAKE_IT_OURS: &str = "make it your own with mode 0700";
/// Bytes that must be free: the store, its log of changes at its bound, and the index of that log.
pub const FREE_BYTES_MIN: usize = 1 << 20;

/// File systems on which a store cannot be relied on: (magic number of statfs(2), name, why not).
const UNFIT: [(i64, &str, Unfit); 15] = [
    (0x0000_6969, "NFS", Unfit::Remote),
    (0x0000_517b, "SMB", Unfit::Remote),
    (0xff53_4d42, "CIFS", Unfit::Remote),
    (0xfe53_4d42, "SMB2", Unfit::Remote),
    (0x0102_1997, "9p", Unfit::Remote),
    (0x6573_5546, "FUSE or virtiofs", Unfit::Remote),
    (0x5346_414f, "AFS", Unfit::Remote),
    (0x6b41_4653, "AFS", Unfit::Remote),
    (0x7375_7245, "Coda", Unfit::Remote),
    (0x00c3_6400, "Ceph", Unfit::Remote),
    (0x0bd0_0bd0, "Lustre", Unfit::Remote),
    (0x786f_4256, "vboxsf", Unfit::Remote),
    (0x0102_1994, "tmpfs", Unfit::Forgets),
    (0x8584_58f6, "ramfs", Unfit::Forgets),
    (0x9584_58f6, "hugetlbfs", Unfit::Forgets),
];

/// Why a file system will not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Its locks or its shared mappings are not those of one kernel.
    Remote,
    /// What is in it is gone after a reboot.
    Forgets,
}

impl Unfit {
    fn why(self) -> &'static str {
        match self {
            Unfit::Remote => "locks and shared memory of several processes cannot be relied on there",
            Unfit::Forgets => {
                "it is empty after a reboot, and addresses of running guests would be given away"
            }
        }
    }
}

/// Why there is no state directory.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// No flag, and nothing in the environment.
    #[error("no state directory: neither XDG_STATE_HOME nor HOME is an absolute path; give --state-dir DIR")]
    Nowhere,
    /// Not absolute, so that each process would have another.
    #[error("--state-dir {}: not an absolute path; give one, so that all processes share it", .0.display())]
    Relative(PathBuf),
    /// A file system that will not do.
    #[error(
        "state directory {}: it is on {name}, and {}; give --state-dir DIR on a local disk",
        path.display(), unfit.why()
    )]
    Unfit {
        /// The directory.
        path: PathBuf,
        /// The file system.
        name: &'static str,
        /// Why not.
        unfit: Unfit,
    },
    /// Somebody else's, or open to others.
    #[error(
        "state directory {}: {why}, so others could hand out this host's addresses; {todo}, or give --state-dir DIR",
        path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        why: String,
        /// What to do about it, but for another directory.
        todo: &'static str,
    },
    /// A file system that takes no writing.
    #[error("state directory {}: its file system is read-only; give --state-dir DIR on another", .0.display())]
    ReadOnly(PathBuf),
    /// No room.
    #[error(
        "state directory {}: the disk (or this user's quota) is full: {} KiB are needed; free some, or give \
         --state-dir DIR on another", .0.display(), FREE_BYTES_MIN / 1024
    )]
    Full(PathBuf),
    /// No permission.
    #[error(
        "state directory {}: no permission to write; give --state-dir DIR of this user's own", .0.display()
    )]
    Denied(PathBuf),
    /// Anything else.
    #[error("state directory {}: cannot {what}", path.display())]
    Other {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
}

/// Where state is kept: `flag`, the value of `--state-dir`, or the default of this user. Touches nothing.
///
/// # Errors
/// [`StateDirError::Relative`] and [`StateDirError::Nowhere`].
pub fn locate(flag: Option<&Path>) -> Result<PathBuf, StateDirError> {
    let [service, state_home, home] = ["STATE_DIRECTORY", "XDG_STATE_HOME", "HOME"].map(std::env::var_os);
    locate_for(flag, service, geteuid().is_root(), state_home, home)
}

/// The user and group that `path` belongs to, if it is there and that user is not the one of this process.
pub fn other_owner(path: &Path) -> Option<(Uid, Gid)> {
    let meta = fs::metadata(path).ok()?;
    let owner = Uid::from_raw(meta.uid());
    (owner != geteuid()).then_some((owner, Gid::from_raw(meta.gid())))
}

fn locate_for(
    flag: Option<&Path>,
    service: Option<OsString>,
    root: bool,
    state_home: Option<OsString>,
    home: Option<OsString>,
) -> Result<PathBuf, StateDirError> {
    match flag {
        Some(path) if path.is_absolute() => return Ok(path.to_owned()),
        Some(path) => return Err(StateDirError::Relative(path.to_owned())),
        None => {}
    }
    // The specification wants relative values ignored.
    let absolute = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    // A unit may have several; the first is ours (systemd.exec(5), StateDirectory=).
    let first = |list: OsString| {
        list.as_bytes().split(|byte| *byte == b':').next().map(|path| OsStr::from_bytes(path).to_owned())
    };
    if let Some(path) = absolute(service.and_then(first)) {
        return Ok(path);
    }
    if root {
        return Ok(PathBuf::from(ROOT_STATE_DIR));
    }
    absolute(state_home)
        .or_else(|| Some(absolute(home)?.join(".local/state")))
        .map(|base| base.join("vunet"))
        .ok_or(StateDirError::Nowhere)
}

/// A directory that was found fit, with room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Makes `path` (absolute; mode 0700 where it is made) and finds out whether it will do.
    ///
    /// # Errors
    /// [`StateDirError`]; nothing is made on a file system that will not do.
    pub fn open(path: PathBuf) -> Result<StateDir, StateDirError> {
        refuse_unfit(&path)?;
        make(&path)?;
        refuse_foreign(&path)?;
        refuse_full(&path)?;
        Ok(StateDir { path })
    }

    /// Finds out, without making or writing anything, whether `path` will do: it is fit, or can be made where it is not there
    /// yet (`None`).
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn look(path: PathBuf) -> Result<Option<StateDir>, StateDirError> {
        refuse_unfit(&path)?;
        let there = existing(&path);
        let is_there = there == path;
        if is_there {
            refuse_foreign(&path)?;
        }
        accessat(CWD, there, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)
            .map_err(|error| told(&path, "write to it", error.into()))?;
        let room = statvfs(there).map_err(|error| told(&path, "ask for its room", error.into()))?;
        let free_bytes = room.f_bavail.saturating_mul(room.f_frsize);
        if usize::try_from(free_bytes).unwrap_or(usize::MAX) < FREE_BYTES_MIN {
            return Err(StateDirError::Full(path));
        }
        Ok(is_there.then_some(StateDir { path }))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of `network`, whether it exists or not.
    pub fn network(&self, network: &NetworkName) -> PathBuf {
        self.path.join("networks").join(network.as_str())
    }

    /// Makes the folder of `network`, mode 0700, unless it exists.
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn make_network(&self, network: &NetworkName) -> Result<PathBuf, StateDirError> {
        let path = self.network(network);
        make(&path)?;
        Ok(path)
    }

    /// Networks that have a folder, in order of their names. What is no network's name is passed over.
    ///
    /// # Errors
    /// [`StateDirError::Denied`] or [`StateDirError::Other`].
    pub fn networks(&self) -> Result<Vec<NetworkName>, StateDirError> {
        let path = self.path.join("networks");
        let failed = |error| told(&path, "read it", error);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            names.extend(entry.file_name().to_str().and_then(|name| name.parse::<NetworkName>().ok()));
        }
        names.sort();
        Ok(names)
    }
}

/// Judges the file system that `path` is on, or would be made on.
fn refuse_unfit(path: &Path) -> Result<(), StateDirError> {
    let stat =
        statfs(existing(path)).map_err(|error| told(path, "ask what file system it is on", error.into()))?;
    // The kernel's numbers have 32 bits; where the field is signed, some come out negative.
    let magic = i64::from(stat.f_type as u32);
    match UNFIT.iter().find(|(number, ..)| *number == magic) {
        Some(&(_, name, unfit)) => Err(StateDirError::Unfit { path: path.to_owned(), name, unfit }),
        None => Ok(()),
    }
}

/// `path`, or what there is of the way to it.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn make(path: &Path) -> Result<(), StateDirError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| told(path, "make it", error))
}

fn refuse_foreign(path: &Path) -> Result<(), StateDirError> {
    let meta = fs::metadata(path).map_err(|error| told(path, "look at it", error))?;
    let us = geteuid();
    let (why, todo) = if meta.uid() != us.as_raw() {
        // What root would make there that user could not use any more.
        let todo = if us.is_root() { "run this as that user, as services of VMs are" } else { MAKE_IT_OURS };
        (format!("it belongs to user {} and this is user {us}", meta.uid()), todo)
    } else if meta.mode() & 0o022 != 0 {
        (format!("its mode {:04o} lets other users write to it", meta.mode() & 0o7777), MAKE_IT_OURS)
    } else {
        return Ok(());
    };
    Err(StateDirError::NotOurs { path: path.to_owned(), why, todo })
}

/// Writes as much as must be free and takes it back. Blocks are set aside as bytes are written, so no
/// waiting for the disk is needed to know.
fn refuse_full(path: &Path) -> Result<(), StateDirError> {
    // Without a name while it is written, so that a process killed meanwhile leaves nothing of it; killed
    // before that it leaves an empty file, which the next one takes away.
    let probe = path.join(".room");
    let file = File::create(&probe).map_err(|error| told(path, "write to it", error))?;
    match fs::remove_file(&probe) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(told(path, "write to it", error));
        }
        _ => {}
    }
    fill(file).map_err(|error| told(path, "write to it", error))
}

fn fill(mut file: impl Write) -> io::Result<()> {
    // Not zeros, which some file systems store without a block.
    let chunk = [0xa5u8; 64 << 10];
    for _ in 0..FREE_BYTES_MIN / chunk.len() {
        file.write_all(&chunk)?;
    }
    file.flush()
}

/// The kernel's refusal as what it means here.
fn told(path: &Path, what: &'static str, source: io::Error) -> StateDirError {
    let path = path.to_owned();
    match Errno::from_io_error(&source) {
        Some(Errno::ROFS) => StateDirError::ReadOnly(path),
        Some(Errno::NOSPC | Errno::DQUOT) => StateDirError::Full(path),
        Some(Errno::ACCESS | Errno::PERM) => StateDirError::Denied(path),
        _ => StateDirError::Other { path, what, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A place on the file system the project was built on, which is on a disk where `/tmp` may not be.
    fn place() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    #[test]
    fn the_flag_wins_then_root_then_the_environment() {
        let at = |flag: Option<&str>, root, state: &str, home: &str| {
            locate_for(flag.map(Path::new), None, root, Some(state.into()), Some(home.into()))
        };
        let service = |flag: Option<&str>, service: &str, root| {
            locate_for(flag.map(Path::new), Some(service.into()), root, Some("/s".into()), None).unwrap()
        };
        assert_eq!(service(None, "/d:/e", false), Path::new("/d"));
        assert_eq!(service(None, "/d", true), Path::new("/d"));
        assert_eq!(service(Some("/x"), "/d", true), Path::new("/x"));
        assert_eq!(service(None, "d", false), Path::new("/s/vunet"));
        assert_eq!(at(Some("/x"), true, "/s", "/h").unwrap(), Path::new("/x"));
        assert_eq!(at(None, true, "/s", "/h").unwrap(), Path::new("/var/lib/vunet"));
        assert_eq!(at(None, false, "/s", "/h").unwrap(), Path::new("/s/vunet"));
        assert_eq!(at(None, false, "s", "/h").unwrap(), Path::new("/h/.local/state/vunet"));
        assert!(matches!(at(None, false, "", "h"), Err(StateDirError::Nowhere)));
        assert!(matches!(at(Some("x"), false, "/s", "/h"), Err(StateDirError::Relative(_))));
    }

    #[test]
    fn only_another_users_directory_has_an_owner_to_act_as() {
        let place = place();
        assert_eq!(other_owner(&place.path().join("none")), None);
        assert_eq!(other_owner(place.path()), None);
    }

    #[test]
    fn a_directory_is_made_for_its_user_alone_and_lists_its_networks() {
        let place = place();
        let state = StateDir::open(place.path().join("a/b")).unwrap();
        assert_eq!(fs::metadata(state.path()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(state.networks().unwrap(), []);
        let names = ["web", "db"].map(|name| name.parse::<NetworkName>().unwrap());
        for name in &names {
            assert_eq!(state.make_network(name).unwrap(), state.network(name));
        }
        fs::create_dir(state.path().join("networks/No Name")).unwrap();
        assert_eq!(state.networks().unwrap(), [names[1].clone(), names[0].clone()]);
        let left: Vec<_> = fs::read_dir(state.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["networks"], "the probe is gone");
    }

    #[test]
    fn a_file_system_in_memory_is_refused_and_nothing_is_made_there() {
        let path = Path::new("/dev/shm").join(format!("vunet-{}", std::process::id()));
        let error = StateDir::open(path.clone()).unwrap_err();
        assert!(error.to_string().contains("it is on tmpfs"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let place = place();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let error = StateDir::open(place.path().to_owned()).unwrap_err();
        assert!(error.to_string().contains("mode 0770"), "{error}");
    }

    #[test]
    fn what_the_kernel_refuses_is_said_as_what_it_is() {
        let full = fill(File::options().write(true).open("/dev/full").unwrap()).unwrap_err();
        let of = |error: io::Error| told(Path::new("/s"), "write to it", error);
        assert!(matches!(of(full), StateDirError::Full(_)));
        assert!(matches!(of(Errno::DQUOT.into()), StateDirError::Full(_)));
        assert!(matches!(of(Errno::ROFS.into()), StateDirError::ReadOnly(_)));
        assert!(matches!(of(Errno::ACCESS.into()), StateDirError::Denied(_)));
        assert!(matches!(of(Errno::IO.into()), StateDirError::Other { .. }));
    }

    #[test]
    fn a_look_makes_nothing_and_finds_what_opening_would() {
        let place = place();
        let fresh = place.path().join("a/b");
        assert_eq!(StateDir::look(fresh.clone()).unwrap(), None, "it can be made");
        assert!(!place.path().join("a").exists());
        let opened = StateDir::open(fresh.clone()).unwrap();
        assert_eq!(StateDir::look(fresh.clone()).unwrap(), Some(opened));
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(StateDir::look(fresh), Err(StateDirError::NotOurs { .. })));
        assert!(matches!(StateDir::look("/dev/shm/v".into()), Err(StateDirError::Unfit { .. })));
        assert!(StateDir::look("/sys/v".into()).is_err(), "nobody has room there");
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let place = place();
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(StateDir::open(file), Err(StateDirError::Other { .. })));
    }
}
