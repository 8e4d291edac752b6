//! What happens, told to whoever listens: a stream of bounded length that never makes its teller wait. Who
//! listens too slowly misses the oldest, and is told how many.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use tokio::sync::broadcast;

use crate::engine::flows::{FlowNews, FlowProtocol};

/// Events kept for a listener that is behind.
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

/// A flow that began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FlowEvent {
    /// Protocol.
    pub protocol: FlowProtocol,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The remote end as the guest sees it.
    pub remote: SocketAddr,
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
        let flow = FlowEvent { protocol: news.protocol, guest: news.guest, remote: news.remote };
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
            Event::PortPublished(_) => "port_published",
            Event::PortUnpublished(_) => "port_unpublished",
            Event::CaptureStarted { .. } => "capture_started",
            Event::CaptureEnded(_) => "capture_ended",
            Event::Log { .. } => "log",
        }
    }

    /// Whether only who asks for each flow wants it.
    pub const fn is_of_flow(&self) -> bool {
        matches!(self, Event::FlowOpened(_) | Event::FlowClosed(_) | Event::FlowsMissed { .. })
    }
}

/// The stream, and who may write to it: all threads.
#[derive(Clone, Debug)]
pub struct Events {
    sender: broadcast::Sender<Event>,
    /// Listeners who want to hear of each flow.
    of_flows: Arc<AtomicUsize>,
}

impl Default for Events {
    fn default() -> Events {
        Events { sender: broadcast::channel(KEPT).0, of_flows: Arc::default() }
    }
}

/// One who wants to hear of each flow, until this is dropped.
#[derive(Debug)]
pub struct FlowListener(Arc<AtomicUsize>);

impl Drop for FlowListener {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Events {
    /// Tells `event` to all who listen.
    pub fn tell(&self, event: Event) {
        // Fails only if nobody listens.
        let _ = self.sender.send(event);
    }

    /// Everything that happens from now on.
    pub fn listen(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    /// Notes one more listener who wants to hear of each flow.
    pub fn want_flows(&self) -> FlowListener {
        self.of_flows.fetch_add(1, Ordering::AcqRel);
        FlowListener(Arc::clone(&self.of_flows))
    }

    /// Whether anybody wants to hear of each flow.
    pub fn flows_wanted(&self) -> bool {
        self.of_flows.load(Ordering::Relaxed) > 0
    }
}

#[cfg(test)]
mod tests {
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
        let (one, other) = (events.want_flows(), events.want_flows());
        drop(one);
        assert!(events.flows_wanted());
        drop(other);
        assert!(!events.flows_wanted());
    }

    #[test]
    fn event_is_a_flat_object_with_its_name() {
        let flow = FlowEvent {
            protocol: FlowProtocol::Tcp,
            guest: "10.0.2.2:5".parse().unwrap(),
            remote: "192.0.2.1:80".parse().unwrap(),
        };
        let json = serde_json::to_value(Event::FlowOpened(flow)).unwrap();
        let wanted = serde_json::json!({
            "event": "flow_opened", "protocol": "tcp", "guest": "10.0.2.2:5", "remote": "192.0.2.1:80"
        });
        assert_eq!(json, wanted);
    }
}
