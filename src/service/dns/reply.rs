//! Bytes of DNS messages: headers and questions as they are, error answers, truncation.
//!
//! The forwarder handles messages it cannot fully read (record types of tomorrow), so everything
//! here looks at the header, the first question and the OPT record only.
//!
//! Read first: RFC 1035, 4.1; RFC 6891, 6; RFC 9018 is of no concern (no cookies here).

use hickory_proto::op::{Edns, Message, ResponseCode};

/// Bytes of a message's header.
const HEADER_BYTES: usize = 12;
/// A datagram's bound for clients that do not say more (RFC 1035, 2.3.4).
const UDP_BYTES_MIN: u16 = 512;
/// The bound we announce: what passes every link unfragmented (DNS Flag Day 2020).
const UDP_BYTES_OURS: u16 = 1232;
/// Longest name in wire form (RFC 1035, 2.3.4).
const NAME_BYTES_MAX: usize = 255;

const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const RA: u8 = 0x80;
const CD: u8 = 0x10;

/// A view of a header. Accessors never fail: the length was judged.
#[derive(Clone, Copy)]
pub(super) struct Head<'a>(&'a [u8; HEADER_BYTES]);

impl<'a> Head<'a> {
    pub(super) fn read(message: &'a [u8]) -> Option<Head<'a>> {
        message.first_chunk().map(Head)
    }

    fn id(self) -> [u8; 2] {
        [self.0[0], self.0[1]]
    }

    pub(super) fn is_response(self) -> bool {
        self.0[2] & QR != 0
    }

    pub(super) fn opcode(self) -> u8 {
        (self.0[2] & OPCODE) >> 3
    }

    pub(super) fn questions(self) -> u16 {
        u16::from_be_bytes([self.0[4], self.0[5]])
    }
}

/// Where the first question ends; `None` if there is none in plain form. A compressed name has
/// nothing before it to point to.
pub(super) fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER_BYTES;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1 + len;
        if len > 63 || at - HEADER_BYTES > NAME_BYTES_MAX {
            return None;
        }
        if len == 0 {
            let end = at + 4;
            return (end <= message.len()).then_some(end);
        }
    }
}

/// Whether `answer` is a response to `query`: same id, same operation, and the same single
/// question, where the case of the name's letters does not count (servers may change it).
pub fn question_matches(query: &[u8], answer: &[u8]) -> bool {
    let (Some(asked), Some(got)) = (Head::read(query), Head::read(answer)) else {
        return false;
    };
    let (Some(asked_end), Some(got_end)) = (question_end(query), question_end(answer)) else {
        return false;
    };
    if !got.is_response() || asked.id() != got.id() || asked.opcode() != got.opcode() || got.questions() != 1
    {
        return false;
    }
    let (asked, got) = (&query[HEADER_BYTES..asked_end], &answer[HEADER_BYTES..got_end]);
    let split = asked.len() - 4;
    // Lengths of labels are below 64 and so no letters.
    asked.len() == got.len()
        && asked[..split].eq_ignore_ascii_case(&got[..split])
        && asked[split..] == got[split..]
}

/// The OPT record we add to an answer to a query that has one: our own size, version 0, and the
/// query's DO bit (RFC 3225, 3).
pub(super) fn our_edns(query: &Edns) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_BYTES_OURS).set_version(0).set_dnssec_ok(query.flags().dnssec_ok);
    edns
}

/// An answer of header, question and OPT only, with `code` (of up to 12 bits, the upper 8 in OPT).
pub(super) fn error(query: &[u8], code: ResponseCode, recursion_available: bool) -> Vec<u8> {
    let Some(head) = Head::read(query) else {
        return Vec::new();
    };
    let question = question_end(query).filter(|_| head.questions() == 1 && head.opcode() == 0);
    let edns = edns_of(query).filter(|_| question.is_some());
    let mut bytes = Vec::with_capacity(HEADER_BYTES + NAME_BYTES_MAX);
    bytes.extend_from_slice(&head.id());
    bytes.push(QR | head.0[2] & (OPCODE | RD));
    bytes.push(if recursion_available { RA } else { 0 } | head.0[3] & CD | code.low());
    bytes.extend_from_slice(&[0, u8::from(question.is_some()), 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    if let Some(end) = question {
        bytes.extend_from_slice(&query[HEADER_BYTES..end]);
    }
    if let Some(edns) = edns {
        push_opt(&mut bytes, &edns, code.high());
    }
    bytes
}

/// The answer to a query that could not be forwarded: SERVFAIL. Empty if `query` has no header.
pub fn servfail(query: &[u8]) -> Vec<u8> {
    error(query, ResponseCode::ServFail, true)
}

/// `answer` as one datagram for the sender of `query`: as it is if it fits in the size the query's
/// OPT record allows (512 bytes without one), else its header with TC set, its question and OPT,
/// so that the client asks again over TCP (RFC 2181, 9).
pub fn truncate_for_udp(answer: &[u8], query: &[u8]) -> Vec<u8> {
    let edns = edns_of(query);
    let bytes_max = edns.as_ref().map_or(UDP_BYTES_MIN, |edns| edns.max_payload().max(UDP_BYTES_MIN));
    let Some(head) = Head::read(answer) else {
        return answer.to_vec();
    };
    if answer.len() <= usize::from(bytes_max) {
        return answer.to_vec();
    }
    let question = question_end(answer).filter(|_| head.questions() == 1);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + NAME_BYTES_MAX);
    bytes.extend_from_slice(&head.id());
    bytes.extend_from_slice(&[head.0[2] | TC, head.0[3]]);
    bytes.extend_from_slice(&[0, u8::from(question.is_some()), 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
    if let Some(end) = question {
        bytes.extend_from_slice(&answer[HEADER_BYTES..end]);
    }
    if let Some(edns) = edns {
        push_opt(&mut bytes, &edns, 0);
    }
    bytes
}

fn edns_of(query: &[u8]) -> Option<Edns> {
    Message::from_vec(query).ok()?.edns
}

/// An OPT record without options (RFC 6891, 6.1.2): root, type 41, our size, the upper bits of the
/// code, version 0, the DO bit, no data.
fn push_opt(bytes: &mut Vec<u8>, query: &Edns, code_high: u8) {
    let dnssec_ok = if query.flags().dnssec_ok { 0x80 } else { 0 };
    let [size_high, size_low] = UDP_BYTES_OURS.to_be_bytes();
    bytes.extend_from_slice(&[0, 0, 41, size_high, size_low, code_high, 0, dnssec_ok, 0, 0, 0]);
}
