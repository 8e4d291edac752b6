//! One queue of a TAP or macvtap interface: ioctls, and one system call a frame.
//!
//! A frame is read into, and written from, several places at once: its virtio-net header and its first
//! bytes in host memory, the rest in guest memory. The kernel checks every access to the latter itself and
//! answers a bad one with `EFAULT`, so no guest can make these calls unsound.
//!
//! Read first: the kernel's `Documentation/networking/tuntap.rst`, `linux/if_tun.h`.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use libc::{c_int, c_short, c_uint, c_ulong, iovec};
use thiserror::Error;

use crate::engine::guest_port::GuestOffloads;
use crate::frame::{Payload, PayloadMut};
use crate::limits::FRAME_SEGMENTS_MAX;
use crate::wire::vnet::VNET_HEADER_BYTES;

/// The device every TUN or TAP interface is opened through.
pub const CLONE_DEVICE: &str = "/dev/net/tun";

/// What an interface must be: Ethernet frames behind a virtio-net header, nothing else in front.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Segments of one call beside those in guest memory: header, head in up to three pieces, and what lies
/// beyond the guest's buffers.
const OWN_SEGMENTS: usize = 5;

/// Why an inherited descriptor is no TAP queue to be used.
#[derive(Debug, Error)]
pub enum InheritedTapError {
    /// 0, 1 and 2 are the standard streams, negative numbers nothing at all.
    #[error("descriptors below 3 are the standard streams")]
    Reserved,
    /// The parent passed no such descriptor.
    #[error("no such descriptor is open in this process")]
    NotOpen,
    /// The same number again.
    #[error("the descriptor is given twice")]
    Twice,
    /// It is open, but no TUN or TAP queue, or one that was not attached to an interface.
    #[error("the descriptor is not a TAP interface (/dev/net/tun after TUNSETIFF, or a macvtap's /dev/tapN)")]
    NotTap,
    /// A TUN: IP packets without Ethernet headers.
    #[error("interface {0} is a TUN, not a TAP: open it with IFF_TAP")]
    Tun(String),
    /// Frames without a virtio-net header.
    #[error("interface {0} was opened without IFF_VNET_HDR: vunet needs the virtio-net header; add the flag")]
    NoVnetHeader(String),
    /// Frames with the TUN protocol header.
    #[error("interface {0} was opened without IFF_NO_PI: add the flag")]
    ProtocolHeader(String),
    /// The kernel refused to set it up.
    #[error("interface {name} cannot be set up")]
    SetUp {
        /// Its name.
        name: String,
        /// The kernel's refusal.
        source: io::Error,
    },
}

/// One queue of an interface, non-blocking.
#[derive(Debug)]
pub struct TapQueue {
    fd: OwnedFd,
    /// The interface's name.
    name: String,
    /// It may be detached from the interface and attached again.
    multi_queue: bool,
}

impl TapQueue {
    /// Opens a queue of the TAP `name` through [`CLONE_DEVICE`]; an interface of that name is made if there
    /// is none, and gone with its last queue then. A `%d` in the name is the kernel's to number.
    ///
    /// # Errors
    /// The kernel's: `NotFound` without the device, `PermissionDenied` without CAP_NET_ADMIN (unless the
    /// interface is the caller's), `ResourceBusy` if another process has it, `InvalidInput` if the
    /// interface is no TAP or was made with other flags than `multi_queue` says.
    pub fn open(name: &str, multi_queue: bool) -> io::Result<TapQueue> {
        let fd = open_device(Path::new(CLONE_DEVICE))?;
        let mut request = request(name)?;
        let flags = FLAGS | if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which we own.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
        TapQueue { fd, name: name_of(&request), multi_queue }.prepared()
    }

    /// Opens a queue of the macvtap `name` through its `device`, such as `/dev/tap7`. Where that is not to
    /// be had, as in containers, a device of the numbers that the file `numbers` holds is made, opened and
    /// removed.
    ///
    /// # Errors
    /// The system's.
    pub fn open_macvtap(
        device: &Path,
        numbers: &Path,
        name: &str,
        multi_queue: bool,
    ) -> io::Result<TapQueue> {
        let text = std::fs::read_to_string(numbers)?;
        let number = parse_numbers(&text).ok_or(io::ErrorKind::InvalidData)?;
        let there = std::fs::metadata(device).is_ok_and(|meta| meta.rdev() == number);
        let fd = if there { open_device(device)? } else { open_number(number, name)? };
        let mut request = request(name)?;
        let flags = FLAGS | if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: TUNSETIFF reads one ifreq, which we own.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) })?;
        // Its queues can be detached too.
        TapQueue { fd, name: name.to_owned(), multi_queue }.prepared()
    }

    /// Takes ownership of the queue the parent passed as descriptor `fd`. To be called at start, once per
    /// number, before the process opens files of its own.
    ///
    /// # Errors
    /// [`InheritedTapError`].
    pub fn inherited(fd: RawFd) -> Result<TapQueue, InheritedTapError> {
        let (name, multi_queue) = TapQueue::examine(fd)?;
        // SAFETY: the descriptor is open (checked above) and the caller keeps that nothing else in this
        // process owns it: it came from the parent and is taken once, before anything else is opened.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let queue = TapQueue { fd, name: name.clone(), multi_queue };
        let prepared = queue.not_blocking().and_then(TapQueue::prepared);
        prepared.map_err(|source| InheritedTapError::SetUp { name, source })
    }

    /// The interface whose queue the parent passed as descriptor `fd`, and whether that can have several. It is neither taken nor
    /// changed.
    ///
    /// # Errors
    /// As [`TapQueue::inherited`].
    pub fn examine(fd: RawFd) -> Result<(String, bool), InheritedTapError> {
        if fd <= libc::STDERR_FILENO {
            return Err(InheritedTapError::Reserved);
        }
        // SAFETY: `F_GETFD` only reads a descriptor's flags; a number that is not open yields EBADF.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            return Err(InheritedTapError::NotOpen);
        }
        let mut request = request("").map_err(|_| InheritedTapError::NotTap)?;
        // SAFETY: TUNGETIFF writes one ifreq, which we own; other devices answer ENOTTY.
        check(unsafe { libc::ioctl(fd, libc::TUNGETIFF, &mut request) })
            .map_err(|_| InheritedTapError::NotTap)?;
        let name = name_of(&request);
        // SAFETY: TUNGETIFF filled this member of the union.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            return Err(InheritedTapError::Tun(name));
        }
        if flags & libc::IFF_VNET_HDR == 0 {
            return Err(InheritedTapError::NoVnetHeader(name));
        }
        if flags & libc::IFF_NO_PI == 0 {
            return Err(InheritedTapError::ProtocolHeader(name));
        }
        Ok((name, flags & libc::IFF_MULTI_QUEUE != 0))
    }

    /// A queue over any descriptor that keeps frames apart, to test what stands above.
    #[cfg(test)]
    pub(crate) fn of_socket(socket: std::os::unix::net::UnixDatagram) -> TapQueue {
        socket.set_nonblocking(true).expect("a socket can be set so");
        TapQueue { fd: socket.into(), name: "test".to_owned(), multi_queue: false }
    }

    /// The header as vunet writes it: 12 bytes, little-endian.
    fn prepared(self) -> io::Result<TapQueue> {
        let header: c_int = VNET_HEADER_BYTES as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which we own.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &header) })?;
        let little_endian: c_int = 1;
        // SAFETY: TUNSETVNETLE reads one int, which we own.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETLE, &little_endian) })?;
        Ok(self)
    }

    fn not_blocking(self) -> io::Result<TapQueue> {
        let socket = socket2::SockRef::from(&self.fd);
        socket.set_nonblocking(true)?;
        socket.set_cloexec(true)?;
        Ok(self)
    }

    /// Its descriptor alone: the queue, for whoever reads and writes it otherwise.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the queue is one of several that the interface may have.
    pub fn is_multi_queue(&self) -> bool {
        self.multi_queue
    }

    /// Its descriptor, to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// Tells the kernel which offloads frames read from here may carry: those of the guest. Holds for all
    /// queues of the interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_offloads(&self, accepted: GuestOffloads) -> io::Result<()> {
        match self.set_offload_bits(offload_bits(accepted)) {
            // Kernels before 6.2 know no UDP segmentation on a TAP.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.set_offload_bits(offload_bits(GuestOffloads { uso4: false, uso6: false, ..accepted }))
            }
            outcome => outcome,
        }
    }

    fn set_offload_bits(&self, bits: c_uint) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its bits by value.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(bits)) })
    }

    /// Attaches the queue to its interface or detaches it, so that no frame is steered to a queue nobody
    /// reads. A detached queue loses the frames it has. Without effect on an interface of one queue.
    ///
    /// # Errors
    /// The kernel's; `InvalidInput` if it is so already.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        let mut request = request("")?;
        let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq, which we own.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &mut request) })
    }

    /// Sets the interface's IP MTU in bytes, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's; it needs CAP_NET_ADMIN.
    pub fn set_ip_mtu(&self, ip_mtu: u16) -> io::Result<()> {
        let control = UdpSocket::bind("0.0.0.0:0")?;
        let mut request = request(&self.name)?;
        request.ifr_ifru.ifru_mtu = c_int::from(ip_mtu);
        // SAFETY: SIOCSIFMTU reads one ifreq, which we own.
        check(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFMTU, &mut request) })
    }

    /// Writes one frame: `header`, `head` in its pieces, and `rest`.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` while the interface takes no more.
    pub fn send(
        &self,
        room: &mut Segments,
        header: &[u8; VNET_HEADER_BYTES],
        head: [&[u8]; 3],
        rest: &Payload<'_>,
    ) -> io::Result<()> {
        let list = &mut room.0;
        list.clear();
        list.push(to_read(header));
        list.extend(head.into_iter().filter(|piece| !piece.is_empty()).map(to_read));
        rest.push_iovecs(list);
        if list.len() > FRAME_SEGMENTS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the list names live memory of the arguments; the kernel only reads it.
        let sent = unsafe { libc::writev(self.fd.as_raw_fd(), list.as_ptr(), list.len() as c_int) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads one frame: into `header`, `head`, `rest`, and what exceeds them into `spare`. Returns the
    /// frame's length without the header, and how many bytes of `rest` could be offered: all, or fewer if
    /// it lies in too many pieces.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if no frame waits.
    pub fn receive(
        &self,
        room: &mut Segments,
        header: &mut [u8; VNET_HEADER_BYTES],
        head: &mut [u8],
        mut rest: PayloadMut<'_>,
        spare: &mut [u8],
    ) -> io::Result<(usize, usize)> {
        let list = &mut room.0;
        list.clear();
        list.push(to_write(header));
        list.push(to_write(head));
        let own = list.len();
        rest.push_iovecs(list);
        list.truncate(own + FRAME_SEGMENTS_MAX - OWN_SEGMENTS);
        let offered = list[own..].iter().map(|segment| segment.iov_len).sum();
        list.push(to_write(spare));
        // SAFETY: the list names memory of the arguments that is theirs to be written; the kernel writes no
        // further than each segment's length.
        let got = unsafe { libc::readv(self.fd.as_raw_fd(), list.as_ptr(), list.len() as c_int) };
        match usize::try_from(got) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(got) => match got.checked_sub(VNET_HEADER_BYTES) {
                Some(len) => Ok((len, offered)),
                None => Err(io::ErrorKind::InvalidData.into()),
            },
        }
    }
}

/// Room for the list of one call's segments, kept between calls.
#[derive(Debug)]
pub struct Segments(Vec<iovec>);

impl Default for Segments {
    fn default() -> Segments {
        Segments(Vec::with_capacity(FRAME_SEGMENTS_MAX + OWN_SEGMENTS))
    }
}

fn to_read(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

fn to_write(bytes: &mut [u8]) -> iovec {
    iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// `TUNSETOFFLOAD`'s bits. UDP segmentation is had for both families or for none, ECN with TCP only.
fn offload_bits(accepted: GuestOffloads) -> c_uint {
    if !accepted.checksum {
        return 0;
    }
    let tcp = accepted.tso4 || accepted.tso6;
    let wanted = [
        (true, libc::TUN_F_CSUM),
        (accepted.tso4, libc::TUN_F_TSO4),
        (accepted.tso6, libc::TUN_F_TSO6),
        (accepted.ecn && tcp, libc::TUN_F_TSO_ECN),
        (accepted.uso4 && accepted.uso6, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    wanted.iter().filter(|(wanted, _)| *wanted).fold(0, |bits, (_, bit)| bits | bit)
}

fn open_device(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    Ok(file.into())
}

/// `MAJOR:MINOR` as the kernel prints it.
fn parse_numbers(text: &str) -> Option<libc::dev_t> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Opens the character device of this number through a file of its own.
fn open_number(number: libc::dev_t, name: &str) -> io::Result<OwnedFd> {
    let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    let text = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: mknod reads the path, which is terminated; it follows no link and replaces nothing.
    check(unsafe { libc::mknod(text.as_ptr(), libc::S_IFCHR | 0o600, number) })?;
    let opened = open_device(&path);
    // It is of no use to anybody else; what cannot be removed is an empty name.
    let _ = std::fs::remove_file(&path);
    opened
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface names have at most 15 bytes"));
    }
    let mut bytes = [0; libc::IFNAMSIZ];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(libc::ifreq { ifr_name: bytes, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } })
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    const ALL: GuestOffloads =
        GuestOffloads { checksum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true };

    #[test]
    fn offloads_follow_what_the_guest_took() {
        use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6;
        assert_eq!(offload_bits(ALL), all);
        assert_eq!(offload_bits(GuestOffloads { checksum: false, ..ALL }), 0, "none without checksums");
        assert_eq!(offload_bits(GuestOffloads::default()), 0);
        let one_family = GuestOffloads { uso6: false, ..ALL };
        assert_eq!(offload_bits(one_family), all & !(TUN_F_USO4 | TUN_F_USO6));
        let no_tcp = GuestOffloads { tso4: false, tso6: false, ..ALL };
        assert_eq!(offload_bits(no_tcp), TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6, "ECN goes with TCP");
        let tso4 = GuestOffloads { checksum: true, tso4: true, ..GuestOffloads::default() };
        assert_eq!(offload_bits(tso4), TUN_F_CSUM | TUN_F_TSO4);
    }

    #[test]
    fn descriptors_that_are_no_tap_are_refused_with_their_reason() {
        for number in [-1, 0, 1, 2] {
            assert!(matches!(TapQueue::inherited(number), Err(InheritedTapError::Reserved)), "{number}");
        }
        assert!(matches!(TapQueue::inherited(1_000_000), Err(InheritedTapError::NotOpen)));
        let file = File::open("/dev/null").unwrap().into_raw_fd();
        assert!(matches!(TapQueue::inherited(file), Err(InheritedTapError::NotTap)));
    }

    #[test]
    fn a_frame_is_gathered_and_scattered_in_one_call() {
        let (near, far) = UnixDatagram::pair().unwrap();
        let (queue, mut room) = (TapQueue::of_socket(near), Segments::default());
        let rest = Payload::from_host(b"payload");
        queue.send(&mut room, &[7; 12], [b"ab", b"", b"cd"], &rest).unwrap();
        let mut bytes = [0; 64];
        let len = far.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], [&[7; 12][..], b"abcdpayload"].concat());

        far.send(&bytes[..len]).unwrap();
        let (mut header, mut head, mut guest, mut spare) = ([0; 12], [0; 3], [0; 5], [0; 32]);
        let rest = PayloadMut::from_host(&mut guest);
        let got = queue.receive(&mut room, &mut header, &mut head, rest, &mut spare).unwrap();
        assert_eq!(got, (11, 5));
        assert_eq!((header, &head, &guest, &spare[..3]), ([7; 12], b"abc", b"dpayl", &b"oad"[..]));
        let rest = PayloadMut::from_host(&mut guest);
        let empty = queue.receive(&mut room, &mut header, &mut head, rest, &mut spare).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        far.send(&[0; 11]).unwrap();
        let rest = PayloadMut::from_host(&mut guest);
        let short = queue.receive(&mut room, &mut header, &mut head, rest, &mut spare).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::InvalidData, "less than a header");
    }
}
