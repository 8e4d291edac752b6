//! Where captures go, and who does not take them.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use vunet::capture::{Ended, OpenError, Opened, Settings, Sink, open};
use vunet::wire::vnet::VnetHeader;

use crate::reader::read;
use crate::rig::{Rig, frame, read_file, until};

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    assert!(fs::metadata(path).unwrap().file_type().is_fifo());
}

#[test]
fn a_file_is_its_owners_alone_and_an_earlier_capture_is_overwritten() {
    let mut rig = Rig::new(1, &Settings::default());
    rig.gets(VnetHeader::default(), &frame(5000, 0));
    rig.capture();
    assert_eq!(fs::metadata(rig.path()).unwrap().permissions().mode() & 0o777, 0o600);
    let sink = open(&rig.path()).unwrap().into();
    let mut again = Rig::to(rig.dir, 1, &Settings::default(), sink);
    again.gets(VnetHeader::default(), &frame(60, 1));
    let capture = again.capture();
    assert_eq!(capture.frames.len(), 1);
    assert_eq!(capture.frames[0].bytes, frame(60, 1));
}

#[test]
fn what_is_no_capture_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("letter"), "dear").unwrap();
    fs::write(path("short"), "d").unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::write(path("pcap"), [0xd4, 0xc3, 0xb2, 0xa1, 1, 2, 3]).unwrap();
    symlink(path("empty"), path("link")).unwrap();
    symlink(path("nowhere"), path("dangling")).unwrap();
    let _socket = UnixListener::bind(path("socket")).unwrap();
    for name in ["letter", "short"] {
        let error = open(&path(name)).unwrap_err();
        assert!(matches!(error, OpenError::NotACapture(_)), "{name}: {error}");
        assert!(error.to_string().contains("remove it, or give another path"), "{error}");
    }
    assert_eq!(fs::read_to_string(path("letter")).unwrap(), "dear");
    for (name, what) in
        [("link", "symbolic link"), ("dangling", "symbolic link"), ("socket", "socket"), (".", "folder")]
    {
        let error = open(&path(name)).unwrap_err().to_string();
        assert!(error.contains(what), "{name}: {error}");
    }
    assert!(open(Path::new("/dev/null")).unwrap_err().to_string().contains("a device"));
    let error = open(&path("none/file")).unwrap_err().to_string();
    assert!(error.contains("none/file") && error.contains("No such file"), "{error}");
    for name in ["empty", "pcap", "new"] {
        assert!(matches!(open(&path(name)), Ok(Opened::File(_))), "{name}");
        assert_eq!(fs::metadata(path(name)).unwrap().len(), 0, "{name}");
    }
}

#[test]
fn two_captures_do_not_share_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let first = open(&path).unwrap();
    assert!(matches!(open(&path), Err(OpenError::InUse(_))));
    drop(first);
    assert!(open(&path).is_ok());
}

#[test]
fn a_fifo_is_waited_for_and_its_reader_sees_all_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fifo(&path);
    let sink = open(&path).unwrap().into();
    let mut rig = Rig::to(dir, 1, &Settings::default(), sink);
    rig.gets(VnetHeader::default(), &frame(60, 0));
    rig.publish();
    until("it waits", || rig.progress.awaits_reader());
    assert_eq!(rig.progress.totals().bytes, 0);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        File::open(path).unwrap().read_to_end(&mut all).unwrap();
        all
    });
    until("the reader came", || !rig.progress.awaits_reader());
    rig.gets(VnetHeader::default(), &frame(65_550, 1));
    let ended = rig.end();
    assert!(matches!(ended, Ended::Drained), "{ended:?}");
    let capture = read(&reader.join().unwrap());
    let bytes: Vec<_> = capture.frames.iter().map(|frame| frame.bytes.clone()).collect();
    assert_eq!(bytes, [frame(60, 0), frame(65_550, 1)]);
}

#[test]
fn a_fifo_without_reader_ends_soon_when_it_is_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fifo(&path);
    let sink = open(&path).unwrap().into();
    let mut rig = Rig::to(dir, 1, &Settings::default(), sink);
    until("it waits", || rig.progress.awaits_reader());
    rig.progress.stop();
    let begun = Instant::now();
    let ended = rig.end();
    assert!(matches!(ended, Ended::GaveUp), "{ended:?}");
    assert!(begun.elapsed() < Duration::from_millis(900), "nobody is waited for: {:?}", begun.elapsed());
}

#[test]
fn a_reader_of_a_fifo_that_leaves_ends_the_capture() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fifo(&path);
    let sink = open(&path).unwrap().into();
    // Opened for both, so that this side waits for nobody.
    let reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut rig = Rig::to(dir, 1, &Settings::default(), sink);
    until("the reader came", || rig.progress.totals().bytes > 0);
    drop(reader);
    rig.gets(VnetHeader::default(), &frame(60, 0));
    rig.publish();
    let ended = rig.ended.recv_timeout(crate::rig::PATIENCE).unwrap();
    assert!(matches!(ended, Ended::Left), "{ended:?}");
}

#[test]
fn who_never_reads_costs_the_capture_its_frames_and_the_worker_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (client, mut pieces) = mpsc::channel(4);
    let mut rig = Rig::to(dir, 1, &Settings::default(), Sink::Stream(client));
    let bytes = frame(60_000, 0);
    let begun = Instant::now();
    for _ in 0..2000 {
        rig.sends(VnetHeader::default(), &bytes);
        rig.judged(None);
        rig.publish();
    }
    // 120 MB: written they would have taken the reader's time.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let totals = rig.progress.totals();
    assert_eq!(totals.seen, 2000);
    assert!(totals.lost > 1500, "{totals:?}");
    // Now it reads: what was kept comes whole, with how much is missing.
    let (seen, lost) = (totals.seen, totals.lost);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        while let Some(piece) = pieces.blocking_recv() {
            all.extend(piece);
        }
        all
    });
    until("the ring has room again", || {
        let before = rig.progress.totals().lost;
        rig.gets(VnetHeader::default(), &frame(60, 1));
        rig.publish();
        rig.progress.totals().lost == before
    });
    let ended = rig.end();
    assert!(matches!(ended, Ended::Drained), "{ended:?}");
    let capture = read(&reader.join().unwrap());
    let totals = rig.progress.totals();
    assert_eq!(totals.seen, totals.lost + capture.frames.len() as u64);
    assert!(totals.seen > seen && totals.lost >= lost);
    let said: u64 = capture.frames.iter().map(|frame| frame.lost).sum();
    assert_eq!(said, totals.lost, "each lost frame is said to be");
    assert_eq!(capture.statistics, Some([totals.seen, totals.lost, capture.frames.len() as u64]));
    assert!(capture.frames.iter().rev().skip(1).rev().any(|frame| frame.bytes == bytes));
}

#[test]
fn a_client_that_leaves_ends_the_capture_without_a_frame_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let (client, mut pieces) = mpsc::channel(4);
    let rig = Rig::to(dir, 1, &Settings::default(), Sink::Stream(client));
    assert!(pieces.blocking_recv().is_some(), "the head comes at once");
    drop(pieces);
    let ended = rig.ended.recv_timeout(crate::rig::PATIENCE).unwrap();
    assert!(matches!(ended, Ended::Left), "{ended:?}");
}

#[test]
fn a_recorder_whose_writer_is_gone_records_nothing() {
    let settings = Settings { bytes_max: Some(4096), ..Settings::default() };
    let mut rig = Rig::new(1, &settings);
    rig.gets(VnetHeader::default(), &frame(5000, 0));
    rig.publish();
    let ended = rig.ended.recv_timeout(crate::rig::PATIENCE).unwrap();
    assert!(matches!(ended, Ended::Full), "{ended:?}");
    until("it shows", || {
        let before = rig.progress.totals().seen;
        rig.gets(VnetHeader::default(), &frame(60, 0));
        rig.publish();
        rig.progress.totals().seen == before
    });
    assert!(read_file(&rig.path()).frames.is_empty());
}
