//! Our own station on the link, as one worker sees it: the address the guest is hidden behind, and where
//! packets go next.
//!
//! All workers share the station behind a lock, and none takes it for a frame to a neighbour it knows: what it
//! was told it keeps, until the station's version changes or the time it was told to look again.
//!
//! May touch: `engine::station`. Read first: there.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::addr::MacAddr;
use crate::config::LinkAddress;
use crate::engine::station::{NextHop, Station};
use crate::limits;
use crate::time::Instant;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::vnet::VnetHeader;

/// Next hops a worker keeps: the router, and some neighbours.
const HOPS_KEPT: usize = 8;

/// The station of a process, shared by its workers.
#[derive(Debug)]
pub struct SharedStation {
    /// The station's version as it was when the lock was last free.
    version: AtomicU64,
    mac: MacAddr,
    /// Whether an answer of DHCP was asked for, as of then.
    awaits_dhcp: AtomicBool,
    station: Mutex<Station>,
}

impl SharedStation {
    /// A station for all workers.
    pub fn new(station: Station) -> SharedStation {
        let (version, mac) = (AtomicU64::new(station.version()), station.mac());
        let awaits_dhcp = AtomicBool::new(station.awaits_dhcp());
        SharedStation { version, mac, awaits_dhcp, station: Mutex::new(station) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Station) -> T) -> T {
        let mut station = self.station.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = act(&mut station);
        self.awaits_dhcp.store(station.awaits_dhcp(), Ordering::Relaxed);
        self.version.store(station.version(), Ordering::Release);
        outcome
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// To this neighbour.
    To(MacAddr),
    /// To one whose MAC address was asked for.
    Wait(Ipv4Addr),
    /// There is none.
    None,
    /// Who has the address is not known, and not asked for: too many others are.
    Withheld,
    /// We may have an address on the link in a moment.
    NotYet,
    /// We have no address there.
    NoAddress,
}

#[derive(Clone, Copy, Debug)]
struct Hop {
    target: Ipv4Addr,
    mac: MacAddr,
    until: Instant,
}

/// A frame that waits until its next hop is known.
#[derive(Debug)]
pub(super) struct Parked {
    target: Ipv4Addr,
    pub(super) vnet: VnetHeader,
    /// The frame, its MAC addresses not written yet.
    pub(super) frame: Box<[u8]>,
}

/// One worker's view.
#[derive(Debug)]
pub(super) struct Outside {
    shared: Arc<SharedStation>,
    seen: u64,
    held: Option<LinkAddress>,
    hops: [Option<Hop>; HOPS_KEPT],
    parked: VecDeque<Parked>,
    parked_bytes: usize,
}

impl Outside {
    pub(super) fn new(shared: Arc<SharedStation>) -> Outside {
        let (hops, parked) = ([None; HOPS_KEPT], VecDeque::new());
        Outside { shared, seen: 0, held: None, hops, parked, parked_bytes: 0 }
    }

    /// Our MAC address on the link.
    pub(super) fn mac(&self) -> MacAddr {
        self.shared.mac
    }

    /// Whether `addr` is our address there, as of the last [`Outside::address`].
    pub(super) fn is_ours(&self, addr: Ipv4Addr) -> bool {
        self.held.is_some_and(|held| held.addr == addr)
    }

    /// Whether an answer of DHCP may come.
    pub(super) fn awaits_dhcp(&self) -> bool {
        self.shared.awaits_dhcp.load(Ordering::Relaxed)
    }

    /// Our address there, if we have one. `changed` is told when it is another than before.
    pub(super) fn address(&mut self, changed: impl FnOnce(Option<Ipv4Addr>)) -> Option<LinkAddress> {
        let version = self.shared.version.load(Ordering::Acquire);
        if version != self.seen {
            self.seen = version;
            self.hops = [None; HOPS_KEPT];
            let held = self.shared.with(|station| station.held());
            let before = std::mem::replace(&mut self.held, held);
            if before.map(|held| held.addr) != held.map(|held| held.addr) {
                changed(held.map(|held| held.addr));
            }
        }
        self.held
    }

    /// Where a packet to `dst` goes. To be called after [`Outside::address`].
    pub(super) fn way(&mut self, now: Instant, dst: Ipv4Addr) -> Way {
        let Some(held) = self.held else {
            let next = self.shared.with(|station| station.next_hop(now, dst));
            return if next == NextHop::NotYet { Way::NotYet } else { Way::NoAddress };
        };
        let target = match held.router {
            _ if held.subnet.contains(dst) => dst,
            Some(router) => router,
            None => return Way::None,
        };
        let kept = &mut self.hops[(target.to_bits() as usize) % HOPS_KEPT];
        if let Some(hop) = kept
            && hop.target == target
            && now < hop.until
        {
            return Way::To(hop.mac);
        }
        match self.shared.with(|station| station.next_hop(now, dst)) {
            NextHop::At(mac, until) => {
                *kept = Some(Hop { target, mac, until });
                Way::To(mac)
            }
            NextHop::Asked(target) => Way::Wait(target),
            NextHop::Unreachable => Way::None,
            NextHop::Withheld => Way::Withheld,
            NextHop::NotYet => Way::NotYet,
            NextHop::NoAddress => Way::NoAddress,
        }
    }

    /// Keeps a frame until its next hop is known. Returns whether there was room.
    pub(super) fn park(&mut self, target: Ipv4Addr, vnet: VnetHeader, frame: Box<[u8]>) -> bool {
        let has_room = self.parked.len() < limits::PARKED_FRAMES_MAX
            && self.parked_bytes + frame.len() <= limits::PARKED_BYTES_MAX;
        if has_room {
            self.parked_bytes += frame.len();
            self.parked.push_back(Parked { target, vnet, frame });
        }
        has_room
    }

    /// Forgets the frames that wait: they were of a guest that is gone.
    pub(super) fn forget_parked(&mut self) {
        self.parked.clear();
        self.parked_bytes = 0;
    }

    /// Whether any frame waits.
    pub(super) fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Takes the frames that need wait no longer: with their next hop, or without if there is none.
    pub(super) fn unpark(&mut self, now: Instant, mut each: impl FnMut(Option<MacAddr>, &mut Parked)) {
        for _ in 0..self.parked.len() {
            let Some(mut parked) = self.parked.pop_front() else { return };
            let mac = match self.way(now, parked.target) {
                Way::Wait(_) | Way::NotYet => {
                    self.parked.push_back(parked);
                    continue;
                }
                Way::To(mac) => Some(mac),
                Way::None | Way::Withheld | Way::NoAddress => None,
            };
            self.parked_bytes -= parked.frame.len();
            each(mac, &mut parked);
        }
    }

    /// Whether the frame of the link may be one for the station itself: ARP, or DHCP for who has no address.
    pub(super) fn may_be_for_station(head: &[u8]) -> bool {
        let Some(ethertype) = head.get(12..ethernet::HEADER_BYTES) else { return false };
        let ethertype = EtherType(u16::from_be_bytes([ethertype[0], ethertype[1]]));
        // Port 67 to 68 behind an IPv4 header without options.
        let is_dhcp = || head.get(23) == Some(&17) && head.get(34..38) == Some(&[0, 67, 0, 68]);
        ethertype == EtherType::ARP || ethertype == EtherType::IPV4 && is_dhcp()
    }

    /// Hands the station a frame of the link; returns whether it took it.
    pub(super) fn receive(&mut self, now: Instant, head: &[u8]) -> bool {
        self.shared.with(|station| station.receive(now, head))
    }

    /// Does what is due, whichever worker comes to it first: any of them may have asked.
    pub(super) fn poll(&mut self, now: Instant) {
        self.shared.with(|station| station.poll(now));
    }

    /// When [`Outside::poll`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.shared.with(|station| station.deadline())
    }

    /// The next frame of the station's.
    pub(super) fn next_frame(&mut self) -> Option<Box<[u8]>> {
        self.shared.with(Station::next_frame)
    }

    /// Gives a leased address back.
    pub(super) fn release(&mut self) {
        self.shared.with(Station::release);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::addr::Ipv4Subnet;
    use crate::config::StationAddress;
    use crate::engine::station::StationConfig;
    use crate::wire::arp;

    const OURS: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 1]);
    const ROUTER: (MacAddr, Ipv4Addr) = (MacAddr([2, 0, 0, 0, 0, 2]), Ipv4Addr::new(192, 0, 2, 2));
    const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    fn ms(at: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(at)
    }

    fn held() -> LinkAddress {
        let subnet = Ipv4Subnet::new([192, 0, 2, 0].into(), 24).unwrap();
        LinkAddress { addr: [192, 0, 2, 50].into(), subnet, router: Some(ROUTER.1) }
    }

    /// Two workers' views of one station, its address settled.
    fn views() -> [Outside; 2] {
        let guests = Ipv4Subnet::new([10, 0, 2, 0].into(), 24).unwrap();
        let address = StationAddress::Fixed(held());
        let station = Station::new(ms(0), StationConfig { mac: OURS, address, guests, seed: 3 });
        let shared = Arc::new(SharedStation::new(station));
        let mut views = [(), ()].map(|()| Outside::new(Arc::clone(&shared)));
        assert_eq!(views[1].address(|_| panic!("there is none")), None);
        assert_eq!(views[1].way(ms(0), WORLD), Way::NotYet);
        for at in [0, 200, 400, 600] {
            views[1].poll(ms(at));
            views[0].poll(ms(at));
        }
        while views[0].next_frame().is_some() {}
        views
    }

    fn answer(from: (MacAddr, Ipv4Addr)) -> [u8; arp::FRAME_BYTES] {
        let packet = arp::Packet {
            operation: arp::Operation::Reply,
            sender_mac: from.0,
            sender_ip: from.1,
            target_mac: OURS,
            target_ip: held().addr,
        };
        packet.frame(OURS, from.0)
    }

    #[test]
    fn what_one_worker_hears_is_known_to_the_other() {
        let [mut first, mut second] = views();
        let mut told = Vec::new();
        for view in [&mut first, &mut second] {
            assert_eq!(view.address(|addr| told.push(addr)), Some(held()));
            assert_eq!(view.address(|_| panic!("told already")), Some(held()));
        }
        assert_eq!(told, [Some(held().addr), Some(held().addr)]);
        assert_eq!(first.way(ms(700), WORLD), Way::NotYet, "the router answers within a moment");
        assert_eq!(first.way(ms(1700), WORLD), Way::Wait(ROUTER.1), "or not");
        assert!(second.receive(ms(700), &answer(ROUTER)));
        first.address(|_| panic!("the address is the same"));
        assert_eq!(first.way(ms(700), WORLD), Way::To(ROUTER.0));
        let moved = MacAddr([2, 0, 0, 0, 0, 9]);
        assert!(second.receive(ms(800), &answer((moved, ROUTER.1))));
        first.address(|_| panic!("the address is the same"));
        assert_eq!(first.way(ms(800), WORLD), Way::To(moved), "what was kept is void");
    }

    #[test]
    fn frames_wait_for_their_next_hop_within_bounds_and_are_given_up_with_it() {
        let [mut view, _] = views();
        view.address(|_| {});
        let other = Ipv4Addr::new(192, 0, 2, 77);
        assert_eq!(view.way(ms(700), other), Way::Wait(other));
        assert!(view.park(ROUTER.1, VnetHeader::default(), vec![1; 100].into()));
        let mut parked = 1;
        while view.park(other, VnetHeader::default(), vec![2; 60_000].into()) {
            parked += 1;
            assert!(parked <= limits::PARKED_FRAMES_MAX);
        }
        assert_eq!(parked, 1 + limits::PARKED_BYTES_MAX / 60_000);
        view.unpark(ms(700), |_, _| panic!("nobody answered"));
        view.receive(ms(700), &answer(ROUTER));
        view.address(|_| {});
        let mut sent = Vec::new();
        view.unpark(ms(700), |mac, parked| sent.push((mac, parked.frame.len())));
        assert_eq!(sent, [(Some(ROUTER.0), 100)]);
        for second in 1..=4 {
            view.poll(ms(700 + second * 1000));
        }
        view.address(|_| {});
        sent.clear();
        view.unpark(ms(4700), |mac, parked| sent.push((mac, parked.frame.len())));
        assert_eq!(sent, [(None, 60_000); 4], "the host is gone");
        assert!(!view.has_parked());
        assert!(view.park(other, VnetHeader::default(), vec![2; 60_000].into()), "there is room again");
    }

    #[test]
    fn only_arp_and_dhcp_are_shown_to_the_station() {
        let mut dhcp = [0; 60];
        dhcp[12..14].copy_from_slice(&[8, 0]);
        dhcp[23] = 17;
        dhcp[34..38].copy_from_slice(&[0, 67, 0, 68]);
        assert!(Outside::may_be_for_station(&answer(ROUTER)) && Outside::may_be_for_station(&dhcp));
        for (at, byte) in [(12, 9), (23, 6), (35, 53), (37, 53)] {
            let mut other = dhcp;
            other[at] = byte;
            assert!(!Outside::may_be_for_station(&other), "{at}");
        }
        assert!(!Outside::may_be_for_station(&dhcp[..13]));
    }
}
