//! The holder's door: a unix socket where processes of the same user get the network's namespaces.
//!
//! An open connection is a use of the network: the kernel closes it whatever way the process ends, so none
//! is counted twice and none is forgotten.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::limits;
use crate::sandbox::namespaces::Namespaces;

/// How long a network without users is kept: its next user need not wait for another holder.
pub const IDLE: Duration = Duration::from_secs(60);
/// What a process says that wants the holder to end.
const END: u8 = b'E';
/// How long a failing socket is left alone: there may be no descriptor just now.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves the door until nobody has used it for `idle` (for ever without), or a user says that it shall end.
pub async fn serve(listener: UnixListener, namespaces: Namespaces, idle: Option<Duration>) {
    let namespaces = Arc::new(namespaces);
    let (count, mut users) = watch::channel(0usize);
    let end = Arc::new(Notify::new());
    // With it end the connections, by which users see that there is no holder any more.
    let mut attended = JoinSet::new();
    loop {
        while attended.try_join_next().is_some() {}
        // A new user, or a change of their number, begins the wait anew.
        let wait = idle.filter(|_| *users.borrow_and_update() == 0).unwrap_or(Duration::MAX);
        let news = async {
            tokio::select! {
                accepted = listener.accept() => Ok(Some(accepted)),
                _ = users.changed() => Ok(None),
                () = end.notified() => Err(()),
            }
        };
        match timeout(wait, news).await {
            Err(_) | Ok(Err(())) => return,
            Ok(Ok(None)) => {}
            Ok(Ok(Some(Err(error)))) => {
                tracing::warn!(%error, "a process could not join the network");
                tokio::time::sleep(PAUSE).await;
            }
            Ok(Ok(Some(Ok((stream, _))))) if *count.borrow() >= limits::HOLDER_USERS_MAX => {
                tracing::warn!(
                    max = limits::HOLDER_USERS_MAX,
                    "too many processes use the network; one is refused"
                );
                drop(stream);
            }
            Ok(Ok(Some(Ok((stream, _))))) => {
                let (count, namespaces, end) = (count.clone(), Arc::clone(&namespaces), Arc::clone(&end));
                count.send_modify(|users| *users += 1);
                attended.spawn(async move {
                    match attend(stream, &namespaces).await {
                        Ok(true) => end.notify_one(),
                        Ok(false) => {}
                        Err(error) => tracing::warn!(%error, "a process could not join the network"),
                    }
                    count.send_modify(|users| *users -= 1);
                });
            }
        }
    }
}

/// Gives one process the namespaces and waits for its end. Whether it asked the holder to end.
async fn attend(stream: tokio::net::UnixStream, namespaces: &Namespaces) -> io::Result<bool> {
    let peer = stream.peer_cred()?;
    tracing::info!(pid = peer.pid(), "joins the network");
    let stream = stream.into_std()?;
    namespaces.send(&stream)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    loop {
        stream.readable().await?;
        let mut said = [0; 64];
        match stream.try_read(&mut said) {
            Ok(0) => break,
            Ok(_) if said[0] == END => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error),
        }
    }
    tracing::info!(pid = peer.pid(), "left the network");
    Ok(false)
}

/// A process's use of the network, until it is dropped.
#[derive(Debug)]
pub struct Use(UnixStream);

impl Use {
    /// Asks the holder to end.
    ///
    /// # Errors
    /// The socket's.
    pub fn end(&self) -> io::Result<()> {
        (&self.0).write_all(&[END])
    }

    /// Waits for the holder's end, whatever ends it. Needs a tokio runtime.
    pub async fn holder_ended(self) {
        let watched = self.0.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(self.0));
        let Ok(stream) = watched else { return };
        while stream.readable().await.is_ok() {
            match stream.try_read(&mut [0; 64]) {
                Ok(0) => return,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                _ => {}
            }
        }
    }
}

/// Knocks at the door: the namespaces, and the use of them that lasts until the process ends.
///
/// # Errors
/// Nobody is behind it ([`io::ErrorKind::NotFound`], [`io::ErrorKind::ConnectionRefused`]), or it is not a
/// holder's.
pub fn knock(path: &Path) -> io::Result<(Namespaces, Use)> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let stream = UnixStream::connect(short_path(&File::open(folder)?, name))?;
    stream.set_read_timeout(Some(limits::HOLDER_ANSWER))?;
    let namespaces = Namespaces::take(&stream)?;
    Ok((namespaces, Use(stream)))
}

/// `name` in the open `folder`, by a path that any socket address has room for.
pub(super) fn short_path(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn own() -> Namespaces {
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        Namespaces { user: open("/proc/self/ns/user"), net: open("/proc/self/ns/net") }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn network_lives_as_long_as_it_is_used_and_a_little_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let idle = Duration::from_millis(50);
        let served = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), own(), Some(idle)));
        let knock_at = path.clone();
        let users =
            tokio::task::spawn_blocking(move || [knock(&knock_at).unwrap(), knock(&knock_at).unwrap()]);
        let [first, second] = users.await.unwrap();
        tokio::time::sleep(4 * idle).await;
        assert!(!served.is_finished(), "two use it");
        drop(first);
        tokio::time::sleep(4 * idle).await;
        assert!(!served.is_finished(), "one still uses it");
        drop(second);
        timeout(Duration::from_secs(10), served).await.expect("nobody uses it").unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_user_may_end_the_holder_and_the_others_hear_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let served = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), own(), None));
        let knock_at = path.clone();
        let users =
            tokio::task::spawn_blocking(move || [knock(&knock_at).unwrap(), knock(&knock_at).unwrap()]);
        let [(_, first), (_, second)] = users.await.unwrap();
        first.end().unwrap();
        timeout(Duration::from_secs(10), served).await.expect("it was asked to").unwrap();
        timeout(Duration::from_secs(10), second.holder_ended()).await.expect("it ended");
    }

    #[test]
    fn door_without_a_holder_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        assert_eq!(knock(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert_eq!(knock(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
