//! What the control thread asks of a worker: for each worker a single-producer single-consumer ring of requests
//! and an eventfd; every request carries the way back for its answer.
//!
//! A worker looks here when the eventfd says so, between two batches, and never waits: it pays nothing while
//! nobody asks. Who asks waits a second at most.
//!
//! May touch: the ring; what an answer is made of. Read first: `worker`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rtrb::{Consumer, Producer, RingBuffer};
use socket2::Socket;
use thiserror::Error;
use tokio::sync::oneshot;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::capture::Recorder;
use crate::config::Publish;
use crate::device::{DeviceStats, Features};
use crate::engine::counters::Counters;
use crate::engine::flows::{Ended, FlowId, FlowPage, FlowQuery};
use crate::histogram::Histogram;

/// Requests that may wait for one worker.
const WAITING_MAX: usize = 64;
/// How long an answer is waited for: a worker that takes longer hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Between two looks whether there is room for a request.
const ROOM_PAUSE: Duration = Duration::from_millis(10);

/// Where an answer goes.
pub type Answer<T> = oneshot::Sender<T>;

/// Something asked of a worker.
#[derive(Debug)]
pub enum Request {
    /// How it is.
    Report(Answer<WorkerReport>),
    /// Its flows, a page of them.
    Flows(FlowQuery, Answer<FlowPage>),
    /// To end a flow, both ends told. Answered with whether there was one.
    EndFlow(FlowId, Answer<bool>),
    /// To let no flow begin any more.
    Drain(Answer<()>),
    /// To record what crosses the device, or nothing any more. Answered with what did so before.
    Record(Option<Box<Recorder>>, Answer<Option<Box<Recorder>>>),
    /// To look at what all workers share, though nothing comes.
    Wake(Answer<()>),
    /// To serve a published port by its socket, or to know that another worker does. Answered with whether it could:
    /// false if a flow has the port. Not carried out once nobody waits for the answer.
    Publish(Publish, Option<Socket>, Answer<io::Result<bool>>),
    /// To serve it no more. Answered with the first step of ending its connections.
    Unpublish {
        /// It, with the port that was picked.
        port: Publish,
        /// Whether open connections end with it.
        reset: bool,
        /// The way back.
        answer: Answer<Ended>,
    },
    /// To end more connections of a port that is published no more, in a further step.
    EndPublished {
        /// The port.
        port: Publish,
        /// Where the step before says.
        first: usize,
        /// The way back.
        answer: Answer<Ended>,
    },
}

/// How a worker is.
#[derive(Clone, Debug, Default)]
pub struct WorkerReport {
    /// Whether a front-end is there.
    pub attached: bool,
    /// What the driver acknowledged and counts.
    pub features: Features,
    /// Rings that run, each with how many of its entries are in use.
    pub rings: Vec<RingReport>,
    /// What engine and link counted.
    pub counters: Counters,
    /// What the device counted.
    pub device: DeviceStats,
    /// Flows it has now.
    pub flows: u64,
    /// What it does.
    pub measures: Measures,
}

/// What a worker does, since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measures {
    /// Times it woke up.
    pub wake_ups: u64,
    /// Notifications of the guest's it took.
    pub kicks: u64,
    /// How long it worked after a wake-up, in microseconds.
    pub batch_time: Histogram,
    /// Frames, both ways, it moved after a wake-up that moved any.
    pub batch_frames: Histogram,
}

/// A ring that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingReport {
    /// Its vring index: even ones receive, odd ones transmit.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Entries the driver made available that are not used yet: frames waiting, or free receive buffers.
    pub available: u16,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NoAnswer {
    /// The worker did not answer in time: it carries out what it was asked once it goes on.
    #[error("the worker does not answer")]
    Busy,
    /// The worker has too many requests waiting: it was not asked, and nothing changes.
    #[error("the worker has as many requests waiting as it takes: nothing was done; try again")]
    Full,
    /// The worker has ended.
    #[error("the worker has ended")]
    Gone,
}

/// The control thread's end of the way to one worker.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    shared: Arc<(Mutex<Producer<Request>>, EventFd)>,
}

/// The worker's end.
#[derive(Debug)]
pub struct RequestBox {
    ring: Consumer<Request>,
    event: EventFd,
}

/// Both ends of a way to a worker.
///
/// # Errors
/// No descriptor for the eventfd.
pub fn channel() -> io::Result<(WorkerHandle, RequestBox)> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (producer, ring) = RingBuffer::new(WAITING_MAX);
    let shared = Arc::new((Mutex::new(producer), event.try_clone()?));
    Ok((WorkerHandle { shared }, RequestBox { ring, event }))
}

impl WorkerHandle {
    fn send(&self, request: Request) -> Result<(), NoAnswer> {
        let (ring, event) = &*self.shared;
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.is_abandoned() {
            return Err(NoAnswer::Gone);
        }
        ring.push(request).map_err(|_| NoAnswer::Full)?;
        // Fails only if the counter is full, and then the worker was woken often enough.
        let _ = event.write(1);
        Ok(())
    }

    /// Asks what must not be lost: waits for room, too, for as long as for an answer.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub async fn insist<T>(&self, request: impl Fn(Answer<T>) -> Request) -> Result<T, NoAnswer> {
        let mut pauses = ANSWER_TIMEOUT.as_millis() / ROOM_PAUSE.as_millis();
        loop {
            match self.ask(&request).await {
                Err(NoAnswer::Full) if pauses > 0 => pauses -= 1,
                outcome => return outcome,
            }
            tokio::time::sleep(ROOM_PAUSE).await;
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, NoAnswer> {
        let (answer, answered) = oneshot::channel();
        self.send(request(answer))?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(NoAnswer::Gone),
            Err(_) => Err(NoAnswer::Busy),
        }
    }
}

impl RequestBox {
    /// Readable (level-triggered) when requests wait.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// The next request; with none left the event is clear.
    pub fn take(&mut self) -> Option<Request> {
        let _ = self.event.read();
        self.ring.pop().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Protocol;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn answer_comes_from_the_worker_that_was_asked() {
        let (handle, mut requests) = channel().unwrap();
        let worker = std::thread::spawn(move || {
            loop {
                match requests.take() {
                    Some(Request::EndFlow(_, answer)) => return answer.send(true).unwrap(),
                    Some(other) => panic!("{other:?} was not asked"),
                    None => std::thread::yield_now(),
                }
            }
        });
        let asked = runtime().block_on(handle.ask(|answer| Request::EndFlow(FlowId(7), answer)));
        worker.join().unwrap();
        assert_eq!(asked, Ok(true));
    }

    #[test]
    fn what_must_not_be_lost_is_asked_once_there_is_room() {
        let (handle, mut requests) = channel().unwrap();
        let unpublish = |answer| Request::Unpublish {
            port: Publish::new(Protocol::Tcp, ([0; 4], 80).into(), 80),
            reset: true,
            answer,
        };
        runtime().block_on(async {
            let before: Vec<_> = (0..WAITING_MAX).map(|_| oneshot::channel()).collect();
            let mut answered = Vec::new();
            for (answer, back) in before {
                handle.send(Request::Drain(answer)).unwrap();
                answered.push(back);
            }
            let worker = async {
                tokio::time::sleep(2 * ROOM_PAUSE).await;
                for _ in 0..WAITING_MAX {
                    let Some(Request::Drain(answer)) = requests.take() else { panic!("they were first") };
                    answer.send(()).unwrap();
                }
                loop {
                    match requests.take() {
                        Some(Request::Unpublish { answer, .. }) => {
                            return answer.send(Ended { connections: 7, next: None }).unwrap();
                        }
                        Some(other) => panic!("{other:?} was not asked"),
                        None => tokio::time::sleep(ROOM_PAUSE).await,
                    }
                }
            };
            let (ended, ()) = tokio::join!(handle.insist(unpublish), worker);
            assert_eq!(ended.unwrap().connections, 7);
        });
        // One that takes none for good is given up, and is known not to have been asked.
        let (handle, _requests) = channel().unwrap();
        let mut answers = Vec::new();
        for _ in 0..WAITING_MAX {
            let (answer, back) = oneshot::channel();
            handle.send(Request::Drain(answer)).unwrap();
            answers.push(back);
        }
        assert_eq!(runtime().block_on(handle.insist(unpublish)).unwrap_err(), NoAnswer::Full);
    }

    #[test]
    fn worker_that_hangs_or_ended_is_not_waited_for() {
        let (handle, requests) = channel().unwrap();
        let all = (0..=WAITING_MAX).map(|_| handle.ask(Request::Report));
        let answers = runtime().block_on(futures_util::future::join_all(all));
        let (last, asked) = answers.split_last().unwrap();
        assert!(asked.iter().all(|answer| matches!(answer, Err(NoAnswer::Busy))));
        assert!(matches!(last, Err(NoAnswer::Full)), "it was not asked");
        drop(requests);
        assert_eq!(runtime().block_on(handle.ask(Request::Report)).unwrap_err(), NoAnswer::Gone);
    }
}
