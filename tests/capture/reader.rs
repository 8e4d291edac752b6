//! pcapng as `pcap-parser` reads it.

use pcap_parser::pcapng::OptionCode;
use pcap_parser::{Block, PcapNGOption, parse_block_le};

/// Options that parser has no name for.
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;
const EPB_QUEUE: u16 = 6;

/// A frame of a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) time_ns: u64,
    pub(crate) original_bytes: u32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) flags: u32,
    pub(crate) queue: u32,
    pub(crate) lost: u64,
    pub(crate) comment: Option<String>,
}

/// A whole capture.
#[derive(Clone, Debug, Default)]
pub(crate) struct Capture {
    pub(crate) application: String,
    pub(crate) hardware: String,
    pub(crate) os: String,
    pub(crate) interface: String,
    pub(crate) linktype: i32,
    pub(crate) snaplen: u32,
    pub(crate) tsresol: u8,
    pub(crate) frames: Vec<Frame>,
    /// Frames that passed the filter, were lost, and are there.
    pub(crate) statistics: Option<[u64; 3]>,
}

fn option<'a>(options: &'a [PcapNGOption<'_>], code: u16) -> Option<&'a [u8]> {
    let found: Vec<_> = options.iter().filter(|option| option.code == OptionCode(code)).collect();
    assert!(found.len() <= 1, "{found:?}");
    let found = found.first()?;
    assert_eq!(
        options.last().map(|last| last.code),
        Some(OptionCode::EndOfOpt),
        "the end of options is said"
    );
    Some(&found.value()[..usize::from(found.len)])
}

fn number<const N: usize>(options: &[PcapNGOption<'_>], code: u16) -> Option<u64> {
    let bytes: [u8; N] = option(options, code)?.try_into().expect("a number of its width");
    Some(bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// Reads a capture, all of whose bytes are whole blocks.
pub(crate) fn read(mut bytes: &[u8]) -> Capture {
    let mut capture = Capture::default();
    let mut blocks = 0;
    while !bytes.is_empty() {
        let (rest, block) = parse_block_le(bytes).expect("a whole block");
        take(&mut capture, block, blocks);
        (bytes, blocks) = (rest, blocks + 1);
    }
    capture
}

fn take(capture: &mut Capture, block: Block<'_>, at: usize) {
    match block {
        Block::SectionHeader(header) => {
            assert_eq!((at, header.major_version, header.minor_version), (0, 1, 0));
            let text = |text: Option<Result<&str, _>>| text.unwrap().unwrap().to_owned();
            capture.application = text(header.shb_userappl());
            capture.hardware = text(header.shb_hardware());
            capture.os = text(header.shb_os());
        }
        Block::InterfaceDescription(interface) => {
            assert_eq!(at, 1);
            capture.interface = interface.if_name().unwrap().unwrap().to_owned();
            capture.linktype = interface.linktype.0;
            capture.snaplen = interface.snaplen;
            capture.tsresol = interface.if_tsresol;
        }
        Block::EnhancedPacket(packet) => {
            assert!(at > 1 && capture.statistics.is_none(), "frames stand behind the interface");
            let comment = option(&packet.options, 1).map(|text| String::from_utf8(text.to_vec()).unwrap());
            capture.frames.push(Frame {
                time_ns: u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low),
                original_bytes: packet.origlen,
                bytes: packet.data[..packet.caplen as usize].to_vec(),
                flags: number::<4>(&packet.options, EPB_FLAGS).expect("flags") as u32,
                queue: number::<4>(&packet.options, EPB_QUEUE).expect("a queue") as u32,
                lost: number::<8>(&packet.options, EPB_DROPCOUNT).unwrap_or(0),
                comment,
            });
        }
        Block::InterfaceStatistics(statistics) => {
            let all = [statistics.isb_filteraccept(), statistics.isb_osdrop(), statistics.isb_usrdeliv()];
            let began = statistics.isb_starttime().unwrap().unwrap();
            let ended = statistics.isb_endtime().unwrap().unwrap();
            assert!(began <= ended);
            capture.statistics = Some(all.map(|number| number.unwrap().unwrap()));
        }
        other => panic!("no block of ours: {other:?}"),
    }
}
