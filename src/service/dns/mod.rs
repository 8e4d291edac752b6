//! The DNS service: answers what is local, and says what is to be forwarded.
//!
//! [`DnsService::handle`] takes one query as the guest sent it. Local names, the reverse names of
//! the guest's subnet and the special-use names of RFC 6761 are answered here and never leave the
//! host; everything else is forwarded byte for byte by [`crate::control::dns_forward`], so that
//! record types nobody here knows, EDNS options and the DO bit pass as they came.
//!
//! `names` says what a name means; `reply` makes bytes of it. Queries are the guest's: nothing of
//! them is trusted, and an answer is never longer than what the transport allows.
//!
//! Read first: RFC 1035, 4; RFC 2308 (negative answers); RFC 6761; RFC 6891; RFC 7766.
//! `docs/adr/0003-dns-names.md` says which special-use names are answered and which are not.

mod names;
mod reply;

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

use crate::config::{DnsConfig, Lan};
use crate::network::guest_names::GuestNames;
use crate::service::dns::names::{LocalNames, Verdict};

pub use crate::service::dns::reply::{question_matches, servfail, truncate_for_udp};

/// UDP and TCP port of the service.
pub const DNS_PORT: u16 = 53;
/// Time to live of local answers, positive and negative, in seconds.
pub const LOCAL_TTL_S: u32 = 300;
/// The same on a named network, whose guests come and go: a guest that asked for one too early finds it so
/// many seconds after it came.
pub const GUEST_TTL_S: u32 = 5;

/// What carried the query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One datagram: the answer is truncated to what the client can take.
    Udp,
    /// A stream: the answer may have up to 65,535 bytes.
    Tcp,
}

/// Why a query is not answered at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// DNS is switched off.
    Disabled,
    /// Shorter than a header.
    Short,
    /// A response: answering one could make two servers talk for ever.
    Response,
}

/// What to do with a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DnsAction {
    /// Send this answer.
    Reply(Vec<u8>),
    /// Hand the query to the forwarder as it is.
    Forward,
    /// Send nothing.
    Drop(Ignored),
}

/// The service's settings, which threads share. Local names may become others; the guests of a named network
/// come and go, which whoever knows them looks after.
#[derive(Debug)]
pub struct DnsService {
    enabled: bool,
    has_upstream: bool,
    /// Locked for as long as it takes to take one up, or to put another in its place.
    names: RwLock<Arc<LocalNames>>,
}

impl DnsService {
    /// A service for the names of `dns` and the reverse names of `lan`. Without an upstream
    /// (`has_upstream` false) what is not local is refused.
    pub fn new(dns: &DnsConfig, lan: &Lan, has_upstream: bool) -> DnsService {
        let names = RwLock::new(Arc::new(LocalNames::new(dns, lan)));
        DnsService { enabled: dns.enabled, has_upstream, names }
    }

    /// Answers for the guests of the named network `lan` too.
    #[must_use]
    pub fn with_guests(mut self, guests: Arc<dyn GuestNames>, lan: &Lan) -> DnsService {
        let names = self.names.get_mut().unwrap_or_else(PoisonError::into_inner);
        let names =
            Arc::get_mut(names).expect("only answering takes one up, and this service is not shared yet");
        names.set_guests(guests, lan.gateway);
        self
    }

    /// Answers by the names of `dns` from now on, the guests of a named network aside. Answers that were given
    /// live on at who asked, up to [`LOCAL_TTL_S`].
    pub fn set_names(&self, dns: &DnsConfig, lan: &Lan) {
        let mut names = LocalNames::new(dns, lan);
        let mut place = self.names.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(guests) = place.guests() {
            names.set_guests(guests, lan.gateway);
        }
        *place = Arc::new(names);
    }

    fn names(&self) -> Arc<LocalNames> {
        Arc::clone(&self.names.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every local name with its addresses: the configured ones, the gateway's, and those of a named network's
    /// guests.
    pub fn records(&self) -> Vec<(String, IpAddr)> {
        self.names().records()
    }

    /// Judges one query.
    pub fn handle(&self, query: &[u8], transport: Transport) -> DnsAction {
        match self.judge(query) {
            DnsAction::Reply(answer) if transport == Transport::Udp => {
                DnsAction::Reply(truncate_for_udp(&answer, query))
            }
            action => action,
        }
    }

    fn judge(&self, query: &[u8]) -> DnsAction {
        if !self.enabled {
            return DnsAction::Drop(Ignored::Disabled);
        }
        let Some(head) = reply::Head::read(query) else {
            return DnsAction::Drop(Ignored::Short);
        };
        if head.is_response() {
            return DnsAction::Drop(Ignored::Response);
        }
        if head.opcode() != 0 {
            return self.error(query, ResponseCode::NotImp);
        }
        if head.questions() != 1 || reply::question_end(query).is_none() {
            return self.error(query, ResponseCode::FormErr);
        }
        match Message::from_vec(query) {
            Ok(message) => self.answer(query, &message),
            // Not for us to judge what a resolver may understand, unless we would have to answer.
            Err(_) => self.forward_or(query, ResponseCode::FormErr),
        }
    }

    fn answer(&self, query: &[u8], message: &Message) -> DnsAction {
        let Some(question) = message.queries.first() else {
            return self.error(query, ResponseCode::FormErr);
        };
        if message.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
            return self.error(query, ResponseCode::BADVERS);
        }
        // Zone transfers are many messages and not a resolver's business.
        if question.query_class != DNSClass::IN
            || matches!(question.query_type, RecordType::AXFR | RecordType::IXFR)
        {
            return self.error(query, ResponseCode::Refused);
        }
        let names = self.names();
        match names.lookup(&question.name, question.query_type) {
            Verdict::Elsewhere if self.has_upstream => DnsAction::Forward,
            Verdict::Elsewhere => self.error(query, ResponseCode::Refused),
            Verdict::Records(data) => {
                let record = |data| Record::from_rdata(question.name.clone(), names.ttl_s(), data);
                let answers = data.into_iter().map(record).collect();
                self.local(query, message, ResponseCode::NoError, answers, Vec::new())
            }
            Verdict::NoData(zone) => {
                self.local(query, message, ResponseCode::NoError, Vec::new(), vec![names.soa(&zone)])
            }
            Verdict::NxDomain(zone) => {
                self.local(query, message, ResponseCode::NXDomain, Vec::new(), vec![names.soa(&zone)])
            }
        }
    }

    fn local(
        &self,
        query: &[u8],
        message: &Message,
        code: ResponseCode,
        answers: Vec<Record<RData>>,
        authorities: Vec<Record<RData>>,
    ) -> DnsAction {
        let mut response = Message::response(message.metadata.id, message.metadata.op_code);
        response.metadata.authoritative = true;
        response.metadata.recursion_desired = message.metadata.recursion_desired;
        response.metadata.recursion_available = self.has_upstream;
        response.metadata.checking_disabled = message.metadata.checking_disabled;
        response.metadata.response_code = code;
        response.queries.clone_from(&message.queries);
        response.answers = answers;
        response.authorities = authorities;
        response.edns = message.edns.as_ref().map(reply::our_edns);
        match response.to_vec() {
            Ok(bytes) => DnsAction::Reply(bytes),
            Err(_) => self.error(query, ResponseCode::ServFail),
        }
    }

    fn forward_or(&self, query: &[u8], code: ResponseCode) -> DnsAction {
        if self.has_upstream && self.names().is_elsewhere(query) {
            DnsAction::Forward
        } else {
            self.error(query, code)
        }
    }

    fn error(&self, query: &[u8], code: ResponseCode) -> DnsAction {
        DnsAction::Reply(reply::error(query, code, self.has_upstream))
    }
}
