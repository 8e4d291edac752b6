//! One VLAN for the guest, who knows nothing of it: its tag is added to what leaves and removed from what
//! comes.
//!
//! Frames with another tag, with none where there is to be one, and the guest's own tags are refused: a
//! second tag behind the first would lead into another VLAN at the next switch ("double tagging").
//!
//! Read first: IEEE 802.1Q, 9.3 to 9.6.

use crate::addr::VlanId;
use crate::engine::counters::DropReason;
use crate::wire::vnet::{Checksum, VnetHeader};

/// Bytes of a tag: its type, and priority with identifier.
pub const TAG_BYTES: usize = 4;
/// Where a tag stands: behind both addresses.
pub const TAG_AT: usize = 12;

/// Types that announce a tag: 802.1Q, 802.1ad, and what older double tagging used.
const TAG_TYPES: [[u8; 2]; 4] = [[0x81, 0x00], [0x88, 0xa8], [0x91, 0x00], [0x92, 0x00]];
/// The identifier's bits within the tag's second half.
const ID_MASK: u16 = 0x0fff;

/// Whether the frame beginning with `head` has a tag.
pub fn is_tagged(head: &[u8]) -> bool {
    head.get(TAG_AT..TAG_AT + 2).is_some_and(|ethertype| TAG_TYPES.iter().any(|tag| tag == ethertype))
}

/// The tag of `id`, at best-effort priority.
pub fn tag(id: VlanId) -> [u8; TAG_BYTES] {
    let [high, low] = id.get().to_be_bytes();
    [TAG_TYPES[0][0], TAG_TYPES[0][1], high, low]
}

/// The header of a frame that gets a tag.
///
/// # Errors
/// [`DropReason::Malformed`] if what it says then lies beyond 64 KiB.
pub fn tagged(vnet: VnetHeader) -> Result<VnetHeader, DropReason> {
    moved(vnet, |at| at.checked_add(TAG_BYTES as u16))
}

/// Judges the frame beginning with `head`, which must have the tag of `id` and no other behind it, and
/// returns its header as it is without it.
///
/// # Errors
/// [`DropReason::VlanTag`], or [`DropReason::Malformed`] if the header points into the tag.
pub fn untagged(vnet: VnetHeader, head: &[u8], id: VlanId) -> Result<VnetHeader, DropReason> {
    let [high, low] = *head.get(TAG_AT + 2..TAG_AT + TAG_BYTES).ok_or(DropReason::VlanTag)? else {
        return Err(DropReason::VlanTag);
    };
    let ours =
        head[TAG_AT..TAG_AT + 2] == TAG_TYPES[0] && u16::from_be_bytes([high, low]) & ID_MASK == id.get();
    if !ours || is_tagged(&head[TAG_BYTES..]) {
        return Err(DropReason::VlanTag);
    }
    moved(vnet, |at| at.checked_sub(TAG_BYTES as u16))
}

fn moved(mut vnet: VnetHeader, to: impl Fn(u16) -> Option<u16>) -> Result<VnetHeader, DropReason> {
    if let Checksum::Partial { start, .. } = &mut vnet.checksum {
        *start = to(*start).ok_or(DropReason::Malformed)?;
    }
    if let Some(gso) = &mut vnet.gso {
        // A hint: zero says nothing.
        gso.headers_bytes = to(gso.headers_bytes).filter(|_| gso.headers_bytes > 0).unwrap_or(0);
    }
    Ok(vnet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::vnet::{Gso, GsoKind};

    fn id(id: u16) -> VlanId {
        VlanId::new(id).expect("1 to 4094")
    }

    fn frame(tags: &[u8]) -> Vec<u8> {
        [&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], tags, &[0x08, 0x00, 0x45, 0]].concat()
    }

    #[test]
    fn only_the_networks_own_tag_is_let_through() {
        let plain = VnetHeader::default();
        for (tags, expected) in [
            (&[0x81, 0, 0, 7][..], Ok(plain)),
            (&[0x81, 0, 0xe0, 7], Ok(plain)),
            (&[0x81, 0, 0xf0, 7], Ok(plain)),
            (&[0x81, 0, 0, 8], Err(DropReason::VlanTag)),
            (&[0x81, 0, 0, 0], Err(DropReason::VlanTag)),
            (&[0x88, 0xa8, 0, 7], Err(DropReason::VlanTag)),
            (&[0x81, 0, 0, 7, 0x81, 0, 0, 8], Err(DropReason::VlanTag)),
            (&[0x81, 0, 0, 7, 0x88, 0xa8, 0, 7], Err(DropReason::VlanTag)),
            (&[], Err(DropReason::VlanTag)),
        ] {
            assert_eq!(untagged(plain, &frame(tags), id(7)), expected, "{tags:x?}");
        }
        for len in 0..16 {
            let cut = &frame(&[0x81, 0, 0, 7])[..len];
            assert_eq!(untagged(plain, cut, id(7)), Err(DropReason::VlanTag), "{len} bytes");
        }
    }

    #[test]
    fn a_tag_is_that_of_the_standard_and_is_seen_as_one() {
        assert_eq!(tag(id(0x123)), [0x81, 0x00, 0x01, 0x23]);
        assert!(is_tagged(&frame(&tag(id(4094)))));
        assert!(!is_tagged(&frame(&[])));
        assert!(!is_tagged(&[]));
        assert_eq!([VlanId::new(0), VlanId::new(4095)], [None, None]);
    }

    #[test]
    fn offsets_of_the_header_follow_the_tag() {
        let gso = |headers_bytes| Gso { kind: GsoKind::Tcp4, size_bytes: 1448, headers_bytes, ecn: false };
        let vnet = |start, headers| VnetHeader {
            checksum: Checksum::Partial { start, offset: 16 },
            gso: Some(gso(headers)),
            num_buffers: 0,
        };
        let ours = frame(&tag(id(7)));
        assert_eq!(tagged(vnet(34, 66)), Ok(vnet(38, 70)));
        assert_eq!(untagged(vnet(38, 70), &ours, id(7)), Ok(vnet(34, 66)));
        assert_eq!(tagged(vnet(34, 0)), Ok(vnet(38, 0)));
        assert_eq!(tagged(vnet(u16::MAX, 0)), Err(DropReason::Malformed));
        assert_eq!(untagged(vnet(3, 0), &ours, id(7)), Err(DropReason::Malformed));
    }
}
