//! What stands in a capture.

use std::time::{SystemTime, UNIX_EPOCH};

use vunet::capture::{Ended, Settings, Unfit};
use vunet::engine::counters::DropReason;
use vunet::frame::{Payload, QueuePair};
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};

use crate::rig::{Rig, frame, read_file};

const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
const CHECKSUM_NOT_READY: u32 = 1 << 9;
const CHECKSUM_VALID: u32 = 1 << 10;
const TCP_SEGMENTATION: u32 = 1 << 11;

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

fn partial() -> VnetHeader {
    VnetHeader { checksum: Checksum::Partial { start: 34, offset: 16 }, ..VnetHeader::default() }
}

fn segmented(kind: GsoKind) -> VnetHeader {
    VnetHeader { gso: Some(Gso { kind, size_bytes: 1448, headers_bytes: 66, ecn: false }), ..partial() }
}

#[test]
fn head_names_who_made_it_and_whose_device_it_is() {
    let capture = Rig::new(1, &Settings { snaplen: 1000, ..Settings::default() }).capture();
    assert_eq!(capture.application, concat!("vunet ", env!("CARGO_PKG_VERSION")));
    assert_eq!(capture.hardware, std::env::consts::ARCH);
    assert!(capture.os.starts_with("Linux "), "{}", capture.os);
    assert_eq!((&*capture.interface, capture.linktype, capture.snaplen), ("vm1", 1, 1000));
    assert_eq!(capture.tsresol, 9);
    assert_eq!(capture.statistics, Some([0, 0, 0]));
    assert!(capture.frames.is_empty());
}

#[test]
fn frames_are_whole_in_order_and_with_their_time_whatever_their_length() {
    let mut rig = Rig::new(1, &Settings::default());
    let lengths = [14, 15, 16, 17, 60, 127, 128, 129, 255, 256, 257, 1514, 9014, 65_549, 65_550];
    let before = now_ns();
    for (seed, len) in lengths.into_iter().enumerate() {
        rig.gets(VnetHeader::default(), &frame(len, seed));
        rig.sends(VnetHeader::default(), &frame(len, 100 + seed));
        rig.judged(None);
        rig.publish();
    }
    let capture = rig.capture();
    let after = now_ns();
    assert_eq!(capture.frames.len(), 2 * lengths.len());
    for (pair, (seed, len)) in capture.frames.chunks(2).zip(lengths.into_iter().enumerate()) {
        assert_eq!(pair[0].bytes, frame(len, seed), "{len}");
        assert_eq!(pair[1].bytes, frame(len, 100 + seed), "{len}");
        assert_eq!(pair.iter().map(|frame| frame.flags).collect::<Vec<_>>(), [INBOUND, OUTBOUND], "{len}");
        assert!(pair.iter().all(|frame| frame.original_bytes as usize == len && frame.comment.is_none()));
    }
    let times: Vec<u64> = capture.frames.iter().map(|frame| frame.time_ns).collect();
    assert!(times.is_sorted() && times[0] >= before && times[times.len() - 1] <= after, "{times:?}");
    assert_eq!(capture.statistics, Some([30, 0, 30]));
}

#[test]
fn offloads_are_said_and_nothing_else_is() {
    let mut rig = Rig::new(1, &Settings::default());
    let verified = VnetHeader { checksum: Checksum::Valid, ..VnetHeader::default() };
    for vnet in [VnetHeader::default(), partial(), verified] {
        rig.gets(vnet, &frame(60, 0));
    }
    for kind in [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::UdpL4] {
        rig.sends(segmented(kind), &frame(5000, 0));
        rig.judged(None);
    }
    let flags: Vec<u32> = rig.capture().frames.iter().map(|frame| frame.flags).collect();
    let large = OUTBOUND | CHECKSUM_NOT_READY | TCP_SEGMENTATION;
    let expected = [
        INBOUND,
        INBOUND | CHECKSUM_NOT_READY,
        INBOUND | CHECKSUM_VALID,
        large,
        large,
        OUTBOUND | CHECKSUM_NOT_READY,
    ];
    assert_eq!(flags, expected);
}

#[test]
fn a_frame_stands_before_its_answer_and_says_what_became_of_it() {
    let mut rig = Rig::new(1, &Settings::default());
    for reason in DropReason::ALL {
        rig.sends(VnetHeader::default(), &frame(60, 1));
        rig.gets(VnetHeader::default(), &frame(70, 2));
        rig.judged(Some(reason));
    }
    rig.sends(VnetHeader::default(), &frame(60, 3));
    rig.judged(None);
    let frames = rig.capture().frames;
    for (pair, reason) in frames.chunks(2).zip(DropReason::ALL) {
        assert_eq!(pair[0].comment, Some(format!("dropped: {}", reason.name())));
        assert_eq!((&pair[0].bytes, &pair[1].bytes), (&frame(60, 1), &frame(70, 2)));
        assert_eq!(pair[1].comment, None);
    }
    let last = frames.last().unwrap();
    assert_eq!((&last.bytes, &last.comment), (&frame(60, 3), &None));
}

#[test]
fn a_frame_that_stays_in_the_guests_ring_is_not_there_and_what_came_meanwhile_is() {
    let mut rig = Rig::new(1, &Settings::default());
    rig.gets(VnetHeader::default(), &frame(60, 0));
    rig.sends(VnetHeader::default(), &frame(65_550, 1));
    rig.gets(VnetHeader::default(), &frame(61, 2));
    rig.gets(VnetHeader::default(), &frame(62, 3));
    rig.recorders[0].not_taken();
    rig.publish();
    rig.sends(VnetHeader::default(), &frame(63, 4));
    rig.recorders[0].not_taken();
    rig.sends(VnetHeader::default(), &frame(63, 4));
    rig.judged(None);
    let capture = rig.capture();
    let bytes: Vec<_> = capture.frames.iter().map(|frame| frame.bytes.clone()).collect();
    assert_eq!(bytes, [frame(60, 0), frame(61, 2), frame(62, 3), frame(63, 4)]);
    assert_eq!(capture.statistics, Some([4, 0, 4]));
}

#[test]
fn what_the_device_can_make_nothing_of_is_there_with_the_metrics_name_of_it() {
    let mut rig = Rig::new(1, &Settings::default());
    for (len, unfit) in
        [(5, Unfit::Length), (0, Unfit::Length), (100, Unfit::Header), (90_000, Unfit::NotNegotiated)]
    {
        let bytes = frame(len, 0);
        rig.recorders[0].unfit(QueuePair(3), &Payload::from_host(&bytes), unfit);
    }
    let frames = rig.capture().frames;
    let said: Vec<_> = frames.iter().map(|frame| frame.comment.clone().unwrap()).collect();
    let names = ["bad_length", "bad_length", "bad_header", "not_negotiated"];
    assert_eq!(said, names.map(|name| format!("dropped: {name}")));
    assert_eq!(frames.iter().map(|frame| frame.bytes.len()).collect::<Vec<_>>(), [5, 0, 100, 65_550]);
    assert_eq!(frames[3].original_bytes, 90_000);
    assert!(frames.iter().all(|frame| frame.queue == 3 && frame.flags == OUTBOUND));
}

#[test]
fn frames_are_cut_to_the_snaplen_and_say_how_long_they_were() {
    for snaplen in [14, 127, 128, 129, 256, 300] {
        let mut rig = Rig::new(1, &Settings { snaplen, ..Settings::default() });
        rig.gets(VnetHeader::default(), &frame(1000, 1));
        rig.sends(VnetHeader::default(), &frame(1001, 2));
        rig.judged(None);
        rig.gets(VnetHeader::default(), &frame(snaplen, 3));
        let frames = rig.capture().frames;
        assert_eq!(frames[0].bytes, frame(1000, 1)[..snaplen]);
        assert_eq!(frames[1].bytes, frame(1001, 2)[..snaplen]);
        assert_eq!(frames[2].bytes, frame(snaplen, 3));
        let lengths: Vec<u32> = frames.iter().map(|frame| frame.original_bytes).collect();
        assert_eq!(lengths, [1000, 1001, snaplen as u32]);
    }
}

#[test]
fn frames_of_several_workers_that_wait_together_are_sorted_by_their_time() {
    let mut rig = Rig::new(3, &Settings::default());
    for seed in 0..300 {
        let bytes = frame(60 + seed, seed);
        let worker = seed % 3;
        let (head, rest) = bytes.split_at(20);
        let pair = QueuePair(worker as u8);
        rig.recorders[worker].to_guest(pair, &VnetHeader::default(), head, &Payload::from_host(rest));
    }
    let capture = rig.capture();
    assert_eq!(capture.frames.len(), 300);
    let mut of_each = [0; 3];
    for frame in &capture.frames {
        of_each[frame.queue as usize] += 1;
    }
    assert_eq!(of_each, [100; 3]);
    // Published one after another, the writer may have looked in between: within one queue all are sorted.
    for queue in 0..3 {
        let mut times = capture.frames.iter().filter(|frame| frame.queue == queue).map(|frame| frame.time_ns);
        assert!(times.by_ref().is_sorted());
    }
}

#[test]
fn the_bound_on_bytes_holds_and_all_blocks_are_whole() {
    for bytes_max in [4096, 4097, 100_000, 3_000_000] {
        let settings = Settings { bytes_max: Some(bytes_max), ..Settings::default() };
        let mut rig = Rig::new(1, &settings);
        for seed in 0..4000 {
            rig.gets(VnetHeader::default(), &frame(1000 + seed % 50, seed));
            if seed % 10 == 0 {
                rig.publish();
            }
        }
        let ended = rig.end();
        assert!(matches!(ended, Ended::Full), "{ended:?}");
        let len = std::fs::metadata(rig.path()).unwrap().len();
        assert!(len <= bytes_max && len + 1300 > bytes_max, "{len} of {bytes_max}");
        assert_eq!(rig.progress.totals().bytes, len);
        let capture = read_file(&rig.path());
        assert_eq!(capture.frames.len() as u64, rig.progress.totals().frames);
        assert_eq!(capture.statistics.unwrap()[2], capture.frames.len() as u64);
    }
}
