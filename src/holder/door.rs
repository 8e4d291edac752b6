//! The holder's door: a unix socket where processes of the same user get the network's namespaces.
//!
//! An open connection is a use of the network: the kernel closes it whatever way the process ends, so none
//! is counted twice and none is forgotten.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::binding;
use super::ports::{self, LendError, Lent, Ports, PortsOf, Record, Said, address};
use super::tenant::Tenant;
use crate::limits;
use crate::sandbox::namespaces::{Namespaces, effective_user};

/// How long a network without users is kept: its next user need not wait for another holder.
pub const IDLE: Duration = Duration::from_secs(60);
/// How long a failing socket is left alone: there may be no descriptor just now.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves the door until nobody has used it for `idle` (for ever without), or a user says that it shall end. What
/// users publish goes to `ports`.
pub async fn serve(listener: UnixListener, namespaces: Namespaces, ports: Ports, idle: Option<Duration>) {
    let namespaces = Arc::new(namespaces);
    let (count, mut users) = watch::channel(0usize);
    let end = Arc::new(Notify::new());
    // With it end the connections, by which users see that there is no holder any more.
    let mut attended = JoinSet::new();
    let mut numbers = 0u64..;
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
                let ports = ports.of(numbers.next().unwrap_or_default());
                count.send_modify(|users| *users += 1);
                attended.spawn(async move {
                    match attend(stream, &namespaces, ports).await {
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

/// Gives one process the namespaces and does what it asks for until its end. Whether it asked the holder to end.
async fn attend(
    stream: tokio::net::UnixStream,
    namespaces: &Namespaces,
    mut ports: PortsOf,
) -> io::Result<bool> {
    let peer = stream.peer_cred()?;
    // The socket is this user's only; root opens it all the same, and may.
    if ![0, effective_user()].contains(&peer.uid()) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    tracing::info!(pid = peer.pid(), "joins the network");
    let stream = stream.into_std()?;
    namespaces.send(&stream)?;
    let mut stream = tokio::net::UnixStream::from_std(stream)?;
    let outcome = listen(&mut stream, &mut ports).await;
    // Whatever ended it.
    ports.close().await;
    tracing::info!(pid = peer.pid(), "left the network");
    outcome
}

/// Does what a process asks for until its end. Whether it asked the holder to end.
async fn listen(stream: &mut tokio::net::UnixStream, ports: &mut PortsOf) -> io::Result<bool> {
    let mut record = Record::default();
    while let Some(said) = record.read(stream).await? {
        match said {
            Said::Publish { socket, guest_port } => {
                let answer = ports.publish(socket, guest_port).await;
                stream.write_all(&[answer]).await?;
            }
            Said::Bind(port) => binding::answer(stream, port).await?,
            Said::Unpublish { port, reset } => {
                let answer = ports.unpublish(port, reset).await;
                stream.write_all(&answer).await?;
            }
            Said::Address(addr) => ports.lead_to(addr).await,
            Said::End => return Ok(true),
            Said::Unknown => {}
        }
    }
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
        (&self.0).write_all(&ports::end())
    }

    /// Lends the holder the process's published ports. They lead to `guest`, or nowhere until it is told of another
    /// address.
    ///
    /// # Errors
    /// [`LendError`], with the port.
    pub fn lend(&self, ports: &[Arc<Lent>], guest: Option<Ipv4Addr>) -> Result<(), (SocketAddr, LendError)> {
        if let (Some(addr), Some(first)) = (guest, ports.first()) {
            let told = (&self.0).write_all(&address(Some(addr)));
            told.map_err(|error| (first.port.host, LendError::Silent(error)))?;
        }
        ports.iter().try_for_each(|lent| lent.lend(&self.0).map_err(|error| (lent.port.host, error)))
    }

    /// Has `tenant` live there until the holder ends, whatever ends it. Needs a tokio runtime.
    pub async fn live(self, tenant: &mut Tenant) {
        let stream = self.0.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(self.0));
        if let Ok(stream) = stream {
            tenant.live(stream).await;
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

    use super::super::tenant;
    use super::*;

    fn own() -> Namespaces {
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        Namespaces { user: open("/proc/self/ns/user"), net: open("/proc/self/ns/net") }
    }

    /// The way to a worker that is not there: nobody publishes anything in these tests.
    fn no_ports() -> Ports {
        ports::channel().unwrap().0
    }

    #[tokio::test(flavor = "current_thread")]
    async fn network_lives_as_long_as_it_is_used_and_a_little_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let idle = Duration::from_millis(50);
        let served = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), own(), no_ports(), Some(idle)));
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
        let served = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), own(), no_ports(), None));
        let knock_at = path.clone();
        let users =
            tokio::task::spawn_blocking(move || [knock(&knock_at).unwrap(), knock(&knock_at).unwrap()]);
        let [(_, first), (_, second)] = users.await.unwrap();
        first.end().unwrap();
        timeout(Duration::from_secs(10), served).await.expect("it was asked to").unwrap();
        let (_lender, wishes) = tenant::channel();
        let mut tenant = Tenant { lent: Vec::new(), guest: watch::channel(None).1, wishes };
        timeout(Duration::from_secs(10), second.live(&mut tenant)).await.expect("it ended");
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
