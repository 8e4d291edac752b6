//! Asks the backend on a thread of its own: it may be stopped, and then no answer comes for long.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::sample::{Sampler, Shown};
use crate::control::client::{Client, ClientError};

/// The way to that thread, which ends with the process at the latest.
#[derive(Debug)]
pub(super) struct Asker {
    questions: SyncSender<()>,
    answers: Receiver<Result<Shown, ClientError>>,
}

impl Asker {
    /// Starts it.
    ///
    /// # Errors
    /// No thread.
    pub(super) fn start(client: Client, mut sampler: Sampler) -> io::Result<Asker> {
        let (questions, asked) = sync_channel(1);
        let (answer, answers) = sync_channel(1);
        thread::Builder::new().name("asker".to_owned()).spawn(move || {
            while asked.recv().is_ok() {
                if answer.send(sampler.next(&client)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Asker { questions, answers })
    }

    /// Asks; to be done again only after the answer.
    pub(super) fn ask(&self) {
        // There is room for one, and the thread lives as long as this.
        let _ = self.questions.try_send(());
    }

    /// The answer, once it is there.
    pub(super) fn answer(&self) -> Option<Result<Shown, ClientError>> {
        self.answers.try_recv().ok()
    }
}
