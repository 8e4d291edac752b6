//! DNS over TCP towards the guest: messages behind a length of two bytes, answered as answers come.
//!
//! The stream is one end of a socket pair whose other end the worker joins to the guest's TCP
//! connection. A client may send several queries without waiting (RFC 7766, 6.2.1.1) and gets the
//! answers in the order in which they are ready; the DNS ids tell them apart. A client that sends
//! its FIN after its queries still gets its answers.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::control::dns_forward::Resolver;
use crate::control::dns_forward::exchange::framed;
use crate::limits;
use crate::service::dns::{DnsAction, DnsService, Transport};

/// How long a connection stays open without a query or an answer, and how long an answer may take
/// to be taken (RFC 7766, 6.2.3: of the order of a few seconds).
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const LEN_BYTES: usize = 2;
const HEADER_BYTES: usize = 12;

/// Serves one connection to its end. Whatever is wrong with it costs this connection only.
pub(super) async fn serve(stream: StdUnixStream, service: &DnsService, resolver: &Arc<Resolver>) {
    let Ok(stream) = UnixStream::from_std(stream) else {
        return;
    };
    let inbox = Vec::with_capacity(LEN_BYTES + limits::DNS_QUERY_BYTES_MAX);
    let mut connection = Connection { stream, inbox, at_end: false, forwarded: JoinSet::new() };
    let _closed = connection.serve(service, resolver).await;
}

/// The connection is over.
struct Closed;

struct Connection {
    stream: UnixStream,
    /// Bytes read and not yet taken as queries: less than one query's, or as many as came along
    /// with it.
    inbox: Vec<u8>,
    at_end: bool,
    forwarded: JoinSet<Vec<u8>>,
}

impl Connection {
    async fn serve(&mut self, service: &DnsService, resolver: &Arc<Resolver>) -> Result<(), Closed> {
        let mut deadline = Instant::now() + IDLE_TIMEOUT;
        loop {
            while let Some(query) = self.next_query()? {
                deadline = Instant::now() + IDLE_TIMEOUT;
                self.take(query, service, resolver).await?;
            }
            let busy = !self.forwarded.is_empty();
            if self.at_end && !busy {
                return Ok(());
            }
            let may_read = !self.at_end && self.forwarded.len() < limits::DNS_STREAM_QUERIES_MAX;
            tokio::select! {
                read = self.stream.read_buf(&mut self.inbox), if may_read => {
                    self.at_end = read.map_err(|_| Closed)? == 0;
                }
                Some(done) = self.forwarded.join_next(), if busy => {
                    let answer = done.map_err(|_| Closed)?;
                    deadline = Instant::now() + IDLE_TIMEOUT;
                    self.send(&answer).await?;
                }
                () = sleep_until(deadline), if !busy => return Ok(()),
            }
        }
    }

    /// The next whole query in the inbox, unless as many as may be are in work.
    fn next_query(&mut self) -> Result<Option<Vec<u8>>, Closed> {
        if self.forwarded.len() >= limits::DNS_STREAM_QUERIES_MAX {
            return Ok(None);
        }
        let Some(len) = self.inbox.first_chunk::<LEN_BYTES>() else {
            return Ok(None);
        };
        let len_bytes = usize::from(u16::from_be_bytes(*len));
        if !(HEADER_BYTES..=limits::DNS_QUERY_BYTES_MAX).contains(&len_bytes) {
            return Err(Closed);
        }
        if self.inbox.len() < LEN_BYTES + len_bytes {
            return Ok(None);
        }
        let query = self.inbox[LEN_BYTES..LEN_BYTES + len_bytes].to_vec();
        self.inbox.drain(..LEN_BYTES + len_bytes);
        Ok(Some(query))
    }

    async fn take(
        &mut self,
        query: Vec<u8>,
        service: &DnsService,
        resolver: &Arc<Resolver>,
    ) -> Result<(), Closed> {
        match service.handle(&query, Transport::Tcp) {
            DnsAction::Reply(answer) => self.send(&answer).await,
            DnsAction::Forward => {
                let resolver = Arc::clone(resolver);
                self.forwarded.spawn(async move { resolver.resolve_tcp(query).await });
                Ok(())
            }
            DnsAction::Drop(_) => Err(Closed),
        }
    }

    async fn send(&mut self, answer: &[u8]) -> Result<(), Closed> {
        match timeout(IDLE_TIMEOUT, self.stream.write_all(&framed(answer))).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Closed),
        }
    }
}
