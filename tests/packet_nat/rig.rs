//! A packet NAT between a guest and a world of frames.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vunet::engine::counters::DropReason;
use vunet::engine::packet::config::{PacketNatConfig, PublishedPort};
use vunet::engine::packet::head::Packet;
use vunet::engine::packet::ports::{Mappings, WorkerSet};
use vunet::engine::packet::{PacketNat, Side, Verdict};
use vunet::limits;
use vunet::time::Instant;
use vunet::wire::vnet::VnetHeader;

use crate::packets::{Frame, IP_AT, TRANSPORT_AT, word};

pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(crate) const GUEST_2: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub(crate) const REMOTE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
pub(crate) const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
pub(crate) const PORTS: RangeInclusive<u16> = 49_152..=65_535;

pub(crate) fn settings() -> PacketNatConfig {
    PacketNatConfig {
        outside: Some(OUTSIDE),
        ports: PORTS,
        flows_max: 70_000,
        guest_flows_max: 60_000,
        ..PacketNatConfig::new("10.0.2.0/24".parse().expect("a subnet"), GATEWAY, (3, 4))
    }
}

pub(crate) fn published(protocol: vunet::config::Protocol, port: u16, guest_port: u16) -> PublishedPort {
    PublishedPort { protocol, port, guest: GUEST, guest_port }
}

/// The NAT, and the time.
pub(crate) struct Rig {
    pub(crate) nat: PacketNat,
    pub(crate) now: Instant,
    pub(crate) tried: WorkerSet,
}

impl Rig {
    pub(crate) fn new(config: PacketNatConfig) -> Rig {
        let mappings = Arc::new(Mutex::new(Mappings::new(config.ports.clone(), (5, 6))));
        Rig::sharing(config, mappings)
    }

    pub(crate) fn sharing(config: PacketNatConfig, mappings: Arc<Mutex<Mappings>>) -> Rig {
        let now = Instant::from_micros(1_000_000);
        let nat = PacketNat::new(config, mappings, now).expect("memory for a table");
        Rig { nat, now, tried: WorkerSet::default() }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(next) = self.nat.next_deadline().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.nat.tick(self.now);
        }
        self.now = until;
        self.nat.tick(until);
    }

    /// Judges a frame as it would be: by its first bytes.
    pub(crate) fn judge(&mut self, side: Side, vnet: &VnetHeader, frame: &mut [u8]) -> Verdict {
        let len_bytes = frame.len();
        let head = &mut frame[..len_bytes.min(limits::FRAME_HEAD_BYTES)];
        let mut packet = Packet { tried: self.tried, ..Packet::new(vnet, head, len_bytes) };
        match side {
            Side::Guest => self.nat.from_guest(self.now, &mut packet),
            Side::World => self.nat.from_world(self.now, &mut packet),
        }
    }

    /// A frame, and what becomes of it.
    pub(crate) fn send(&mut self, side: Side, frame: &[u8]) -> (Verdict, Vec<u8>) {
        let mut frame = frame.to_vec();
        let verdict = self.judge(side, &VnetHeader::default(), &mut frame);
        (verdict, frame)
    }

    /// A frame that must leave; returns it as it left.
    #[track_caller]
    pub(crate) fn out(&mut self, frame: &Frame) -> Vec<u8> {
        self.carried(Side::Guest, &frame.build(), Verdict::Forward)
    }

    /// A frame that must come in; returns it as it came.
    #[track_caller]
    pub(crate) fn inn(&mut self, frame: &Frame) -> Vec<u8> {
        self.carried(Side::World, &frame.build(), Verdict::Forward)
    }

    /// A frame that must turn back.
    #[track_caller]
    pub(crate) fn around(&mut self, frame: &Frame) -> Vec<u8> {
        self.carried(Side::Guest, &frame.build(), Verdict::Hairpin)
    }

    #[track_caller]
    pub(crate) fn carried(&mut self, side: Side, frame: &[u8], expected: Verdict) -> Vec<u8> {
        let (verdict, frame) = self.send(side, frame);
        assert_eq!(verdict, expected);
        frame
    }

    /// A frame that must go nowhere, unchanged and counted.
    #[track_caller]
    pub(crate) fn dropped(&mut self, side: Side, frame: &Frame, reason: DropReason) {
        let before = self.nat.counters().dropped(reason);
        let (verdict, _) = self.send(side, &frame.build());
        assert_eq!(verdict, Verdict::Drop(reason));
        assert_eq!(self.nat.counters().dropped(reason), before + 1);
    }

    /// A frame whose sender must be told; returns type, code and the rest of the ICMP message.
    #[track_caller]
    pub(crate) fn told(&mut self, side: Side, vnet: &VnetHeader, frame: &[u8]) -> (u8, u8, Vec<u8>) {
        let mut copy = frame.to_vec();
        let verdict = self.judge(side, vnet, &mut copy);
        let Verdict::Answer(len) = verdict else { panic!("{verdict:?}") };
        assert_eq!(copy, frame, "the packet told of is unchanged");
        let answer = &self.nat.answer()[..len];
        assert_eq!(answer[..6], frame[6..12], "to the station it came from");
        assert_eq!(answer[IP_AT + 16..IP_AT + 20], frame[IP_AT + 12..IP_AT + 16], "to its sender");
        assert_eq!(answer[TRANSPORT_AT + 8..], frame[IP_AT..][..answer.len() - TRANSPORT_AT - 8], "quoted");
        (answer[TRANSPORT_AT], answer[TRANSPORT_AT + 1], answer[TRANSPORT_AT + 4..].to_vec())
    }
}

/// The source of a frame.
pub(crate) fn source(frame: &[u8]) -> (Ipv4Addr, u16) {
    (address(frame, IP_AT + 12), word(frame, TRANSPORT_AT))
}

/// An address in a frame.
pub(crate) fn address(frame: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3])
}
