//! The holder's door: a unix socket where processes of the same user get the network's namespaces.
//!
//! An open connection is a use of the network: the kernel closes it whatever way the process ends, so none
//! is counted twice and none is forgotten.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::limits;
use crate::sandbox::namespaces::Namespaces;

/// How long a network without users is kept: its next user need not wait for another holder.
pub const IDLE: Duration = Duration::from_secs(60);
/// How long a failing socket is left alone: there may be no descriptor just now.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves the door until nobody has used it for `idle`.
pub async fn serve(listener: UnixListener, namespaces: Namespaces, idle: Duration) {
    let namespaces = Arc::new(namespaces);
    let (count, mut users) = watch::channel(0usize);
    loop {
        // A new user, or a change of their number, begins the wait anew.
        let wait = if *users.borrow_and_update() == 0 { idle } else { Duration::MAX };
        let news = async {
            tokio::select! {
                accepted = listener.accept() => Some(accepted),
                _ = users.changed() => None,
            }
        };
        match timeout(wait, news).await {
            Err(_) => return,
            Ok(None) => {}
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "a process could not join the network");
                tokio::time::sleep(PAUSE).await;
            }
            Ok(Some(Ok((stream, _)))) if *count.borrow() >= limits::HOLDER_USERS_MAX => {
                tracing::warn!(
                    max = limits::HOLDER_USERS_MAX,
                    "too many processes use the network; one is refused"
                );
                drop(stream);
            }
            Ok(Some(Ok((stream, _)))) => {
                let (count, namespaces) = (count.clone(), Arc::clone(&namespaces));
                count.send_modify(|users| *users += 1);
                tokio::spawn(async move {
                    if let Err(error) = attend(stream, &namespaces).await {
                        tracing::warn!(%error, "a process could not join the network");
                    }
                    count.send_modify(|users| *users -= 1);
                });
            }
        }
    }
}

/// Gives one process the namespaces and waits for its end.
async fn attend(stream: tokio::net::UnixStream, namespaces: &Namespaces) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    tracing::info!(pid = peer.pid(), "joins the network");
    let stream = stream.into_std()?;
    namespaces.send(&stream)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    loop {
        stream.readable().await?;
        match stream.try_read(&mut [0; 64]) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            // A process that says something is not asked what.
            outcome => drop(outcome?),
        }
    }
    tracing::info!(pid = peer.pid(), "left the network");
    Ok(())
}

/// A process's use of the network, until it is dropped.
#[derive(Debug)]
pub struct Use(#[expect(dead_code, reason = "its being open is what counts")] UnixStream);

/// Knocks at the door: the namespaces, and the use of them that lasts until the process ends.
///
/// # Errors
/// Nobody is behind it ([`io::ErrorKind::NotFound`], [`io::ErrorKind::ConnectionRefused`]), or it is not a
/// holder's.
pub fn knock(path: &std::path::Path) -> io::Result<(Namespaces, Use)> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(limits::HOLDER_ANSWER))?;
    let namespaces = Namespaces::take(&stream)?;
    Ok((namespaces, Use(stream)))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
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
        let served = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), own(), idle));
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

    #[test]
    fn door_without_a_holder_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        assert_eq!(knock(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert_eq!(knock(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
