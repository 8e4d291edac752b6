//! The handshake: what is agreed with a back-end, and handing it memory and rings.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;

use super::features::{Features, PROTOCOL_FEATURES};
use super::ring::RingAddrs;
use super::session::{Session, SessionError, protocol, ring_state, words};
use super::{DriverConfig, Order};
use crate::sys::mem::{GuestMemory, Region};

/// virtio 1.3, 2.1: acknowledged, driver, features accepted, driver ready.
const STATUS_DRIVER_OK: u64 = 1 | 2 | 8 | 4;
const DEFAULT_IP_MTU: u16 = 1500;

/// What front-end and back-end agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreement {
    /// What the back-end offers.
    pub(super) offered: Features,
    /// What both accept.
    pub(super) features: Features,
    /// The device's MAC address, where it says one.
    pub(super) mac: Option<[u8; 6]>,
    /// IP MTU of the link in bytes.
    pub(super) ip_mtu: u16,
}

/// One ring as the back-end needs to know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingPlace {
    /// Where it lies.
    pub(super) addrs: RingAddrs,
    /// Entries.
    pub(super) size: u16,
    /// Eventfd from driver to device.
    pub(super) kick: RawFd,
    /// Eventfd from device to driver.
    pub(super) call: RawFd,
}

/// Negotiates features and reads the device's configuration.
pub(super) fn negotiate(session: &mut Session, config: &DriverConfig) -> Result<Agreement, SessionError> {
    let offered = session.offered()?;
    let mut features = offered.intersect(config.features);
    if config.queues == 1 {
        features.0 &= !(1 << virtio_bindings::virtio_net::VIRTIO_NET_F_MQ);
    }
    let features = features.with_dependencies_met();
    if offered.has(PROTOCOL_FEATURES) {
        session.agree_protocol(config.protocol)?;
    }
    if session.protocol().has(protocol::MQ) {
        let pairs = session.ask_u64(FrontendReq::GET_QUEUE_NUM)?;
        if pairs < config.queues as u64 {
            return Err(SessionError::Unfit(format!(
                "has {pairs} queue pairs, {} are wanted",
                config.queues
            )));
        }
    } else if config.queues > 1 {
        return Err(SessionError::Unfit("knows no multiple queue pairs".into()));
    }
    session.tell(FrontendReq::SET_OWNER, &[], &[])?;
    let mut agreement = Agreement { offered, features, mac: None, ip_mtu: DEFAULT_IP_MTU };
    if session.protocol().has(protocol::CONFIG) {
        let space = session.config()?;
        if features.named("mac") {
            agreement.mac = space[..6].try_into().ok();
        }
        if features.named("mtu") {
            agreement.ip_mtu = u16::from_le_bytes([space[10], space[11]]);
        }
    }
    if let Some(ip_mtu) = config.ip_mtu {
        agreement.ip_mtu = ip_mtu;
    }
    if session.protocol().has(protocol::NET_MTU) && features.named("mtu") {
        let body = u64::from(agreement.ip_mtu).to_le_bytes();
        session.tell(FrontendReq::NET_SET_MTU, &body, &[])?;
    }
    if session.protocol().has(protocol::BACKEND_REQ) {
        offer_backend_channel(session)?;
    }
    Ok(agreement)
}

fn offer_backend_channel(session: &mut Session) -> Result<(), SessionError> {
    let request = FrontendReq::SET_BACKEND_REQ_FD;
    let (ours, theirs) = UnixStream::pair().map_err(|source| SessionError::Io { request, source })?;
    session.tell(request, &[], &[theirs.as_raw_fd()])?;
    // Nothing is answered on it: a back-end without requests must not miss answers. It stays open
    // for the life of the process, because a closed channel is an event of its own.
    std::mem::forget(ours);
    Ok(())
}

/// Hands over memory and rings; the rings run when this returns.
pub(super) fn start_rings(
    session: &mut Session,
    config: &DriverConfig,
    agreement: &Agreement,
    mem: &GuestMemory,
    rings: &[RingPlace],
) -> Result<(), SessionError> {
    let features = agreement.features.0.to_le_bytes();
    let enable = agreement.features.has(PROTOCOL_FEATURES);
    if config.order == Order::Qemu {
        // QEMU says so once, before it sets any feature, and never again.
        for ring in 0..count(rings) {
            session.tell(FrontendReq::SET_VRING_ENABLE, &ring_state(ring, 1), &[])?;
        }
    }
    let repeats = if config.order == Order::Qemu { rings.len() / 2 } else { 1 };
    for _ in 0..repeats {
        session.tell(FrontendReq::SET_FEATURES, &features, &[])?;
        if !session.protocol().has(protocol::CONFIGURE_MEM_SLOTS) {
            share_table(session, mem)?;
        }
    }
    if session.protocol().has(protocol::CONFIGURE_MEM_SLOTS) {
        share_regions(session, mem)?;
    }
    for (index, ring) in (0..).zip(rings) {
        start_ring(session, mem, index, ring)?;
    }
    if enable && config.order == Order::Spec {
        for ring in 0..count(rings) {
            session.tell(FrontendReq::SET_VRING_ENABLE, &ring_state(ring, 1), &[])?;
        }
    }
    if session.protocol().has(protocol::STATUS) {
        session.tell(FrontendReq::SET_STATUS, &STATUS_DRIVER_OK.to_le_bytes(), &[])?;
    }
    // Messages are handled in order: an answer here means the rings are running.
    session.offered().map(drop)
}

fn count(rings: &[RingPlace]) -> u32 {
    u32::try_from(rings.len()).expect("few rings")
}

fn region_words(region: &Region) -> [u64; 4] {
    [region.guest_addr, region.len_bytes, region.user_addr(), region.file_offset]
}

fn share_table(session: &mut Session, mem: &GuestMemory) -> Result<(), SessionError> {
    let regions = mem.regions();
    let mut body = words(&[regions.len() as u64]);
    for region in regions {
        body.extend(words(&region_words(region)));
    }
    session.tell(FrontendReq::SET_MEM_TABLE, &body, &vec![mem.fd(); regions.len()])
}

fn share_regions(session: &mut Session, mem: &GuestMemory) -> Result<(), SessionError> {
    let slots = session.ask_u64(FrontendReq::GET_MAX_MEM_SLOTS)?;
    if slots < mem.regions().len() as u64 {
        return Err(SessionError::Unfit(format!("has {slots} memory slots")));
    }
    for region in mem.regions() {
        let mut body = words(&[0]);
        body.extend(words(&region_words(region)));
        session.tell(FrontendReq::ADD_MEM_REG, &body, &[mem.fd()])?;
    }
    Ok(())
}

fn start_ring(
    session: &mut Session,
    mem: &GuestMemory,
    index: u32,
    ring: &RingPlace,
) -> Result<(), SessionError> {
    let base = u16::from_le(mem.u16_at(ring.addrs.used + 2).load(std::sync::atomic::Ordering::Acquire));
    session.tell(FrontendReq::SET_VRING_NUM, &ring_state(index, u32::from(ring.size)), &[])?;
    session.tell(FrontendReq::SET_VRING_BASE, &ring_state(index, u32::from(base)), &[])?;
    let mut addr = ring_state(index, 0).to_vec();
    let [desc, used, avail] =
        [ring.addrs.desc, ring.addrs.used, ring.addrs.avail].map(|addr| mem.user_addr(addr));
    addr.extend(words(&[desc, used, avail, 0]));
    session.tell(FrontendReq::SET_VRING_ADDR, &addr, &[])?;
    let which = u64::from(index).to_le_bytes();
    session.tell(FrontendReq::SET_VRING_CALL, &which, &[ring.call])?;
    session.tell(FrontendReq::SET_VRING_KICK, &which, &[ring.kick])
}

/// Stops the rings as an orderly front-end does. The back-end may be gone: nothing is lost then.
pub(super) fn stop_rings(session: &mut Session, rings: &[RingPlace]) {
    for ring in 0..count(rings) {
        if let Err(e) = session.ask(FrontendReq::GET_VRING_BASE, &ring_state(ring, 0)) {
            eprintln!("stopping ring {ring}: {e}");
            return;
        }
    }
}
