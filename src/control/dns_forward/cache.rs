//! Answers kept for the next who asks, until their times to live run out.
//!
//! Kept are the bytes of an upstream's answer, not its records: the next answer is the same message with
//! another id, the asker's spelling of the question and less time to live. The whole message lives as
//! long as its shortest-lived record. A negative answer lives as its SOA record says (RFC 2308, 5), one
//! without lives not at all, and a failure for seconds (RFC 9520, 3.2). What was truncated, or is not
//! understood to its last byte, is not kept.
//!
//! Entries and bytes are bounded; the least recently used make room. Time is an argument.
//!
//! Read first: RFC 2181, 8; RFC 2308, 5; RFC 9520; `docs/adr/0007-dns-answers-are-kept-as-bytes.md`.

use std::time::Duration;

use hashbrown::HashMap;
use slab::Slab;

use crate::control::dns_forward::message::{
    HEADER_BYTES, Key, OPT, Opt, Record, Section, be16, question_end, records, without_hop,
};
use crate::engine::lru::Lru;
use crate::limits;
use crate::time::Instant;

/// Longest a positive answer is kept, in seconds, whatever it says: a day, as most resolvers do (RFC
/// 8767, 4 speaks of days to weeks).
const TTL_MAX_S: u32 = 86_400;
/// The same for a negative answer (RFC 2308, 5: one to three hours worked well).
const NEGATIVE_TTL_MAX_S: u32 = 10_800;
/// An upstream's failure or refusal (RFC 9520, 3.2: at least a second, five to begin with).
const FAILURE_TTL_S: u32 = 5;
/// No upstream answered: as short as may be, for it may be our own network that comes back.
const UNANSWERED_TTL: Duration = Duration::from_secs(1);
/// What an entry takes besides its bytes: tables, order and allocations, rounded up.
const ENTRY_BYTES: usize = 192;

const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const TC: u8 = 0x02;
const NOERROR: u8 = 0;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;
const REFUSED: u8 = 5;
const SOA: u16 = 6;
const ANY: u16 = 255;

/// The answers kept.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: Slab<Entry>,
    by_key: HashMap<Key, usize, foldhash::quality::RandomState>,
    lru: Lru,
    bytes: usize,
    generation: u64,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    answer: Kept,
    stored: Instant,
    expires: Instant,
}

impl Entry {
    fn bytes(&self) -> usize {
        // The key is kept twice: as the table's and as the entry's own.
        ENTRY_BYTES
            + 2 * self.key.len()
            + self.answer.bytes.len()
            + self.answer.ttl_at.len() * size_of::<u16>()
    }
}

/// An answer that may be kept.
#[derive(Debug)]
struct Kept {
    bytes: Box<[u8]>,
    /// Where its times to live stand.
    ttl_at: Box<[u16]>,
    lifetime: Duration,
}

impl Cache {
    /// The answer to `query`, whose key is `key`, if one is kept: with its id, its spelling of the
    /// question, and times to live as they are `now`.
    pub(super) fn get(&mut self, now: Instant, key: &Key, query: &[u8]) -> Option<Vec<u8>> {
        let at = *self.by_key.get(key)?;
        let entry = &self.entries[at];
        if now >= entry.expires {
            self.remove(at);
            return None;
        }
        self.lru.touch(at);
        let age_s = u32::try_from(now.since(entry.stored).as_secs()).unwrap_or(u32::MAX);
        let mut bytes = entry.answer.bytes.to_vec();
        for &ttl_at in &entry.answer.ttl_at {
            let field = &mut bytes[usize::from(ttl_at)..][..4];
            let ttl_s = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
            field.copy_from_slice(&ttl_s.min(TTL_MAX_S).saturating_sub(age_s).to_be_bytes());
        }
        adopt(&mut bytes, query);
        Some(bytes)
    }

    /// Keeps an upstream's `answer` under `key`, if it may be kept. Returns how many others made room.
    pub(super) fn insert(&mut self, now: Instant, key: &Key, answer: &[u8]) -> u64 {
        keepable(answer).map_or(0, |kept| self.keep(now, key, kept))
    }

    /// Keeps `answer`, our own word that no upstream answered.
    pub(super) fn insert_unanswered(&mut self, now: Instant, key: &Key, answer: &[u8]) -> u64 {
        let kept = Kept { bytes: answer.into(), ttl_at: Box::default(), lifetime: UNANSWERED_TTL };
        self.keep(now, key, kept)
    }

    fn keep(&mut self, now: Instant, key: &Key, answer: Kept) -> u64 {
        if let Some(&old) = self.by_key.get(key) {
            self.remove(old);
        }
        let expires = now + answer.lifetime;
        let entry = Entry { key: key.clone(), answer, stored: now, expires };
        self.bytes += entry.bytes();
        let at = self.entries.insert(entry);
        self.by_key.insert(key.clone(), at);
        self.lru.touch(at);
        let mut evicted = 0;
        while self.bytes > limits::DNS_CACHE_BYTES_MAX || self.entries.len() > limits::DNS_CACHE_ENTRIES_MAX {
            let Some(oldest) = self.lru.oldest() else { break };
            self.remove(oldest);
            evicted += 1;
        }
        evicted
    }

    /// Forgets everything: the host is on another network, or has other resolvers.
    pub(super) fn clear(&mut self) {
        *self = Cache { generation: self.generation + 1, ..Cache::default() };
    }

    /// How often everything was forgotten: what was asked for before is not to be kept after.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    fn remove(&mut self, at: usize) {
        let entry = self.entries.remove(at);
        self.bytes -= entry.bytes();
        self.lru.remove(at);
        self.by_key.remove(&entry.key);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.entries.len()
    }
}

/// Makes `answer` one to `query`, which asks the same: its id, its spelling of the name.
pub(super) fn adopt(answer: &mut [u8], query: &[u8]) {
    answer[..2].copy_from_slice(&query[..2]);
    if let (Some(end), Some(asked)) = (question_end(answer), question_end(query))
        && end == asked
    {
        answer[HEADER_BYTES..end].copy_from_slice(&query[HEADER_BYTES..end]);
    }
}

/// `answer` as it may be kept; `None` if it may not.
fn keepable(answer: &[u8]) -> Option<Kept> {
    let header = answer.first_chunk::<HEADER_BYTES>()?;
    if header[2] & (QR | OPCODE | TC) != QR || be16(header, 4) != 1 {
        return None;
    }
    let end = question_end(answer)?;
    let found = records(answer, end)?;
    let mut opts = found.iter().filter(|record| record.kind == OPT);
    if let Some(opt) = opts.next() {
        let opt = Opt::read(answer, opt)?;
        if opt.version != 0 || opt.code_high != 0 || opts.next().is_some() {
            return None;
        }
    }
    let lifetime_s = lifetime_s(answer, &found, header[3] & 0x0f, be16(answer, end - 4))?;
    let bytes = without_hop(answer, &found)?;
    // Places have moved if options went.
    let found = records(&bytes, end)?;
    let has_ttl = found.iter().filter(|record| record.kind != OPT);
    let ttl_at: Option<Box<[u16]>> = has_ttl.map(|record| u16::try_from(record.ttl_at).ok()).collect();
    let lifetime = Duration::from_secs(lifetime_s.into());
    Some(Kept { bytes: bytes.into(), ttl_at: ttl_at?, lifetime })
}

/// How long `answer` holds, in seconds; `None` if it does not.
fn lifetime_s(answer: &[u8], records: &[Record], code: u8, asked: u16) -> Option<u32> {
    if matches!(code, SERVFAIL | REFUSED) {
        return Some(FAILURE_TTL_S);
    }
    let has_ttl = records.iter().filter(|record| record.kind != OPT);
    let shortest_s = has_ttl.map(|record| record.ttl_s(answer)).min();
    let is_answer =
        |record: &Record| record.section == Section::Answer && (record.kind == asked || asked == ANY);
    let lifetime_s = if code == NOERROR && records.iter().any(is_answer) {
        shortest_s?.min(TTL_MAX_S)
    } else if matches!(code, NOERROR | NXDOMAIN) {
        let is_soa = |record: &&Record| record.section == Section::Authority && record.kind == SOA;
        let minimum_s = records.iter().find(is_soa)?.soa_minimum_s(answer)?;
        shortest_s?.min(minimum_s).min(NEGATIVE_TTL_MAX_S)
    } else {
        return None;
    };
    (lifetime_s > 0).then_some(lifetime_s)
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, ResponseCode};
    use hickory_proto::rr::rdata::{CNAME, TXT};
    use hickory_proto::rr::{Name, RData, Record as HickoryRecord, RecordType};

    use super::*;
    use crate::control::dns_forward::message::tests::{answer, negative, query, response, with_edns};
    use crate::service::dns::servfail;

    const START: Instant = Instant::from_micros(5_000_000_000);

    fn after(seconds: u64) -> Instant {
        START + Duration::from_secs(seconds)
    }

    fn www() -> Message {
        query("www.example.", RecordType::A)
    }

    fn bytes(message: &Message) -> Vec<u8> {
        message.to_vec().unwrap()
    }

    fn key(message: &Message) -> Key {
        Key::of(&bytes(message)).unwrap()
    }

    fn cached(answer: &Message, asked: &Message) -> Cache {
        let mut cache = Cache::default();
        cache.insert(START, &key(asked), &bytes(answer));
        cache
    }

    fn get(cache: &mut Cache, now: Instant, asked: &Message) -> Option<Message> {
        cache.get(now, &key(asked), &bytes(asked)).map(|bytes| Message::from_vec(&bytes).unwrap())
    }

    fn ttls(message: &Message) -> Vec<u32> {
        message.answers.iter().chain(&message.authorities).map(|record| record.ttl).collect()
    }

    #[test]
    fn times_to_live_count_down_and_the_shortest_ends_the_answer() {
        let mut cache = cached(&answer(&www(), &[60, 300]), &www());
        assert_eq!(ttls(&get(&mut cache, START, &www()).unwrap()), [60, 300]);
        assert_eq!(ttls(&get(&mut cache, after(1), &www()).unwrap()), [59, 299]);
        assert_eq!(ttls(&get(&mut cache, after(59), &www()).unwrap()), [1, 241]);
        assert_eq!(get(&mut cache, after(60), &www()), None);
        assert_eq!((cache.len(), cache.bytes), (0, 0));
    }

    #[test]
    fn the_answer_has_the_askers_id_and_spelling_and_no_authority() {
        let mut cache = cached(&answer(&www(), &[60]), &www());
        let mut other = query("wWw.eXample.", RecordType::A);
        other.metadata.id = 4711;
        let got = get(&mut cache, START, &other).unwrap();
        assert_eq!(got.metadata.id, 4711);
        assert_eq!(bytes(&got)[HEADER_BYTES..25], bytes(&other)[HEADER_BYTES..25]);
        assert!(!got.metadata.authoritative);
        assert_eq!(get(&mut cache, START, &query("www.example.", RecordType::AAAA)), None);
    }

    #[test]
    fn a_time_to_live_of_years_is_cut_to_a_day() {
        let mut cache = cached(&answer(&www(), &[40_000_000]), &www());
        assert_eq!(ttls(&get(&mut cache, after(10), &www()).unwrap()), [86_390]);
        assert_eq!(get(&mut cache, after(86_400), &www()), None);
    }

    #[test]
    fn a_time_to_live_of_zero_or_with_its_top_bit_set_is_not_kept() {
        for ttl_s in [0, 1 << 31, u32::MAX] {
            assert_eq!(cached(&answer(&www(), &[60, ttl_s]), &www()).len(), 0, "{ttl_s}");
        }
    }

    #[test]
    fn negative_answers_live_as_long_as_soa_and_its_minimum_say() {
        for code in [ResponseCode::NXDomain, ResponseCode::NoError] {
            for (ttl_s, minimum_s, holds_s) in [(100, 20, 20), (20, 100, 20), (90_000, 90_000, 10_800)] {
                let mut cache = cached(&negative(&www(), code, ttl_s, minimum_s), &www());
                let last = get(&mut cache, after(holds_s - 1), &www()).unwrap();
                assert_eq!(last.metadata.response_code, code);
                assert_eq!(get(&mut cache, after(holds_s), &www()), None, "{code} {ttl_s} {minimum_s}");
            }
        }
    }

    #[test]
    fn negative_answers_without_soa_and_aliases_that_lead_nowhere_are_not_kept() {
        for code in [ResponseCode::NXDomain, ResponseCode::NoError] {
            assert_eq!(cached(&response(&www(), code), &www()).len(), 0);
        }
        let mut alias = response(&www(), ResponseCode::NoError);
        let target = RData::CNAME(CNAME(Name::from_ascii("else.example.").unwrap()));
        let name = www().queries[0].name.clone();
        alias.answers.push(HickoryRecord::from_rdata(name, 60, target));
        assert_eq!(cached(&alias, &www()).len(), 0);
        alias.authorities = negative(&www(), ResponseCode::NoError, 30, 30).authorities;
        assert_eq!(cached(&alias, &www()).len(), 1, "nothing behind the alias, and says so");
    }

    #[test]
    fn failures_are_kept_for_seconds_and_other_errors_not_at_all() {
        for code in [ResponseCode::ServFail, ResponseCode::Refused] {
            let mut cache = cached(&response(&www(), code), &www());
            assert!(get(&mut cache, after(4), &www()).is_some());
            assert_eq!(get(&mut cache, after(5), &www()), None);
        }
        for code in [ResponseCode::FormErr, ResponseCode::NotImp, ResponseCode::YXDomain] {
            assert_eq!(cached(&response(&www(), code), &www()).len(), 0);
        }
        let mut cache = Cache::default();
        cache.insert_unanswered(START, &key(&www()), &servfail(&bytes(&www())));
        let half = START + Duration::from_millis(999);
        assert_eq!(get(&mut cache, half, &www()).unwrap().metadata.response_code, ResponseCode::ServFail);
        assert_eq!(get(&mut cache, after(1), &www()), None);
    }

    #[test]
    fn truncated_and_malformed_answers_are_not_kept() {
        let mut truncated = answer(&www(), &[60]);
        truncated.metadata.truncation = true;
        assert_eq!(cached(&truncated, &www()).len(), 0);
        let whole = bytes(&answer(&www(), &[60]));
        let mut cache = Cache::default();
        for len in 0..whole.len() {
            cache.insert(START, &key(&www()), &whole[..len]);
        }
        cache.insert(START, &key(&www()), &[&whole[..], b"tail"].concat());
        let asked = bytes(&www());
        cache.insert(START, &key(&www()), &asked);
        assert_eq!(cache.len(), 0);
        cache.insert(START, &key(&www()), &whole);
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn whatever_an_upstream_sends_is_kept_whole_or_not_at_all() {
        let asked = with_edns(www(), |_| {});
        let whole = bytes(&answer(&asked, &[60, 61]));
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut changed = whole.clone();
                changed[at] ^= 1 << bit;
                let mut cache = Cache::default();
                cache.insert(START, &key(&asked), &changed);
                let (query, kept) = (bytes(&asked), cache.len());
                let got = cache.get(after(1), &key(&asked), &query);
                assert!(
                    kept == 0 || got.is_none_or(|got| got.len() == whole.len()),
                    "bit {bit} of byte {at}"
                );
                cache.get(after(u64::from(u32::MAX)), &key(&asked), &query);
                assert_eq!((cache.len(), cache.bytes), (0, 0));
            }
        }
    }

    #[test]
    fn with_and_without_edns_or_dnssec_are_different_questions() {
        let plain = www();
        let edns = with_edns(www(), |_| {});
        let secure = with_edns(www(), |edns| {
            edns.set_dnssec_ok(true);
        });
        let mut cache = cached(&answer(&secure, &[60]), &secure);
        assert_eq!(get(&mut cache, START, &plain), None);
        assert_eq!(get(&mut cache, START, &edns), None);
        let got = get(&mut cache, after(7), &secure).unwrap();
        assert!(got.edns.unwrap().flags().dnssec_ok, "the OPT record's flags are no time to live");
    }

    #[test]
    fn as_many_entries_as_may_be_are_kept_and_the_least_used_goes_first() {
        let mut cache = Cache::default();
        let nth = |n: usize| query(&format!("n{n}.example."), RecordType::A);
        for n in 0..limits::DNS_CACHE_ENTRIES_MAX {
            let asked = nth(n);
            assert_eq!(cache.insert(START, &key(&asked), &bytes(&answer(&asked, &[60]))), 0);
        }
        assert!(get(&mut cache, START, &nth(0)).is_some());
        let one_more = nth(limits::DNS_CACHE_ENTRIES_MAX);
        assert_eq!(cache.insert(START, &key(&one_more), &bytes(&answer(&one_more, &[60]))), 1);
        assert_eq!(cache.len(), limits::DNS_CACHE_ENTRIES_MAX);
        assert_eq!(get(&mut cache, START, &nth(1)), None);
        assert!(get(&mut cache, START, &nth(0)).is_some());
        assert!(get(&mut cache, START, &one_more).is_some());
    }

    #[test]
    fn as_many_bytes_as_may_be_are_kept() {
        let mut cache = Cache::default();
        let mut evicted = 0;
        for n in 0..200 {
            let asked = query(&format!("n{n}.example."), RecordType::TXT);
            let mut large = response(&asked, ResponseCode::NoError);
            let text = TXT::new(vec!["x".repeat(255); 250]);
            let name = asked.queries[0].name.clone();
            large.answers.push(HickoryRecord::from_rdata(name, 60, RData::TXT(text)));
            evicted += cache.insert(START, &key(&asked), &bytes(&large));
            assert!(cache.bytes <= limits::DNS_CACHE_BYTES_MAX);
        }
        assert!(evicted > 100 && cache.len() > 50, "{evicted} {}", cache.len());
        let sum: usize = cache.entries.iter().map(|(_, entry)| entry.bytes()).sum();
        assert_eq!(sum, cache.bytes);
        cache.clear();
        assert_eq!((cache.len(), cache.bytes), (0, 0));
    }

    #[test]
    fn a_newer_answer_takes_the_place_of_an_older() {
        let mut cache = cached(&answer(&www(), &[60]), &www());
        let one = cache.bytes;
        cache.insert(after(10), &key(&www()), &bytes(&answer(&www(), &[90])));
        assert_eq!((cache.len(), cache.bytes), (1, one));
        assert_eq!(ttls(&get(&mut cache, after(20), &www()).unwrap()), [80]);
    }
}
