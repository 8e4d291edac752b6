//! What the guard reads of DHCP: which questions the guest asked, and what the LAN's server leased it.
//!
//! Read first: RFC 2131, 2 and 4.3.1; RFC 2132, 9.2 and 9.6.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::addr::MacAddr;

/// The client's UDP port.
pub(super) const CLIENT_PORT: u16 = 68;
/// The server's UDP port.
pub(super) const SERVER_PORT: u16 = 67;

/// Bytes in front of the magic cookie (RFC 2131, 2).
const FIXED_BYTES: usize = 236;
const MAGIC_COOKIE: [u8; 4] = [99, 130, 83, 99];
const ETHERNET: [u8; 3] = [1, 6, 0];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const PAD: u8 = 0;
const LEASE_TIME: u8 = 51;
const MESSAGE_TYPE: u8 = 53;
const END: u8 = 255;
const ACK: u8 = 5;
const NAK: u8 = 6;
/// A lease time that means for ever (RFC 2131, 3.3).
const FOR_EVER: u32 = u32::MAX;

/// A question of the guest, as much as the copy of a frame's first bytes holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The transaction.
    pub(super) xid: u32,
    /// Whom the answer is for.
    pub(super) client: MacAddr,
}

impl Question {
    /// Reads the payload of a datagram to a server's port; `None` if it is no question over Ethernet.
    pub(super) fn parse(payload: &[u8]) -> Option<Question> {
        let head: &[u8; 34] = payload.first_chunk()?;
        if head[0] != REQUEST || head[1..3] != ETHERNET[..2] {
            return None;
        }
        Some(Question { xid: be32(&head[4..8]), client: mac(&head[28..34]) })
    }
}

/// What a server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The address is the client's, for so long; without end if `None`.
    Leased(Ipv4Addr, Option<Duration>),
    /// The client has to begin anew.
    Refused,
}

/// Reads the payload of a datagram to a client's port: its transaction, its client, and what it grants or
/// refuses; `None` for everything else, and for what is not whole.
pub(super) fn parse_answer(payload: &[u8]) -> Option<(Question, Answer)> {
    let fixed: &[u8; FIXED_BYTES] = payload.first_chunk()?;
    if fixed[0] != REPLY || fixed[1..3] != ETHERNET[..2] {
        return None;
    }
    let question = Question { xid: be32(&fixed[4..8]), client: mac(&fixed[28..34]) };
    let address = Ipv4Addr::from_bits(be32(&fixed[16..20]));
    let options = payload[FIXED_BYTES..].strip_prefix(&MAGIC_COOKIE)?;
    let (kind, lease) = parse_options(options)?;
    let answer = match kind {
        // To an INFORM nothing is leased (RFC 2131, 4.3.5).
        ACK if address.is_unspecified() => return None,
        ACK => {
            let for_ever = lease == Some(FOR_EVER);
            let lease = Duration::from_secs(lease.unwrap_or(0).into());
            Answer::Leased(address, (!for_ever).then_some(lease))
        }
        NAK => Answer::Refused,
        _ => return None,
    };
    Some((question, answer))
}

/// Message type and lease time in seconds.
fn parse_options(mut rest: &[u8]) -> Option<(u8, Option<u32>)> {
    let (mut kind, mut lease) = (None, None);
    // Ends: each turn takes a byte at least.
    while let Some((&code, behind)) = rest.split_first() {
        if code == PAD {
            rest = behind;
            continue;
        }
        if code == END {
            break;
        }
        let (&len, behind) = behind.split_first()?;
        let (value, behind) = behind.split_at_checked(len.into())?;
        match (code, value) {
            (MESSAGE_TYPE, [value]) => kind = Some(*value),
            (LEASE_TIME, [_, _, _, _]) => lease = Some(be32(value)),
            _ => {}
        }
        rest = behind;
    }
    Some((kind?, lease))
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("the caller cuts four bytes"))
}

fn mac(bytes: &[u8]) -> MacAddr {
    MacAddr(bytes.try_into().expect("the caller cuts six bytes"))
}
