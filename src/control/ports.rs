//! Published ports while the process runs: what there is, and how one is added or removed.
//!
//! Sockets are bound here, on the control thread, so that a refusal is known before anybody serves the port, and
//! handed to whoever does: a worker, the relay of a named network (`port_relay`), or none, where packets are
//! translated. Changes come one after another.
//!
//! May touch: `requests`, `port_relay`, `uplink::published`, `network_watch`.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use socket2::Socket;
use thiserror::Error;
use tokio::sync::{Mutex, MutexGuard};

use super::events::{Event, Events, PortEvent};
use super::network_watch::SharedJoined;
use super::port_relay::{GuestAddress, Relay};
use crate::config::{Protocol, Publish};
use crate::holder::ports::LendError;
use crate::holder::tenant::Lender;
use crate::limits;
use crate::network::manager::NetworkError;
use crate::network::users::PublishedPort;
use crate::requests::{NoAnswer, Request, WorkerHandle};
use crate::uplink::conntrack::{Conntrack, Redirected};
use crate::uplink::published::{self, BindError, Obstacle};

/// Who serves published ports.
#[derive(Debug)]
pub enum Way {
    /// Nobody, for this reason: no port of this host leads to the guest.
    None(&'static str),
    /// Workers, by sockets of this host; the first one has them.
    Workers(Vec<WorkerHandle>),
    /// Workers, by ports of an address on a link, which is this one unless DHCP leases it.
    Link(Vec<WorkerHandle>, Option<std::net::Ipv4Addr>),
    /// The host's kernel redirects, and a relay serves the host itself.
    Kernel(SharedJoined, GuestAddress),
    /// The holder of a rootless network, by sockets that it binds and this process has.
    Holder(SharedJoined, Lender),
}

/// Why a port cannot be published.
#[derive(Debug, Error)]
pub enum PortError {
    /// No port can be, here.
    #[error("{0}")]
    NotHere(&'static str),
    /// It is published.
    #[error("{wanted} takes what {known} has, which is published already (port {id})")]
    Known {
        /// What was asked for.
        wanted: Publish,
        /// What is in its way.
        known: Publish,
        /// Its number.
        id: u64,
    },
    /// A flow of the guest has it.
    #[error("{0}: a flow of the guest has this port of the address on the link; try again once it has ended")]
    FlowHasIt(Publish),
    /// Too many.
    #[error(
        "{} ports are published, which is as many as can be: remove some first",
        limits::PUBLISHED_PORTS_MAX
    )]
    TooMany,
    /// The kernel refuses.
    #[error("{}{}", .0, tail(.0))]
    Bind(BindError),
    /// The socket cannot be served.
    #[error("{0} cannot be served: {1}")]
    Serve(Publish, io::Error),
    /// A worker does not answer.
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    /// The network's holder does not serve it.
    #[error(transparent)]
    Holder(LendError),
    /// The named network does not take it.
    #[error("the network does not take it: {}", chain(.0))]
    Network(#[from] NetworkError),
    /// Open connections cannot be ended from here; nothing was changed.
    #[error(
        "connections that the kernel redirects cannot be ended here ({0}): remove the port with keep=true (--keep)"
    )]
    CannotClose(io::Error),
    /// The same, and the port is removed.
    #[error("{0} is published no more, but its open connections go on: {1}")]
    NotEnded(Publish, io::Error),
}

/// A port as it is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its number, which no other gets.
    pub id: u64,
    /// It, with the host's port that was picked.
    pub port: Publish,
}

#[derive(Debug)]
struct Entry {
    published: Published,
    /// What serves it here. Dropped, it serves no more clients.
    relay: Option<Relay>,
}

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    last_id: u64,
}

/// The published ports of a process.
#[derive(Clone, Debug)]
pub struct Ports {
    way: Arc<Way>,
    table: Arc<Mutex<Table>>,
    events: Events,
}

impl Ports {
    /// Those that were published at the start, with what serves them here.
    pub fn new(
        way: Way,
        events: Events,
        published: impl IntoIterator<Item = (Publish, Option<Relay>)>,
    ) -> Ports {
        let mut table = Table::default();
        for (port, relay) in published {
            table.add(port, relay);
        }
        Ports { way: Arc::new(way), table: Arc::new(Mutex::new(table)), events }
    }

    /// All of them, in the order they were published.
    pub async fn list(&self) -> Vec<Published> {
        self.table.lock().await.entries.iter().map(|entry| entry.published).collect()
    }

    /// Publishes all of `wanted`, or none.
    ///
    /// # Errors
    /// [`PortError`], of the first that cannot be.
    pub async fn publish(&self, wanted: Vec<Publish>) -> Result<Vec<Published>, PortError> {
        let mut table = self.table.lock().await;
        if table.entries.len() + wanted.len() > limits::PUBLISHED_PORTS_MAX {
            return Err(PortError::TooMany);
        }
        let mut done = Vec::with_capacity(wanted.len());
        for port in wanted {
            match self.publish_one(&mut table, port).await {
                Ok(published) => done.push(published),
                Err(error) => {
                    for Published { id, .. } in done {
                        // They were just made, and have no clients to speak of.
                        let _ = self.remove_from(&mut table, id, false).await;
                    }
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.note(&table).await {
            for Published { id, .. } in done {
                let _ = self.remove_from(&mut table, id, false).await;
            }
            return Err(error);
        }
        for Published { id, port } in &done {
            tracing::info!(id, kind = port.protocol.name(), host = %port.host, guest_port = port.guest_port, "published");
            self.events.tell(Event::PortPublished(event(port)));
        }
        Ok(done)
    }

    async fn publish_one(&self, table: &mut Table, port: Publish) -> Result<Published, PortError> {
        match self.serve(table, port).await {
            Err(PortError::Bind(refused)) => Err(PortError::Bind(self.name_publisher(refused).await)),
            outcome => outcome,
        }
    }

    /// The same refusal; of a port that a process of a named network has, with whose it is.
    async fn name_publisher(&self, mut refused: BindError) -> BindError {
        let (Way::Kernel(joined, _) | Way::Holder(joined, _)) = &*self.way else { return refused };
        let networks = joined.lock().unwrap_or_else(PoisonError::into_inner).networks().clone();
        let port = *refused.port;
        let found = tokio::task::spawn_blocking(move || networks.publisher(&port)).await;
        if let Some(publisher) = found.ok().flatten() {
            publisher.name_in(&mut refused);
        }
        refused
    }

    async fn serve(&self, table: &mut Table, mut port: Publish) -> Result<Published, PortError> {
        if let Some(known) =
            table.entries.iter().map(|entry| entry.published).find(|known| known.port.collides(&port))
        {
            return Err(PortError::Known { wanted: port, known: known.port, id: known.id });
        }
        let relay = match &*self.way {
            Way::None(why) => return Err(PortError::NotHere(why)),
            Way::Link(workers, held) => {
                fits_link(&port, *held)?;
                tell_all(workers, port, None).await?;
                None
            }
            Way::Workers(workers) => {
                let socket = bind(&mut port).await?;
                tell_all(workers, port, Some(socket)).await?;
                None
            }
            Way::Holder(_, lender) => {
                port = lender.publish(port).await?;
                None
            }
            Way::Kernel(_, guest) => {
                let socket = bind(&mut port).await?;
                let relay = Relay::new(socket, guest.clone(), &port);
                Some(relay.map_err(|error| PortError::Serve(port, error))?)
            }
        };
        Ok(table.add(port, relay))
    }

    /// Removes a port; its open connections go on, unless they are to be `reset`. Exchanges of datagrams end. How many
    /// connections were reset; `None` if there is no such port.
    ///
    /// # Errors
    /// [`PortError`]; the port is removed all the same, but for [`PortError::CannotClose`], [`PortError::NotHere`], what a named
    /// network refuses, and [`NoAnswer::Full`].
    pub async fn remove(&self, id: u64, reset: bool) -> Result<Option<usize>, PortError> {
        let mut table = self.table.lock().await;
        let known = table.entries.iter().find(|entry| entry.published.id == id);
        let Some(port) = known.map(|entry| entry.published.port) else { return Ok(None) };
        let outcome = match &*self.way {
            Way::None(why) => return Err(PortError::NotHere(why)),
            Way::Kernel(joined, _) => self.remove_redirect(&mut table, id, joined, reset).await,
            Way::Workers(_) | Way::Link(..) | Way::Holder(..) => {
                let outcome = self.remove_from(&mut table, id, reset).await;
                self.note(&table).await.and(outcome)
            }
        };
        if table.entries.iter().all(|entry| entry.published.id != id) {
            tracing::info!(id, kind = port.protocol.name(), host = %port.host, "published no more");
            self.events.tell(Event::PortUnpublished(event(&port)));
        }
        outcome
    }

    /// Removes a port that the kernel redirects: first its rule, so that it is there still if that fails.
    async fn remove_redirect(
        &self,
        table: &mut Table,
        id: u64,
        joined: &SharedJoined,
        reset: bool,
    ) -> Result<Option<usize>, PortError> {
        let Some(at) = table.entries.iter().position(|entry| entry.published.id == id) else {
            return Ok(None);
        };
        let port = table.entries[at].published.port;
        // Exchanges of datagrams end in any case, as they do elsewhere.
        let redirected = redirected(joined, &port).filter(|redirected| reset || redirected.udp);
        if let (Some(redirected), true) = (redirected, reset) {
            with_conntrack(move |conntrack| conntrack.count(&redirected))
                .await
                .map_err(PortError::CannotClose)?;
        }
        let others = table.entries.iter().filter(|entry| entry.published.id != id);
        note(joined, others.map(|entry| PublishedPort::from(&entry.published.port)).collect()).await?;
        let relay = table.entries.remove(at).relay.filter(|_| reset);
        let relayed = relay.as_ref().map_or(0, Relay::reset);
        drop(relay);
        let ended = match redirected {
            Some(redirected) => with_conntrack(move |conntrack| conntrack.end(&redirected)).await,
            None => Ok(0),
        };
        match ended {
            Ok(ended) => Ok(Some(relayed + ended)),
            // Exchanges of datagrams end by themselves, too, once they are silent.
            Err(error) if !reset => {
                tracing::warn!(host = %port.host, %error, "exchanges of a port that is published no more go on");
                Ok(Some(0))
            }
            Err(error) => Err(PortError::NotEnded(port, error)),
        }
    }

    /// Removes a port without a word to others. It stays known if a worker could not be asked, which serves it still.
    async fn remove_from(
        &self,
        table: &mut MutexGuard<'_, Table>,
        id: u64,
        reset: bool,
    ) -> Result<Option<usize>, PortError> {
        let Some(at) = table.entries.iter().position(|entry| entry.published.id == id) else {
            return Ok(None);
        };
        let port = table.entries[at].published.port;
        let ended = match &*self.way {
            Way::None(_) | Way::Kernel(..) => Ok(0),
            Way::Holder(_, lender) => lender.unpublish(port, reset).await.map_err(PortError::from),
            Way::Workers(workers) | Way::Link(workers, _) => withdraw(workers, port, reset).await,
        };
        if !matches!(ended, Err(PortError::NoAnswer(NoAnswer::Full))) {
            table.entries.remove(at);
        }
        ended.map(Some)
    }

    /// Tells others of the named network, and the kernel, what is published now.
    async fn note(&self, table: &Table) -> Result<(), PortError> {
        let (Way::Kernel(joined, _) | Way::Holder(joined, _)) = &*self.way else { return Ok(()) };
        note(joined, table.entries.iter().map(|entry| PublishedPort::from(&entry.published.port)).collect())
            .await
    }
}

/// Tells others of the named network, and the kernel, that this is published; or nothing, if it cannot be done.
async fn note(joined: &SharedJoined, published: Vec<PublishedPort>) -> Result<(), PortError> {
    let joined = Arc::clone(joined);
    let work = move || {
        let mut joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
        joined.try_update(|user| user.published = published)
    };
    // It does not panic.
    tokio::task::spawn_blocking(work).await.map_or(Ok(()), |outcome| Ok(outcome?))
}

/// What the kernel redirects by this port.
fn redirected(joined: &SharedJoined, port: &Publish) -> Option<Redirected> {
    let joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
    let (SocketAddr::V4(host), Some(lan)) = (port.host, joined.definition().kind.lan()) else { return None };
    let udp = port.protocol == Protocol::Udp;
    Some(Redirected { udp, host, guest_port: port.guest_port, subnet: lan.subnet })
}

/// Asks the kernel for connections; aside, because it may have many.
async fn with_conntrack<T: Send + 'static>(
    work: impl FnOnce(&mut Conntrack) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let work = move || Conntrack::open().and_then(|mut conntrack| work(&mut conntrack));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

impl Table {
    fn add(&mut self, port: Publish, relay: Option<Relay>) -> Published {
        self.last_id += 1;
        let published = Published { id: self.last_id, port };
        self.entries.push(Entry { published, relay });
        published
    }
}

/// An error with its causes.
fn chain(error: &NetworkError) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What the kernel says, where the obstacle says no more than that it refuses.
fn tail(refused: &BindError) -> String {
    if refused.why == Obstacle::Other { format!(": {}", refused.source) } else { String::new() }
}

/// Binds a port; aside, because to find out who else has it takes a while.
async fn bind(port: &mut Publish) -> Result<Socket, PortError> {
    let mut bound = *port;
    let work = move || published::bind(&mut bound).map(|socket| (socket, bound));
    let outcome = tokio::task::spawn_blocking(work).await;
    let outcome = outcome.map_err(|error| PortError::Serve(*port, io::Error::other(error)))?;
    let (socket, bound) = outcome.map_err(PortError::Bind)?;
    *port = bound;
    Ok(socket)
}

fn event(port: &Publish) -> PortEvent {
    PortEvent { protocol: port.protocol.name(), host: port.host, guest_port: port.guest_port }
}

/// Whether packets to this end come to the address on the link.
fn fits_link(port: &Publish, held: Option<std::net::Ipv4Addr>) -> Result<(), PortError> {
    let at_address = port.host.ip().is_unspecified() || held.is_some_and(|held| port.host.ip() == held);
    if !at_address || port.interface.is_some() {
        let why = "ports are published at the address on the link (--nat-address), and at no other: give no address \
                   or interface of this host";
        return Err(PortError::NotHere(why));
    }
    if port.host.port() == 0 {
        return Err(PortError::NotHere("nobody on the link could know the port picked: give one"));
    }
    Ok(())
}

/// Has all workers know of a port, the first one last: it serves it. What some know already is taken back if another
/// does not answer.
async fn tell_all(workers: &[WorkerHandle], port: Publish, socket: Option<Socket>) -> Result<(), PortError> {
    let mut socket = socket;
    for (n, worker) in workers.iter().enumerate().rev() {
        let own = if n == 0 { socket.take() } else { None };
        let told = worker.ask(|answer| Request::Publish(port, own, answer)).await;
        let refused = match told {
            Ok(Ok(true)) => continue,
            Ok(Ok(false)) => PortError::FlowHasIt(port),
            Ok(Err(error)) => PortError::Serve(port, error),
            Err(error) => PortError::NoAnswer(error),
        };
        let _ = withdraw(&workers[n..], port, false).await;
        return Err(refused);
    }
    Ok(())
}

/// Has all workers forget a port; how many connections were reset.
async fn withdraw(workers: &[WorkerHandle], port: Publish, reset: bool) -> Result<usize, PortError> {
    let (mut connections, mut failed) = (0, None);
    for worker in workers {
        match withdraw_from(worker, port, reset).await {
            Ok(count) => connections += count,
            // Who was not asked serves it still, which must not be hidden behind another's silence.
            Err(error) if failed != Some(NoAnswer::Full) => failed = Some(error),
            Err(_) => {}
        }
    }
    failed.map_or(Ok(connections), |error| Err(error.into()))
}

/// The same of one worker, which ends connections in bounded steps.
async fn withdraw_from(worker: &WorkerHandle, port: Publish, reset: bool) -> Result<usize, NoAnswer> {
    let mut ended = worker.insist(|answer| Request::Unpublish { port, reset, answer }).await?;
    let mut connections = ended.connections;
    while let Some(first) = ended.next {
        ended = worker.insist(|answer| Request::EndPublished { port, first, answer }).await?;
        connections += ended.connections;
    }
    Ok(connections)
}

impl From<LendError> for PortError {
    fn from(error: LendError) -> PortError {
        match error {
            LendError::Bind(refused) => PortError::Bind(*refused),
            LendError::TooMany => PortError::TooMany,
            other => PortError::Holder(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::flows::Ended;
    use crate::requests;

    fn port(text: &str) -> Publish {
        crate::config::publish::publish(text).unwrap().iter().next().unwrap()
    }

    /// A worker that does as it is told, and counts the sockets it has.
    fn worker(
        says: fn(&Publish) -> io::Result<bool>,
    ) -> (WorkerHandle, std::thread::JoinHandle<Vec<Publish>>) {
        let (handle, mut asked) = requests::channel().unwrap();
        let serves = std::thread::spawn(move || {
            let mut served: Vec<(Publish, Option<Socket>)> = Vec::new();
            loop {
                match asked.take() {
                    Some(Request::Publish(port, socket, answer)) => {
                        let outcome = says(&port);
                        if matches!(outcome, Ok(true)) {
                            served.push((port, socket));
                        }
                        let _ = answer.send(outcome);
                    }
                    Some(Request::Unpublish { port, answer, .. }) => {
                        served.retain(|(known, _)| *known != port);
                        let _ = answer.send(Ended { connections: 1, next: Some(4096) });
                    }
                    Some(Request::EndPublished { first, answer, .. }) => {
                        let _ = answer.send(Ended { connections: first, next: None });
                    }
                    Some(Request::Drain(answer)) => {
                        let _ = answer.send(());
                        return served.into_iter().map(|(port, _)| port).collect();
                    }
                    Some(other) => panic!("{other:?}"),
                    None => std::thread::yield_now(),
                }
            }
        });
        (handle, serves)
    }

    async fn end(handle: &WorkerHandle) {
        handle.ask(Request::Drain).await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_is_bound_known_by_its_number_and_free_after_its_removal() {
        let (first, served_first) = worker(|_| Ok(true));
        let (second, served_second) = worker(|_| Ok(true));
        let workers = vec![first.clone(), second.clone()];
        let ports = Ports::new(Way::Workers(workers), Events::default(), [(port("127.0.0.1:7:7"), None)]);
        let mut events = ports.events.listen();
        let made = ports.publish(vec![port("127.0.0.1:0:80"), port("udp:127.0.0.1:0:80")]).await.unwrap();
        let [tcp, udp] = made[..] else { panic!("{made:?}") };
        assert!(tcp.port.host.port() != 0 && udp.port.host.port() != 0 && tcp.id != udp.id);
        assert!(matches!(events.try_recv(), Ok(Event::PortPublished(told)) if told.host == tcp.port.host));
        assert!(published::bind(&mut tcp.port.clone()).is_err(), "it is held");
        let again = ports.publish(vec![tcp.port]).await.unwrap_err();
        assert!(matches!(again, PortError::Known { id, .. } if id == tcp.id), "{again}");
        assert_eq!(ports.list().await.len(), 3);
        assert_eq!(
            ports.remove(tcp.id, true).await.unwrap(),
            Some(2 * 4097),
            "in two steps of each worker's"
        );
        assert_eq!(ports.remove(tcp.id, true).await.unwrap(), None);
        published::bind(&mut tcp.port.clone()).expect("it is free");
        end(&first).await;
        end(&second).await;
        assert_eq!(served_first.join().unwrap(), [udp.port]);
        assert_eq!(served_second.join().unwrap(), [udp.port]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn either_all_ports_of_a_request_are_published_or_none() {
        let (handle, served) = worker(|_| Ok(true));
        let ports = Ports::new(Way::Workers(vec![handle.clone()]), Events::default(), []);
        let mut events = ports.events.listen();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let wanted = Publish::new(Protocol::Tcp, taken.local_addr().unwrap(), 80);
        let error = ports.publish(vec![port("127.0.0.1:0:80"), wanted]).await.unwrap_err();
        let pid = format!("process {}", std::process::id());
        assert!(matches!(error, PortError::Bind(_)) && error.to_string().contains(&pid), "{error}");
        assert_eq!(ports.list().await, []);
        assert!(events.try_recv().is_err(), "nobody was told of the one that was taken back");
        let many = vec![port("0:1"); limits::PUBLISHED_PORTS_MAX + 1];
        assert!(matches!(ports.publish(many).await, Err(PortError::TooMany)));
        end(&handle).await;
        assert_eq!(served.join().unwrap(), []);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_one_worker_does_not_take_no_other_keeps() {
        let (first, served_first) = worker(|_| Ok(false));
        let (second, served_second) = worker(|_| Ok(true));
        let ports = Ports::new(Way::Link(vec![first.clone(), second.clone()], None), Events::default(), []);
        let error = ports.publish(vec![port("80:80")]).await.unwrap_err();
        assert!(matches!(error, PortError::FlowHasIt(_)), "{error}");
        for (text, part) in
            [("0:80", "give one"), ("192.0.2.1:80:80", "no other"), ("%eth0:80:80", "no other")]
        {
            let error = ports.publish(vec![port(text)]).await.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        end(&first).await;
        end(&second).await;
        assert_eq!(served_first.join().unwrap(), []);
        assert_eq!(served_second.join().unwrap(), []);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_stays_known_while_its_worker_cannot_be_asked_and_is_removed_once_it_can() {
        let (handle, mut asked) = requests::channel().unwrap();
        let ports = Ports::new(Way::Workers(vec![handle.clone()]), Events::default(), [(port("7:7"), None)]);
        let mut events = ports.events.listen();
        // More than it takes, of whose answers nobody wants to know.
        let all = (0..1000).map(|_| handle.ask(Request::Report));
        let answers = futures_util::future::join_all(all).await;
        assert!(answers.iter().any(|answer| matches!(answer, Err(NoAnswer::Full))));
        let error = ports.remove(1, true).await.unwrap_err();
        assert!(matches!(error, PortError::NoAnswer(NoAnswer::Full)), "{error}");
        assert_eq!(ports.list().await.len(), 1, "it is served still");
        assert!(events.try_recv().is_err(), "and nobody was told otherwise");
        while asked.take().is_some() {}
        let worker = std::thread::spawn(move || {
            loop {
                match asked.take() {
                    Some(Request::Unpublish { answer, .. }) => return answer.send(Ended::default()).unwrap(),
                    Some(other) => panic!("{other:?}"),
                    None => std::thread::yield_now(),
                }
            }
        });
        assert_eq!(ports.remove(1, true).await.unwrap(), Some(0));
        worker.join().unwrap();
        assert_eq!(ports.list().await, []);
        assert!(matches!(events.try_recv(), Ok(Event::PortUnpublished(_))));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn where_no_port_leads_to_the_guest_that_is_said() {
        let ports = Ports::new(Way::None("no port leads there"), Events::default(), []);
        let error = ports.publish(vec![port("80:80")]).await.unwrap_err();
        assert_eq!(error.to_string(), "no port leads there");
        // Those of the start are others' to serve, and to end.
        let ports = Ports::new(Way::None("a holder has it"), Events::default(), [(port("80:80"), None)]);
        assert!(matches!(ports.remove(1, false).await, Err(PortError::NotHere("a holder has it"))));
        assert_eq!(ports.list().await.len(), 1);
    }
}
