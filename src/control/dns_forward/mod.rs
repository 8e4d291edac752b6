//! The DNS forwarder: the guest's queries to the host's resolvers, byte for byte.
//!
//! A worker owns a [`DnsClient`], the control thread a [`DnsForwarder`]. Between them are two
//! single-producer rings, and two descriptors that wake the other side: an eventfd for the worker's
//! epoll, a socket pair for tokio, which watches no eventfd without unsafe code and for which the
//! closed end says that the client is gone. The worker's side never blocks, locks or waits. Every
//! query that [`DnsClient::submit`] accepts comes back as exactly one answer, so the bound on
//! queries outstanding is also the bound on the ring of answers, which therefore never overflows.
//!
//! Queries of UDP clients are asked over UDP, and an answer with TC set passes as it came: the
//! guest asks again over TCP. For TCP the worker gets a stream ([`DnsClient::connect_stream`])
//! whose other end is served here: DNS over TCP, local names from the shared
//! [`DnsService`](crate::service::dns::DnsService), the rest asked over TCP.
//!
//! `exchange` asks one upstream once; `upstreams` knows whom to ask; `stream` serves a connection.
//!
//! Read first: RFC 5452 (answers that are not ours), RFC 7766 (DNS over TCP).

mod exchange;
mod stream;
mod upstreams;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rtrb::{Consumer, Producer, RingBuffer};
use tokio::net::UnixStream as TokioUnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::limits;
use crate::service::dns::{DnsService, Transport, servfail};

use crate::control::dns_forward::upstreams::UpstreamList;
pub use crate::control::dns_forward::upstreams::Upstreams;

/// A query to forward.
#[derive(Debug, PartialEq, Eq)]
pub struct DnsQuery {
    /// The submitter's own mark, given back with the answer.
    pub id: u64,
    /// The query as the guest sent it.
    pub bytes: Vec<u8>,
}

/// The answer to a query.
#[derive(Debug, PartialEq, Eq)]
pub struct DnsAnswer {
    /// The mark of the query.
    pub id: u64,
    /// The answer, up to 65,535 bytes, with the DNS id of the query. Empty if the query was shorter
    /// than a header.
    pub bytes: Vec<u8>,
}

/// What the forwarder has done since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsStats {
    /// Queries taken to be forwarded.
    pub queries: u64,
    /// Queries an upstream answered, whatever the answer.
    pub answered: u64,
    /// Queries no upstream answered: SERVFAIL was.
    pub failed: u64,
    /// Queries beyond the bound on those outstanding: not taken, or answered with SERVFAIL.
    pub over_bound: u64,
    /// Tries that ran into their 2 s.
    pub timeouts: u64,
    /// Tries that the host's network refused: unreachable, nobody listens, no descriptor.
    pub errors: u64,
    /// Answers of an upstream whose id or question was not the query's, ignored.
    pub mismatched: u64,
    /// Connections beyond the bound on those open.
    pub streams_refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    queries: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
    over_bound: AtomicU64,
    timeouts: AtomicU64,
    errors: AtomicU64,
    mismatched: AtomicU64,
    streams_refused: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What both sides see: counters, and the number of connections.
#[derive(Debug, Default)]
struct Shared {
    counters: Counters,
    streams: AtomicUsize,
}

/// One open connection, counted until it is dropped.
#[derive(Debug)]
struct StreamPermit(Arc<Shared>);

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Job {
    Query(DnsQuery),
    Stream(UnixStream, StreamPermit),
}

/// Makes the two ends. `upstreams` says whom the forwarder asks.
///
/// # Errors
/// No descriptor for the two eventfds.
pub fn channel(upstreams: Upstreams) -> io::Result<(DnsClient, DnsForwarder)> {
    let (jobs_in, jobs_out) = RingBuffer::new(limits::DNS_QUERIES_MAX + limits::DNS_STREAMS_MAX);
    let (answers_in, answers_out) = RingBuffer::new(limits::DNS_QUERIES_MAX);
    let (wake_in, wake_out) = UnixStream::pair()?;
    wake_in.set_nonblocking(true)?;
    wake_out.set_nonblocking(true)?;
    let answers_event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let shared = Arc::new(Shared::default());
    let client = DnsClient {
        jobs: jobs_in,
        wake: wake_in,
        answers: answers_out,
        answers_event: Arc::clone(&answers_event),
        outstanding: 0,
        shared: Arc::clone(&shared),
    };
    let resolver = Arc::new(Resolver {
        upstreams: Mutex::new(UpstreamList::new(upstreams)),
        tcp_queries: Semaphore::new(limits::DNS_TCP_QUERIES_MAX),
        failing: AtomicBool::new(false),
        shared,
    });
    let forwarder =
        DnsForwarder { jobs: jobs_out, wake: wake_out, answers: answers_in, answers_event, resolver };
    Ok((client, forwarder))
}

/// The worker's end.
#[derive(Debug)]
pub struct DnsClient {
    jobs: Producer<Job>,
    wake: UnixStream,
    answers: Consumer<DnsAnswer>,
    answers_event: Arc<EventFd>,
    outstanding: usize,
    shared: Arc<Shared>,
}

impl DnsClient {
    /// Hands over a query that came over UDP. Its answer comes through
    /// [`poll_answer`](Self::poll_answer), 8 s later at most.
    ///
    /// # Errors
    /// The query itself, if [`limits::DNS_QUERIES_MAX`] are outstanding, it is longer than
    /// [`limits::DNS_QUERY_BYTES_MAX`], or the forwarder is gone. It is to be answered with
    /// [`servfail`].
    pub fn submit(&mut self, query: DnsQuery) -> Result<(), DnsQuery> {
        if self.outstanding >= limits::DNS_QUERIES_MAX
            || query.bytes.len() > limits::DNS_QUERY_BYTES_MAX
            || self.jobs.is_abandoned()
        {
            count(&self.shared.counters.over_bound);
            return Err(query);
        }
        match self.jobs.push(Job::Query(query)) {
            Ok(()) => {
                self.outstanding += 1;
                self.wake_forwarder();
                Ok(())
            }
            Err(rtrb::PushError::Full(Job::Query(query))) => Err(query),
            Err(rtrb::PushError::Full(Job::Stream(..))) => unreachable!("a query was pushed"),
        }
    }

    /// The next answer, if one waits. After `None` the [`event_fd`](Self::event_fd) is cleared, so
    /// that both level- and edge-triggered polling work if answers are taken until `None`.
    pub fn poll_answer(&mut self) -> Option<DnsAnswer> {
        let answer = self.answers.pop().or_else(|empty| {
            // An answer may come between the look and the clearing: look again.
            let _ = self.answers_event.read();
            self.answers.pop().map_err(|_| empty)
        });
        let answer = answer.ok()?;
        self.outstanding -= 1;
        Some(answer)
    }

    /// Readable while answers wait. Owned by this client.
    pub fn event_fd(&self) -> RawFd {
        self.answers_event.as_raw_fd()
    }

    /// A connection to the service that speaks DNS over TCP: non-blocking, closed by the service
    /// when idle for 10 s.
    ///
    /// # Errors
    /// `ConnectionRefused` if [`limits::DNS_STREAMS_MAX`] are open or the forwarder is gone; the
    /// kernel's error if it has no descriptor.
    pub fn connect_stream(&mut self) -> io::Result<UnixStream> {
        let refuse = |shared: &Shared| {
            count(&shared.counters.streams_refused);
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        // Only this side counts up, so what is below the bound here stays below it.
        if self.shared.streams.load(Ordering::Relaxed) >= limits::DNS_STREAMS_MAX || self.jobs.is_abandoned()
        {
            return refuse(&self.shared);
        }
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        self.shared.streams.fetch_add(1, Ordering::Relaxed);
        let permit = StreamPermit(Arc::clone(&self.shared));
        if self.jobs.push(Job::Stream(far, permit)).is_err() {
            return refuse(&self.shared);
        }
        self.wake_forwarder();
        Ok(near)
    }

    fn wake_forwarder(&mut self) {
        // Fails only if the forwarder has not read for thousands of wakes, and then it is awake, or
        // if it is gone.
        let _ = self.wake.write(&[1]);
    }

    /// What the forwarder has done so far.
    pub fn stats(&self) -> DnsStats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DnsStats {
            queries: read(&counters.queries),
            answered: read(&counters.answered),
            failed: read(&counters.failed),
            over_bound: read(&counters.over_bound),
            timeouts: read(&counters.timeouts),
            errors: read(&counters.errors),
            mismatched: read(&counters.mismatched),
            streams_refused: read(&counters.streams_refused),
        }
    }
}

/// The control thread's end.
#[derive(Debug)]
pub struct DnsForwarder {
    jobs: Consumer<Job>,
    wake: UnixStream,
    answers: Producer<DnsAnswer>,
    answers_event: Arc<EventFd>,
    resolver: Arc<Resolver>,
}

impl DnsForwarder {
    /// Serves until the client is dropped; then what is under way is given up.
    ///
    /// # Errors
    /// The client's wakes cannot be watched by the runtime.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O and time enabled.
    pub async fn run(mut self, service: Arc<DnsService>) -> io::Result<()> {
        let wake = TokioUnixStream::from_std(self.wake.try_clone()?)?;
        let mut queries: JoinSet<DnsAnswer> = JoinSet::new();
        let mut streams: JoinSet<()> = JoinSet::new();
        loop {
            tokio::select! {
                ready = wake.readable() => {
                    ready?;
                    let client_gone = is_closed(&wake);
                    while let Ok(job) = self.jobs.pop() {
                        self.start(job, &service, &mut queries, &mut streams);
                    }
                    if client_gone {
                        return Ok(());
                    }
                }
                Some(done) = queries.join_next() => {
                    if let Ok(answer) = done {
                        self.deliver(answer);
                    }
                }
                Some(_) = streams.join_next() => {}
            }
        }
    }

    fn start(
        &self,
        job: Job,
        service: &Arc<DnsService>,
        queries: &mut JoinSet<DnsAnswer>,
        streams: &mut JoinSet<()>,
    ) {
        let resolver = Arc::clone(&self.resolver);
        match job {
            Job::Query(DnsQuery { id, bytes }) => {
                queries.spawn(async move {
                    DnsAnswer { id, bytes: resolver.resolve(&bytes, Transport::Udp).await }
                });
            }
            Job::Stream(stream, permit) => {
                let service = Arc::clone(service);
                streams.spawn(async move {
                    stream::serve(stream, &service, &resolver).await;
                    drop(permit);
                });
            }
        }
    }

    fn deliver(&mut self, answer: DnsAnswer) {
        let pushed = self.answers.push(answer);
        debug_assert!(pushed.is_ok(), "no more answers than queries outstanding");
        // Fails only if the counter is full, and then the worker has been woken often enough.
        let _ = self.answers_event.write(1);
    }
}

/// Takes the wakes that wait; true if there will be no more.
fn is_closed(wake: &TokioUnixStream) -> bool {
    let mut wakes = [0; 256];
    match wake.try_read(&mut wakes) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Asks upstreams until one answers.
#[derive(Debug)]
struct Resolver {
    upstreams: Mutex<UpstreamList>,
    tcp_queries: Semaphore,
    /// Whether the last query found no upstream: said once in the log when it changes.
    failing: AtomicBool,
    shared: Arc<Shared>,
}

impl Resolver {
    /// The answer to `query`, with its id: of the first upstream that gives one. An upstream that
    /// is silent, unreachable, failing (SERVFAIL) or unwilling (REFUSED) makes way for the next; if
    /// all are, their first answer stands, or SERVFAIL of our own if there is none.
    async fn resolve(&self, query: &[u8], transport: Transport) -> Vec<u8> {
        let counters = &self.shared.counters;
        count(&counters.queries);
        let upstreams = self.upstreams.lock().unwrap_or_else(PoisonError::into_inner).current();
        let mut second_best = None;
        for &upstream in upstreams.iter() {
            match exchange::ask(upstream, query, transport, counters).await {
                Ok(answer) if answer.is_final() => {
                    return self.answered(answer.into_bytes_for(query));
                }
                Ok(answer) => second_best = second_best.or(Some(answer)),
                Err(exchange::Failure::Timeout) => count(&counters.timeouts),
                Err(exchange::Failure::Io(error)) => {
                    tracing::debug!(%upstream, %error, "resolver not reached");
                    count(&counters.errors);
                }
            }
        }
        if let Some(answer) = second_best {
            return self.answered(answer.into_bytes_for(query));
        }
        count(&counters.failed);
        if !upstreams.is_empty() && !self.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(?upstreams, "no resolver answers; the guest's queries fail until one does");
        }
        servfail(query)
    }

    /// As [`resolve`](Self::resolve), for queries from connections, within their bound.
    async fn resolve_tcp(&self, query: &[u8]) -> Vec<u8> {
        match self.tcp_queries.try_acquire() {
            Ok(_permit) => self.resolve(query, Transport::Tcp).await,
            Err(_) => {
                count(&self.shared.counters.over_bound);
                servfail(query)
            }
        }
    }

    fn answered(&self, bytes: Vec<u8>) -> Vec<u8> {
        count(&self.shared.counters.answered);
        if self.failing.swap(false, Ordering::Relaxed) {
            tracing::info!("resolvers answer again");
        }
        bytes
    }
}
