//! What the engine does for translation of packets, which takes its place but for the gateway's services: it
//! knows where the guest's addresses are, and it speaks to the guest as the gateway.

use std::net::{IpAddr, Ipv4Addr};

use super::Engine;
use super::core::Neighbour;
use super::guest_port::GuestPort;
use super::host_net::HostNet;
use crate::frame::QueuePair;
use crate::time::Instant;
use crate::wire::icmpv4::Message;
use crate::wire::vnet::VnetHeader;

impl<N: HostNet> Engine<N> {
    /// A frame that passed the engine came from `addr` at `from`. Returns whether the guest may have it.
    pub fn saw_guest(&mut self, now: Instant, addr: Ipv4Addr, from: Neighbour) -> bool {
        self.begin(now);
        let may_have = from.mac.is_unicast() && self.core.is_guest_address(addr);
        if may_have {
            self.learn(addr, from);
        }
        may_have
    }

    /// The guest's starts as of `now`, one that others saw included.
    pub fn guest_starts(&mut self, now: Instant) -> u64 {
        self.begin(now);
        self.guest_starts
    }

    /// Where an address of the guest was last seen.
    pub fn guest_at(&self, addr: Ipv4Addr) -> Option<Neighbour> {
        self.core.neighbour(IpAddr::V4(addr))
    }

    /// Asks the guest where its address `addr` is.
    pub fn ask_for_guest(&mut self, now: Instant, port: &mut impl GuestPort, addr: Ipv4Addr) {
        self.begin(now);
        self.core.ask_for(port, IpAddr::V4(addr));
    }

    /// The guest address that published ports lead to.
    pub fn published_guest(&self) -> Option<Ipv4Addr> {
        match self.core.primary_guest() {
            Some(IpAddr::V4(addr)) => Some(addr),
            _ => None,
        }
    }

    /// Tells the guest at `to` as the gateway what became of its `packet`, the first bytes of an IPv4 packet,
    /// within the rate limit.
    pub fn tell_guest(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        to: Neighbour,
        message: Message,
        packet: &[u8],
    ) {
        self.begin(now);
        self.core.send_icmp_error(port, to, message, packet);
    }

    /// The queue pair of this worker's for what came by none of them.
    pub fn first_pair(&self) -> QueuePair {
        self.core.first_pair()
    }

    /// Sends the guest a whole frame, or keeps it until it has buffers.
    pub fn send_to_guest(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
        vnet: VnetHeader,
        frame: &[u8],
    ) {
        self.begin(now);
        self.core.send(port, pair, vnet, frame);
    }
}
