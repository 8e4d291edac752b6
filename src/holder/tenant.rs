//! A process on a rootless network at its holder's door, while it runs: its guest's address, and ports that come and go.
//!
//! May touch: `ports`, `binding`. Read first: `door`.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::binding;
use super::ports::{self, LendError, Lent, RECORD_BYTES, address};
use crate::config::Publish;
use crate::limits;

/// Wishes that may wait: they come one after another.
const WISHES_MAX: usize = 16;

/// What is wished of the holder.
#[derive(Debug)]
pub enum Wish {
    /// A port that leads to the guest; answered with it as it was bound.
    Publish(Publish, oneshot::Sender<Result<Publish, LendError>>),
    /// One less, its connections reset or left; answered with how many were reset.
    Unpublish(Publish, bool, oneshot::Sender<Result<usize, LendError>>),
}

/// The way to ask for that.
#[derive(Clone, Debug)]
pub struct Lender(mpsc::Sender<Wish>);

/// Where it is heard.
pub type Wishes = mpsc::Receiver<Wish>;

/// Both ends of the way.
pub fn channel() -> (Lender, Wishes) {
    let (sender, wishes) = mpsc::channel(WISHES_MAX);
    (Lender(sender), wishes)
}

impl Lender {
    /// Has the holder bind a port and lead it to the guest. Not to be given up before it is answered: it would be published
    /// all the same.
    ///
    /// # Errors
    /// [`LendError`]; nothing is published then.
    pub async fn publish(&self, port: Publish) -> Result<Publish, LendError> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Wish::Publish(port, answer)).await.map_err(|_| LendError::NoHolder)?;
        answered.await.unwrap_or(Err(LendError::NoHolder))
    }

    /// Has it lead there no more; how many connections were reset.
    ///
    /// # Errors
    /// [`LendError`]; the port is free all the same.
    pub async fn unpublish(&self, port: Publish, reset: bool) -> Result<usize, LendError> {
        let (answer, answered) = oneshot::channel();
        let sent = self.0.send(Wish::Unpublish(port, reset, answer)).await;
        sent.map_err(|_| LendError::NoHolder)?;
        answered.await.unwrap_or(Err(LendError::NoHolder))
    }
}

/// What a process has at its holder's: the sockets of its published ports, and what is wished of them.
#[derive(Debug)]
pub struct Tenant {
    /// Published ports.
    pub lent: Vec<Arc<Lent>>,
    /// The guest's address as it comes and goes.
    pub guest: watch::Receiver<Option<Ipv4Addr>>,
    /// What is wished meanwhile.
    pub wishes: Wishes,
}

impl Tenant {
    /// Tells the holder at the other end of `stream` of the guest's address, and has ports published and removed there, until
    /// the holder ends or does not answer.
    pub(super) async fn live(&mut self, mut stream: UnixStream) {
        let (mut told, mut changes) = (None, true);
        loop {
            let addr = *self.guest.borrow_and_update();
            if addr != told && answered(stream.write_all(&address(addr))).await.is_err() {
                return;
            }
            told = addr;
            tokio::select! {
                () = ended(&stream) => return,
                changed = self.guest.changed(), if changes => changes = changed.is_ok(),
                Some(wish) = self.wishes.recv() => {
                    if !self.grant(&mut stream, wish).await {
                        return;
                    }
                }
            }
        }
    }

    /// Waits for `until`; meanwhile nothing can be published, and what is removed is free at once.
    pub async fn without_a_holder<T>(&mut self, until: impl Future<Output = T>) -> T {
        tokio::pin!(until);
        loop {
            tokio::select! {
                outcome = &mut until => return outcome,
                Some(wish) = self.wishes.recv() => match wish {
                    Wish::Publish(_, answer) => drop(answer.send(Err(LendError::NoHolder))),
                    Wish::Unpublish(port, _, answer) => {
                        self.lent.retain(|lent| lent.port != port);
                        // Its connections ended with the holder.
                        drop(answer.send(Ok(0)));
                    }
                },
            }
        }
    }

    /// Does what is wished. False if the holder does not answer as it should, and nothing it says can be relied on.
    async fn grant(&mut self, stream: &mut UnixStream, wish: Wish) -> bool {
        match wish {
            Wish::Publish(port, answer) => {
                let outcome = self.publish(stream, port).await;
                let goes_on = matches!(&outcome, Ok(_) | Err(LendError::Bind(_) | LendError::TooMany));
                let _ = answer.send(outcome);
                goes_on
            }
            Wish::Unpublish(port, reset, answer) => {
                // Free once the holder has let go of it too.
                self.lent.retain(|lent| lent.port != port);
                let outcome = answered(unpublish(stream, &port, reset)).await;
                let goes_on = outcome.is_ok();
                let _ = answer.send(outcome);
                goes_on
            }
        }
    }

    async fn publish(&mut self, stream: &mut UnixStream, mut port: Publish) -> Result<Publish, LendError> {
        let socket = answered(binding::ask(stream, &mut port)).await?;
        let lent = Lent { socket, port };
        answered(lent.lend_over(stream)).await?;
        self.lent.push(Arc::new(lent));
        Ok(port)
    }
}

async fn unpublish(stream: &mut UnixStream, port: &Publish, reset: bool) -> Result<usize, LendError> {
    stream.write_all(&ports::unpublish(port, reset)).await?;
    let mut answer = [0; RECORD_BYTES];
    stream.read_exact(&mut answer).await?;
    ports::unpublished(answer).ok_or(LendError::NotUnderstood)
}

/// What the holder answers, which is waited for so long and no longer.
async fn answered<T, E>(answer: impl Future<Output = Result<T, E>>) -> Result<T, LendError>
where
    LendError: From<E>,
{
    let silent = |_| LendError::Silent(io::ErrorKind::TimedOut.into());
    timeout(limits::HOLDER_ANSWER, answer).await.map_err(silent)?.map_err(LendError::from)
}

/// Waits for the holder's end, whatever ends it. Between two answers it says nothing.
async fn ended(stream: &UnixStream) {
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut [0; 64]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(len) if len > 0 => {}
            _ => return,
        }
    }
}
