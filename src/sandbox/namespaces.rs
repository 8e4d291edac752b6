//! A network of its own without privilege: a namespace of users, in which this user is root, and one of
//! networks that belongs to it.
//!
//! A process can enter a namespace of users only while it has one thread, so all of this happens before any
//! is started. The namespaces live as long as a descriptor of them is open or a process is in them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::sys;

/// Bytes of an error that come out of the child; longer ones are cut.
const ERROR_BYTES_MAX: u64 = 4096;

/// Bytes that descriptors come with: what each is.
const USER: u8 = b'U';
const NET: u8 = b'N';
const OPENED: u8 = b'O';

/// A namespace of users and the namespace of networks it owns.
#[derive(Debug)]
pub struct Namespaces {
    /// Of users.
    pub user: OwnedFd,
    /// Of networks.
    pub net: OwnedFd,
}

/// Why there are no namespaces.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// The kernel or its configuration forbids them to this user.
    #[error("this user may not make namespaces: {hint}")]
    Forbidden {
        /// What forbids it and what to do.
        hint: String,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// What was to happen inside did not.
    #[error("{0}")]
    Inside(String),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> NamespaceError {
    move |source| NamespaceError::Io { what, source }
}

impl Namespaces {
    /// Makes new namespaces and runs `inside` in them, in a child process; the descriptor it returns (a TAP)
    /// comes back. The caller stays where it is.
    ///
    /// # Errors
    /// [`NamespaceError`]; nothing is left then.
    pub fn make(
        inside: impl FnOnce() -> Result<OwnedFd, String>,
    ) -> Result<(Namespaces, OwnedFd), NamespaceError> {
        in_child(None, || unshare().and_then(|()| open_all(inside)))
    }

    /// The same to find out whether it can be done: nothing of it is kept, and a child process that takes longer than
    /// `patience` is killed.
    ///
    /// # Errors
    /// [`NamespaceError`]; of the kind [`io::ErrorKind::WouldBlock`] after `patience`.
    pub fn try_out(
        patience: Duration,
        inside: impl FnOnce() -> Result<OwnedFd, String>,
    ) -> Result<(), NamespaceError> {
        in_child(Some(patience), || unshare().and_then(|()| open_all(inside))).map(drop)
    }

    /// Those of the process `pid`, if it has others than this one.
    ///
    /// # Errors
    /// It is gone, or not this user's.
    pub fn of_process(pid: u32) -> io::Result<Option<Namespaces>> {
        let open = |kind: &str| File::open(format!("/proc/{pid}/ns/{kind}"));
        let (user, net) = (open("user")?, open("net")?);
        let own = fs::metadata("/proc/self/ns/net")?;
        let is_own = net.metadata()?.ino() == own.ino();
        Ok((!is_own).then(|| Namespaces { user: user.into(), net: net.into() }))
    }

    /// Runs `inside` in these namespaces, in a child process; the descriptor it returns comes back.
    ///
    /// # Errors
    /// [`NamespaceError`].
    pub fn reach(&self, inside: impl FnOnce() -> Result<OwnedFd, String>) -> Result<OwnedFd, NamespaceError> {
        in_child(None, || self.enter().and_then(|()| open_all(inside))).map(|(_, opened)| opened)
    }

    /// Moves this process into the namespaces. It must have one thread.
    ///
    /// # Errors
    /// [`NamespaceError`].
    pub fn enter(&self) -> Result<(), NamespaceError> {
        sys::enter(self.user.as_fd(), sys::Kind::User).map_err(failed("enter the network's users"))?;
        sys::enter(self.net.as_fd(), sys::Kind::Net).map_err(failed("enter the network's namespace"))
    }

    /// Sends both over `stream`, each with a byte of its own.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&self, stream: &UnixStream) -> io::Result<()> {
        send_fd(stream, USER, &self.user)?;
        send_fd(stream, NET, &self.net)
    }

    /// Takes what [`Namespaces::send`] sent.
    ///
    /// # Errors
    /// The socket's; [`io::ErrorKind::InvalidData`] if something else came, or the end.
    pub fn take(stream: &UnixStream) -> io::Result<Namespaces> {
        Ok(Namespaces { user: receive_fd(stream, USER)?, net: receive_fd(stream, NET)? })
    }
}

/// Keeps what this process has open from programs it starts: an inherited socket is its own only.
///
/// # Errors
/// The kernel's refusal.
pub fn keep_from_children() -> io::Result<()> {
    sys::keep_from_children()
}

/// The number of the user this process acts as.
pub fn effective_user() -> u32 {
    sys::effective_ids().0
}

/// Runs `work` in a child process; what it opens comes back. A child that says nothing for `patience` is killed.
fn in_child(
    patience: Option<Duration>,
    work: impl FnOnce() -> Result<(Namespaces, OwnedFd), NamespaceError>,
) -> Result<(Namespaces, OwnedFd), NamespaceError> {
    let (here, there) = UnixStream::pair().map_err(failed("make a socket pair"))?;
    here.set_read_timeout(patience).map_err(failed("bound the wait for the child process"))?;
    let child = sys::in_child(|| report(&there, work())).map_err(failed("start a child process"))?;
    // Only the child's end is left: that it ended is seen.
    drop(there);
    let outcome = receive(&here);
    match &outcome {
        // It may be beyond being killed at once, so it is not waited for.
        Err(NamespaceError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => child.kill(),
        _ => child.wait().map_err(failed("wait for the child process"))?,
    }
    outcome
}

fn unshare() -> Result<(), NamespaceError> {
    // Read before: inside, this user is another.
    let (uid, gid) = sys::effective_ids();
    sys::unshare_user_and_net().map_err(forbidden)?;
    let write = |path: &str, text: &str| fs::write(path, text);
    // Older kernels have no setgroups to deny, and then none is needed.
    match write("/proc/self/setgroups", "deny") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(forbidden(error)),
        _ => {}
    }
    write("/proc/self/uid_map", &format!("0 {uid} 1")).map_err(forbidden)?;
    write("/proc/self/gid_map", &format!("0 {gid} 1")).map_err(forbidden)
}

/// What forbids a namespace of users to this user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// None are allowed at all.
    Zero,
    /// Debian's switch for users without privilege.
    Switch,
    /// Ubuntu's, by AppArmor.
    AppArmor,
    /// There are as many as may be.
    Bound,
    /// Something that no setting tells of.
    Policy,
}

impl Obstacle {
    const ALL: [Obstacle; 5] =
        [Obstacle::Zero, Obstacle::Switch, Obstacle::AppArmor, Obstacle::Bound, Obstacle::Policy];

    /// What it is, as the settings that `value` reads have it and the kernel's `refusal`.
    fn of(value: impl Fn(&str) -> String, refusal: &io::Error) -> Obstacle {
        let is = |path: &str, text: &str| value(path).trim() == text;
        if is("user/max_user_namespaces", "0") {
            Obstacle::Zero
        } else if is("kernel/unprivileged_userns_clone", "0") {
            Obstacle::Switch
        } else if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
            Obstacle::AppArmor
        } else if refusal.raw_os_error() == Some(libc::ENOSPC) {
            Obstacle::Bound
        } else {
            Obstacle::Policy
        }
    }

    /// What it is and what to do, in words.
    pub fn hint(self) -> &'static str {
        match self {
            Obstacle::Zero => "sysctl user.max_user_namespaces is 0; set it to 1000 or so",
            Obstacle::Switch => "sysctl kernel.unprivileged_userns_clone is 0; set it to 1",
            Obstacle::AppArmor => {
                "sysctl kernel.apparmor_restrict_unprivileged_userns is 1; set it to 0, or give vunet an AppArmor \
                 profile that allows userns"
            }
            Obstacle::Bound => {
                "there are as many as sysctl user.max_user_namespaces and user.max_net_namespaces allow"
            }
            Obstacle::Policy => "a security policy forbids it (a container's seccomp profile, for example)",
        }
    }

    /// The settings that end it.
    pub fn settings(self) -> &'static [&'static str] {
        match self {
            Obstacle::Zero => &["user.max_user_namespaces=1000"],
            Obstacle::Switch => &["kernel.unprivileged_userns_clone=1"],
            Obstacle::AppArmor => &["kernel.apparmor_restrict_unprivileged_userns=0"],
            Obstacle::Bound => &["user.max_user_namespaces=15000", "user.max_net_namespaces=15000"],
            Obstacle::Policy => &[],
        }
    }

    /// The one an error of this room tells of: a child process tells it in words.
    pub fn told_in(text: &str) -> Option<Obstacle> {
        Self::ALL.into_iter().find(|obstacle| text.contains(obstacle.hint()))
    }
}

/// What is to be said where namespaces are forbidden.
fn forbidden(source: io::Error) -> NamespaceError {
    let value = |path: &str| fs::read_to_string(Path::new("/proc/sys").join(path)).unwrap_or_default();
    let hint = Obstacle::of(value, &source).hint().to_owned();
    NamespaceError::Forbidden { hint, source }
}

/// The namespaces this process is in, and what `inside` opens there.
fn open_all(
    inside: impl FnOnce() -> Result<OwnedFd, String>,
) -> Result<(Namespaces, OwnedFd), NamespaceError> {
    let opened = inside().map_err(NamespaceError::Inside)?;
    let open = |path: &str| File::open(path).map(OwnedFd::from).map_err(failed("open a namespace"));
    Ok((Namespaces { user: open("/proc/self/ns/user")?, net: open("/proc/self/ns/net")? }, opened))
}

/// Tells the parent how it went: descriptors, or the error in words.
fn report(to: &UnixStream, outcome: Result<(Namespaces, OwnedFd), NamespaceError>) {
    // Without a parent nobody is to be told.
    let _ = match outcome {
        Ok((namespaces, opened)) => namespaces.send(to).and_then(|()| send_fd(to, OPENED, &opened)),
        Err(error) => {
            let mut to = to;
            let source = std::error::Error::source(&error);
            let text = source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
            to.write_all(text.as_bytes())
        }
    };
}

fn receive(from: &UnixStream) -> Result<(Namespaces, OwnedFd), NamespaceError> {
    let mut first = [0; 1];
    let (len, user) = from.recv_with_fd(&mut first).map_err(|e| failed("hear from the child")(e.into()))?;
    if let Some(user) = user {
        let rest = || Ok((receive_fd(from, NET)?, receive_fd(from, OPENED)?));
        let (net, opened) = rest().map_err(failed("hear from the child"))?;
        return Ok((Namespaces { user: user.into(), net }, opened));
    }
    let mut text = Vec::from(&first[..len]);
    let _ = from.take(ERROR_BYTES_MAX).read_to_end(&mut text);
    if text.is_empty() {
        text = b"the child process ended unexpectedly".to_vec();
    }
    Err(NamespaceError::Inside(String::from_utf8_lossy(&text).into_owned()))
}

fn send_fd(to: &UnixStream, mark: u8, fd: &OwnedFd) -> io::Result<()> {
    to.send_with_fd(&[mark][..], fd.as_raw_fd()).map(drop).map_err(io::Error::from)
}

fn receive_fd(from: &UnixStream, mark: u8) -> io::Result<OwnedFd> {
    let mut byte = [0; 1];
    match from.recv_with_fd(&mut byte) {
        Ok((1, Some(fd))) if byte[0] == mark => Ok(fd.into()),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_forbids_namespaces_is_known_and_found_again_in_words() {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        let of = |path: &'static str, text: &'static str, refusal: &io::Error| {
            Obstacle::of(|asked| if asked == path { format!("{text}\n") } else { String::new() }, refusal)
        };
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let found = [
            of("user/max_user_namespaces", "0", &full),
            of("kernel/unprivileged_userns_clone", "0", &denied),
            of("kernel/apparmor_restrict_unprivileged_userns", "1", &denied),
            of("user/max_user_namespaces", "1000", &full),
            of("kernel/unprivileged_userns_clone", "1", &denied),
        ];
        assert_eq!(found, Obstacle::ALL);
        for obstacle in Obstacle::ALL {
            let error =
                NamespaceError::Forbidden { hint: obstacle.hint().to_owned(), source: full.kind().into() };
            assert_eq!(Obstacle::told_in(&error.to_string()), Some(obstacle));
        }
    }

    #[test]
    fn what_is_sent_is_taken_and_nothing_else() {
        let (here, there) = UnixStream::pair().unwrap();
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        let own = Namespaces { user: open("/proc/self/ns/user"), net: open("/proc/self/ns/net") };
        own.send(&here).unwrap();
        let taken = Namespaces::take(&there).unwrap();
        let inode = |fd: &OwnedFd| File::from(fd.try_clone().unwrap()).metadata().unwrap().ino();
        assert_eq!(inode(&taken.user), inode(&own.user));
        assert_eq!(inode(&taken.net), inode(&own.net));
        (&here).write_all(b"uu").unwrap();
        assert_eq!(Namespaces::take(&there).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
