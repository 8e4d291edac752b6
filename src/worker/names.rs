//! A worker's questions to resolvers: from its engine to the DNS client, and answers back.
//!
//! May touch: `control` (its DNS client), `engine`.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use crate::control::dns_forward::{DnsClient, DnsQuery};
use crate::engine::Engine;
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::Token;
use crate::service::dns;
use crate::time::Instant;
use crate::uplink::sockets::HostSockets;
use crate::uplink::sys::poll::Poll;

/// The worker's way to resolvers.
#[derive(Debug)]
pub(crate) struct Names {
    client: Rc<RefCell<DnsClient>>,
    /// Answers wait for receive buffers.
    waiting: bool,
}

impl Names {
    /// Over `client`, whose answers are told of as `token`.
    ///
    /// # Errors
    /// The descriptor cannot be watched.
    pub(crate) fn new(client: DnsClient, poll: &Poll, token: Token) -> io::Result<Names> {
        poll.watch_readable(client.event_fd().as_raw_fd(), token)?;
        Ok(Names { client: Rc::new(RefCell::new(client)), waiting: false })
    }

    /// Makes streams for the guest's DNS over TCP.
    pub(crate) fn streams(&self) -> Box<dyn FnMut() -> io::Result<UnixStream>> {
        let client = Rc::clone(&self.client);
        Box::new(move || client.borrow_mut().connect_stream())
    }

    /// Whether answers wait until the guest has buffers.
    pub(crate) fn are_waiting(&self) -> bool {
        self.waiting
    }

    /// Hands answers to the engine while the guest has buffers for them; the rest waits where it is until it has.
    pub(crate) fn answer(
        &mut self,
        now: Instant,
        engine: &mut Engine<HostSockets>,
        port: &mut impl GuestPort,
    ) {
        let mut client = self.client.borrow_mut();
        client.clear_event();
        self.waiting = false;
        loop {
            if !engine.guest_keeps_up() {
                self.waiting = true;
                return;
            }
            let Some(answer) = client.poll_answer() else { return };
            engine.dns_answer(now, port, answer.id, &answer.bytes);
        }
    }

    /// Submits what the engine has to ask; what is refused is answered with a failure.
    pub(crate) fn ask(&mut self, now: Instant, engine: &mut Engine<HostSockets>, port: &mut impl GuestPort) {
        while let Some(forward) = engine.next_dns_forward() {
            let query = DnsQuery { id: forward.id, bytes: forward.query };
            if let Err(refused) = self.client.borrow_mut().submit(query) {
                engine.dns_answer(now, port, refused.id, &dns::servfail(&refused.bytes));
            }
        }
    }
}
