//! A file read away from the control thread, which may hang: on a network's file system whose server is gone, say. Nobody
//! waits for it longer than [`PATIENCE`], not even the end of the process, so it has a thread of its own.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// How long it may take. A file of settings is read within a millisecond where its disk lives.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome<T> {
    /// It was read.
    Done(T),
    /// It was not, in time; what comes later is nobody's.
    Late,
    /// The reader has failed.
    Failed,
}

/// Why nothing is read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// The last one hangs: a second thread would hang beside it.
    #[error("they are still being read since the signal before")]
    UnderWay,
    /// No thread.
    #[error("no thread for it ({0})")]
    Thread(#[from] io::Error),
}

/// At most one at a time.
#[derive(Debug)]
pub(super) struct Reading<T> {
    awaited: Option<(oneshot::Receiver<T>, Instant)>,
    /// The last thread, unless it is known to be done.
    thread: Option<JoinHandle<()>>,
    /// Asked for while one was awaited, which may have read what was there before.
    again: bool,
    patience: Duration,
}

impl<T: Send + 'static> Reading<T> {
    /// None, and none may take longer than `patience`.
    pub(super) fn new(patience: Duration) -> Reading<T> {
        Reading { awaited: None, thread: None, again: false, patience }
    }

    /// Whether one is awaited; then it is noted that another is to follow.
    pub(super) fn follows(&mut self) -> bool {
        self.again |= self.awaited.is_some();
        self.awaited.is_some()
    }

    /// Whether another is to follow the one whose outcome came.
    pub(super) fn take_again(&mut self) -> bool {
        std::mem::take(&mut self.again)
    }

    /// Begins one.
    pub(super) fn begin(&mut self, read: impl FnOnce() -> T + Send + 'static) -> Result<(), Refused> {
        if self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) || self.awaited.is_some() {
            return Err(Refused::UnderWay);
        }
        let (done, awaited) = oneshot::channel();
        let work = move || {
            // Fails only if nobody waits any more.
            let _ = done.send(read());
        };
        self.thread = Some(thread::Builder::new().name("settings".to_owned()).spawn(work)?);
        self.awaited = Some((awaited, Instant::now() + self.patience));
        Ok(())
    }

    /// What comes of the one that was begun; never anything if none was. Loses nothing if it is dropped.
    pub(super) async fn outcome(&mut self) -> Outcome<T> {
        let Some((awaited, deadline)) = &mut self.awaited else { return std::future::pending().await };
        let outcome = match timeout_at(*deadline, awaited).await {
            Ok(Ok(done)) => Outcome::Done(done),
            Ok(Err(_)) => Outcome::Failed,
            Err(_) => Outcome::Late,
        };
        self.awaited = None;
        if !matches!(outcome, Outcome::Late) {
            // It has nothing more to do than to end.
            self.thread = None;
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn what_hangs_is_given_up_in_time_and_nothing_is_read_beside_it() {
        let mut reading = Reading::new(Duration::from_millis(100));
        let (server, gone) = mpsc::channel::<()>();
        reading.begin(move || gone.recv().is_ok()).unwrap();
        assert!(matches!(reading.begin(|| true), Err(Refused::UnderWay)));
        assert_eq!(reading.outcome().await, Outcome::Late);
        assert!(matches!(reading.begin(|| true), Err(Refused::UnderWay)), "it hangs still");
        let nothing = tokio::time::timeout(Duration::from_millis(20), reading.outcome());
        assert!(nothing.await.is_err());
        server.send(()).unwrap();
        while let Err(error) = reading.begin(|| false) {
            assert!(matches!(error, Refused::UnderWay));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(reading.outcome().await, Outcome::Done(false), "and not what came late");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_fails_is_no_end_of_reading() {
        let mut reading = Reading::new(PATIENCE);
        reading.begin(|| panic!("as it should")).unwrap();
        assert_eq!(reading.outcome().await, Outcome::<bool>::Failed);
        assert!(!reading.follows() && !reading.take_again());
        reading.begin(|| true).expect("nothing is under way");
        assert!(reading.follows(), "asked for meanwhile");
        assert_eq!(reading.outcome().await, Outcome::Done(true));
        assert!(reading.take_again() && !reading.take_again(), "once");
    }
}
