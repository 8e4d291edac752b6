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
//! [`DnsService`], the rest asked over TCP.
//!
//! All forwarders of the process share one [`Resolver`]: what one worker's guest asked for, another's
//! finds in the cache. `resolver` answers a query, from the `cache` or by asking upstreams; `message`
//! reads what the cache has to know of one; `exchange` asks one upstream once, over `connections` for TCP;
//! `upstreams` knows whom to ask; `source` where those come from, such as a `resolv_conf`, and `file_news`
//! when that changes; `stream` serves a connection of the guest.
//!
//! Read first: RFC 5452 (answers that are not ours), RFC 7766 (DNS over TCP).

mod cache;
mod connections;
mod exchange;
mod file_news;
mod message;
pub mod probe;
mod resolv_conf;
mod resolver;
mod source;
mod stream;
mod upstreams;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rtrb::{Consumer, Producer, RingBuffer};
use tokio::net::UnixStream as TokioUnixStream;
use tokio::task::{JoinSet, yield_now};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::dns_forward::resolver::Begun;
use crate::limits;
use crate::service::dns::DnsService;

pub use crate::control::dns_forward::resolver::Resolver;
pub use crate::control::dns_forward::source::Upstreams;

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

/// What the resolver has done since its start, for all its clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsStats {
    /// Queries taken to be forwarded.
    pub queries: u64,
    /// Queries answered from the cache.
    pub cached: u64,
    /// Queries that waited for the answer to another one that asked the same.
    pub joined: u64,
    /// Answers that made room in the cache for others.
    pub evicted: u64,
    /// Questions an upstream answered, whatever the answer.
    pub answered: u64,
    /// Questions no upstream answered: SERVFAIL was.
    pub failed: u64,
    /// Queries beyond the bound on those outstanding: not taken, or answered with SERVFAIL.
    pub over_bound: u64,
    /// Tries that ran out of time.
    pub timeouts: u64,
    /// Tries that the host's network refused: unreachable, nobody listens, no descriptor.
    pub errors: u64,
    /// Answers of an upstream whose id or question was not the query's, ignored.
    pub mismatched: u64,
    /// Connections opened to upstreams.
    pub connections: u64,
    /// Connections of guests beyond the bound on those open.
    pub streams_refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    queries: AtomicU64,
    cached: AtomicU64,
    joined: AtomicU64,
    evicted: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
    over_bound: AtomicU64,
    timeouts: AtomicU64,
    errors: AtomicU64,
    mismatched: AtomicU64,
    connections: AtomicU64,
    streams_refused: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    fn read(&self) -> DnsStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DnsStats {
            queries: read(&self.queries),
            cached: read(&self.cached),
            joined: read(&self.joined),
            evicted: read(&self.evicted),
            answered: read(&self.answered),
            failed: read(&self.failed),
            over_bound: read(&self.over_bound),
            timeouts: read(&self.timeouts),
            errors: read(&self.errors),
            mismatched: read(&self.mismatched),
            connections: read(&self.connections),
            streams_refused: read(&self.streams_refused),
        }
    }
}

/// What both sides see: the resolver's counters, and what is under way between them.
#[derive(Debug)]
struct Shared {
    counters: Arc<Counters>,
    streams: AtomicUsize,
    /// Bytes of the queries that wait for their answers.
    query_bytes: AtomicUsize,
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

/// Makes the two ends of a worker's channel to `resolver`.
///
/// # Errors
/// No descriptor for the two eventfds.
pub fn channel(resolver: &Arc<Resolver>) -> io::Result<(DnsClient, DnsForwarder)> {
    let (jobs_in, jobs_out) = RingBuffer::new(limits::DNS_QUERIES_MAX + limits::DNS_STREAMS_MAX);
    let (answers_in, answers_out) = RingBuffer::new(limits::DNS_QUERIES_MAX);
    let (wake_in, wake_out) = UnixStream::pair()?;
    wake_in.set_nonblocking(true)?;
    wake_out.set_nonblocking(true)?;
    let answers_event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let counters = Arc::clone(resolver.counters());
    let shared =
        Arc::new(Shared { counters, streams: AtomicUsize::default(), query_bytes: AtomicUsize::default() });
    let client = DnsClient {
        jobs: jobs_in,
        wake: wake_in,
        answers: answers_out,
        answers_event: Arc::clone(&answers_event),
        outstanding: 0,
        shared: Arc::clone(&shared),
    };
    let resolver = Arc::clone(resolver);
    let forwarder =
        DnsForwarder { jobs: jobs_out, wake: wake_out, answers: answers_in, answers_event, shared, resolver };
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
    /// The query itself, if [`limits::DNS_QUERIES_MAX`] queries or [`limits::DNS_QUERIES_BYTES_MAX`] bytes
    /// of them are outstanding, it is longer than [`limits::DNS_QUERY_BYTES_MAX`], or the forwarder is
    /// gone. It is to be answered with SERVFAIL.
    pub fn submit(&mut self, query: DnsQuery) -> Result<(), DnsQuery> {
        let len_bytes = query.bytes.len();
        // Only this side counts up, so what is below the bound here stays below it.
        let waiting_bytes = self.shared.query_bytes.load(Ordering::Relaxed);
        if self.outstanding >= limits::DNS_QUERIES_MAX
            || len_bytes > limits::DNS_QUERY_BYTES_MAX
            || waiting_bytes + len_bytes > limits::DNS_QUERIES_BYTES_MAX
            || self.jobs.is_abandoned()
        {
            count(&self.shared.counters.over_bound);
            return Err(query);
        }
        self.shared.query_bytes.fetch_add(len_bytes, Ordering::Relaxed);
        match self.jobs.push(Job::Query(query)) {
            Ok(()) => {
                self.outstanding += 1;
                self.wake_forwarder();
                Ok(())
            }
            Err(rtrb::PushError::Full(job)) => {
                self.shared.query_bytes.fetch_sub(len_bytes, Ordering::Relaxed);
                let Job::Query(query) = job else { unreachable!("a query was pushed") };
                Err(query)
            }
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

    /// Clears the [`event_fd`](Self::event_fd) though answers may wait: for who leaves them there.
    pub fn clear_event(&mut self) {
        // Nothing to clear is as good.
        let _ = self.answers_event.read();
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

    /// What the resolver has done so far, for all its clients.
    pub fn stats(&self) -> DnsStats {
        self.shared.counters.read()
    }
}

/// The control thread's end.
#[derive(Debug)]
pub struct DnsForwarder {
    jobs: Consumer<Job>,
    wake: UnixStream,
    answers: Producer<DnsAnswer>,
    answers_event: Arc<EventFd>,
    shared: Arc<Shared>,
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
    pub async fn run(self, service: Arc<DnsService>) -> io::Result<()> {
        let DnsForwarder { mut jobs, wake, answers, answers_event, shared, resolver } = self;
        let mut answers = Answers { ring: answers, event: answers_event, shared };
        let wake = TokioUnixStream::from_std(wake)?;
        let mut queries: JoinSet<(usize, DnsAnswer)> = JoinSet::new();
        let mut streams: JoinSet<()> = JoinSet::new();
        let (mut has_more, mut client_gone) = (false, false);
        loop {
            let may_take = tokio::select! {
                ready = wake.readable(), if !has_more => {
                    ready?;
                    client_gone = is_closed(&wake);
                    true
                }
                () = yield_now(), if has_more => true,
                Some(done) = queries.join_next() => {
                    if let Ok((query_bytes, answer)) = done {
                        answers.give(query_bytes, answer);
                    }
                    false
                }
                Some(_) = streams.join_next() => false,
            };
            if !may_take {
                continue;
            }
            has_more = !jobs.is_empty();
            for job in std::iter::from_fn(|| jobs.pop().ok()).take(limits::DNS_JOBS_BATCH) {
                match job {
                    Job::Query(query) => start_query(&mut queries, query, &resolver, &mut answers),
                    Job::Stream(stream, permit) => {
                        start_stream(&mut streams, stream, permit, &service, &resolver);
                    }
                }
            }
            if client_gone && !has_more {
                return Ok(());
            }
        }
    }
}

/// The way back to the worker.
struct Answers {
    ring: Producer<DnsAnswer>,
    event: Arc<EventFd>,
    shared: Arc<Shared>,
}

impl Answers {
    /// Gives `answer` to the worker, whose query had `query_bytes`.
    fn give(&mut self, query_bytes: usize, answer: DnsAnswer) {
        self.shared.query_bytes.fetch_sub(query_bytes, Ordering::Relaxed);
        let pushed = self.ring.push(answer);
        debug_assert!(pushed.is_ok(), "no more answers than queries outstanding");
        // Fails only if the counter is full, and then the worker was woken often enough.
        let _ = self.event.write(1);
    }
}

/// Answers a query at once if its answer is known, else on a task of its own.
fn start_query(
    tasks: &mut JoinSet<(usize, DnsAnswer)>,
    query: DnsQuery,
    resolver: &Arc<Resolver>,
    answers: &mut Answers,
) {
    let DnsQuery { id, bytes } = query;
    match resolver.begin(bytes) {
        Begun::Known(query, answer) => answers.give(query.len(), DnsAnswer { id, bytes: answer }),
        Begun::Asking(asking) => {
            tasks.spawn(async move {
                let (query, answer) = asking.wait().await;
                (query.len(), DnsAnswer { id, bytes: answer })
            });
        }
    }
}

fn start_stream(
    tasks: &mut JoinSet<()>,
    stream: UnixStream,
    permit: StreamPermit,
    service: &Arc<DnsService>,
    resolver: &Arc<Resolver>,
) {
    let (service, resolver) = (Arc::clone(service), Arc::clone(resolver));
    tasks.spawn(async move {
        stream::serve(stream, &service, &resolver).await;
        drop(permit);
    });
}

/// Takes the wakes that wait; true if there will be no more.
fn is_closed(wake: &TokioUnixStream) -> bool {
    let mut wakes = [0; 256];
    match wake.try_read(&mut wakes) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}
