//! A recorder and its writer, with no device around them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vunet::capture::{Ended, Progress, Recorder, Rings, Settings, Sink, open};
use vunet::engine::counters::DropReason;
use vunet::frame::{Payload, QueuePair, TxFrame};
use vunet::wire::vnet::VnetHeader;

use crate::reader::{Capture, read};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// It.
pub(crate) struct Rig {
    pub(crate) recorders: Vec<Recorder>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) ended: Receiver<Ended>,
    pub(crate) dir: TempDir,
}

/// A frame of so many bytes, each another.
pub(crate) fn frame(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + seed * 13) as u8).collect()
}

impl Rig {
    /// To a file.
    pub(crate) fn new(workers: usize, settings: &Settings) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let sink = open(&dir.path().join("file")).unwrap().into();
        Rig::to(dir, workers, settings, sink)
    }

    pub(crate) fn to(dir: TempDir, workers: usize, settings: &Settings, sink: Sink) -> Rig {
        let rings = Rings::new(workers);
        let progress = rings.progress();
        let (tell, ended) = channel();
        let started = rings.start(settings, "vm1", sink, move |end| tell.send(end).unwrap());
        Rig { recorders: started.unwrap().0, progress, ended, dir }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    pub(crate) fn gets(&mut self, vnet: VnetHeader, bytes: &[u8]) {
        let (head, rest) = bytes.split_at(bytes.len().min(128));
        self.recorders[0].to_guest(QueuePair(0), &vnet, head, &Payload::from_host(rest));
    }

    pub(crate) fn sends(&mut self, vnet: VnetHeader, bytes: &[u8]) {
        let head = &bytes[..bytes.len().min(256)];
        let whole = Payload::from_host(bytes);
        self.recorders[0].from_guest(&TxFrame { vnet, head, whole, pair: QueuePair(0) });
    }

    pub(crate) fn judged(&mut self, why: Option<DropReason>) {
        self.recorders[0].judged(why);
    }

    pub(crate) fn publish(&mut self) {
        self.recorders.iter_mut().for_each(Recorder::publish);
    }

    /// Ends it with all that was recorded.
    pub(crate) fn end(&mut self) -> Ended {
        self.publish();
        self.recorders.clear();
        self.ended.recv_timeout(PATIENCE).expect("the writer ends")
    }

    /// The same; the file as it was read.
    pub(crate) fn capture(&mut self) -> Capture {
        let ended = self.end();
        assert!(matches!(ended, Ended::Drained), "{ended:?}");
        read_file(&self.path())
    }
}

pub(crate) fn read_file(path: &Path) -> Capture {
    read(&std::fs::read(path).unwrap())
}

/// Waits until `is_so`.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
