//! What happens, told to whoever listens: streams of bounded length that never make their teller wait. Who
//! listens too slowly misses the oldest, and is told how many.
//!
//! Flows have a stream of their own: a guest can open thousands a second, which must displace no lease and no port.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::engine::flows::{FlowNews, FlowProtocol};

/// Events kept for a listener that is behind, of each [`Kind`].
const KEPT: usize = 1024;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The first event of every stream: nothing after it is missed unsaid.
    Listening,
    /// A front-end connected.
    Attached,
    /// It left.
    Detached,
    /// The guest started anew.
    GuestReset,
    /// The guest's address, as DHCP gave it or took it back.
    Lease {
        /// The address; none after it was given back.
        address: Option<Ipv4Addr>,
    },
    /// A flow began.
    FlowOpened(FlowEvent),
    /// A flow ended.
    FlowClosed(FlowEvent),
    /// More flows began or ended than could be told.
    FlowsMissed {
        /// How many.
        count: u64,
    },
    /// Who listens was too slow for the oldest of one kind, which are lost to it alone.
    Missed {
        /// Of which kind.
        kind: Kind,
        /// How many.
        count: u64,
    },
    /// A port was published.
    PortPublished(PortEvent),
    /// A port is published no more.
    PortUnpublished(PortEvent),
    /// A capture began.
    CaptureStarted {
        /// Where it goes: a path, or `client`.
        to: String,
    },
    /// It ended.
    CaptureEnded(CaptureEnd),
    /// A warning or an error, as the log has it.
    Log {
        /// `warn` or `error`.
        level: &'static str,
        /// What it says.
        message: String,
    },
}

/// Events that are kept, and lost, together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Flows that began or ended.
    Flows,
    /// Everything else.
    Others,
}

/// A flow that began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FlowEvent {
    /// Protocol.
    pub protocol: FlowProtocol,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The remote end as the guest sees it.
    pub remote: SocketAddr,
    /// Payload that one which ended has carried from the guest, where that is counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_guest_bytes: Option<u64>,
    /// The same to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_guest_bytes: Option<u64>,
}

/// How a capture ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CaptureEnd {
    /// Where it went.
    pub to: String,
    /// Why it ended: a name of [`super::capture::Reason`].
    pub reason: &'static str,
    /// Frames in it.
    pub frames: u64,
    /// Frames that are not in it because it was written too slowly.
    pub lost_frames: u64,
    /// Bytes of it.
    pub bytes: u64,
}

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PortEvent {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The host's address and port.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
}

impl From<FlowNews> for Event {
    fn from(news: FlowNews) -> Event {
        let flow = FlowEvent {
            protocol: news.protocol,
            guest: news.guest,
            remote: news.remote,
            from_guest_bytes: news.carried.map(|carried| carried.from_guest_bytes),
            to_guest_bytes: news.carried.map(|carried| carried.to_guest_bytes),
        };
        if news.opened { Event::FlowOpened(flow) } else { Event::FlowClosed(flow) }
    }
}

impl Event {
    /// Its name, as its JSON has it.
    pub const fn name(&self) -> &'static str {
        match self {
            Event::Listening => "listening",
            Event::Attached => "attached",
            Event::Detached => "detached",
            Event::GuestReset => "guest_reset",
            Event::Lease { .. } => "lease",
            Event::FlowOpened(_) => "flow_opened",
            Event::FlowClosed(_) => "flow_closed",
            Event::FlowsMissed { .. } => "flows_missed",
            Event::Missed { .. } => "missed",
            Event::PortPublished(_) => "port_published",
            Event::PortUnpublished(_) => "port_unpublished",
            Event::CaptureStarted { .. } => "capture_started",
            Event::CaptureEnded(_) => "capture_ended",
            Event::Log { .. } => "log",
        }
    }

    /// With which it is kept.
    const fn kind(&self) -> Kind {
        match self {
            Event::FlowOpened(_) | Event::FlowClosed(_) | Event::FlowsMissed { .. } => Kind::Flows,
            _ => Kind::Others,
        }
    }
}

/// The streams, and who may write to them: all threads.
#[derive(Clone, Debug)]
pub struct Events {
    others: broadcast::Sender<Event>,
    flows: broadcast::Sender<Event>,
    /// Listeners who want to hear of each flow.
    of_flows: Arc<AtomicUsize>,
}

impl Default for Events {
    fn default() -> Events {
        let stream = || broadcast::channel(KEPT).0;
        Events { others: stream(), flows: stream(), of_flows: Arc::default() }
    }
}

/// Flows for one who wants to hear of each, until this is dropped.
#[derive(Debug)]
struct FlowListener {
    heard: broadcast::Receiver<Event>,
    listeners: Arc<AtomicUsize>,
}

impl Drop for FlowListener {
    fn drop(&mut self) {
        self.listeners.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One who listens, and is told what it missed.
#[derive(Debug)]
pub struct Listener {
    others: broadcast::Receiver<Event>,
    flows: Option<FlowListener>,
}

impl Events {
    /// Tells `event` to all who listen to its kind.
    pub fn tell(&self, event: Event) {
        let stream = match event.kind() {
            Kind::Flows => &self.flows,
            Kind::Others => &self.others,
        };
        // Fails only if nobody listens.
        let _ = stream.send(event);
    }

    /// Everything but flows that happens from now on.
    pub fn listen(&self) -> broadcast::Receiver<Event> {
        self.others.subscribe()
    }

    /// A listener to everything that happens from now on, to each flow if `with_flows`.
    pub fn listener(&self, with_flows: bool) -> Listener {
        let flows = with_flows.then(|| {
            self.of_flows.fetch_add(1, Ordering::AcqRel);
            FlowListener { heard: self.flows.subscribe(), listeners: Arc::clone(&self.of_flows) }
        });
        Listener { others: self.listen(), flows }
    }

    /// Whether anybody wants to hear of each flow.
    pub fn flows_wanted(&self) -> bool {
        self.of_flows.load(Ordering::Relaxed) > 0
    }
}

impl Listener {
    /// The next event, in the order of its kind; [`Event::Missed`] in the place of those that are lost. `None` after the
    /// last.
    pub async fn next(&mut self) -> Option<Event> {
        let flow = async {
            match &mut self.flows {
                Some(flows) => flows.heard.recv().await,
                None => std::future::pending().await,
            }
        };
        // Neither kind keeps the other from its turn.
        let (kind, heard) = tokio::select! {
            heard = self.others.recv() => (Kind::Others, heard),
            heard = flow => (Kind::Flows, heard),
        };
        match heard {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(count)) => Some(Event::Missed { kind, count }),
            Err(RecvError::Closed) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn listener_that_is_behind_misses_the_oldest_and_the_teller_never_waits() {
        let events = Events::default();
        events.tell(Event::Attached);
        let mut listener = events.listen();
        for _ in 0..KEPT + 5 {
            events.tell(Event::GuestReset);
        }
        let missed = listener.try_recv().unwrap_err();
        assert_eq!(missed, broadcast::error::TryRecvError::Lagged(5));
        assert_eq!(listener.try_recv(), Ok(Event::GuestReset));
    }

    #[test]
    fn flows_are_wanted_as_long_as_somebody_listens_to_them() {
        let events = Events::default();
        assert!(!events.flows_wanted());
        let (one, other) = (events.listener(true), events.listener(true));
        let _quiet = events.listener(false);
        drop(one);
        assert!(events.flows_wanted());
        drop(other);
        assert!(!events.flows_wanted());
    }

    fn flow() -> FlowEvent {
        FlowEvent {
            protocol: FlowProtocol::Tcp,
            guest: "10.0.2.2:5".parse().unwrap(),
            remote: "192.0.2.1:80".parse().unwrap(),
            from_guest_bytes: None,
            to_guest_bytes: None,
        }
    }

    /// All that waits for a listener.
    fn heard(listener: &mut Listener) -> Vec<Event> {
        let mut all = Vec::new();
        while let Some(Some(event)) = listener.next().now_or_never() {
            all.push(event);
        }
        all
    }

    #[test]
    fn flows_without_end_displace_no_lease_and_who_is_behind_learns_of_what_kind_it_missed() {
        let events = Events::default();
        let (mut quiet, mut all) = (events.listener(false), events.listener(true));
        let lease = Event::Lease { address: Some(Ipv4Addr::new(10, 0, 2, 2)) };
        events.tell(lease.clone());
        for _ in 0..3 * KEPT {
            events.tell(Event::FlowOpened(flow()));
        }
        assert_eq!(heard(&mut quiet), std::slice::from_ref(&lease));
        let seen = heard(&mut all);
        assert!(seen.contains(&lease), "it is kept however many flows there are");
        let missed = Event::Missed { kind: Kind::Flows, count: 2 * KEPT as u64 };
        let flows: Vec<_> = seen.into_iter().filter(|event| *event != lease).collect();
        assert_eq!((flows.len(), &flows[0]), (1 + KEPT, &missed));
        (0..=KEPT).for_each(|_| events.tell(lease.clone()));
        assert_eq!(heard(&mut quiet)[0], Event::Missed { kind: Kind::Others, count: 1 });
        let json = serde_json::to_value(missed).unwrap();
        assert_eq!(json, serde_json::json!({ "event": "missed", "kind": "flows", "count": 2 * KEPT }));
    }

    #[test]
    fn event_is_a_flat_object_with_its_name() {
        let json = serde_json::to_value(Event::FlowOpened(flow())).unwrap();
        let wanted = serde_json::json!({
            "event": "flow_opened", "protocol": "tcp", "guest": "10.0.2.2:5", "remote": "192.0.2.1:80"
        });
        assert_eq!(json, wanted);
        let ended = FlowEvent { from_guest_bytes: Some(7), to_guest_bytes: Some(0), ..flow() };
        let json = serde_json::to_value(Event::FlowClosed(ended)).unwrap();
        assert_eq!((json["from_guest_bytes"].as_u64(), json["to_guest_bytes"].as_u64()), (Some(7), Some(0)));
    }
}
