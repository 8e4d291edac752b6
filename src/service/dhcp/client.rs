//! A DHCP client: who holds an address on somebody else's network asks for it here.
//!
//! Messages in, messages out, time an argument. [`DhcpClient::poll`] says what is to be sent now, and
//! [`DhcpClient::receive`] what an answer changed. Whether the address is free is its user's to find out, who
//! calls [`DhcpClient::decline`] if not.
//!
//! Read first: RFC 2131, 4.4 (with figure 5 and table 5); RFC 5227, 2.1.

use std::net::Ipv4Addr;
use std::time::Duration;

use dhcproto::v4::{
    Decodable, Decoder, DhcpOption, Encodable, Flags, HType, Message, MessageType, Opcode, OptionCode,
};

use crate::addr::{Ipv4Subnet, MacAddr};
use crate::limits;
use crate::time::Instant;

/// The first wait for an answer; each further one is twice as long, up to [`WAIT_MAX`] (RFC 2131, 4.1).
const WAIT_FIRST: Duration = Duration::from_secs(2);
/// The longest.
const WAIT_MAX: Duration = Duration::from_secs(64);
/// The shortest wait between two messages that prolong a lease (RFC 2131, 4.4.5).
const RENEW_WAIT_MIN: Duration = Duration::from_secs(60);
/// Questions for an offered address before offers are asked for anew (RFC 2131, 4.4.5: about a minute).
const REQUESTS_MAX: u32 = 4;
/// How long a client whose address was in use waits before it asks again (RFC 2131, 3.1, 5).
const DECLINED_WAIT: Duration = Duration::from_secs(10);
/// What a message is at least, so that no relay or old server drops it (RFC 1542, 2.1).
const MESSAGE_BYTES_MIN: usize = 300;
/// What is asked for (RFC 2132).
const PARAMETERS: [OptionCode; 5] = [
    OptionCode::SubnetMask,
    OptionCode::Router,
    OptionCode::AddressLeaseTime,
    OptionCode::Renewal,
    OptionCode::Rebinding,
];

/// An address leased to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLease {
    /// The address.
    pub addr: Ipv4Addr,
    /// The network it is in.
    pub subnet: Ipv4Subnet,
    /// The network's first router, if it told of one on it.
    pub router: Option<Ipv4Addr>,
    /// Who leased it.
    pub server: Ipv4Addr,
    /// How long, from when it was asked for.
    pub lease_time: Duration,
    /// After how long its server is asked to prolong it, and after how long any server (T1 and T2).
    pub renewal: (Duration, Duration),
}

/// What an answer, or the want of one, changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientEvent {
    /// The address is ours, newly or as it was.
    Bound(ClientLease),
    /// It is ours no more.
    Lost,
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientMessage {
    /// The UDP payload, from port 68 to port 67.
    pub payload: Vec<u8>,
    /// The source address: unspecified while there is none.
    pub src: Ipv4Addr,
    /// The server's address, or broadcast.
    pub dst: Ipv4Addr,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Nothing is asked before this.
    Init { at: Instant },
    /// Offers are asked for.
    Selecting,
    /// One was chosen.
    Requesting { addr: Ipv4Addr, server: Ipv4Addr },
    /// The lease runs; from `rebind` on anybody is asked to prolong it.
    Bound { lease: ClientLease, rebind: Instant, end: Instant },
}

/// The client of one address.
#[derive(Debug)]
pub struct DhcpClient {
    mac: MacAddr,
    state: State,
    xid: u32,
    /// When the first message of this exchange was sent.
    begun: Instant,
    /// Messages sent in this state.
    tries: u32,
    /// When the next one is due.
    due: Instant,
    random: u64,
}

impl DhcpClient {
    /// A client that asks at once. `seed` is random: other machines ask at other times.
    pub fn new(now: Instant, mac: MacAddr, seed: u64) -> DhcpClient {
        let state = State::Init { at: now };
        DhcpClient { mac, state, xid: 0, begun: now, tries: 0, due: now, random: seed | 1 }
    }

    /// Whether something was asked that no answer came to.
    pub fn awaits_answer(&self) -> bool {
        match self.state {
            State::Init { .. } => false,
            State::Selecting | State::Requesting { .. } => true,
            State::Bound { .. } => self.tries > 0,
        }
    }

    /// When [`DhcpClient::poll`] has something to do.
    pub fn deadline(&self) -> Instant {
        match self.state {
            State::Init { at } => at,
            State::Bound { end, .. } => self.due.min(end),
            State::Selecting | State::Requesting { .. } => self.due,
        }
    }

    /// Does what is due: a message to send, and what changed.
    pub fn poll(&mut self, now: Instant) -> (Option<ClientMessage>, Option<ClientEvent>) {
        if now < self.deadline() {
            return (None, None);
        }
        match self.state {
            State::Init { .. } => {
                self.begin(now, State::Selecting);
                (Some(self.discover(now)), None)
            }
            State::Selecting => (Some(self.discover(now)), None),
            State::Requesting { .. } if self.tries >= REQUESTS_MAX => {
                self.begin(now, State::Selecting);
                (Some(self.discover(now)), None)
            }
            State::Requesting { addr, server } => (Some(self.request(now, addr, server)), None),
            State::Bound { end, .. } if now >= end => {
                self.begin(now, State::Selecting);
                (Some(self.discover(now)), Some(ClientEvent::Lost))
            }
            State::Bound { lease, rebind, end, .. } => (Some(self.prolong(now, &lease, rebind, end)), None),
        }
    }

    /// Takes what came to port 68. Messages that are not for this client, or not asked for, change nothing.
    pub fn receive(&mut self, now: Instant, payload: &[u8]) -> Option<ClientEvent> {
        let answer = Answer::parse(payload, self.mac, self.xid)?;
        match (self.state, answer.kind) {
            (State::Selecting, MessageType::Offer) => {
                let (addr, server) = (answer.addr?, answer.server?);
                self.state = State::Requesting { addr, server };
                (self.tries, self.due) = (0, now);
                None
            }
            (State::Requesting { addr, server }, MessageType::Ack) if answer.is_of(server) => {
                let lease = answer.lease(server).filter(|lease| lease.addr == addr)?;
                self.bind(lease)
            }
            // RENEWING: the server of the lease was asked, and nobody else; REBINDING: anybody (RFC 2131, 4.4.5).
            (State::Bound { lease: held, rebind, .. }, MessageType::Ack)
                if self.tries > 0 && (now >= rebind || answer.is_of(held.server)) =>
            {
                let lease = answer.lease(held.server)?;
                (lease.addr == held.addr).then(|| self.bind(lease))?
            }
            (State::Requesting { server, .. }, MessageType::Nak) if answer.server == Some(server) => {
                self.state = State::Init { at: now + self.jitter(WAIT_FIRST) };
                None
            }
            (State::Bound { lease, rebind, .. }, MessageType::Nak)
                if self.tries > 0 && (now >= rebind || answer.is_of(lease.server)) =>
            {
                self.state = State::Init { at: now };
                Some(ClientEvent::Lost)
            }
            _ => None,
        }
    }

    /// Another host has the address: says so to the server, and asks for another after a while.
    pub fn decline(&mut self, now: Instant) -> Option<ClientMessage> {
        let State::Bound { lease, .. } = self.state else { return None };
        let mut message = self.blank(MessageType::Decline);
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(lease.addr));
        message.opts_mut().insert(DhcpOption::ServerIdentifier(lease.server));
        self.state = State::Init { at: now + DECLINED_WAIT };
        Some(sent(&message, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST))
    }

    /// The address cannot be used: gives it back, and asks for one again after `wait`.
    pub fn refuse(&mut self, now: Instant, wait: Duration) -> Option<ClientMessage> {
        let message = self.release()?;
        self.state = State::Init { at: now + wait };
        Some(message)
    }

    /// Gives the address back.
    pub fn release(&mut self) -> Option<ClientMessage> {
        let State::Bound { lease, .. } = self.state else { return None };
        let mut message = self.blank(MessageType::Release);
        message.set_ciaddr(lease.addr);
        message.opts_mut().insert(DhcpOption::ServerIdentifier(lease.server));
        Some(sent(&message, lease.addr, lease.server))
    }

    fn bind(&mut self, lease: ClientLease) -> Option<ClientEvent> {
        // The lease runs from when it was asked for (RFC 2131, 4.4.1).
        let end = self.begun + lease.lease_time;
        let (renew, rebind) = (self.begun + lease.renewal.0, self.begun + lease.renewal.1);
        self.state = State::Bound { lease, rebind, end };
        (self.tries, self.due) = (0, renew);
        Some(ClientEvent::Bound(lease))
    }

    fn begin(&mut self, now: Instant, state: State) {
        self.state = state;
        self.xid = self.next_random() as u32;
        (self.begun, self.tries) = (now, 0);
    }

    fn discover(&mut self, now: Instant) -> ClientMessage {
        self.wait(now);
        let mut message = self.blank(MessageType::Discover);
        self.ask(&mut message, now);
        sent(&message, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST)
    }

    fn request(&mut self, now: Instant, addr: Ipv4Addr, server: Ipv4Addr) -> ClientMessage {
        self.wait(now);
        let mut message = self.blank(MessageType::Request);
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(addr));
        message.opts_mut().insert(DhcpOption::ServerIdentifier(server));
        self.ask(&mut message, now);
        sent(&message, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST)
    }

    /// RENEWING and REBINDING: the server's, then anybody's word that the lease goes on.
    fn prolong(&mut self, now: Instant, lease: &ClientLease, rebind: Instant, end: Instant) -> ClientMessage {
        let is_rebinding = now >= rebind;
        if self.tries == 0 {
            self.xid = self.next_random() as u32;
            self.begun = now;
        }
        self.tries += 1;
        let until = if is_rebinding { end } else { rebind };
        // Half of what is left, a minute at least, but the next state in time (RFC 2131, 4.4.5).
        self.due = (now + (until.since(now) / 2).max(RENEW_WAIT_MIN)).min(until);
        let mut message = self.blank(MessageType::Request);
        message.set_ciaddr(lease.addr);
        self.ask(&mut message, now);
        let dst = if is_rebinding { Ipv4Addr::BROADCAST } else { lease.server };
        sent(&message, lease.addr, dst)
    }

    /// Puts off the next message: twice as long each time, one second more or less.
    fn wait(&mut self, now: Instant) {
        let wait = (WAIT_FIRST * 2u32.saturating_pow(self.tries)).min(WAIT_MAX);
        self.tries += 1;
        self.due = now + self.jitter(wait);
    }

    fn jitter(&mut self, wait: Duration) -> Duration {
        wait + Duration::from_micros(self.next_random() % 2_000_000) - Duration::from_secs(1)
    }

    /// xorshift64: spreads times and numbers transactions, and keeps no secret.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn blank(&self, kind: MessageType) -> Message {
        let none = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(self.xid, none, none, none, none, &self.mac.0);
        message.set_opcode(Opcode::BootRequest).set_htype(HType::Eth).set_flags(Flags::default());
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        let id = [&[u8::from(HType::Eth)], &self.mac.0[..]].concat();
        message.opts_mut().insert(DhcpOption::ClientIdentifier(id));
        message
    }

    fn ask(&self, message: &mut Message, now: Instant) {
        message.set_secs(u16::try_from(now.since(self.begun).as_secs()).unwrap_or(u16::MAX));
        let options = message.opts_mut();
        options.insert(DhcpOption::ParameterRequestList(PARAMETERS.to_vec()));
        options.insert(DhcpOption::MaxMessageSize(limits::DHCP_MESSAGE_BYTES_MAX as u16));
    }
}

fn sent(message: &Message, src: Ipv4Addr, dst: Ipv4Addr) -> ClientMessage {
    let mut payload = message.to_vec().expect("options of bounded length encode into a growing buffer");
    payload.resize(payload.len().max(MESSAGE_BYTES_MIN), 0);
    ClientMessage { payload, src, dst }
}

/// A server's message, as far as it matters.
struct Answer {
    kind: MessageType,
    addr: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    subnet: Option<Ipv4Subnet>,
    router: Option<Ipv4Addr>,
    lease_time: Option<Duration>,
    renewal: (Option<Duration>, Option<Duration>),
}

impl Answer {
    /// A message to the client `mac` in its exchange `xid`.
    fn parse(bytes: &[u8], mac: MacAddr, xid: u32) -> Option<Answer> {
        if bytes.len() > limits::DHCP_MESSAGE_BYTES_MAX {
            return None;
        }
        let message = Message::decode(&mut Decoder::new(bytes)).ok()?;
        let is_ours = message.opcode() == Opcode::BootReply
            && message.xid() == xid
            && message.hlen() == 6
            && message.chaddr() == mac.0;
        if !is_ours {
            return None;
        }
        let options = message.opts();
        let addr = Some(message.yiaddr()).filter(|addr| is_host(*addr));
        let subnet = match (addr, options.get(OptionCode::SubnetMask)) {
            (Some(addr), Some(DhcpOption::SubnetMask(mask))) => subnet_of(addr, *mask),
            _ => None,
        };
        let router = match options.get(OptionCode::Router) {
            Some(DhcpOption::Router(routers)) => routers.first().copied(),
            _ => None,
        };
        let server = match options.get(OptionCode::ServerIdentifier) {
            Some(DhcpOption::ServerIdentifier(server)) => Some(*server).filter(|server| is_host(*server)),
            _ => None,
        };
        let duration = |code| match options.get(code) {
            Some(
                DhcpOption::AddressLeaseTime(seconds)
                | DhcpOption::Renewal(seconds)
                | DhcpOption::Rebinding(seconds),
            ) if *seconds > 0 => Some(Duration::from_secs(u64::from(*seconds))),
            _ => None,
        };
        let lease_time = duration(OptionCode::AddressLeaseTime);
        let renewal = (duration(OptionCode::Renewal), duration(OptionCode::Rebinding));
        Some(Answer { kind: options.msg_type()?, addr, server, subnet, router, lease_time, renewal })
    }

    /// Whether it can be the word of `server`: old ones do not say whose it is.
    fn is_of(&self, server: Ipv4Addr) -> bool {
        self.server.is_none_or(|own| own == server)
    }

    /// What an acknowledgement leases; `None` if it lacks what is needed to use the address.
    fn lease(&self, server: Ipv4Addr) -> Option<ClientLease> {
        let (addr, subnet) = (self.addr?, self.subnet?);
        let router = self.router.filter(|router| subnet.is_host(*router) && *router != addr);
        let server = self.server.unwrap_or(server);
        let lease_time = self.lease_time?;
        // The fractions of RFC 2131, 4.4.5, where the server says nothing, or nothing in order.
        let renewal = match self.renewal {
            (Some(renew), Some(rebind)) if renew < rebind && rebind < lease_time => (renew, rebind),
            _ => (lease_time / 2, lease_time * 7 / 8),
        };
        Some(ClientLease { addr, subnet, router, server, lease_time, renewal })
    }
}

/// Whether a host can have the address (RFC 1122, 3.2.1.3).
fn is_host(addr: Ipv4Addr) -> bool {
    let [first, ..] = addr.octets();
    first != 0 && first < 224 && !addr.is_loopback()
}

/// The network of `addr` under `mask`, if it is one that `addr` can be a host of.
fn subnet_of(addr: Ipv4Addr, mask: Ipv4Addr) -> Option<Ipv4Subnet> {
    let prefix = mask.to_bits().leading_ones();
    if mask.to_bits().count_ones() != prefix {
        return None;
    }
    let network = Ipv4Addr::from_bits(addr.to_bits() & mask.to_bits());
    Ipv4Subnet::new(network, u8::try_from(prefix).ok()?).ok().filter(|subnet| subnet.is_host(addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
    const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 50);

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    fn kind(message: &ClientMessage) -> MessageType {
        read(message).opts().msg_type().unwrap()
    }

    fn read(message: &ClientMessage) -> Message {
        Message::decode(&mut Decoder::new(&message.payload)).unwrap()
    }

    /// The server's answer to `asked`.
    fn answer(asked: &ClientMessage, kind: MessageType, addr: Ipv4Addr, lease_s: u32) -> Vec<u8> {
        let asked = read(asked);
        let none = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(asked.xid(), none, addr, none, none, &MAC.0);
        message.set_opcode(Opcode::BootReply);
        let options = message.opts_mut();
        options.insert(DhcpOption::MessageType(kind));
        options.insert(DhcpOption::ServerIdentifier(SERVER));
        options.insert(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)));
        options.insert(DhcpOption::Router(vec![SERVER]));
        options.insert(DhcpOption::AddressLeaseTime(lease_s));
        message.to_vec().unwrap()
    }

    fn next(client: &mut DhcpClient) -> (Instant, ClientMessage, Option<ClientEvent>) {
        let now = client.deadline();
        let (message, event) = client.poll(now);
        (now, message.expect("a message is due"), event)
    }

    fn bound() -> DhcpClient {
        let mut client = DhcpClient::new(Instant::ZERO, MAC, 7);
        let (now, discover, _) = next(&mut client);
        assert_eq!(kind(&discover), MessageType::Discover);
        assert_eq!((discover.src, discover.dst), (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
        assert_eq!(client.receive(now, &answer(&discover, MessageType::Offer, OURS, 3600)), None);
        let (now, request, _) = next(&mut client);
        assert_eq!(kind(&request), MessageType::Request);
        let asked = read(&request);
        let options = asked.opts();
        assert_eq!(options.get(OptionCode::RequestedIpAddress), Some(&DhcpOption::RequestedIpAddress(OURS)));
        assert_eq!(options.get(OptionCode::ServerIdentifier), Some(&DhcpOption::ServerIdentifier(SERVER)));
        let event = client.receive(now, &answer(&request, MessageType::Ack, OURS, 3600));
        let Some(ClientEvent::Bound(lease)) = event else { panic!("{event:?}") };
        assert_eq!((lease.addr, lease.router, lease.server), (OURS, Some(SERVER), SERVER));
        assert_eq!(lease.subnet.to_string(), "192.0.2.0/24");
        client
    }

    #[test]
    fn an_address_is_asked_for_and_prolonged_from_its_server() {
        let mut client = bound();
        assert_eq!(client.deadline(), at(1800));
        assert_eq!(client.poll(at(1799)), (None, None));
        let (now, renew, _) = next(&mut client);
        assert_eq!((kind(&renew), renew.src, renew.dst), (MessageType::Request, OURS, SERVER));
        let asked = read(&renew);
        assert_eq!(asked.ciaddr(), OURS);
        assert!(!asked.opts().contains(OptionCode::ServerIdentifier), "table 5");
        let event = client.receive(now, &answer(&renew, MessageType::Ack, OURS, 3600));
        assert!(matches!(event, Some(ClientEvent::Bound(lease)) if lease.addr == OURS));
        assert_eq!(client.deadline(), at(1800 + 1800));
    }

    /// The same answer, said by another server.
    fn of_another(answer: &[u8], server: Ipv4Addr) -> Vec<u8> {
        let mut message = Message::decode(&mut Decoder::new(answer)).unwrap();
        message.opts_mut().insert(DhcpOption::ServerIdentifier(server));
        message.to_vec().unwrap()
    }

    #[test]
    fn only_its_server_prolongs_a_lease_until_anybody_is_asked() {
        let other = Ipv4Addr::new(192, 0, 2, 7);
        let mut client = bound();
        let (now, renew, _) = next(&mut client);
        for kind in [MessageType::Ack, MessageType::Nak] {
            let stranger = of_another(&answer(&renew, kind, OURS, 7200), other);
            assert_eq!(client.receive(now, &stranger), None, "{kind:?}");
        }
        let (now, rebind) = loop {
            let (now, message, _) = next(&mut client);
            if message.dst.is_broadcast() {
                break (now, message);
            }
        };
        let event = client.receive(now, &of_another(&answer(&rebind, MessageType::Ack, OURS, 3600), other));
        assert!(matches!(event, Some(ClientEvent::Bound(lease)) if lease.server == other), "{event:?}");
        let (_, renew, _) = next(&mut client);
        assert_eq!(renew.dst, other, "its server from now on");
    }

    #[test]
    fn a_lease_that_cannot_be_used_is_given_back_and_asked_for_later() {
        let mut client = bound();
        let release = client.refuse(at(1), Duration::from_secs(40)).unwrap();
        assert_eq!((kind(&release), release.dst), (MessageType::Release, SERVER));
        assert_eq!(client.deadline(), at(41));
        let (now, again, event) = next(&mut client);
        assert_eq!((now, kind(&again), event), (at(41), MessageType::Discover, None));
    }

    #[test]
    fn a_lease_nobody_prolongs_ends_and_another_is_asked_for() {
        let mut client = bound();
        let mut to = Vec::new();
        loop {
            let (now, message, event) = next(&mut client);
            if event == Some(ClientEvent::Lost) {
                assert_eq!((now, kind(&message)), (at(3600), MessageType::Discover));
                break;
            }
            to.push((now.as_micros() / 1_000_000, message.dst));
            assert!(to.len() < 20, "{to:?}");
        }
        // T1, half of what is left each time, T2 and on.
        assert_eq!(to[..3], [(1800, SERVER), (2475, SERVER), (2812, SERVER)]);
        assert!(to.contains(&(3150, Ipv4Addr::BROADCAST)), "{to:?}");
        assert!(to.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 60 || pair[1].0 == 3150), "{to:?}");
    }

    #[test]
    fn questions_come_ever_more_seldom() {
        let mut client = DhcpClient::new(Instant::ZERO, MAC, 99);
        let times: Vec<u64> = (0..9).map(|_| next(&mut client).0.as_micros() / 1000).collect();
        for (pair, wait) in times.windows(2).zip([2, 4, 8, 16, 32, 64, 64, 64]) {
            assert!((pair[1] - pair[0]).abs_diff(wait * 1000) <= 1000, "{times:?}");
        }
    }

    #[test]
    fn answers_that_are_not_ours_or_make_no_sense_change_nothing() {
        let mut client = DhcpClient::new(Instant::ZERO, MAC, 7);
        let (now, discover, _) = next(&mut client);
        let offer = answer(&discover, MessageType::Offer, OURS, 3600);
        let mut other_mac = offer.clone();
        other_mac[33] ^= 1;
        let mut other_xid = offer.clone();
        other_xid[7] ^= 1;
        let mut request = offer.clone();
        request[0] = 1;
        for bad in [&other_mac[..], &other_xid, &request, &offer[..200], &[0; 1501], &[]] {
            assert_eq!(client.receive(now, bad), None);
            assert!(matches!(client.state, State::Selecting));
        }
        // An offer of nothing, and an acknowledgement before any was asked for.
        client.receive(now, &answer(&discover, MessageType::Offer, Ipv4Addr::UNSPECIFIED, 3600));
        client.receive(now, &answer(&discover, MessageType::Ack, OURS, 3600));
        assert!(matches!(client.state, State::Selecting));
        client.receive(now, &offer);
        let (now, request, _) = next(&mut client);
        let other = Ipv4Addr::new(192, 0, 2, 51);
        for bad in
            [answer(&request, MessageType::Ack, other, 3600), answer(&request, MessageType::Ack, OURS, 0)]
        {
            assert_eq!(client.receive(now, &bad), None);
        }
        assert!(matches!(client.state, State::Requesting { .. }));
    }

    #[test]
    fn a_refusal_starts_over_and_one_of_another_server_does_not() {
        let mut client = bound();
        let (now, renew, _) = next(&mut client);
        assert_eq!(
            client.receive(now, &answer(&renew, MessageType::Nak, Ipv4Addr::UNSPECIFIED, 1)),
            Some(ClientEvent::Lost)
        );
        let (_, again, event) = next(&mut client);
        assert_eq!((kind(&again), event), (MessageType::Discover, None));
        assert_ne!(read(&again).xid(), read(&renew).xid());
    }

    #[test]
    fn what_another_host_has_is_declined_and_what_is_ours_given_back() {
        let mut client = bound();
        let release = client.release().unwrap();
        assert_eq!((kind(&release), release.src, release.dst), (MessageType::Release, OURS, SERVER));
        let decline = client.decline(at(1)).unwrap();
        assert_eq!((kind(&decline), decline.dst), (MessageType::Decline, Ipv4Addr::BROADCAST));
        assert_eq!(client.deadline(), at(11));
        assert_eq!((client.release(), client.decline(at(2))), (None, None));
    }
}
