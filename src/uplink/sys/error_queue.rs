//! The error queue of a datagram socket: what routers and hosts said of datagrams it sent.
//!
//! Read first: ip(7) on `IP_RECVERR`, `linux/errqueue.h`.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, iovec};
use socket2::{SockAddr, SockAddrStorage};

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
    control: Box<ControlBuffer>,
}

#[repr(C, align(8))]
#[derive(Debug)]
struct ControlBuffer([u8; CONTROL_BYTES]);

impl Default for ErrorReader {
    fn default() -> ErrorReader {
        ErrorReader {
            quote: Box::new([0; QUOTE_BYTES_MAX]),
            control: Box::new(ControlBuffer([0; CONTROL_BYTES])),
        }
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
        header.msg_control = self.control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL_BYTES as _;
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: `header` names live storage of the lengths it says.
        let result = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, flags) };
        let len = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the kernel wrote an address of `msg_namelen` bytes into the storage.
        let name = unsafe { SockAddr::new(name, header.msg_namelen) };
        let control = &self.control.0[..header.msg_controllen.min(CONTROL_BYTES)];
        let Some((to, (message, offender))) = name.as_socket().zip(extended_error(control)) else {
            return Ok(None);
        };
        let quoted = &self.quote[..len.min(QUOTE_BYTES_MAX)];
        Ok(Some(NetworkError { to, offender, message, quoted }))
    }
}

/// The ICMP error among control messages, and who sent it.
fn extended_error(mut control: &[u8]) -> Option<(Message, Option<IpAddr>)> {
    const HEADER_BYTES: usize = size_of::<usize>() + 2 * size_of::<c_int>();
    loop {
        let (len, rest) = control.split_first_chunk::<{ size_of::<usize>() }>()?;
        let (level, rest) = rest.split_first_chunk::<4>()?;
        let (kind, _) = rest.split_first_chunk::<4>()?;
        let len = usize::from_ne_bytes(*len);
        let data = control.get(HEADER_BYTES..len)?;
        if (c_int::from_ne_bytes(*level), c_int::from_ne_bytes(*kind)) == (libc::SOL_IP, libc::IP_RECVERR) {
            return parse(data);
        }
        control = control.get(len.next_multiple_of(size_of::<usize>())..)?;
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

    fn message(level: c_int, kind: c_int, data: &[u8]) -> Vec<u8> {
        let mut out = (16 + data.len()).to_ne_bytes().to_vec();
        out.extend(level.to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(data);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    fn error(origin: u8, kind: u8, code: u8, info: u32) -> Vec<u8> {
        let mut out = vec![0, 0, 0, 0, origin, kind, code, 0];
        out.extend(info.to_ne_bytes());
        out.extend([0; 4]);
        out.extend((libc::AF_INET as u16).to_ne_bytes());
        out.extend([0, 0, 192, 0, 2, 9, 0, 0, 0, 0, 0, 0, 0, 0]);
        out
    }

    #[test]
    fn an_error_is_found_behind_other_control_messages() {
        let mut control = message(libc::SOL_SOCKET, 29, &[1, 2, 3]);
        control.extend(message(libc::SOL_IP, libc::IP_RECVERR, &error(2, 3, 4, 1400)));
        let expected =
            Message::Unreachable { code: UnreachableCode::FragmentationNeeded, next_hop_mtu: 1400 };
        assert_eq!(extended_error(&control), Some((expected, Some([192, 0, 2, 9].into()))));
    }

    #[test]
    fn the_kernels_own_errors_and_cut_ones_are_none_of_the_networks() {
        let whole = message(libc::SOL_IP, libc::IP_RECVERR, &error(1, 0, 0, 1400));
        assert_eq!(extended_error(&whole), None);
        let whole = message(libc::SOL_IP, libc::IP_RECVERR, &error(2, 11, 0, 0));
        for len in 0..whole.len() {
            assert!(extended_error(&whole[..len]).is_none(), "{len} bytes");
        }
        assert_eq!(
            extended_error(&whole),
            Some((Message::TimeExceeded { code: 0 }, Some([192, 0, 2, 9].into())))
        );
    }
}
