//! A TAP interface with virtio-net headers, one descriptor per queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

/// What the driver side of the TAP accepts, as `TUNSETOFFLOAD` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offload {
    /// Frames with partial checksums may be read from the TAP.
    pub(crate) csum: bool,
    /// TCP over IPv4 segments of up to 64 KiB.
    pub(crate) tso4: bool,
    /// The same over IPv6.
    pub(crate) tso6: bool,
    /// With ECN's CWR.
    pub(crate) ecn: bool,
    /// UDP datagrams to be segmented.
    pub(crate) uso: bool,
}

impl Offload {
    fn bits(self) -> libc::c_uint {
        let mut bits = 0;
        if !self.csum {
            return bits;
        }
        bits |= libc::TUN_F_CSUM;
        if self.tso4 {
            bits |= libc::TUN_F_TSO4;
        }
        if self.tso6 {
            bits |= libc::TUN_F_TSO6;
        }
        if self.ecn && (self.tso4 || self.tso6) {
            bits |= libc::TUN_F_TSO_ECN;
        }
        if self.uso {
            bits |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
        }
        bits
    }
}

/// A TAP interface in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Tap {
    name: String,
    queues: Vec<File>,
    control: UdpSocket,
}

impl Tap {
    /// Creates interface `name` with `queues` queues, non-blocking, each frame preceded by a
    /// virtio-net header of `header_bytes` (10 or 12).
    ///
    /// # Errors
    /// What opening `/dev/net/tun` or its ioctls answer.
    pub(crate) fn open(name: &str, queues: usize, header_bytes: usize, offload: Offload) -> io::Result<Tap> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "interface name of 1 to 15 bytes needed",
            ));
        }
        let control = UdpSocket::bind("0.0.0.0:0")?;
        let mut tap = Tap { name: name.to_owned(), queues: Vec::new(), control };
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let header = libc::c_int::try_from(header_bytes).map_err(io::Error::other)?;
        for _ in 0..queues {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")?;
            let mut request = tap.request();
            request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
            // SAFETY: TUNSETIFF reads and writes one ifreq, which we own.
            let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
            check(rc)?;
            // SAFETY: TUNSETVNETHDRSZ reads one int, which we own.
            let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &header) };
            check(rc)?;
            let bits = libc::c_ulong::from(offload.bits());
            // SAFETY: TUNSETOFFLOAD takes its bits by value.
            let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, bits) };
            check(rc)?;
            tap.queues.push(file);
        }
        Ok(tap)
    }

    /// Creates interface `name` with one queue whose frames have no header in front.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_plain(name: &str) -> io::Result<Tap> {
        let control = UdpSocket::bind("0.0.0.0:0")?;
        let mut tap = Tap { name: name.to_owned(), queues: Vec::new(), control };
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        let mut request = tap.request();
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which we own.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        check(rc)?;
        tap.queues.push(file);
        Ok(tap)
    }

    /// The descriptor of queue `index`.
    pub(crate) fn fd(&self, index: usize) -> RawFd {
        self.queues[index].as_raw_fd()
    }

    /// Queue `index` as a file: one frame a read or write.
    pub(crate) fn file(&self, index: usize) -> &File {
        &self.queues[index]
    }

    fn request(&self) -> libc::ifreq {
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
    }

    fn control_ioctl(&self, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the interface ioctls used here read and write one ifreq, which we own.
        let rc = unsafe { libc::ioctl(self.control.as_raw_fd(), code, request) };
        check(rc)
    }

    /// Sets the interface's MAC address.
    ///
    /// # Errors
    /// What the kernel answers; the interface must be down or allow live changes (TAP does).
    pub(crate) fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut request = self.request();
        let mut data = [0; 14];
        for (to, from) in data.iter_mut().zip(mac) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
        self.control_ioctl(libc::SIOCSIFHWADDR, &mut request)
    }

    /// The interface's MAC address.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn mac(&self) -> io::Result<[u8; 6]> {
        let mut request = self.request();
        self.control_ioctl(libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: SIOCGIFHWADDR filled this member of the union.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
        Ok(std::array::from_fn(|at| data[at].cast_unsigned()))
    }

    /// Sets the interface's IP MTU in bytes.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn set_ip_mtu(&self, ip_mtu: u16) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_mtu = i32::from(ip_mtu);
        self.control_ioctl(libc::SIOCSIFMTU, &mut request)
    }

    /// Sets how many frames the kernel keeps for a reader that is late.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn set_tx_queue_frames(&self, frames: u16) -> io::Result<()> {
        let mut request = self.request();
        // SIOCSIFTXQLEN reads ifr_qlen, an int where the MTU is (netdevice(7)).
        request.ifr_ifru.ifru_mtu = i32::from(frames);
        self.control_ioctl(libc::SIOCSIFTXQLEN, &mut request)
    }

    /// Brings the interface up.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn set_up(&self) -> io::Result<()> {
        let mut request = self.request();
        self.control_ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS filled this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
        self.control_ioctl(libc::SIOCSIFFLAGS, &mut request)
    }
}

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
