//! Binds published ports, and says why one cannot be.
//!
//! Needs no privilege but for ports below `net.ipv4.ip_unprivileged_port_start`; an interface is bound to without
//! any since Linux 5.7. May touch: sockets, `port_owner`, a sysctl. Read first: ip(7), socket(7) (`SO_BINDTODEVICE`).

use std::fmt;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use thiserror::Error;

use super::port_owner::{PortOwner, owner_of};
use crate::config::{Protocol, Publish};

/// Connections that wait to be taken from a published port; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 1024;
/// The sysctl that says which ports need a capability.
const PORT_START: &str = "net.ipv4.ip_unprivileged_port_start";

/// A published port that could not be bound.
#[derive(Debug, Error)]
#[error("cannot listen on {port}: {why}")]
pub struct BindError {
    /// The port.
    pub port: Box<Publish>,
    /// What is in the way.
    pub why: Obstacle,
    /// The kernel's refusal.
    pub source: io::Error,
}

/// What keeps a port from being bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Obstacle {
    /// Another socket has it.
    Taken {
        /// Whose, as far as the kernel tells.
        owner: Option<PortOwner>,
        /// Whose of the processes of named networks.
        network_user: Option<String>,
    },
    /// It needs CAP_NET_BIND_SERVICE.
    Privileged {
        /// The port.
        port: u16,
        /// The first that needs nothing.
        first_free: u16,
    },
    /// The host has no such address.
    NoAddress,
    /// The host has no such interface.
    NoInterface,
    /// The kernel does not bind to an interface without privilege.
    OldKernel,
    /// Something else, which the kernel's refusal says.
    Other,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Taken { owner, network_user } => {
                f.write_str("it is taken by ")?;
                match (network_user, owner) {
                    (Some(user), _) => f.write_str(user)?,
                    (None, Some(owner)) => write!(f, "{owner}")?,
                    (None, None) => f.write_str("a socket that does not listen yet, or has ended just now")?,
                }
                f.write_str("; end that, or publish another port of this host")
            }
            Obstacle::Privileged { port, first_free } => write!(
                f,
                "ports below {first_free} need the capability CAP_NET_BIND_SERVICE, which this process lacks: publish a port from \
                 {first_free} on, or give it to the program (setcap cap_net_bind_service=+ep), or allow all users this one \
                 (sysctl -w {PORT_START}={port})"
            ),
            Obstacle::NoAddress => {
                f.write_str("no interface of this host has the address: give one of its own, or none for all")
            }
            Obstacle::NoInterface => f.write_str("this host has no such interface (ip link)"),
            Obstacle::OldKernel => f.write_str(
                "before Linux 5.7 binding to an interface needs the capability CAP_NET_RAW: leave the interface out, or bind \
                 to its address",
            ),
            Obstacle::Other => f.write_str("the kernel refuses"),
        }
    }
}

/// Binds a published port, TCP listening, and puts the port the kernel picked in the place of port 0.
///
/// # Errors
/// [`BindError`].
pub fn bind(port: &mut Publish) -> Result<Socket, BindError> {
    let refused =
        |source: io::Error| BindError { port: Box::new(*port), why: obstacle(port, &source), source };
    let socket = open(port).map_err(refused)?;
    let host = socket.local_addr().map_err(refused)?.as_socket().unwrap_or(port.host);
    port.host = host;
    Ok(socket)
}

/// Binds a published port, without listening, and lets go of it: nothing can reach it meanwhile.
///
/// # Errors
/// The kernel's refusal.
pub fn try_bind(port: &Publish) -> io::Result<()> {
    bound(port).map(drop)
}

fn open(port: &Publish) -> io::Result<Socket> {
    let socket = bound(port)?;
    if port.protocol == Protocol::Tcp {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

fn bound(port: &Publish) -> io::Result<Socket> {
    let kind = match port.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(port.host), kind.nonblocking().cloexec(), None)?;
    if let Some(interface) = port.interface {
        socket.bind_device(Some(interface.as_str().as_bytes()))?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&port.host.into())?;
    Ok(socket)
}

fn obstacle(port: &Publish, error: &io::Error) -> Obstacle {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => Obstacle::Taken { owner: owner_of(port), network_user: None },
        Some(libc::EACCES) => {
            let path = format!("/proc/sys/{}", PORT_START.replace('.', "/"));
            let read = fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
            Obstacle::Privileged { port: port.host.port(), first_free: read.unwrap_or(1024) }
        }
        Some(libc::EADDRNOTAVAIL) => Obstacle::NoAddress,
        Some(libc::ENODEV) => Obstacle::NoInterface,
        Some(libc::EPERM) if port.interface.is_some() => Obstacle::OldKernel,
        _ => Obstacle::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> Publish {
        crate::config::publish::publish(text).unwrap().iter().next().unwrap()
    }

    fn says(text: &str) -> String {
        bind(&mut port(text)).expect_err(text).to_string()
    }

    #[test]
    fn a_taken_port_is_refused_with_its_owner() {
        for protocol in ["tcp", "udp"] {
            let mut first = port(&format!("{protocol}:127.0.0.1:0:80"));
            let _held = bind(&mut first).unwrap();
            assert!(first.host.port() != 0);
            let number = first.host.port();
            let error = says(&format!("{protocol}:{number}:81"));
            let pid = std::process::id();
            for part in [
                &*format!("cannot listen on {protocol}:0.0.0.0:{number}:81"),
                &format!("process {pid} ("),
                "of user",
            ] {
                assert!(error.contains(part), "'{part}' is not in: {error}");
            }
        }
    }

    #[test]
    fn what_the_host_does_not_have_is_named() {
        assert!(says("192.0.2.77:0:80").contains("no interface of this host has the address"));
        assert!(says("%vunet-none:0:80").contains("no such interface"));
    }

    #[test]
    fn a_port_is_bound_to_one_interface_without_privilege() {
        let mut on_lo = port("udp:%lo:0:80");
        let socket = bind(&mut on_lo).unwrap();
        assert_eq!(socket.device().unwrap().as_deref(), Some(&b"lo"[..]));
        // Another interface has the same port to itself, all interfaces together have not.
        let taken = says(&format!("udp:{}:81", on_lo.host.port()));
        assert!(taken.contains("taken by process"), "{taken}");
    }

    #[test]
    fn the_loopback_of_ipv6_is_bound() {
        let mut any = port("[::1]:0:80");
        let socket = bind(&mut any).unwrap();
        assert_eq!(socket.local_addr().unwrap().as_socket(), Some(any.host));
    }

    #[test]
    fn a_privileged_port_is_refused_with_what_it_needs() {
        let why = Obstacle::Privileged { port: 80, first_free: 1024 }.to_string();
        for part in ["CAP_NET_BIND_SERVICE", "from 1024 on", "setcap", "ip_unprivileged_port_start=80"] {
            assert!(why.contains(part), "'{part}' is not in: {why}");
        }
        let error = io::Error::from_raw_os_error(libc::EACCES);
        assert!(matches!(obstacle(&port("80:80"), &error), Obstacle::Privileged { port: 80, .. }));
    }
}
