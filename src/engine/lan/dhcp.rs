//! What the guard reads of DHCP: what the guest asked or gave back, and what the LAN's server leased it.
//!
//! The guest's own messages are read as strictly as any server could: what one server may read otherwise than
//! another is none.
//!
//! Read first: RFC 2131, 2, 4.3.1 and table 5; RFC 2132, 9.1 to 9.3 and 9.6.

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
const REQUESTED: u8 = 50;
const LEASE_TIME: u8 = 51;
const OVERLOAD: u8 = 52;
const MESSAGE_TYPE: u8 = 53;
const END: u8 = 255;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
/// A lease time that means for ever (RFC 2131, 3.3).
const FOR_EVER: u32 = u32::MAX;

/// Who asks for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The transaction.
    pub(super) xid: u32,
    /// Whom the answer is for.
    pub(super) client: MacAddr,
}

/// What the guest tells a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// It asks for something.
    Asks(Question),
    /// It has this address no more: RELEASE or DECLINE, which have no answer.
    GivesBack(Question, Ipv4Addr),
}

impl Told {
    /// Reads the payload of a datagram to a server's port; `None` if it is no message over Ethernet, or not to be
    /// read to its end.
    pub(super) fn parse(payload: &[u8]) -> Option<Told> {
        let fixed: &[u8; FIXED_BYTES] = payload.first_chunk()?;
        if fixed[0] != REQUEST || fixed[1..3] != ETHERNET[..2] {
            return None;
        }
        let question = Question { xid: be32(&fixed[4..8]), client: mac(&fixed[28..34]) };
        // Plain BOOTP, which gives nothing back.
        let Some(options) = payload[FIXED_BYTES..].strip_prefix(&MAGIC_COOKIE) else {
            return Some(Told::Asks(question));
        };
        let (mut kind, mut requested, mut twice) = (None, None, false);
        each_option(options, |code, value| {
            twice |= match code {
                MESSAGE_TYPE => kind.replace(value).is_some(),
                REQUESTED => requested.replace(value).is_some(),
                // The type might stand elsewhere.
                OVERLOAD => true,
                _ => false,
            };
        })?;
        let address = |bytes: &[u8]| Some(Ipv4Addr::from_bits(u32::from_be_bytes(bytes.try_into().ok()?)));
        match kind {
            _ if twice => None,
            Some([RELEASE]) => Some(Told::GivesBack(question, address(&fixed[12..16])?)),
            Some([DECLINE]) => Some(Told::GivesBack(question, address(requested?)?)),
            None | Some([_]) => Some(Told::Asks(question)),
            Some(_) => None,
        }
    }

    /// Of whom it is.
    pub(super) fn question(self) -> Question {
        let (Told::Asks(question) | Told::GivesBack(question, _)) = self;
        question
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
fn parse_options(options: &[u8]) -> Option<(u8, Option<u32>)> {
    let (mut kind, mut lease) = (None, None);
    each_option(options, |code, value| match (code, value) {
        (MESSAGE_TYPE, [value]) => kind = Some(*value),
        (LEASE_TIME, [_, _, _, _]) => lease = Some(be32(value)),
        _ => {}
    })?;
    Some((kind?, lease))
}

/// Goes through the options up to their end; `None` if one is cut.
fn each_option<'a>(mut rest: &'a [u8], mut each: impl FnMut(u8, &'a [u8])) -> Option<()> {
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
        each(code, value);
        rest = behind;
    }
    Some(())
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("the caller cuts four bytes"))
}

fn mac(bytes: &[u8]) -> MacAddr {
    MacAddr(bytes.try_into().expect("the caller cuts six bytes"))
}
