//! DNS over TCP towards upstreams: connections that are kept and carry many questions.
//!
//! A question takes a connection that is idle; else a new one, up to [`limits::DNS_CONNECTIONS_MAX`] to an
//! upstream; else the one with the fewest questions on it, behind or before which its answer comes, as the
//! upstream likes (RFC 7766, 6.2.1.1). An upstream may close whenever it likes (6.2.3): what it left
//! unanswered is asked again on another connection (6.2.4), unless it never answered anything. A connection
//! that takes no new questions lives as long as one of those on it may take, whatever the upstream does.
//!
//! Each connection is a task of its own, and nothing but that task touches its socket.
//!
//! Read first: RFC 7766, 6 and 8.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::control::dns_forward::exchange::{Answer, framed};
use crate::control::dns_forward::{Counters, count};
use crate::limits;

/// How long a connection without questions is kept (RFC 7766, 6.2.3: of the order of seconds).
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes asked and not yet sent beyond which no more questions are taken.
const OUTBOX_BYTES: usize = 64 << 10;
const LEN_BYTES: usize = 2;

/// A question, with a place for its answer.
struct Request {
    query: Vec<u8>,
    /// How long the upstream may say nothing at all before the connection is given up.
    silence_max: Duration,
    reply: oneshot::Sender<Result<Answer, Lost>>,
}

/// A connection ended before the answer came.
#[derive(Clone, Copy, Debug)]
struct Lost {
    error: io::ErrorKind,
    /// The system's own number for it, if it has one.
    code: Option<i32>,
    /// It had answered others before: what it lost may be asked again.
    was_good: bool,
}

impl From<Lost> for io::Error {
    fn from(lost: Lost) -> io::Error {
        lost.code.map_or_else(|| lost.error.into(), io::Error::from_raw_os_error)
    }
}

#[derive(Clone, Debug)]
struct Connection {
    number: u64,
    requests: mpsc::Sender<Request>,
    /// Questions on it.
    load: Arc<AtomicUsize>,
}

/// A question on a connection. Dropped before it heard anything, because its time is up, it leaves the
/// connection to the questions that are on it: it may be dead.
struct Place<'a> {
    connections: &'a Connections,
    upstream: SocketAddr,
    connection: Connection,
    heard: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.connection.load.fetch_sub(1, Ordering::Relaxed);
        if !self.heard {
            self.connections.remove(self.upstream, self.connection.number);
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    by_upstream: HashMap<SocketAddr, Vec<Connection>>,
    next_number: u64,
}

/// The connections to all upstreams.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    table: Arc<Mutex<Table>>,
    counters: Arc<Counters>,
}

impl Connections {
    pub(super) fn new(counters: Arc<Counters>) -> Connections {
        Connections { table: Arc::default(), counters }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `upstream`, which has `silence_max` to answer; the caller bounds the time.
    pub(super) async fn ask(
        &self,
        upstream: SocketAddr,
        query: &[u8],
        silence_max: Duration,
    ) -> io::Result<Answer> {
        // Each turn but the last lost a connection that had answered somebody.
        for _ in 0..limits::DNS_TCP_QUERIES_MAX {
            let mut place = self.pick(upstream, silence_max);
            let (reply, answer) = oneshot::channel();
            let request = Request { query: query.to_vec(), silence_max, reply };
            if place.connection.requests.send(request).await.is_err() {
                continue;
            }
            let answer = answer.await;
            place.heard = true;
            match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(lost)) if !lost.was_good => return Err(lost.into()),
                // Not taken before it ended, or worth another one.
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Err(io::ErrorKind::ConnectionReset.into())
    }

    /// Leaves all connections to the questions that are on them: the way to the upstreams is another.
    pub(super) fn forget(&self) {
        self.lock().by_upstream.clear();
    }

    fn pick(&self, upstream: SocketAddr, silence_max: Duration) -> Place<'_> {
        let mut table = self.lock();
        let open = table.by_upstream.entry(upstream).or_default();
        let load = |connection: &&Connection| connection.load.load(Ordering::Relaxed);
        let least = open
            .iter()
            .min_by_key(load)
            .filter(|connection| load(connection) == 0 || open.len() >= limits::DNS_CONNECTIONS_MAX);
        let connection = match least {
            Some(least) => least.clone(),
            None => self.open(&mut table, upstream, silence_max),
        };
        connection.load.fetch_add(1, Ordering::Relaxed);
        Place { connections: self, upstream, connection, heard: false }
    }

    fn open(&self, table: &mut Table, upstream: SocketAddr, silence_max: Duration) -> Connection {
        let (requests, taken) = mpsc::channel(1);
        table.next_number += 1;
        let number = table.next_number;
        let connection = Connection { number, requests, load: Arc::default() };
        table.by_upstream.entry(upstream).or_default().push(connection.clone());
        count(&self.counters.connections);
        let connections = self.clone();
        tokio::spawn(async move {
            let mut talk = Talk { requests: taken, pending: HashMap::new(), answered: 0 };
            let outcome = match timeout(silence_max, TcpStream::connect(upstream)).await {
                Ok(Ok(stream)) => talk.run(stream, &connections.counters).await,
                Ok(Err(error)) => Err(error),
                // The kernel itself goes on for two minutes.
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
            };
            connections.remove(upstream, number);
            talk.give_up(&outcome.err().unwrap_or(io::ErrorKind::TimedOut.into()));
        });
        connection
    }

    fn remove(&self, upstream: SocketAddr, number: u64) {
        let mut table = self.lock();
        if let Some(open) = table.by_upstream.get_mut(&upstream) {
            open.retain(|connection| connection.number != number);
            if open.is_empty() {
                table.by_upstream.remove(&upstream);
            }
        }
    }
}

/// One connection's life.
struct Talk {
    requests: mpsc::Receiver<Request>,
    /// By the id each was asked with.
    pending: HashMap<u16, Request>,
    answered: u64,
}

impl Talk {
    async fn run(&mut self, mut stream: TcpStream, counters: &Counters) -> io::Result<()> {
        // A question is one write; waiting to fill a segment would only delay it.
        stream.set_nodelay(true)?;
        let (mut reader, mut writer) = stream.split();
        let (mut inbox, mut outbox) = (Vec::new(), Vec::new());
        let (mut spoken, mut silence_max) = (Instant::now(), IDLE_TIMEOUT);
        // Once no new questions come: when the time of the last one on it is up.
        let mut ends: Option<Instant> = None;
        while ends.is_none() || !self.pending.is_empty() {
            let is_idle = self.pending.is_empty();
            let has_room = self.pending.len() < limits::DNS_TCP_QUERIES_MAX && outbox.len() < OUTBOX_BYTES;
            if ends.is_none() && self.requests.is_closed() && self.requests.is_empty() {
                ends = Some(Instant::now() + silence_max);
                continue;
            }
            let silent = spoken + if is_idle { IDLE_TIMEOUT } else { silence_max };
            let deadline = ends.map_or(silent, |ends| ends.min(silent));
            tokio::select! {
                request = self.requests.recv(), if ends.is_none() && has_room => {
                    // None: there will be no more, which the next turn sees.
                    if let Some(request) = request {
                        if is_idle {
                            spoken = Instant::now();
                        }
                        silence_max = request.silence_max;
                        self.take(request, &mut outbox)?;
                    }
                }
                written = writer.write(&outbox), if !outbox.is_empty() => {
                    outbox.drain(..written?);
                }
                read = reader.read_buf(&mut inbox) => {
                    if read? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    spoken = Instant::now();
                    self.answer(&mut inbox, counters);
                }
                () = sleep_until(deadline) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(())
    }

    /// Puts a question on its way under a random id of its own.
    fn take(&mut self, mut request: Request, outbox: &mut Vec<u8>) -> io::Result<()> {
        if self.pending.len() + 1 >= limits::DNS_TCP_QUERIES_MAX {
            // Those whose askers' time was up would fill the connection in the end.
            self.pending.retain(|_, request| !request.reply.is_closed());
        }
        loop {
            let mut id = [0; 2];
            getrandom::fill(&mut id)?;
            // Far fewer than 65,536 are on their way, so one is soon found.
            if let Entry::Vacant(free) = self.pending.entry(u16::from_be_bytes(id)) {
                request.query[..2].copy_from_slice(&id);
                outbox.extend(framed(&request.query));
                free.insert(request);
                return Ok(());
            }
        }
    }

    /// Takes the whole messages out of `inbox`, and gives each to who asked for it.
    fn answer(&mut self, inbox: &mut Vec<u8>, counters: &Counters) {
        let mut taken = 0;
        while let Some((len, rest)) = inbox[taken..].split_first_chunk::<LEN_BYTES>() {
            let len_bytes = usize::from(u16::from_be_bytes(*len));
            let Some(message) = rest.get(..len_bytes).map(<[u8]>::to_vec) else { break };
            taken += LEN_BYTES + len_bytes;
            let id = message.first_chunk().map(|id| u16::from_be_bytes(*id));
            let asked = id.and_then(|id| self.pending.get(&id));
            match asked.and_then(|request| Answer::accept(&request.query, message)) {
                Some(answer) => {
                    self.answered += 1;
                    if let Some(request) = id.and_then(|id| self.pending.remove(&id)) {
                        // Its time may be up.
                        let _ = request.reply.send(Ok(answer));
                    }
                }
                None => count(&counters.mismatched),
            }
        }
        // Once for all: an upstream may send tens of thousands of empty messages at a time.
        inbox.drain(..taken);
    }

    /// Tells those who wait that no answer comes.
    fn give_up(&mut self, error: &io::Error) {
        let lost = Lost { error: error.kind(), code: error.raw_os_error(), was_good: self.answered > 0 };
        self.requests.close();
        while let Ok(request) = self.requests.try_recv() {
            let _ = request.reply.send(Err(lost));
        }
        for (_, request) in self.pending.drain() {
            // Its time may be up.
            let _ = request.reply.send(Err(lost));
        }
    }
}
