//! A client's connection, which must take what it is owed in time: one that never reads would keep its place for ever.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// It. A write that waits longer than `patience` for the client fails with [`io::ErrorKind::TimedOut`]. The time runs
/// from the first write that has to wait until everything is written, so that reading byte by byte is no way out.
#[derive(Debug)]
pub(super) struct Punctual<S> {
    stream: S,
    patience: Duration,
    /// The end of the client's time, while it is owed something.
    late: Option<Pin<Box<Sleep>>>,
}

impl<S> Punctual<S> {
    /// `stream`, whose client has `patience`.
    pub(super) fn new(stream: S, patience: Duration) -> Punctual<S> {
        Punctual { stream, patience, late: None }
    }

    /// What becomes of a write that the stream answered with `written`.
    fn judge<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            return written;
        }
        let patience = self.patience;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(late.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Punctual<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Punctual<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes when it has written all it had.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) {
            self.late = None;
        }
        self.judge(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::Instant;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(200);

    #[tokio::test(flavor = "current_thread")]
    async fn who_does_not_read_what_it_is_owed_is_given_up() {
        let (stream, client) = duplex(8);
        let mut stream = Punctual::new(stream, PATIENCE);
        stream.write_all(&[0; 8]).await.unwrap();
        sleep(2 * PATIENCE).await;
        stream.flush().await.expect("there was room: nothing is owed");
        let begun = Instant::now();
        let error = stream.write_all(&[0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= PATIENCE);
        drop(client);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_byte_now_and_then_wins_no_time_but_who_keeps_up_has_all_of_it() {
        let (stream, mut client) = duplex(8);
        let patience = 10 * PATIENCE;
        let mut stream = Punctual::new(stream, patience);
        let reads = tokio::spawn(async move {
            let mut seen = 0;
            while client.read_u8().await.is_ok() {
                seen += 1;
                if seen > 160 {
                    sleep(patience / 4).await;
                }
            }
        });
        for _ in 0..10 {
            stream.write_all(&[0; 16]).await.expect("it keeps up");
            stream.flush().await.unwrap();
        }
        let error = stream.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(stream);
        reads.await.unwrap();
    }
}
