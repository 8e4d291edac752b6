//! Who uses a named network: one locked file for each process, in the network's folder `run/`.
//!
//! The kernel releases a lock when its process ends, however it ends; so a file that nobody has locked is
//! of a dead process, and the count of locked files is the count of users. Files are made, judged and
//! removed only under the folder's own lock, so that nobody takes one for dead that is being made. Each
//! holds what others must know of its process to restore what it needs of the host.
//!
//! May touch: files of the network's folder. Read first: flock(2).

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::file_lock;
use crate::addr::LinkName;
use crate::config::{Protocol, Publish};
use crate::limits;
use crate::random;

/// Folder of locks within a network's folder.
pub const RUN_FOLDER: &str = "run";
/// Lock of the folder itself.
const LOCK_NAME: &str = "lock";
/// Lock of the process that looks after the network.
const KEEPER_NAME: &str = "keeper.lock";
/// Beginning of the names of users' files; the process id and random digits follow.
const USER_PREFIX: &str = "user-";

/// Whether a file of the run folder is a user's, by its name.
pub fn is_user_file(name: &str) -> bool {
    name.starts_with(USER_PREFIX)
}

/// A port of the host that leads to a process's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Whether it is UDP, else TCP.
    pub udp: bool,
    /// Address and port of the host; the address is unspecified for "any".
    pub host: SocketAddr,
    /// The one interface of the host whose clients are taken; those of all if `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<LinkName>,
    /// Port in the guest.
    pub guest_port: u16,
}

impl From<&Publish> for PublishedPort {
    fn from(publish: &Publish) -> PublishedPort {
        let Publish { protocol, host, interface, guest_port } = *publish;
        PublishedPort { udp: protocol == Protocol::Udp, host, interface, guest_port }
    }
}

impl From<&PublishedPort> for Publish {
    fn from(port: &PublishedPort) -> Publish {
        let PublishedPort { udp, host, interface, guest_port } = *port;
        Publish { protocol: if udp { Protocol::Udp } else { Protocol::Tcp }, host, interface, guest_port }
    }
}

/// What a process notes about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its process id, in its own namespace.
    pub pid: u32,
    /// Its network namespace: inode number of `/proc/thread-self/ns/net`.
    pub net_namespace: u64,
    /// Its vhost-user socket, for people.
    pub socket: Option<PathBuf>,
    /// Name of its TAP, once it has one.
    pub tap: Option<String>,
    /// Its guest's address, once it has one.
    pub guest: Option<Ipv4Addr>,
    /// Ports that lead to its guest.
    pub published: Vec<PublishedPort>,
    /// The number its leases have in the network's store; none of one that leases nothing.
    #[serde(default)]
    pub holder: Option<u64>,
}

impl User {
    /// This process, with nothing noted yet.
    ///
    /// # Errors
    /// No `/proc`.
    pub fn this_process() -> io::Result<User> {
        let net_namespace = fs::metadata("/proc/thread-self/ns/net")?.ino();
        let pid = std::process::id();
        let (socket, tap, guest) = (None, None, None);
        Ok(User { pid, net_namespace, socket, tap, guest, published: Vec::new(), holder: None })
    }
}

/// The run folder of a network, locked: until it is dropped nobody else joins, leaves or cleans up.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Locks the run folder of the network in `folder`, which is made if need be. Waits for who has it.
    ///
    /// # Errors
    /// `TimedOut` if one process has held it for 30 s, with its number; `Interrupted` if a signal came meanwhile; the file
    /// system's refusal; `NotFound` if the network's folder is gone.
    pub fn lock(folder: &Path) -> io::Result<RunFolder> {
        loop {
            let (path, file) = RunFolder::open(folder)?;
            file_lock::lock(&file)?;
            if is_still(&file, &path.join(LOCK_NAME)) {
                return Ok(RunFolder { path, _lock: file });
            }
        }
    }

    /// The same without waiting; `None` if somebody has it.
    ///
    /// # Errors
    /// As [`Self::lock`].
    pub fn try_lock(folder: &Path) -> io::Result<Option<RunFolder>> {
        let (path, file) = RunFolder::open(folder)?;
        match file.try_lock() {
            Ok(()) if is_still(&file, &path.join(LOCK_NAME)) => Ok(Some(RunFolder { path, _lock: file })),
            Ok(()) | Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Makes the caller the keeper of the network in `folder`, while it has what is returned; `None` if another
    /// process is, or it cannot be known.
    pub fn try_keep(folder: &Path) -> Option<File> {
        let path = folder.join(RUN_FOLDER).join(KEEPER_NAME);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).ok()?;
        file.try_lock().is_ok().then_some(file)
    }

    fn open(folder: &Path) -> io::Result<(PathBuf, File)> {
        let path = folder.join(RUN_FOLDER);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let lock = path.join(LOCK_NAME);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lock)?;
        Ok((path, file))
    }

    /// The processes that live. Files of dead ones are removed.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn users(&self) -> io::Result<Vec<User>> {
        let mut users = Vec::new();
        for path in self.user_files()? {
            let mut file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            match file.try_lock_shared() {
                Ok(()) => fs::remove_file(&path)?,
                Err(TryLockError::WouldBlock) => users.push(read_user(&mut file, &path)?),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        users.sort_by_key(|user| user.pid);
        Ok(users)
    }

    fn user_files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(is_user_file) {
                files.push(entry.path());
            }
        }
        Ok(files)
    }

    /// Makes `user` one of those that live, until what is returned is dropped or the process ends.
    ///
    /// # Errors
    /// The file system's refusal; `QuotaExceeded` past [`limits::NETWORK_USERS_MAX`].
    pub fn join(&self, user: &User) -> io::Result<Membership> {
        if self.user_files()?.len() >= limits::NETWORK_USERS_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let random = random::bits32()?;
        let path = self.path.join(format!("{USER_PREFIX}{}-{random:08x}", user.pid));
        let file = File::create_new(&path)?;
        file.lock()?;
        let mut membership = Membership { path, file };
        membership.note(self, user)?;
        Ok(membership)
    }
}

/// Whether `file` is what `path` names now, and not one that was removed with its folder.
fn is_still(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn read_user(file: &mut File, path: &Path) -> io::Result<User> {
    let mut text = String::new();
    file.take(limits::NETWORK_USER_FILE_BYTES_MAX).read_to_string(&mut text)?;
    serde_json::from_str(&text)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))
}

/// This process's place among the users. Dropped, it is given up; a process that dies gives it up too.
#[derive(Debug)]
pub struct Membership {
    path: PathBuf,
    file: File,
}

impl Membership {
    /// Notes how `user` is now. The folder's lock keeps others from reading half of it.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn note(&mut self, _folder: &RunFolder, user: &User) -> io::Result<()> {
        let text = serde_json::to_vec(user).map_err(io::Error::other)?;
        self.file.rewind()?;
        self.file.write_all(&text)?;
        self.file.set_len(text.len() as u64)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        // Whoever looks next removes what is left.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn user(pid: u32) -> User {
        User { pid, ..User::this_process().unwrap() }
    }

    #[test]
    fn who_joined_is_a_user_until_it_leaves() {
        let folder = folder();
        let run = RunFolder::lock(folder.path()).unwrap();
        assert_eq!(run.users().unwrap(), []);
        let mut first = run.join(&user(7)).unwrap();
        let second = run.join(&user(3)).unwrap();
        assert_eq!(run.users().unwrap(), [user(3), user(7)]);
        let host = "0.0.0.0:8080".parse().unwrap();
        let interface = LinkName::new("eth0");
        let published = PublishedPort { udp: false, host, interface, guest_port: 80 };
        let more = User { tap: Some("vt-1".to_owned()), published: vec![published; 9], ..user(7) };
        first.note(&run, &more).unwrap();
        assert_eq!(run.users().unwrap(), [user(3), more]);
        first.note(&run, &user(7)).unwrap();
        drop(second);
        assert_eq!(run.users().unwrap(), [user(7)], "what was longer before is cut");
    }

    #[test]
    fn what_a_dead_process_left_is_no_user_and_is_removed() {
        let folder = folder();
        let run = RunFolder::lock(folder.path()).unwrap();
        // As after a kill at any instruction: nothing written, half of it, or all.
        for (name, text) in [("user-9-0", ""), ("user-9-1", "{\"pid\":"), ("user-9-2", "{}")] {
            fs::write(folder.path().join(RUN_FOLDER).join(name), text).unwrap();
        }
        let _live = run.join(&user(1)).unwrap();
        assert_eq!(run.users().unwrap(), [user(1)]);
        assert_eq!(run.user_files().unwrap().len(), 1);
    }

    #[test]
    fn one_has_the_folder_at_a_time_and_a_removed_folder_is_not_had() {
        let folder = folder();
        let run = RunFolder::lock(folder.path()).unwrap();
        assert!(RunFolder::try_lock(folder.path()).unwrap().is_none());
        drop(run);
        let run = RunFolder::try_lock(folder.path()).unwrap().unwrap();
        let path = folder.path().to_owned();
        let waits = std::thread::spawn(move || RunFolder::lock(&path).map(|run| run.users().unwrap().len()));
        std::thread::sleep(std::time::Duration::from_millis(50));
        // Whoever waited for the old one must end up with the new one, in which somebody lives.
        fs::remove_dir_all(folder.path().join(RUN_FOLDER)).unwrap();
        let new = RunFolder::lock(folder.path()).unwrap();
        let _live = new.join(&user(1)).unwrap();
        drop(run);
        drop(new);
        assert_eq!(waits.join().unwrap().unwrap(), 1);
    }

    #[test]
    fn one_keeps_the_network_at_a_time() {
        let folder = folder();
        let _run = RunFolder::lock(folder.path()).unwrap();
        let keeper = RunFolder::try_keep(folder.path()).expect("nobody does");
        assert!(RunFolder::try_keep(folder.path()).is_none());
        drop(keeper);
        assert!(RunFolder::try_keep(folder.path()).is_some());
    }

    #[test]
    fn one_user_past_the_bound_is_refused() {
        let folder = folder();
        let run = RunFolder::lock(folder.path()).unwrap();
        for n in 0..limits::NETWORK_USERS_MAX {
            fs::write(folder.path().join(RUN_FOLDER).join(format!("user-{n}")), "").unwrap();
        }
        assert_eq!(run.join(&user(1)).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        assert!(run.users().unwrap().is_empty(), "all of them were dead");
        run.join(&user(1)).unwrap();
    }
}
