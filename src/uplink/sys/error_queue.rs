//! The error queue of a datagram socket: what routers and hosts said of datagrams it sent.
//!
//! Read first: ip(7) on `IP_RECVERR`, `linux/errqueue.h`.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, iovec};
use socket2::{SockAddr, SockAddrStorage};

use super::control::Control;
use crate::engine::host_net::NetworkError;
use crate::wire::icmpv4::{Message, UnreachableCode};

/// Bytes of a returned datagram that are kept: more than any ICMP error of IPv4 quotes (RFC 1812,
/// 4.3.2.3).
const QUOTE_BYTES_MAX: usize = 576;
/// Room for control messages: one extended error and what else a kernel may add.
const CONTROL_BYTES: usize = 256;

/// Types of ICMP (RFC 792).
const UNREACHABLE: u8 = 3;
const TIME_EXCEEDED: u8 = 11;

/// Reads errors one by one.
#[derive(Debug)]
pub struct ErrorReader {
    quote: Box<[u8; QUOTE_BYTES_MAX]>,
    control: Box<Control<CONTROL_BYTES>>,
}

impl Default for ErrorReader {
    fn default() -> ErrorReader {
        ErrorReader { quote: Box::new([0; QUOTE_BYTES_MAX]), control: Box::default() }
    }
}

impl ErrorReader {
    /// Takes the oldest error from the queue, without blocking. `Ok(None)` for one the network did not
    /// send (the kernel's own) or that is not understood.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if none waits.
    pub fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<NetworkError<'_>>> {
        let mut name = SockAddrStorage::zeroed();
        let mut segment = iovec { iov_base: self.quote.as_mut_ptr().cast(), iov_len: QUOTE_BYTES_MAX };
        // SAFETY: `msghdr` is plain data, for which all zeroes is valid.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_name = (&raw mut name).cast();
        header.msg_namelen = name.size_of();
        header.msg_iov = &raw mut segment;
        header.msg_iovlen = 1;
        self.control.receive_with(&mut header);
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: `header` names live storage of the lengths it says.
        let result = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, flags) };
        let len = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the kernel wrote an address of `msg_namelen` bytes into the storage.
        let name = unsafe { SockAddr::new(name, header.msg_namelen) };
        let error = self.control.find(header.msg_controllen, libc::SOL_IP, libc::IP_RECVERR);
        let Some((to, (message, offender))) = name.as_socket().zip(error.and_then(parse)) else {
            return Ok(None);
        };
        let quoted = &self.quote[..len.min(QUOTE_BYTES_MAX)];
        Ok(Some(NetworkError { to, offender, message, quoted }))
    }
}

/// `struct sock_extended_err` and the offender's `struct sockaddr_in` behind it.
fn parse(data: &[u8]) -> Option<(Message, Option<IpAddr>)> {
    let (error, offender) = data.split_first_chunk::<16>()?;
    let (origin, kind, code) = (error[4], error[5], error[6]);
    if origin != libc::SO_EE_ORIGIN_ICMP {
        return None;
    }
    let info = u32::from_ne_bytes([error[8], error[9], error[10], error[11]]);
    let message = match kind {
        UNREACHABLE => {
            let code = UnreachableCode::from(code);
            let is_mtu = code == UnreachableCode::FragmentationNeeded;
            let next_hop_mtu = if is_mtu { u16::try_from(info).unwrap_or(u16::MAX) } else { 0 };
            Message::Unreachable { code, next_hop_mtu }
        }
        TIME_EXCEEDED => Message::TimeExceeded { code },
        kind => Message::Other { kind, code },
    };
    Some((message, ipv4_of(offender)))
}

fn ipv4_of(address: &[u8]) -> Option<IpAddr> {
    let family = u16::from_ne_bytes([*address.first()?, *address.get(1)?]);
    let octets: [u8; 4] = address.get(4..8)?.try_into().ok()?;
    let addr = Ipv4Addr::from(octets);
    (c_int::from(family) == libc::AF_INET && !addr.is_unspecified()).then_some(IpAddr::V4(addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(origin: u8, kind: u8, code: u8, info: u32) -> Vec<u8> {
        let mut out = vec![0, 0, 0, 0, origin, kind, code, 0];
        out.extend(info.to_ne_bytes());
        out.extend([0; 4]);
        out.extend((libc::AF_INET as u16).to_ne_bytes());
        out.extend([0, 0, 192, 0, 2, 9, 0, 0, 0, 0, 0, 0, 0, 0]);
        out
    }

    #[test]
    fn an_mtu_is_read_and_the_offender() {
        let expected =
            Message::Unreachable { code: UnreachableCode::FragmentationNeeded, next_hop_mtu: 1400 };
        assert_eq!(parse(&error(2, 3, 4, 1400)), Some((expected, Some([192, 0, 2, 9].into()))));
        let port = Message::Unreachable { code: UnreachableCode::Port, next_hop_mtu: 0 };
        assert_eq!(parse(&error(2, 3, 3, 1400)).map(|(message, _)| message), Some(port));
    }

    #[test]
    fn the_kernels_own_errors_and_cut_ones_are_none_of_the_networks() {
        assert_eq!(parse(&error(1, 0, 0, 1400)), None);
        let whole = error(2, 11, 0, 0);
        for len in 0..16 {
            assert!(parse(&whole[..len]).is_none(), "{len} bytes");
        }
        let expired = Message::TimeExceeded { code: 0 };
        assert_eq!(parse(&whole[..20]), Some((expired, None)), "who sent it is cut off");
    }
}
