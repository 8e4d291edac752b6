//! The process's resolver: answers a query from the cache, from another's answer on its way, or by asking
//! upstreams.
//!
//! A question that is on its way already is not asked again: whoever asks the same meanwhile waits for
//! the same answer, and gets it with its own id and its own spelling of the name. Besides sparing the
//! upstream this leaves a forger one port and one id to guess, however often the guest asks (RFC 5452,
//! 5). Queries whose answer may depend on more than what a cache's key holds go their own way.
//!
//! A question's journey belongs to no asker: it goes on, and its answer is kept, when the asker leaves.
//!
//! Read first: RFC 5452, 5 and 9; RFC 7766.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::control::dns_forward::cache::{Cache, adopt};
use crate::control::dns_forward::connections::Connections;
use crate::control::dns_forward::exchange::{self, Answer, Failure};
use crate::control::dns_forward::file_news::FileNews;
use crate::control::dns_forward::message::{HEADER_BYTES, Key, question_end, records, without_hop};
use crate::control::dns_forward::source::{Source, Upstreams};
use crate::control::dns_forward::upstreams::{Try, UpstreamList};
use crate::control::dns_forward::{Counters, DnsStats, count};
use crate::histogram::Histogram;
use crate::limits;
use crate::service::dns::{Transport, servfail};
use crate::time::{Clock, Instant};
use crate::uplink::sys::clock::since_boot;

/// How long a question may take, waiting for its turn included: then the guest's own resolver has given
/// up.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(8);

/// How often a question begins anew because the way to the upstreams is another. On a host whose routes never
/// settle, none would come to its end otherwise.
const RESTARTS_MAX: usize = 3;

/// How long the host's settings are left alone after news of them.
const SETTLE_TIME: Duration = Duration::from_millis(100);

/// A question on its way, as far as its answer may differ from another's: what the cache goes by, the
/// transport, and the OPT record as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Flight {
    key: Key,
    /// The cache's when it began: what is asked on another network is another question.
    generation: u64,
    is_tcp: bool,
    opt: Box<[u8]>,
}

/// A place among the questions that connections have on their way: the asker's, and the question's own,
/// which may go on without it.
type TcpPlace = Arc<OwnedSemaphorePermit>;

/// An answer that comes.
type Arrival = watch::Receiver<Option<Arc<[u8]>>>;

/// Asks upstreams until one answers, and remembers what it said. One for all workers.
#[derive(Debug)]
pub struct Resolver {
    source: Mutex<Source>,
    upstreams: Mutex<UpstreamList>,
    connections: Connections,
    cache: Mutex<Cache>,
    flights: Mutex<HashMap<Flight, Arrival, foldhash::quality::RandomState>>,
    exchanges: Semaphore,
    tcp_queries: Arc<Semaphore>,
    search: watch::Sender<Vec<String>>,
    /// How often the way to the upstreams became another.
    ways: watch::Sender<u64>,
    /// Whether the last question found no upstream: said once in the log when it changes.
    failing: AtomicBool,
    clock: Clock,
    /// The time by which answers grow old.
    since_boot: fn() -> Instant,
    counters: Arc<Counters>,
    /// How long questions took that an upstream answered, in microseconds.
    times: Mutex<Histogram>,
}

/// What became of a query at once.
pub(super) enum Begun {
    /// The query, and its answer.
    Known(Vec<u8>, Vec<u8>),
    /// Its answer is to be waited for.
    Asking(Asking),
}

/// A query whose answer is on its way.
pub(super) struct Asking {
    query: Vec<u8>,
    from: From,
}

enum From {
    /// A question others may wait for too.
    Shared(Arrival),
    /// One of its own.
    Own(Arc<Resolver>, Transport),
}

impl Asking {
    /// The query, and its answer.
    pub(super) async fn wait(self) -> (Vec<u8>, Vec<u8>) {
        let Asking { query, from } = self;
        let answer = match from {
            From::Own(resolver, transport) => resolver.ask_upstreams(&query, transport).await.bytes,
            From::Shared(mut arrival) => {
                // Only the end of the runtime ends a question without an answer.
                let arrived = arrival.wait_for(Option::is_some).await;
                arrived.ok().and_then(|answer| answer.as_deref().map(<[u8]>::to_vec)).unwrap_or_default()
            }
        };
        let answer = match answer {
            mut bytes if bytes.len() >= HEADER_BYTES => {
                adopt(&mut bytes, &query);
                bytes
            }
            _ => servfail(&query),
        };
        (query, answer)
    }
}

/// What one upstream made of a question.
enum Asked {
    Answer(Answer),
    /// Failure or refusal: to be passed on if nobody knows better.
    SecondBest(Answer),
    Silent,
    Unreachable,
}

/// The end of a question's journey.
struct Landed {
    bytes: Vec<u8>,
    /// Whether an upstream said so.
    is_answered: bool,
}

/// Whether this process or its host lacked something: the resolver was not even asked.
fn is_own_want(error: &io::Error) -> bool {
    use libc::{EADDRNOTAVAIL, EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM};
    let wants = [EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, EAGAIN];
    error.raw_os_error().is_some_and(|code| wants.contains(&code))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Resolver {
    /// A resolver that asks `upstreams`.
    pub fn new(upstreams: Upstreams) -> Arc<Resolver> {
        Resolver::with_clock(upstreams, since_boot)
    }

    /// The same with another clock by which answers grow old, for tests: one that counts the host's sleep.
    pub fn with_clock(upstreams: Upstreams, since_boot: fn() -> Instant) -> Arc<Resolver> {
        let counters = Arc::<Counters>::default();
        let source = Source::new(upstreams);
        Arc::new(Resolver {
            upstreams: Mutex::new(UpstreamList::new(source.conf().clone())),
            source: Mutex::new(source),
            connections: Connections::new(Arc::clone(&counters)),
            cache: Mutex::default(),
            flights: Mutex::default(),
            exchanges: Semaphore::new(limits::DNS_EXCHANGES_MAX),
            tcp_queries: Arc::new(Semaphore::new(limits::DNS_TCP_QUERIES_MAX)),
            search: watch::Sender::new(Vec::new()),
            ways: watch::Sender::new(0),
            failing: AtomicBool::new(false),
            clock: Clock::start(),
            since_boot,
            counters,
            times: Mutex::default(),
        })
    }

    /// What was done so far.
    pub fn stats(&self) -> DnsStats {
        self.counters.read()
    }

    /// How long questions took that an upstream answered, in microseconds.
    pub fn times(&self) -> Histogram {
        *self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn took(&self, begun: Instant) {
        let time = self.clock.now().since(begun);
        self.times.lock().unwrap_or_else(PoisonError::into_inner).record_time(time);
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Begins to answer `query`, which came over UDP. Needs a tokio runtime.
    pub(super) fn begin(self: &Arc<Self>, query: Vec<u8>) -> Begun {
        self.begin_at(query, None)
    }

    /// The same of a query from a connection, which has a place.
    fn begin_at(self: &Arc<Self>, query: Vec<u8>, place: Option<&TcpPlace>) -> Begun {
        let transport = if place.is_some() { Transport::Tcp } else { Transport::Udp };
        count(&self.counters.queries);
        self.look();
        let Some(key) = Key::of(&query) else {
            return Begun::Asking(Asking { query, from: From::Own(Arc::clone(self), transport) });
        };
        let mut cache = lock(&self.cache);
        if let Some(answer) = cache.get((self.since_boot)(), &key, &query) {
            count(&self.counters.cached);
            return Begun::Known(query, answer);
        }
        let generation = cache.generation();
        drop(cache);
        // What the asker says to us, such as its cookie (RFC 7873), is not for the upstream.
        let end = question_end(&query);
        let sent = end.and_then(|end| without_hop(&query, &records(&query, end)?));
        let sent = sent.unwrap_or_else(|| query.clone());
        let opt = end.map_or(&[][..], |end| &sent[end..]);
        let is_tcp = place.is_some();
        let flight = Flight { key, generation, is_tcp, opt: opt.into() };
        let arrival = self.join(flight, sent, place.cloned());
        Begun::Asking(Asking { query, from: From::Shared(arrival) })
    }

    /// Follows the host's settings as they change, for as long as it is polled. Without it they are looked
    /// at when a query comes.
    pub async fn follow(self: Arc<Self>) {
        let path = lock(&self.source).path().map(Path::to_owned);
        let Some(path) = path else { return };
        loop {
            let news = FileNews::of(&path);
            self.look_again();
            let told = match news {
                Ok(news) => news.wait().await,
                Err(error) => Err(error),
            };
            if let Err(error) = told {
                tracing::warn!(path = %path.display(), %error, "cannot be watched; it is looked at when a query comes");
                return;
            }
            // Who rewrites it is given time to finish, and who rewrites it all the time costs little.
            sleep(SETTLE_TIME).await;
        }
    }

    /// The search list of the host, now and as it changes.
    pub fn search_list(&self) -> watch::Receiver<Vec<String>> {
        self.search.subscribe()
    }

    /// Looks whether the host has other settings now, if it was not looked just before.
    fn look(&self) {
        let mut source = lock(&self.source);
        if source.look(self.clock.now()) {
            self.obey(&source);
        }
    }

    /// Reads the host's settings, whether their file seems to have changed or not.
    fn look_again(&self) {
        let mut source = lock(&self.source);
        if source.read() {
            self.obey(&source);
        }
    }

    fn obey(&self, source: &Source) {
        *lock(&self.upstreams) = UpstreamList::new(source.conf().clone());
        self.search.send_if_modified(|search| {
            let is_other = *search != source.conf().search;
            search.clone_from(&source.conf().search);
            is_other
        });
        self.forget();
    }

    /// The host's network is another: answers are forgotten, and how resolvers have done; questions on
    /// their way begin anew, from new sockets.
    pub fn network_changed(&self) {
        // A resolver may be named by an interface, which may be another now.
        self.look_again();
        lock(&self.upstreams).forget_health();
        self.forget();
    }

    fn forget(&self) {
        lock(&self.cache).clear();
        self.connections.forget();
        self.ways.send_modify(|count| *count += 1);
    }

    /// Waits for `flight`'s answer, beginning the flight if there is none.
    fn join(self: &Arc<Self>, flight: Flight, query: Vec<u8>, place: Option<TcpPlace>) -> Arrival {
        let mut flights = lock(&self.flights);
        if let Some(arrival) = flights.get(&flight) {
            count(&self.counters.joined);
            return arrival.clone();
        }
        let (landing, arrival) = watch::channel(None);
        flights.insert(flight.clone(), arrival.clone());
        let resolver = Arc::clone(self);
        tokio::spawn(async move {
            let transport = if flight.is_tcp { Transport::Tcp } else { Transport::Udp };
            let landed = resolver.ask_upstreams(&query, transport).await;
            resolver.keep(&flight, &landed);
            lock(&resolver.flights).remove(&flight);
            // Nobody may be waiting any more.
            let _ = landing.send(Some(landed.bytes.into()));
            drop(place);
        });
        arrival
    }

    fn keep(&self, flight: &Flight, landed: &Landed) {
        let (mut cache, now, key) = (lock(&self.cache), (self.since_boot)(), &flight.key);
        if cache.generation() != flight.generation {
            return;
        }
        let evicted = match landed.is_answered {
            true => cache.insert(now, key, &landed.bytes),
            false => cache.insert_unanswered(now, key, &landed.bytes),
        };
        self.counters.evicted.fetch_add(evicted, Ordering::Relaxed);
    }

    /// As [`begin`](Self::begin) to the end, for queries from connections, within their bound.
    pub(super) async fn resolve_tcp(self: &Arc<Self>, query: Vec<u8>) -> Vec<u8> {
        let Ok(permit) = Arc::clone(&self.tcp_queries).try_acquire_owned() else {
            count(&self.counters.over_bound);
            return servfail(&query);
        };
        // Held until the answer is there.
        let place = Arc::new(permit);
        match self.begin_at(query, Some(&place)) {
            Begun::Known(_, answer) => answer,
            Begun::Asking(asking) => asking.wait().await.1,
        }
    }

    /// Asks one upstream after the other, and those that were silent again. One that is silent,
    /// unreachable, failing (SERVFAIL) or unwilling (REFUSED) makes way for the next; if all are, their
    /// first answer stands, or SERVFAIL of our own if there is none.
    async fn ask_upstreams(&self, query: &[u8], transport: Transport) -> Landed {
        let mut second_best = None;
        let asked = async {
            // Connections are bounded where they come from.
            let _turn = match transport {
                Transport::Udp => self.exchanges.acquire().await.ok(),
                Transport::Tcp => None,
            };
            for _ in 0..RESTARTS_MAX {
                let mut ways = self.ways.subscribe();
                tokio::select! {
                    answer = self.try_all(query, transport, &mut second_best) => return answer,
                    Ok(()) = ways.changed() => {}
                }
            }
            self.try_all(query, transport, &mut second_best).await
        };
        let begun = self.clock.now();
        let answer = timeout(QUESTION_TIMEOUT, asked).await.ok().flatten().or(second_best);
        match answer {
            Some(answer) => {
                count(&self.counters.answered);
                self.took(begun);
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("resolvers answer again");
                }
                Landed { bytes: answer.into_bytes_for(query), is_answered: true }
            }
            None => {
                count(&self.counters.failed);
                self.say_failing();
                Landed { bytes: servfail(query), is_answered: false }
            }
        }
    }

    async fn try_all(
        &self,
        query: &[u8],
        transport: Transport,
        second_best: &mut Option<Answer>,
    ) -> Option<Answer> {
        let mut plan = lock(&self.upstreams).plan(self.clock.now());
        for _ in 0..plan.attempts {
            let mut silent = Vec::new();
            for one in plan.tries {
                match self.ask(one, query, transport, plan.timeout).await {
                    Asked::Answer(answer) => return Some(answer),
                    Asked::SecondBest(answer) => *second_best = second_best.take().or(Some(answer)),
                    Asked::Silent => silent.push(one),
                    Asked::Unreachable => {}
                }
            }
            plan.tries = silent;
        }
        None
    }

    async fn ask(&self, one: Try, query: &[u8], transport: Transport, time_max: Duration) -> Asked {
        let start = self.clock.now();
        let outcome = match transport {
            Transport::Udp => exchange::ask_udp(one, query, time_max, &self.counters).await,
            Transport::Tcp => exchange::ask_tcp(one, query, time_max, &self.connections).await,
        };
        let now = self.clock.now();
        let mut upstreams = lock(&self.upstreams);
        match outcome {
            Ok(answer) => {
                upstreams.answered(one.addr, now.since(start));
                if answer.is_final() { Asked::Answer(answer) } else { Asked::SecondBest(answer) }
            }
            Err(Failure::Timeout) => {
                count(&self.counters.timeouts);
                upstreams.failed(now, one.addr);
                Asked::Silent
            }
            Err(Failure::Io(error)) => {
                tracing::debug!(resolver = %one.addr, %error, "not reached");
                count(&self.counters.errors);
                if !is_own_want(&error) {
                    upstreams.failed(now, one.addr);
                }
                Asked::Unreachable
            }
        }
    }

    fn say_failing(&self) {
        let upstreams = lock(&self.upstreams);
        let servers = &upstreams.conf().servers;
        if !servers.is_empty() && !self.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(resolvers = ?servers, "no resolver answers; the guest's queries fail until one does");
        }
    }
}
