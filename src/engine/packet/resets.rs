//! Resets of the NAT's own, to both ends of a connection that it ends.
//!
//! Each end takes a reset only with the very number it expects (RFC 5961, 3.2). The NAT knows that number where all that was
//! sent has arrived, and where nothing has; both are sent. Else the end asks back, and what it says then is nobody's:
//! the other end, or who it goes to, answers it.
//!
//! Read first: `tcp_state.rs`; RFC 9293, 3.10.7.4; RFC 5961, 3.2.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};

use super::Side;
use super::flow::{Flow, FlowFlags};
use super::tcp_state::Direction;
use crate::addr::MacAddr;
use crate::engine::emit::{self, IPV4_FRAME_HEAD_BYTES};
use crate::frame::Payload;
use crate::limits;
use crate::wire::ipv4::Protocol;
use crate::wire::tcp::{self, Flags, Options, SeqNumber};

/// Bytes of a reset's frame.
pub const RESET_FRAME_BYTES: usize = IPV4_FRAME_HEAD_BYTES + tcp::HEADER_BYTES;

/// A reset for one end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// On which side that end is.
    pub to: Side,
    /// The frame, whose Ethernet addresses its sender writes.
    pub frame: [u8; RESET_FRAME_BYTES],
}

/// Resets that wait to be sent.
#[derive(Debug, Default)]
pub(super) struct Resets(VecDeque<Reset>);

impl Resets {
    /// The next one.
    pub(super) fn pop(&mut self) -> Option<Reset> {
        self.0.pop_front()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Resets both ends of `flow`, if it is a TCP connection that is not over; whether it was. The end outside speaks to
    /// `outside`. Past a bound nobody is told.
    pub(super) fn add(&mut self, flow: &Flow, outside: Option<Ipv4Addr>) -> bool {
        let key = flow.key();
        if key.protocol != Protocol::TCP {
            return false;
        }
        let by_world = flow.flags.has(FlowFlags::FROM_WORLD);
        let (guest, world) = if by_world {
            (Direction::Reply, Direction::Original)
        } else {
            (Direction::Original, Direction::Reply)
        };
        let remote = SocketAddr::from((key.remote, key.remote_port));
        let own = SocketAddr::from((key.guest, key.guest_port));
        let mut was_open = false;
        for reset in flow.tcp.resets(guest).filter_map(|numbers| frame(Side::Guest, remote, own, numbers)) {
            was_open = true;
            self.push(reset);
        }
        // Of a guest that came by our own address, the other end is another flow's.
        if let Some(outside) = outside.filter(|outside| *outside != key.remote) {
            let external = SocketAddr::from((outside, key.external_port));
            for numbers in flow.tcp.resets(world) {
                frame(Side::World, external, remote, numbers).into_iter().for_each(|reset| self.push(reset));
            }
        }
        was_open
    }

    fn push(&mut self, reset: Reset) {
        if self.0.len() < limits::PACKET_RESETS_MAX {
            self.0.push_back(reset);
        }
    }
}

fn frame(
    to: Side,
    src: SocketAddr,
    dst: SocketAddr,
    (seq, ack): (SeqNumber, Option<SeqNumber>),
) -> Option<Reset> {
    let header = tcp::Header {
        src_port: src.port(),
        dst_port: dst.port(),
        seq,
        ack: ack.unwrap_or_default(),
        flags: if ack.is_some() { Flags::RST | Flags::ACK } else { Flags::RST },
        window: 0,
        urgent: 0,
        options: Options::default(),
    };
    let head = emit::tcp(MacAddr::ZERO, src, dst, &header, &Payload::EMPTY, false)?;
    Some(Reset { to, frame: head.bytes().try_into().ok()? })
}
