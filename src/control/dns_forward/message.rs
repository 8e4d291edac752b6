//! DNS messages as far as a cache has to read them: which question a query asks, and which records an
//! answer holds.
//!
//! Bytes stay bytes: nothing is decoded but names' lengths, types and times to live, so that records
//! nobody here knows are kept as well as others. Queries come from the guest and answers from the
//! network: every length is checked, and what is not understood to its last byte is simply not kept.
//!
//! Read first: RFC 1035, 4.1; RFC 6891, 6.1 (OPT); RFC 6840, 5.7 (AD in queries).

use std::ops::Range;

/// Bytes of a message's header.
pub(super) const HEADER_BYTES: usize = 12;
/// Longest name in wire form (RFC 1035, 2.3.4).
const NAME_BYTES_MAX: usize = 255;
/// Type of the OPT pseudo-record (RFC 6891, 6.1.1).
pub(super) const OPT: u16 = 41;

const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const AD: u8 = 0x20;
const CD: u8 = 0x10;
/// DO, the first bit of an OPT record's flags (RFC 3225, 3).
const DNSSEC_OK: u8 = 0x80;

/// Options between neighbours, which no answer depends on: cookies (RFC 7873), keepalive (RFC 7828) and
/// padding (RFC 7830).
const HOP_OPTIONS: [u16; 3] = [10, 11, 12];

/// What decides a query's answer: name in lower case, type, class; the bits RD, AD, CD and DO; whether
/// it has an OPT record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(Box<[u8]>);

impl Key {
    /// The key of `query`; `None` if its answer may depend on more (signatures, client subnets and other
    /// options, several questions), or if it is not understood.
    pub(super) fn of(query: &[u8]) -> Option<Key> {
        let header = query.first_chunk::<HEADER_BYTES>()?;
        let plain = header[2] & (QR | OPCODE | TC) == 0 && header[4..10] == [0, 1, 0, 0, 0, 0];
        let end = question_end(query)?;
        let records = plain.then(|| records(query, end)).flatten()?;
        let opt = match &records[..] {
            [] => None,
            [opt] => Some(Opt::read(query, opt).filter(|opt| opt.is_plain(query))?),
            _ => return None,
        };
        let mut key = query[HEADER_BYTES..end].to_ascii_lowercase();
        // Type and class are no letters.
        let fixed = key.len() - 4;
        key[fixed..].copy_from_slice(&query[end - 4..end]);
        key.push(header[2] & RD | header[3] & (AD | CD));
        key.push(opt.map_or(0, |opt| 1 | if opt.dnssec_ok { 2 } else { 0 }));
        Some(Key(key.into()))
    }

    /// Bytes it takes.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// One record of a message, by its places there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) section: Section,
    /// Where its name begins.
    pub(super) at: usize,
    pub(super) kind: u16,
    pub(super) ttl_at: usize,
    pub(super) data: Range<usize>,
}

/// Where in a message a record stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Answer,
    Authority,
    Additional,
}

impl Record {
    /// Time to live in seconds; a set top bit makes it zero (RFC 2181, 8).
    pub(super) fn ttl_s(&self, message: &[u8]) -> u32 {
        let ttl = be32(message, self.ttl_at);
        if ttl > i32::MAX as u32 { 0 } else { ttl }
    }

    /// The last field of an SOA record: how long a negative answer holds, in seconds (RFC 2308, 4).
    pub(super) fn soa_minimum_s(&self, message: &[u8]) -> Option<u32> {
        // Two names of at least a byte, and five numbers.
        (self.data.len() >= 22).then(|| be32(message, self.data.end - 4))
    }
}

/// An OPT record (RFC 6891, 6.1.3).
#[derive(Clone, Debug)]
pub(super) struct Opt {
    /// Upper bits of the response code.
    pub(super) code_high: u8,
    pub(super) version: u8,
    dnssec_ok: bool,
    options: Range<usize>,
}

impl Opt {
    /// `record` as OPT, if it is one: of the root, among the additional records.
    pub(super) fn read(message: &[u8], record: &Record) -> Option<Opt> {
        let is_opt = record.kind == OPT && record.section == Section::Additional && message[record.at] == 0;
        let [code_high, version, flags, _] = *message.get(record.ttl_at..)?.first_chunk::<4>()?;
        is_opt.then(|| Opt {
            code_high,
            version,
            dnssec_ok: flags & DNSSEC_OK != 0,
            options: record.data.clone(),
        })
    }

    /// Whether answers do not depend on it but for what a [`Key`] has.
    fn is_plain(&self, message: &[u8]) -> bool {
        let options = options(message, self.options.clone());
        self.version == 0
            && options.is_some_and(|options| options.iter().all(|(code, _)| HOP_OPTIONS.contains(code)))
    }
}

/// `message` without what is said between neighbours only: options of [`HOP_OPTIONS`], and of an answer AA,
/// which a copy is not. `None` if its OPT record cannot be read, or if records behind it would move, whose
/// names others may point to.
pub(super) fn without_hop(message: &[u8], records: &[Record]) -> Option<Vec<u8>> {
    const AA: u8 = 0x04;
    let mut bytes = message.to_vec();
    bytes[2] &= !AA;
    let Some(opt) = records.iter().find(|record| record.kind == OPT) else { return Some(bytes) };
    let options = options(message, opt.data.clone())?;
    let kept = options.into_iter().filter(|(code, _)| !HOP_OPTIONS.contains(code));
    let kept: Vec<u8> = kept.flat_map(|(_, whole)| message[whole].to_vec()).collect();
    if kept.len() < opt.data.len() && opt.data.end < message.len() {
        return None;
    }
    // What is left is no longer than what was.
    let len_bytes = u16::try_from(kept.len()).ok()?;
    bytes[opt.data.start - 2..opt.data.start].copy_from_slice(&len_bytes.to_be_bytes());
    bytes.splice(opt.data.clone(), kept);
    Some(bytes)
}

/// Code and place of each option in `data`; `None` if they do not fill it.
fn options(message: &[u8], data: Range<usize>) -> Option<Vec<(u16, Range<usize>)>> {
    let mut found = Vec::new();
    let mut at = data.start;
    while at < data.end {
        let [code_high, code_low, len_high, len_low] = *message.get(at..data.end)?.first_chunk::<4>()?;
        let end = at + 4 + usize::from(u16::from_be_bytes([len_high, len_low]));
        if end > data.end {
            return None;
        }
        found.push((u16::from_be_bytes([code_high, code_low]), at..end));
        at = end;
    }
    Some(found)
}

/// Where the first question ends; `None` if there is none in plain form.
pub(super) fn question_end(message: &[u8]) -> Option<usize> {
    let (end, compressed) = name_end(message, HEADER_BYTES)?;
    let end = end + 4;
    (!compressed && end <= message.len()).then_some(end)
}

/// All records behind the question that ends at `at`; `None` unless they fill the message to its end.
pub(super) fn records(message: &[u8], mut at: usize) -> Option<Vec<Record>> {
    let mut found = Vec::new();
    for (section, count_at) in [(Section::Answer, 6), (Section::Authority, 8), (Section::Additional, 10)] {
        // A record has at least 11 bytes, so the message's length bounds this.
        for _ in 0..be16(message, count_at) {
            let (name_end, _) = name_end(message, at)?;
            let fixed = message.get(name_end..name_end + 10)?;
            let data = name_end + 10..name_end + 10 + usize::from(be16(fixed, 8));
            if data.end > message.len() {
                return None;
            }
            let record =
                Record { section, at, kind: be16(fixed, 0), ttl_at: name_end + 4, data: data.clone() };
            found.push(record);
            at = data.end;
        }
    }
    (at == message.len()).then_some(found)
}

/// Where the name that begins at `at` ends in the message, and whether it ends in a pointer.
fn name_end(message: &[u8], mut at: usize) -> Option<(usize, bool)> {
    let start = at;
    loop {
        let len = *message.get(at)?;
        at += 1 + usize::from(len & 0x3f);
        match len >> 6 {
            0 if len == 0 => return Some((at, false)),
            0 if at - start < NAME_BYTES_MAX => {}
            // Of a pointer's two bytes the second belongs to the offset whatever the first says.
            3 => {
                let end = at - usize::from(len & 0x3f) + 1;
                return (end <= message.len()).then_some((end, true));
            }
            _ => return None,
        }
    }
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Messages for tests of this room.
#[cfg(test)]
pub(super) mod tests {
    use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::opt::EdnsOption;
    use hickory_proto::rr::rdata::{A, SOA};
    use hickory_proto::rr::{Name, RData, Record as HickoryRecord, RecordType};

    use super::*;

    pub(in crate::control::dns_forward) fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    pub(in crate::control::dns_forward) fn with_edns(
        mut query: Message,
        change: impl Fn(&mut Edns),
    ) -> Message {
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        change(&mut edns);
        query.set_edns(edns);
        query
    }

    /// An answer with an A record for each TTL.
    pub(in crate::control::dns_forward) fn answer(query: &Message, ttls_s: &[u32]) -> Message {
        let mut message = response(query, ResponseCode::NoError);
        let name = query.queries[0].name.clone();
        for (n, ttl_s) in (1..).zip(ttls_s) {
            let data = RData::A(A::new(192, 0, 2, n));
            message.answers.push(HickoryRecord::from_rdata(name.clone(), *ttl_s, data));
        }
        message
    }

    /// An answer that says there is none, by the zone's SOA record.
    pub(in crate::control::dns_forward) fn negative(
        query: &Message,
        code: ResponseCode,
        ttl_s: u32,
        minimum_s: u32,
    ) -> Message {
        let mut message = response(query, code);
        let name = |text| Name::from_ascii(text).unwrap();
        let soa = SOA::new(name("ns.example."), name("hostmaster.example."), 1, 2, 3, 4, minimum_s);
        message.authorities.push(HickoryRecord::from_rdata(name("example."), ttl_s, RData::SOA(soa)));
        message
    }

    pub(in crate::control::dns_forward) fn response(query: &Message, code: ResponseCode) -> Message {
        let mut message = Message::response(query.metadata.id, OpCode::Query);
        message.metadata.recursion_desired = query.metadata.recursion_desired;
        message.metadata.authoritative = true;
        message.metadata.response_code = code;
        message.queries.clone_from(&query.queries);
        message.edns.clone_from(&query.edns);
        message
    }

    fn key(message: &Message) -> Option<Key> {
        Key::of(&message.to_vec().unwrap())
    }

    #[test]
    fn everything_that_decides_the_answer_is_in_the_key() {
        let plain = || query("www.example.", RecordType::A);
        let mut variants = vec![
            plain(),
            query("ww.example.", RecordType::A),
            query("www.example.", RecordType::AAAA),
            with_edns(plain(), |_| {}),
            with_edns(plain(), |edns| {
                edns.set_dnssec_ok(true);
            }),
        ];
        for change in [0, 1, 2] {
            let mut message = plain();
            match change {
                0 => message.metadata.recursion_desired = false,
                1 => message.metadata.checking_disabled = true,
                _ => message.metadata.authentic_data = true,
            }
            variants.push(message);
        }
        let mut class = plain().to_vec().unwrap();
        *class.last_mut().unwrap() = 3;
        let mut keys: Vec<_> = variants.iter().map(|message| key(message).unwrap()).collect();
        keys.push(Key::of(&class).unwrap());
        for (n, one) in keys.iter().enumerate() {
            assert!(!keys[n + 1..].contains(one), "variant {n}");
        }
    }

    #[test]
    fn case_id_size_and_options_between_neighbours_are_not_in_the_key() {
        let mut other = query("WWW.Example.", RecordType::A);
        other.metadata.id = 8;
        assert_eq!(key(&other), key(&query("www.example.", RecordType::A)));
        let plain = with_edns(other.clone(), |_| {});
        let cookie = EdnsOption::Unknown(10, vec![1; 8]);
        let with_cookie = with_edns(other, |edns| {
            edns.set_max_payload(4096).options_mut().insert(cookie.clone());
        });
        assert_eq!(key(&with_cookie), key(&plain));
    }

    #[test]
    fn queries_whose_answer_may_depend_on_more_have_no_key() {
        let subnet = EdnsOption::Unknown(8, vec![0, 1, 0, 0]);
        let mut with_subnet = query("www.example.", RecordType::A);
        with_subnet = with_edns(with_subnet, |edns| {
            edns.options_mut().insert(subnet.clone());
        });
        assert_eq!(key(&with_subnet), None);
        let version = with_edns(query("www.example.", RecordType::A), |edns| {
            edns.set_version(1);
        });
        assert_eq!(key(&version), None);
        let mut trailing = query("www.example.", RecordType::A).to_vec().unwrap();
        trailing.push(0);
        assert_eq!(Key::of(&trailing), None);
        let mut two = query("www.example.", RecordType::A);
        two.add_query(Query::query(Name::from_ascii("b.").unwrap(), RecordType::A));
        assert_eq!(key(&two), None);
        assert_eq!(Key::of(&[0; 11]), None);
    }

    #[test]
    fn no_cut_or_changed_message_makes_the_reader_fail() {
        let message = with_edns(query("www.example.", RecordType::A), |edns| {
            edns.options_mut().insert(EdnsOption::Unknown(10, vec![1; 8]));
        });
        let whole = answer(&message, &[60, 61]).to_vec().unwrap();
        let read = |bytes: &[u8]| {
            let _ = Key::of(bytes);
            let end = (bytes.len() >= HEADER_BYTES).then(|| question_end(bytes)).flatten()?;
            let records = records(bytes, end)?;
            records.iter().for_each(|record| {
                let _ = (Opt::read(bytes, record), record.ttl_s(bytes), record.soa_minimum_s(bytes));
            });
            without_hop(bytes, &records)
        };
        assert!(read(&whole).is_some());
        for len in 0..whole.len() {
            assert_eq!(read(&whole[..len]), None, "{len} bytes");
        }
        for at in 0..whole.len() {
            for value in 0..=u8::MAX {
                let mut changed = whole.clone();
                changed[at] = value;
                read(&changed);
            }
        }
    }

    #[test]
    fn an_answer_whose_names_would_point_elsewhere_is_not_changed() {
        let asked = with_edns(query("www.example.", RecordType::A), |edns| {
            edns.options_mut().insert(EdnsOption::Unknown(10, vec![1; 16]));
        });
        let mut bytes = answer(&asked, &[60]).to_vec().unwrap();
        let records_of = |bytes: &[u8]| records(bytes, question_end(bytes).unwrap()).unwrap();
        assert!(without_hop(&bytes, &records_of(&bytes)).is_some());
        // Behind the OPT record two more, the second with the first one's name.
        let first_at = u16::try_from(bytes.len()).unwrap();
        let fixed = [0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 9];
        bytes.extend([&[1, b'x', 0][..], &fixed].concat());
        bytes.extend([&(0xc000 | first_at).to_be_bytes()[..], &fixed].concat());
        bytes[11] += 2;
        assert_eq!(Message::from_vec(&bytes).unwrap().additionals.len(), 2);
        assert_eq!(without_hop(&bytes, &records_of(&bytes)), None);
    }

    #[test]
    fn options_between_neighbours_are_taken_out_of_an_answer_and_others_stay() {
        let asked = with_edns(query("www.example.", RecordType::A), |_| {});
        let mut message = answer(&asked, &[60]);
        let options = message.edns.as_mut().unwrap().options_mut();
        options.insert(EdnsOption::Unknown(10, vec![1; 16]));
        options.insert(EdnsOption::Unknown(15, vec![0, 3]));
        options.insert(EdnsOption::Unknown(12, vec![0; 40]));
        let bytes = message.to_vec().unwrap();
        let records = records(&bytes, question_end(&bytes).unwrap()).unwrap();
        let kept = Message::from_vec(&without_hop(&bytes, &records).unwrap()).unwrap();
        let codes: Vec<u16> =
            kept.edns.as_ref().unwrap().options().as_ref().iter().map(|(code, _)| (*code).into()).collect();
        assert_eq!(codes, [15]);
        assert_eq!(kept.answers, message.answers);
        assert!(!kept.metadata.authoritative);
    }
}
