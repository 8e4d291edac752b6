//! pcapng (draft-ietf-opsawg-pcapng-05): the blocks a capture has, appended to a buffer.
//!
//! A capture has one section and one interface, which is the guest's network device: outbound is what the guest
//! sends and inbound what it gets, as in a capture made in the guest.
//!
//! Why not a library: `pcap-file`'s released version (2.0) is of 2022 and its next one a candidate since; it has no name for `epb_queue`, takes a list
//! on the heap for each frame's options, and cannot say how long a block will be before it is made. `tests/capture` reads what is written here
//! with `pcap-parser`.
//!
//! May touch: nothing. Read first: the draft's sections 3.1 (blocks), 3.5 (options), 4.1, 4.2, 4.3 and 4.6.

use super::Totals;
use super::record::{Direction, Header};

/// Block types (section 4).
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;

const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
/// Ethernet (draft-ietf-opsawg-pcaplinktype).
const LINKTYPE_ETHERNET: u16 = 1;
/// Time is in nanoseconds: 10 to the power of minus this.
const TSRESOL_NANOSECONDS: u8 = 9;

/// Options of any block, of a section, an interface, its statistics, and a packet.
const OPT_END: u16 = 0;
const OPT_COMMENT: u16 = 1;
const SHB_HARDWARE: u16 = 2;
const SHB_OS: u16 = 3;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const IF_TSRESOL: u16 = 9;
const ISB_STARTTIME: u16 = 2;
const ISB_ENDTIME: u16 = 3;
const ISB_FILTERACCEPT: u16 = 6;
const ISB_OSDROP: u16 = 7;
const ISB_USRDELIV: u16 = 8;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;
const EPB_QUEUE: u16 = 6;

/// Bits of `epb_flags`.
const INBOUND: u32 = 0b01;
const OUTBOUND: u32 = 0b10;
const CHECKSUM_NOT_READY: u32 = 1 << 9;
const CHECKSUM_VALID: u32 = 1 << 10;
const TCP_SEGMENTATION: u32 = 1 << 11;

/// Bytes of a statistics block.
pub(super) const STATISTICS_BYTES: usize = 20 + 5 * 12 + 8;

/// Appends one block: `body` appends what stands between its lengths.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    body(out);
    let len = u32::try_from(out.len() - start + 4).expect("a block holds one frame and short texts");
    out[start + 4..start + 8].copy_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
}

/// Appends zeros up to a whole word.
fn pad(out: &mut Vec<u8>, bytes: usize) {
    out.extend_from_slice(&[0; 3][..bytes.next_multiple_of(4) - bytes]);
}

fn option(out: &mut Vec<u8>, code: u16, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&code.to_le_bytes());
    out.extend_from_slice(&u16::try_from(len).expect("an option is a number or a short text").to_le_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
    pad(out, len);
}

fn end_of_options(out: &mut Vec<u8>) {
    out.extend_from_slice(&OPT_END.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
}

/// A time in two halves, the higher first (section 4.3).
fn time(time_ns: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&((time_ns >> 32) as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&(time_ns as u32).to_le_bytes());
    bytes
}

/// The first part of a text that is no longer than an option may reasonably be.
fn short(text: &str) -> &[u8] {
    let end = text.char_indices().map(|(at, _)| at).take_while(|at| *at <= 255).last().unwrap_or(0);
    if text.len() <= 255 { text.as_bytes() } else { &text.as_bytes()[..end] }
}

/// Appends the head of a capture: the section and its interface, the device of the guest called `guest`.
pub(super) fn head(out: &mut Vec<u8>, guest: &str, snaplen: usize, os: &str) {
    block(out, SECTION_HEADER, |out| {
        out.extend_from_slice(&BYTE_ORDER_MAGIC.to_le_bytes());
        // Version 1.0, and a length that is not known.
        out.extend_from_slice(&[1, 0, 0, 0]);
        out.extend_from_slice(&u64::MAX.to_le_bytes());
        option(out, SHB_HARDWARE, &[std::env::consts::ARCH.as_bytes()]);
        option(out, SHB_OS, &[short(os)]);
        option(out, SHB_USERAPPL, &[concat!("vunet ", env!("CARGO_PKG_VERSION")).as_bytes()]);
        end_of_options(out);
    });
    block(out, INTERFACE_DESCRIPTION, |out| {
        out.extend_from_slice(&LINKTYPE_ETHERNET.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&u32::try_from(snaplen).unwrap_or(u32::MAX).to_le_bytes());
        option(out, IF_NAME, &[short(guest)]);
        option(out, IF_DESCRIPTION, &[b"network device of the guest; outbound is what the guest sends"]);
        option(out, IF_TSRESOL, &[&[TSRESOL_NANOSECONDS]]);
        end_of_options(out);
    });
}

fn flags(header: &Header) -> u32 {
    let direction = match header.direction {
        Direction::FromGuest => OUTBOUND,
        Direction::ToGuest => INBOUND,
    };
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    direction
        | flag(header.is_partial, CHECKSUM_NOT_READY)
        | flag(header.is_verified, CHECKSUM_VALID)
        | flag(header.is_segmented, TCP_SEGMENTATION)
}

/// What the comment of a frame that went nowhere begins with.
const DROPPED: &[u8] = b"dropped: ";

/// Bytes of the packet block of a record.
pub(super) fn packet_bytes(header: &Header) -> usize {
    let lost = if header.lost > 0 { 12 } else { 0 };
    let why = header.why.map_or(0, |why| 4 + (DROPPED.len() + why.name().len()).next_multiple_of(4));
    let frame = (header.captured_bytes as usize).next_multiple_of(4);
    // Head and end of the block, flags, queue, end of options.
    28 + frame + 8 + 8 + lost + why + 4 + 4
}

/// Appends the packet block of a record, whose frame lies in two parts.
pub(super) fn packet(out: &mut Vec<u8>, header: &Header, (first, second): (&[u8], &[u8])) {
    block(out, ENHANCED_PACKET, |out| {
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&time(header.time_ns));
        out.extend_from_slice(&header.captured_bytes.to_le_bytes());
        out.extend_from_slice(&header.original_bytes.to_le_bytes());
        out.extend_from_slice(first);
        out.extend_from_slice(second);
        pad(out, first.len() + second.len());
        option(out, EPB_FLAGS, &[&flags(header).to_le_bytes()]);
        if header.lost > 0 {
            option(out, EPB_DROPCOUNT, &[&u64::from(header.lost).to_le_bytes()]);
        }
        option(out, EPB_QUEUE, &[&u32::from(header.pair).to_le_bytes()]);
        if let Some(why) = header.why {
            option(out, OPT_COMMENT, &[DROPPED, why.name().as_bytes()]);
        }
        end_of_options(out);
    });
}

/// Appends the statistics a capture ends with.
pub(super) fn statistics(out: &mut Vec<u8>, (began_ns, ended_ns): (u64, u64), totals: &Totals) {
    block(out, INTERFACE_STATISTICS, |out| {
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&time(ended_ns));
        option(out, ISB_STARTTIME, &[&time(began_ns)]);
        option(out, ISB_ENDTIME, &[&time(ended_ns)]);
        option(out, ISB_FILTERACCEPT, &[&totals.seen.to_le_bytes()]);
        option(out, ISB_OSDROP, &[&totals.lost.to_le_bytes()]);
        option(out, ISB_USRDELIV, &[&totals.frames.to_le_bytes()]);
        end_of_options(out);
    });
}

/// Of `bytes`, which begin with a block, how many are whole blocks.
pub(super) fn whole_blocks(bytes: &[u8]) -> usize {
    let mut end = 0;
    while let Some(len) = bytes.get(end + 4..end + 8) {
        let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
        if len < 12 || len > bytes.len() - end {
            break;
        }
        end += len;
    }
    end
}
