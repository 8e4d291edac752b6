//! The least of DNS a guest needs: one A question over UDP, and the addresses in its answer
//! (RFC 1035, 4.1).

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::Failure;

/// How often a question is asked before giving up, and how long each waits: as libc's resolver does
/// by default, shortened so that five tries end within a step.
const TRIES: u16 = 5;
const TRY_WAITS: Duration = Duration::from_secs(2);

/// The first name server of `/etc/resolv.conf`.
pub(crate) fn system_server() -> Result<IpAddr, Failure> {
    let text = std::fs::read_to_string("/etc/resolv.conf")
        .map_err(|error| format!("/etc/resolv.conf: {error}; was a lease obtained?"))?;
    let server = text.lines().find_map(|line| line.strip_prefix("nameserver ")?.trim().parse().ok());
    server.ok_or_else(|| "/etc/resolv.conf names no server".into())
}

/// Asks `server` for the A records of `name`.
pub(crate) fn lookup(name: &str, server: IpAddr) -> Result<Vec<Ipv4Addr>, Failure> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(SocketAddr::new(server, 53))?;
    socket.set_read_timeout(Some(TRY_WAITS))?;
    for id in 1..=TRIES {
        socket.send(&question(name, id)?)?;
        let mut answer = [0u8; 1500];
        match socket.recv(&mut answer) {
            Ok(length) => return addresses(&answer[..length], id),
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(format!("{server} port 53: {error}").into()),
        }
    }
    Err(format!("{server} did not answer {TRIES} questions for {name}").into())
}

fn would_block(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

/// A recursive question for the A records of `name`.
fn question(name: &str, id: u16) -> Result<Vec<u8>, Failure> {
    let mut message = Vec::with_capacity(64);
    message.extend_from_slice(&id.to_be_bytes());
    message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length));
        message.push(length.ok_or_else(|| format!("{name}: not a host name"))?);
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    Ok(message)
}

/// The A records of an answer to question `id`; an error code, another id or no record is a failure.
fn addresses(answer: &[u8], id: u16) -> Result<Vec<Ipv4Addr>, Failure> {
    let cut = || Failure::from("the answer is cut short");
    let word = |at: usize| Some(u16::from_be_bytes([*answer.get(at)?, *answer.get(at + 1)?]));
    if word(0) != Some(id) {
        return Err("the answer is to another question".into());
    }
    let code = answer.get(3).ok_or_else(cut)? & 0x0f;
    if code != 0 {
        return Err(format!("the server answered with error code {code}").into());
    }
    let mut at = 12;
    for _ in 0..word(4).ok_or_else(cut)? {
        at = after_name(answer, at).ok_or_else(cut)? + 4;
    }
    let mut found = Vec::new();
    for _ in 0..word(6).ok_or_else(cut)? {
        at = after_name(answer, at).ok_or_else(cut)?;
        let kind = word(at).ok_or_else(cut)?;
        let length = usize::from(word(at + 8).ok_or_else(cut)?);
        let data = answer.get(at + 10..at + 10 + length).ok_or_else(cut)?;
        if let (1, Ok(octets)) = (kind, <[u8; 4]>::try_from(data)) {
            found.push(Ipv4Addr::from(octets));
        }
        at += 10 + length;
    }
    if found.is_empty() { Err("the answer holds no address".into()) } else { Ok(found) }
}

/// Where the name at `at` ends: past its zero label or its compression pointer.
fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: u16, code: u8, records: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = question("world.test", id).unwrap();
        message[2] = 0x81;
        message[3] = 0x80 | code;
        message[7] = u8::try_from(records.len()).unwrap();
        for (kind, data) in records {
            message.extend_from_slice(&[0xc0, 12]);
            message.extend_from_slice(&kind.to_be_bytes());
            message.extend_from_slice(&[0, 1, 0, 0, 0, 60]);
            message.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
            message.extend_from_slice(data);
        }
        message
    }

    #[test]
    fn addresses_are_read_past_an_alias() {
        let message = answer(9, 0, &[(5, b"\x01a\xc0\x0c"), (1, &[192, 0, 2, 2]), (1, &[192, 0, 2, 3])]);
        let expected = vec![Ipv4Addr::new(192, 0, 2, 2), Ipv4Addr::new(192, 0, 2, 3)];
        assert_eq!(addresses(&message, 9).unwrap(), expected);
    }

    #[test]
    fn an_error_code_another_id_and_no_record_fail() {
        assert!(addresses(&answer(9, 3, &[]), 9).unwrap_err().to_string().contains("code 3"));
        assert!(addresses(&answer(9, 0, &[(1, &[1, 2, 3, 4])]), 8).is_err());
        assert!(addresses(&answer(9, 0, &[]), 9).is_err());
    }

    #[test]
    fn an_answer_cut_anywhere_fails_without_a_panic() {
        let message = answer(9, 0, &[(1, &[192, 0, 2, 2])]);
        for length in 0..message.len() {
            assert!(addresses(&message[..length], 9).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_label_of_64_octets_is_refused_and_of_63_is_asked() {
        assert!(question(&"a".repeat(64), 1).is_err());
        assert!(question(&"a".repeat(63), 1).is_ok());
    }
}
