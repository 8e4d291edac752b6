//! The frame guest: makes and consumes UDP frames in guest memory itself, as many as it can, to
//! measure frames a second without any network stack in the way.
//!
//! Every transmit slot holds its finished frame from the start, so that sending costs the driver one
//! descriptor. It answers ARP for its own address and counts whatever else arrives. Each queue pair has
//! a thread of its own; flows, which are source ports, are dealt out to the pairs in turn.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use thiserror::Error;

use super::check::Header;
use super::driver::{self, DriverConfig, PairRings};
use super::handshake::{self, Agreement};
use super::ring::{Piece, Used};
use super::{GuestError, print_line};
use crate::lab::frame::udp_frame;
use crate::sys::mem::GuestMemory;

/// Frames shown to the device at a time.
const BATCH: usize = 32;
/// Pause when there is nothing to do, so that the back-end gets the processor on a small machine.
const IDLE: Duration = Duration::from_micros(50);
/// Source port of the first flow; the others follow.
const FIRST_PORT: u16 = 4000;
/// Flows at most.
const FLOWS_MAX: u16 = 1024;
/// Bytes of an ARP packet over Ethernet, with the Ethernet header (RFC 826).
const ARP_BYTES: usize = 42;

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generate {
    /// Length of a frame in bytes, Ethernet header included, FCS not.
    pub frame_bytes: u16,
    /// Where the datagrams go.
    pub to: SocketAddrV4,
}

/// Why a text is no [`Generate`].
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?}: expected udp:FRAME_BYTES:ADDRESS:PORT with 46 to 1514 bytes, such as udp:64:192.0.2.2:9001")]
pub struct BadGenerate(String);

impl FromStr for Generate {
    type Err = BadGenerate;
    fn from_str(text: &str) -> Result<Generate, BadGenerate> {
        let bad = || BadGenerate(text.to_owned());
        let rest = text.strip_prefix("udp:").ok_or_else(bad)?;
        let (size, to) = rest.split_once(':').ok_or_else(bad)?;
        let frame_bytes = size.parse().ok().filter(|size| (46..=1514).contains(size)).ok_or_else(bad)?;
        Ok(Generate { frame_bytes, to: to.parse().map_err(|_| bad())? })
    }
}

/// What a frame guest is to be.
#[derive(Clone, Debug)]
pub struct FramesConfig {
    /// Its driver; all its queue pairs are used.
    pub driver: DriverConfig,
    /// What to send; nothing if absent, then it only receives.
    pub generate: Option<Generate>,
    /// Flows the datagrams belong to, one or more for each queue pair.
    pub flows: u16,
    /// Frames to send at most on each queue pair; without it as many as go.
    pub frames_max: Option<u64>,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub ip: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: [u8; 6],
    /// For how long.
    pub duration: Duration,
}

/// Runs a frame guest for its time, then prints one JSON line with frames and rates.
///
/// # Errors
/// [`GuestError`].
pub fn run(config: &FramesConfig) -> Result<(), GuestError> {
    config.driver.validate()?;
    if config.flows > FLOWS_MAX || usize::from(config.flows) < config.driver.queues {
        let text = format!("{} flows: expected one a queue pair to {FLOWS_MAX}", config.flows);
        return Err(GuestError::Config(text));
    }
    let listener = config.driver.listen().map_err(|e| GuestError::Kernel("binding the socket", e))?;
    let mut session = config.driver.meet(listener.as_ref())?;
    let agreement = handshake::negotiate(&mut session, &config.driver)?;
    let mut layout = driver::lay_out(&config.driver, &agreement)?;
    let mut sources = Vec::new();
    for (pair, rings) in layout.pairs.drain(..).enumerate() {
        let ports = ports_of(config.flows, config.driver.queues, pair);
        sources.push(Source::new(config, layout.mem, agreement, rings, &ports)?);
    }
    handshake::start_rings(&mut session, &config.driver, &agreement, layout.mem, &layout.places)?;
    print_line(&json!({ "ready": true, "features": agreement.features }));
    let started = Instant::now();
    run_all(&mut sources, started + config.duration);
    let seconds = started.elapsed().as_secs_f64();
    handshake::stop_rings(&mut session, &layout.places);
    let sum = |of: fn(&Source) -> u64| sources.iter().map(of).sum::<u64>();
    let (sent, received) = (sum(|source| source.sent), sum(|source| source.arrivals.frames));
    print_line(&json!({
        "seconds": seconds,
        "sent": sent,
        "received": received,
        "received_bytes": sum(|source| source.arrivals.bytes),
        "sent_per_second": sent as f64 / seconds,
        "received_per_second": received as f64 / seconds,
    }));
    Ok(())
}

/// Source ports of the flows that queue pair `pair` of `pairs` has.
fn ports_of(flows: u16, pairs: usize, pair: usize) -> Vec<u16> {
    (0..flows).skip(pair).step_by(pairs).map(|flow| FIRST_PORT + flow).collect()
}

/// Runs every pair on a thread of its own until `end`, the first one on the caller's.
fn run_all(sources: &mut [Source], end: Instant) {
    let Some((first, others)) = sources.split_first_mut() else {
        return;
    };
    thread::scope(|scope| {
        for source in others {
            scope.spawn(|| source.run_until(end));
        }
        first.run_until(end);
    });
}

struct Source {
    mem: &'static GuestMemory,
    header_bytes: usize,
    mac: [u8; 6],
    ip: Ipv4Addr,
    rings: PairRings,
    /// Frames still to send.
    left: u64,
    frame_len_bytes: usize,
    free: Vec<u16>,
    /// The slot kept for ARP answers, when it is not in flight.
    answer_slot: Option<u16>,
    used: Vec<Used>,
    pieces: Vec<Piece>,
    sent: u64,
    arrivals: Arrivals,
}

/// Frames that came, each in one receive buffer or in several (MRG_RXBUF).
#[derive(Debug, Default)]
struct Arrivals {
    frames: u64,
    /// Without headers of the device.
    bytes: u64,
    /// Buffers still to come of the last frame.
    buffers_left: u16,
}

impl Arrivals {
    /// Counts one used buffer, `head` and `len_bytes` of it; returns whether a frame begins in it.
    fn add(&mut self, head: &[u8], len_bytes: usize, header_bytes: usize) -> bool {
        if self.buffers_left > 0 {
            self.buffers_left -= 1;
            self.bytes += len_bytes as u64;
            return false;
        }
        self.frames += 1;
        self.bytes += len_bytes.saturating_sub(header_bytes) as u64;
        let buffers = Header::parse(head, header_bytes).map_or(1, |header| header.num_buffers);
        self.buffers_left = buffers.saturating_sub(1);
        true
    }
}

impl Source {
    fn new(
        config: &FramesConfig,
        mem: &'static GuestMemory,
        agreement: Agreement,
        rings: PairRings,
        ports: &[u16],
    ) -> Result<Source, GuestError> {
        let header_bytes = agreement.features.header_bytes();
        let slots = u16::try_from(rings.tx_slots.len()).expect("slots are counted by ring size");
        let mut source = Source {
            mem,
            header_bytes,
            mac: config.mac,
            ip: config.ip,
            rings,
            left: config.generate.map_or(0, |_| config.frames_max.unwrap_or(u64::MAX)),
            frame_len_bytes: 0,
            free: (1..slots).collect(),
            answer_slot: Some(0),
            used: Vec::new(),
            pieces: Vec::new(),
            sent: 0,
            arrivals: Arrivals::default(),
        };
        if let Some(generate) = config.generate {
            source.fill_slots(config, generate, ports);
        }
        for (token, slot) in (0..).zip(&source.rings.rx_slots) {
            source.rings.rx.add(&slot.pieces, token).map_err(|_| {
                GuestError::Config("the receive ring is smaller than the buffers laid out for it".into())
            })?;
        }
        source.rings.rx.publish();
        // It polls: notifications would only cost the device time.
        source.rings.rx.disarm();
        source.rings.tx.disarm();
        Ok(source)
    }

    /// Writes the finished frames, the flows in turn. All have one length.
    fn fill_slots(&mut self, config: &FramesConfig, generate: Generate, ports: &[u16]) {
        let payload = vec![0x55; usize::from(generate.frame_bytes) - 42];
        self.frame_len_bytes = self.header_bytes + usize::from(generate.frame_bytes);
        for (slot, port) in self.rings.tx_slots[1..].iter().zip(ports.iter().cycle()) {
            let from = (config.mac, SocketAddrV4::new(config.ip, *port));
            let frame = udp_frame(from, (config.gateway_mac, generate.to), &payload);
            slot.write(self.mem, &vec![0; self.header_bytes]);
            slot.write_at(self.mem, self.header_bytes, &frame);
        }
    }

    fn run_until(&mut self, end: Instant) {
        while Instant::now() < end {
            self.turn();
        }
    }

    /// Sends and receives what can be, once.
    fn turn(&mut self) {
        let taken = self.take_back();
        let received = self.receive();
        let sent = if self.left > 0 { self.send() } else { 0 };
        if taken + received + sent == 0 {
            thread::sleep(IDLE);
        }
    }

    fn take_back(&mut self) -> usize {
        self.used.clear();
        self.rings.tx.take_used(usize::MAX, &mut self.used);
        for used in &self.used {
            match used.token {
                0 => self.answer_slot = Some(0),
                token => self.free.push(token),
            }
        }
        self.used.len()
    }

    fn send(&mut self) -> usize {
        let mut count = 0;
        while count < BATCH && self.left > count as u64 {
            let Some(&token) = self.free.last() else {
                break;
            };
            if !self.offer(token, self.frame_len_bytes) {
                break;
            }
            self.free.pop();
            count += 1;
        }
        self.sent += count as u64;
        self.left -= count as u64;
        self.show_tx();
        count
    }

    fn offer(&mut self, token: u16, len_bytes: usize) -> bool {
        self.pieces.clear();
        self.rings.tx_slots[usize::from(token)].pieces_of(len_bytes, &mut self.pieces);
        self.rings.tx.add(&self.pieces, token).is_ok()
    }

    fn show_tx(&mut self) {
        if self.rings.tx.publish() {
            // A full counter has told the device often enough.
            let _ = self.rings.bells.tx_kick.write(1);
        }
    }

    fn receive(&mut self) -> usize {
        self.used.clear();
        self.rings.rx.take_used(usize::MAX, &mut self.used);
        let used = std::mem::take(&mut self.used);
        for used in &used {
            let mut head = [0; 12 + ARP_BYTES];
            let len_bytes = used.len as usize;
            let have = self.rings.rx_slots[usize::from(used.token)].read(self.mem, &mut head).min(len_bytes);
            if self.arrivals.add(&head[..have], len_bytes, self.header_bytes) {
                self.answer_arp(*used, &head);
            }
            let slot = &self.rings.rx_slots[usize::from(used.token)];
            self.rings.rx.add(&slot.pieces, used.token).expect("its own descriptors are free again");
        }
        if self.rings.rx.publish() {
            // As above.
            let _ = self.rings.bells.rx_kick.write(1);
        }
        let count = used.len();
        self.used = used;
        count
    }

    /// Answers a request for the guest's own address (RFC 826).
    fn answer_arp(&mut self, used: Used, head: &[u8; 12 + ARP_BYTES]) {
        if used.len as usize > self.header_bytes + 128 {
            return;
        }
        let request = &head[self.header_bytes..self.header_bytes + ARP_BYTES];
        let asks_us =
            request[12..14] == [8, 6] && request[20..22] == [0, 1] && request[38..42] == self.ip.octets();
        let Some(slot) = self.answer_slot.filter(|_| asks_us) else {
            return;
        };
        let mut answer = vec![0; self.header_bytes];
        answer.extend(&request[6..12]);
        answer.extend(self.mac);
        answer.extend(&request[12..21]);
        answer.push(2);
        answer.extend(self.mac);
        answer.extend(self.ip.octets());
        answer.extend(&request[22..32]);
        self.rings.tx_slots[usize::from(slot)].write(self.mem, &answer);
        if self.offer(slot, answer.len()) {
            self.answer_slot = None;
            self.show_tx();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generators_parse() {
        let to = "192.0.2.2:9001".parse().unwrap();
        assert_eq!("udp:64:192.0.2.2:9001".parse(), Ok(Generate { frame_bytes: 64, to }));
        for bad in
            ["udp:64", "udp:20:192.0.2.2:9", "udp:1515:192.0.2.2:9", "tcp:64:192.0.2.2:9", "udp:64:host:9"]
        {
            assert_eq!(bad.parse::<Generate>(), Err(BadGenerate(bad.into())));
        }
    }

    #[test]
    fn flows_are_dealt_out_to_the_pairs_in_turn() {
        assert_eq!(ports_of(5, 2, 0), [4000, 4002, 4004]);
        assert_eq!(ports_of(5, 2, 1), [4001, 4003]);
    }

    #[test]
    fn a_frame_in_several_buffers_is_one_frame() {
        let mut arrivals = Arrivals::default();
        let head = |buffers: u8| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, buffers, 0];
        assert!(arrivals.add(&head(2), 4096, 12));
        assert!(!arrivals.add(&[9; 12], 54, 12), "its rest has no header");
        assert!(arrivals.add(&head(1), 118, 12));
        assert!(arrivals.add(&[], 5, 12), "too short for a header");
        assert_eq!((arrivals.frames, arrivals.bytes), (3, 4096 + 54 - 12 + 106));
    }
}
