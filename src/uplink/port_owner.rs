//! Whose a taken port of the host is, as far as procfs says: the user always, the process where this one may look
//! into it (its own user's, or all for root).
//!
//! Read only to explain a refusal, on the control thread or before there are others. May touch: files of `/proc`.
//! Read first: proc_net(5) (`/proc/net/tcp` and its like), `Documentation/networking/proc_net_tcp.rst` of Linux.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{Protocol, Publish};

/// Sockets looked at: more than one host has.
const SOCKETS_MAX: usize = 1 << 20;
/// Descriptors of other processes looked at.
const DESCRIPTORS_MAX: usize = 1 << 20;
/// Bytes of a process's name that are kept: `TASK_COMM_LEN` is 16.
const NAME_BYTES_MAX: usize = 32;
/// `TCP_LISTEN` of `net/tcp_states.h`.
const LISTEN: u8 = 0x0a;

/// Who has a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortOwner {
    /// The user's number.
    pub uid: u32,
    /// The process, where it can be known: number and name.
    pub process: Option<(u32, String)>,
}

impl fmt::Display for PortOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some((pid, name)) => write!(f, "process {pid} ({name}) of user {}", self.uid),
            None => write!(f, "a process of user {}, which only that user and root may know", self.uid),
        }
    }
}

/// Who has what `port` needs; `None` if procfs does not say.
pub fn owner_of(port: &Publish) -> Option<PortOwner> {
    let (v4, v6) = match port.protocol {
        Protocol::Tcp => ("tcp", "tcp6"),
        Protocol::Udp => ("udp", "udp6"),
    };
    let socket = [v4, v6].into_iter().find_map(|table| {
        let file = File::open(Path::new("/proc/thread-self/net").join(table)).ok()?;
        let lines = BufReader::new(file).lines().skip(1).take(SOCKETS_MAX).map_while(Result::ok);
        find(lines, port)
    })?;
    Some(PortOwner { uid: socket.uid, process: process_of(socket.inode) })
}

/// The process of this number with its name.
pub fn process(pid: u32) -> (u32, String) {
    (pid, name_of(&Path::new("/proc").join(pid.to_string())))
}

/// A socket as such a table tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    local: IpAddr,
    port: u16,
    state: u8,
    uid: u32,
    inode: u64,
}

/// The first of `lines` that is in the way of `port`: of TCP one that listens.
fn find(lines: impl Iterator<Item = String>, port: &Publish) -> Option<Entry> {
    lines.filter_map(|line| parse(&line)).find(|entry| {
        let listens = port.protocol == Protocol::Udp || entry.state == LISTEN;
        listens && entry.port == port.host.port() && in_the_way(entry.local, port.host.ip())
    })
}

/// Whether a socket at `taken` keeps another from `wanted`. One of IPv6 for all addresses has IPv4's too, unless it
/// was told otherwise, which does not show.
fn in_the_way(taken: IpAddr, wanted: IpAddr) -> bool {
    taken == wanted || taken.is_unspecified() || wanted == IpAddr::V4(Ipv4Addr::UNSPECIFIED)
}

/// Reads a line: number, local and remote end, state, queues, timer, retransmits, user, time-out, inode.
fn parse(line: &str) -> Option<Entry> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (addr, port) = fields.next()?.split_once(':')?;
    let state = u8::from_str_radix(fields.nth(1)?, 16).ok()?;
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Entry { local: address(addr)?, port: u16::from_str_radix(port, 16).ok()?, state, uid, inode })
}

/// An address as words of the host's byte order in hexadecimal; an IPv4 one within IPv6 as itself.
fn address(text: &str) -> Option<IpAddr> {
    let word = |text: &str| Some(u32::from_str_radix(text, 16).ok()?.to_ne_bytes());
    match text.len() {
        8 => Some(Ipv4Addr::from(word(text)?).into()),
        32 => {
            let mut octets = [0; 16];
            for (n, into) in octets.chunks_exact_mut(4).enumerate() {
                into.copy_from_slice(&word(text.get(8 * n..8 * n + 8)?)?);
            }
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

/// The process that has the socket `inode` open, of those this one may look into.
fn process_of(inode: u64) -> Option<(u32, String)> {
    let wanted = format!("socket:[{inode}]");
    let mut looked_at = 0;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            looked_at += 1;
            if looked_at > DESCRIPTORS_MAX {
                return None;
            }
            if fs::read_link(descriptor.path()).is_ok_and(|target| target.as_os_str() == &*wanted) {
                return Some(self::process(pid));
            }
        }
    }
    None
}

/// A process's name without what a terminal could take for a command.
fn name_of(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name[..name.len().min(NAME_BYTES_MAX)]).trim_end().to_owned();
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> Publish {
        crate::config::publish::publish(text).unwrap().iter().next().unwrap()
    }

    fn words(addr: [u8; 4]) -> String {
        format!("{:08X}", u32::from_ne_bytes(addr))
    }

    #[test]
    fn the_socket_in_the_way_is_found_in_the_kernels_table() {
        let line = |addr: &str, port: u16, state: &str, uid: u32, inode: u64| {
            format!(
                "   0: {addr}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  {uid}  0 {inode} 1 0"
            )
        };
        let any6 = "0".repeat(32);
        let mapped =
            format!("{}{}{}{}", words([0; 4]), words([0; 4]), words([0, 0, 255, 255]), words([10, 0, 0, 1]));
        let lines = vec![
            line(&words([127, 0, 0, 1]), 80, "01", 7, 1),
            line(&words([127, 0, 0, 1]), 80, "0A", 1000, 2),
            line(&words([0; 4]), 81, "0A", 0, 3),
            line(&any6, 82, "0A", 5, 4),
            line(&mapped, 83, "0A", 6, 5),
            "nonsense".to_owned(),
        ];
        for (wanted, inode) in [
            ("127.0.0.1:80:1", Some(2)),
            ("80:1", Some(2)),
            ("192.0.2.1:80:1", None),
            ("192.0.2.1:81:1", Some(3)),
            ("82:1", Some(4)),
            ("10.0.0.1:83:1", Some(5)),
            ("10.0.0.2:83:1", None),
            ("84:1", None),
        ] {
            let found = find(lines.clone().into_iter(), &port(wanted));
            assert_eq!(found.map(|entry| entry.inode), inode, "{wanted}");
        }
        assert_eq!(find(lines.into_iter(), &port("80:1")).unwrap().uid, 1000);
    }

    #[test]
    fn a_port_of_this_process_is_known_as_its_own() {
        let user = crate::sandbox::namespaces::effective_user();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let number = tcp.local_addr().unwrap().port();
        let held = [format!("{number}:1"), format!("udp:127.0.0.1:{}:1", udp.local_addr().unwrap().port())];
        for text in held {
            let owner = owner_of(&port(&text)).expect("it is listed");
            assert_eq!(owner.uid, user);
            let (pid, name) = owner.process.expect("it is ours");
            assert!(pid == std::process::id() && !name.is_empty(), "{pid} {name}");
        }
        drop(tcp);
        assert_eq!(owner_of(&port(&format!("{number}:1"))), None);
    }
}
