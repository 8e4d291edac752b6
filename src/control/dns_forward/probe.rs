//! One question to a resolver, to find out whether it answers; and which ones a file names.
//!
//! Asked is what every resolver knows and no name is told by: the name servers of the root.
//!
//! Read first: RFC 1035, 4.1; RFC 8109 (the same question, as it is asked by resolvers).

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::Counters;
use super::exchange::{Failure, ask_udp};
use super::resolv_conf::ResolvConf;
use super::source::read_head;
use super::upstreams::Try;

/// `. IN NS`, recursion desired.
const QUESTION: [u8; 17] = [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It was answered.
    Answered,
    /// The answer tells of failure.
    Failing,
    /// Nothing came in time.
    Silent,
    /// The host's network refuses, in the kernel's words.
    Refused(String),
}

/// The resolvers that the file at `path` names, as vunet would read them.
///
/// # Errors
/// The file cannot be read.
pub fn resolvers(path: &Path) -> io::Result<Vec<SocketAddr>> {
    Ok(ResolvConf::parse(&read_head(path)?).servers)
}

/// Asks the resolver `addr` once over UDP, and again while nothing comes within `time_max`. To be called within a tokio
/// runtime.
pub async fn ask(addr: SocketAddr, time_max: Duration) -> Asked {
    let one = Try { addr, resend_after: time_max / 3 };
    match ask_udp(one, &QUESTION, time_max, &Counters::default()).await {
        Ok(answer) if answer.is_final() => Asked::Answered,
        Ok(_) => Asked::Failing,
        Err(Failure::Timeout) => Asked::Silent,
        Err(Failure::Io(error)) => Asked::Refused(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a resolver that answers with `code` makes of a question, or none at all.
    async fn asked_of(code: Option<u8>) -> Asked {
        let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let addr = server.local_addr().unwrap();
        let serve = async move {
            let mut bytes = [0; 64];
            let (len, client) = server.recv_from(&mut bytes).await.unwrap();
            let Some(code) = code else { return std::future::pending().await };
            bytes[2] |= 0x80;
            bytes[3] = code;
            server.send_to(&bytes[..len], client).await.unwrap();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            asked = ask(addr, Duration::from_millis(if code.is_some() { 5000 } else { 200 })) => asked,
            () = serve => unreachable!(),
        }
    }

    #[tokio::test]
    async fn a_resolver_answers_fails_is_silent_or_not_there() {
        assert_eq!(asked_of(Some(0)).await, Asked::Answered);
        assert_eq!(asked_of(Some(2)).await, Asked::Failing);
        assert_eq!(asked_of(None).await, Asked::Silent);
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(matches!(ask(free, Duration::from_secs(5)).await, Asked::Refused(_)));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_and_not_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        assert_eq!(resolvers(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(resolvers(&path).unwrap(), ["192.0.2.1:53".parse().unwrap()]);
    }
}
