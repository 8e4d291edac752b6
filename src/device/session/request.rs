//! What a vhost-user message asks, judged by its bytes alone.
//!
//! Payload sizes are lower bounds: user-mode Linux pads its memory table to two regions, and a
//! longer payload from a newer front-end still begins with what we know. Descriptors a message has
//! no use for are closed; where one is needed, exactly one must be there.
//!
//! May touch: nothing. Read first: the vhost-user specification, "Front-end message types".

use std::fs::File;
use std::os::fd::OwnedFd;

use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserInflight, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserMsgValidator, VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use crate::device::guest_mem::RegionSpec;
use crate::device::ring::RingAddrs;
use crate::limits::{RING_SIZE_MAX, VRINGS_MAX};

/// Why a message was not carried out. It costs the message, not the connection.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    /// A type nobody defined, or one we never offered the feature for.
    #[error("not a message this back-end serves")]
    Unsupported,
    /// Fewer payload bytes than the type has.
    #[error("{got} bytes of payload instead of {want}")]
    Short {
        /// Bytes that came.
        got: usize,
        /// Bytes of the type.
        want: usize,
    },
    /// Not the number of descriptors the type needs.
    #[error("{got} file descriptors instead of {want}")]
    Descriptors {
        /// Descriptors that came.
        got: usize,
        /// Descriptors needed.
        want: usize,
    },
    /// No such ring.
    #[error("ring {0} of {VRINGS_MAX}")]
    Ring(u64),
    /// Not a size a split ring can have.
    #[error("ring size {0} is not a power of two from 2 to {RING_SIZE_MAX}")]
    RingSize(u32),
    /// Ring addresses not aligned as virtio 1.3, 2.7 asks, or unknown flags.
    #[error("misaligned ring addresses or unknown flags")]
    RingAddress,
    /// A field that holds nothing sensible.
    #[error("{0}")]
    Value(&'static str),
    /// Features that were not offered.
    #[error("features acknowledged that were not offered: {0}")]
    Features(String),
    /// The memory table, or one region.
    #[error(transparent)]
    Memory(#[from] crate::device::guest_mem::RegionError),
    /// A ring could not be started.
    #[error("ring {index} cannot be started")]
    Start {
        /// Its index.
        index: usize,
        /// Why.
        #[source]
        why: crate::device::command::StartError,
    },
    /// The kernel refused something the message needs.
    #[error("{0}")]
    System(&'static str, #[source] std::io::Error),
}

/// A part of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigRange {
    pub(super) offset_bytes: u32,
    pub(super) size_bytes: u32,
    pub(super) flags: u32,
}

/// An inflight area, asked for or handed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InflightArea {
    pub(super) size_bytes: u64,
    pub(super) offset_bytes: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
}

/// A message's meaning. Ring indices are below [`VRINGS_MAX`].
#[derive(Debug)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    /// SET_OWNER, RESET_OWNER, SET_CONFIG: nothing to do. Nothing in the configuration space is the
    /// driver's to set.
    Nothing,
    GetQueueNum,
    SetMemTable(Vec<(RegionSpec, File)>),
    AddMemReg(RegionSpec, File),
    RemMemReg(RegionSpec),
    GetMaxMemSlots,
    SetVringNum(usize, u16),
    SetVringAddr(usize, RingAddrs),
    /// Only remembered: a ring starts where its used index stands, whatever the front-end says.
    SetVringBase(usize, u16),
    GetVringBase(usize),
    /// A descriptor, or none: the ring is polled, or wants no notification.
    SetVringKick(usize, Option<OwnedFd>),
    SetVringCall(usize, Option<OwnedFd>),
    SetVringErr(usize, Option<OwnedFd>),
    SetVringEnable(usize, bool),
    NetSetMtu(u64),
    SetBackendReqFd(OwnedFd),
    GetConfig(ConfigRange),
    GetInflightFd(InflightArea),
    SetInflightFd(InflightArea, OwnedFd),
    ResetDevice,
    SetStatus(u64),
    GetStatus,
}

impl Request {
    /// Reads a message of type `code`.
    pub(super) fn parse(code: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Request, Refusal> {
        use FrontendReq as Req;
        let code = Req::try_from(code).map_err(|_| Refusal::Unsupported)?;
        let number = || read::<VhostUserU64>(payload).map(|n| n.value);
        Ok(match code {
            Req::GET_FEATURES => Request::GetFeatures,
            Req::SET_FEATURES => Request::SetFeatures(number()?),
            Req::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
            Req::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(number()?),
            Req::SET_OWNER | Req::RESET_OWNER => Request::Nothing,
            Req::GET_QUEUE_NUM => Request::GetQueueNum,
            Req::SET_MEM_TABLE => Request::SetMemTable(memory_table(payload, fds)?),
            Req::ADD_MEM_REG => Request::AddMemReg(single_region(payload)?, one(fds)?.into()),
            Req::REM_MEM_REG => Request::RemMemReg(single_region(payload)?),
            Req::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
            Req::SET_VRING_NUM => {
                let (index, size) = vring_state(payload)?;
                Request::SetVringNum(index, ring_size(size)?)
            }
            Req::SET_VRING_ADDR => vring_addr(payload)?,
            Req::SET_VRING_BASE => vring_state(payload).map(|(n, at)| Request::SetVringBase(n, at as u16))?,
            Req::GET_VRING_BASE => Request::GetVringBase(vring_state(payload)?.0),
            Req::SET_VRING_KICK => vring_fd(payload, fds).map(|(n, fd)| Request::SetVringKick(n, fd))?,
            Req::SET_VRING_CALL => vring_fd(payload, fds).map(|(n, fd)| Request::SetVringCall(n, fd))?,
            Req::SET_VRING_ERR => vring_fd(payload, fds).map(|(n, fd)| Request::SetVringErr(n, fd))?,
            Req::SET_VRING_ENABLE => match vring_state(payload)? {
                (index, on @ 0..=1) => Request::SetVringEnable(index, on == 1),
                _ => return Err(Refusal::Value("neither enabled nor disabled")),
            },
            Req::NET_SET_MTU => Request::NetSetMtu(number()?),
            Req::SET_BACKEND_REQ_FD => Request::SetBackendReqFd(one(fds)?),
            Req::GET_CONFIG => Request::GetConfig(config(payload)?),
            Req::SET_CONFIG => config_written(payload).map(|()| Request::Nothing)?,
            Req::GET_INFLIGHT_FD => Request::GetInflightFd(inflight(payload)?),
            Req::SET_INFLIGHT_FD => Request::SetInflightFd(inflight(payload)?, one(fds)?),
            Req::RESET_DEVICE => Request::ResetDevice,
            Req::SET_STATUS => Request::SetStatus(number()?),
            Req::GET_STATUS => Request::GetStatus,
            _ => return Err(Refusal::Unsupported),
        })
    }
}

/// Whether a message of type `code` has a reply of its own, which its sender waits for.
pub(super) fn awaits_reply(code: u32) -> bool {
    use FrontendReq as Req;
    matches!(
        Req::try_from(code),
        Ok(Req::GET_FEATURES
            | Req::GET_PROTOCOL_FEATURES
            | Req::GET_QUEUE_NUM
            | Req::GET_VRING_BASE
            | Req::GET_CONFIG
            | Req::GET_INFLIGHT_FD
            | Req::GET_MAX_MEM_SLOTS
            | Req::GET_STATUS)
    )
}

/// Copies a `T` off the start of `bytes`.
fn read<T: ByteValued + Default>(bytes: &[u8]) -> Result<T, Refusal> {
    read_first(bytes, size_of::<T>())
}

/// Copies the first `want` bytes of a `T`; the rest of it stays zero.
fn read_first<T: ByteValued + Default>(bytes: &[u8], want: usize) -> Result<T, Refusal> {
    let mut value = T::default();
    let bytes = bytes.get(..want).ok_or(Refusal::Short { got: bytes.len(), want })?;
    value.as_mut_slice()[..want].copy_from_slice(bytes);
    Ok(value)
}

fn one(mut fds: Vec<OwnedFd>) -> Result<OwnedFd, Refusal> {
    let got = fds.len();
    match fds.pop() {
        Some(fd) if got == 1 => Ok(fd),
        _ => Err(Refusal::Descriptors { got, want: 1 }),
    }
}

fn ring_index(index: u64) -> Result<usize, Refusal> {
    usize::try_from(index).ok().filter(|n| *n < VRINGS_MAX).ok_or(Refusal::Ring(index))
}

fn ring_size(size: u32) -> Result<u16, Refusal> {
    let fits = |n: &u16| *n >= 2 && *n <= RING_SIZE_MAX && n.is_power_of_two();
    u16::try_from(size).ok().filter(fits).ok_or(Refusal::RingSize(size))
}

fn vring_state(payload: &[u8]) -> Result<(usize, u32), Refusal> {
    let state: VhostUserVringState = read(payload)?;
    Ok((ring_index(u64::from(state.index))?, state.num))
}

fn vring_addr(payload: &[u8]) -> Result<Request, Refusal> {
    let addr: VhostUserVringAddr = read(payload)?;
    let index = ring_index(u64::from(addr.index))?;
    if !addr.is_valid() {
        return Err(Refusal::RingAddress);
    }
    let addrs = RingAddrs { descriptors: addr.descriptor, avail: addr.available, used: addr.used };
    Ok(Request::SetVringAddr(index, addrs))
}

/// Bits of the payload of KICK, CALL and ERR: the ring's index, and that no descriptor comes.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NOFD_MASK: u64 = 0x100;

fn vring_fd(payload: &[u8], fds: Vec<OwnedFd>) -> Result<(usize, Option<OwnedFd>), Refusal> {
    let value = read::<VhostUserU64>(payload)?.value;
    let index = ring_index(value & VRING_INDEX_MASK)?;
    let fd = if value & VRING_NOFD_MASK == 0 { Some(one(fds)?) } else { None };
    Ok((index, fd))
}

fn region_spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        size_bytes: region.memory_size,
        user_addr: region.user_addr,
        file_offset_bytes: region.mmap_offset,
    }
}

fn single_region(payload: &[u8]) -> Result<RegionSpec, Refusal> {
    read::<VhostUserSingleMemoryRegion>(payload).map(|single| region_spec(&single))
}

fn memory_table(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Vec<(RegionSpec, File)>, Refusal> {
    let header: VhostUserMemory = read(payload)?;
    let want = header.num_regions as usize;
    if fds.len() != want {
        return Err(Refusal::Descriptors { got: fds.len(), want });
    }
    let mut rest = &payload[size_of::<VhostUserMemory>()..];
    let mut table = Vec::with_capacity(want);
    for fd in fds {
        let region: VhostUserMemoryRegion = read(rest)?;
        rest = &rest[size_of::<VhostUserMemoryRegion>()..];
        table.push((region_spec(&region), File::from(fd)));
    }
    Ok(table)
}

fn config(payload: &[u8]) -> Result<ConfigRange, Refusal> {
    let VhostUserConfig { offset, size, flags } = read(payload)?;
    Ok(ConfigRange { offset_bytes: offset, size_bytes: size, flags })
}

/// Checks that a write to the configuration space is whole.
fn config_written(payload: &[u8]) -> Result<(), Refusal> {
    let range = config(payload)?;
    let want = size_of::<VhostUserConfig>() + range.size_bytes as usize;
    if payload.len() < want {
        return Err(Refusal::Short { got: payload.len(), want });
    }
    Ok(())
}

/// Bytes of the inflight description without its trailing padding, which some send and some do not.
const INFLIGHT_BYTES: usize = 20;

fn inflight(payload: &[u8]) -> Result<InflightArea, Refusal> {
    let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } =
        read_first(payload, INFLIGHT_BYTES)?;
    if usize::from(num_queues) > VRINGS_MAX || queue_size > RING_SIZE_MAX {
        return Err(Refusal::Value("inflight area for more or longer rings than there can be"));
    }
    Ok(InflightArea { size_bytes: mmap_size, offset_bytes: mmap_offset, queues: num_queues, queue_size })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn null_fds(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    fn state(index: u32, num: u32) -> Vec<u8> {
        [index.to_ne_bytes(), num.to_ne_bytes()].concat()
    }

    fn parse(code: FrontendReq, payload: &[u8], fds: usize) -> Result<Request, Refusal> {
        Request::parse(code.into(), payload, null_fds(fds))
    }

    #[test]
    fn ring_size_must_be_a_power_of_two_within_bounds() {
        for good in [2, 64, 1024, 32_768] {
            assert!(parse(FrontendReq::SET_VRING_NUM, &state(0, good), 0).is_ok(), "{good}");
        }
        for bad in [0, 1, 3, 300, 65_536, u32::MAX] {
            let refused = parse(FrontendReq::SET_VRING_NUM, &state(0, bad), 0);
            assert!(matches!(refused, Err(Refusal::RingSize(n)) if n == bad), "{bad}");
        }
    }

    #[test]
    fn ring_index_at_the_limit_is_taken_and_one_past_it_refused() {
        let last = VRINGS_MAX as u32 - 1;
        assert!(parse(FrontendReq::GET_VRING_BASE, &state(last, 0), 0).is_ok());
        assert!(matches!(parse(FrontendReq::GET_VRING_BASE, &state(last + 1, 0), 0), Err(Refusal::Ring(_))));
    }

    #[test]
    fn kick_needs_exactly_one_descriptor_unless_it_says_none() {
        let with = 3u64.to_ne_bytes();
        let without = (3u64 | 0x100).to_ne_bytes();
        assert!(matches!(
            parse(FrontendReq::SET_VRING_KICK, &with, 1),
            Ok(Request::SetVringKick(3, Some(_)))
        ));
        assert!(matches!(
            parse(FrontendReq::SET_VRING_KICK, &without, 0),
            Ok(Request::SetVringKick(3, None))
        ));
        assert!(matches!(
            parse(FrontendReq::SET_VRING_KICK, &with, 0),
            Err(Refusal::Descriptors { got: 0, want: 1 })
        ));
        assert!(matches!(
            parse(FrontendReq::SET_VRING_KICK, &with, 2),
            Err(Refusal::Descriptors { got: 2, want: 1 })
        ));
    }

    #[test]
    fn memory_table_padded_beyond_its_count_is_taken() {
        let mut payload = 1u32.to_ne_bytes().to_vec();
        payload.resize(8 + 2 * 32, 0);
        payload[16..24].copy_from_slice(&0x1000u64.to_ne_bytes());
        match parse(FrontendReq::SET_MEM_TABLE, &payload, 1) {
            Ok(Request::SetMemTable(table)) => {
                assert_eq!(table.len(), 1);
                assert_eq!(table[0].0.size_bytes, 0x1000);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn memory_table_with_missing_or_extra_descriptors_is_refused() {
        let mut payload = 2u32.to_ne_bytes().to_vec();
        payload.resize(8 + 2 * 32, 0);
        for fds in [0, 1, 3, 33] {
            let refused = parse(FrontendReq::SET_MEM_TABLE, &payload, fds);
            assert!(matches!(refused, Err(Refusal::Descriptors { want: 2, .. })), "{fds}");
        }
        payload.truncate(8 + 32);
        assert!(matches!(parse(FrontendReq::SET_MEM_TABLE, &payload, 2), Err(Refusal::Short { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_messages_are_judged_without_panicking(
            code in 0u32..64,
            payload in proptest::collection::vec(any::<u8>(), 0..200),
            fds in 0usize..4,
        ) {
            let _ = Request::parse(code, &payload, null_fds(fds));
        }
    }
}
