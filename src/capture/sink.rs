//! Where a capture goes: a file, a FIFO, or a client of the control API.
//!
//! A file is created for its owner alone. What is overwritten is an earlier capture or an empty file, and nothing
//! else: a mistyped path must not cost somebody's data. A FIFO is opened by the writer once it has a reader.
//!
//! May touch: the file of the path given. Read first: fifo(7), open(2).

use std::fs::{File, FileType, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::pcapng::whole_blocks;

/// How long to rest before a sink that took nothing is tried again.
const RETRY: Duration = Duration::from_millis(2);

/// First bytes of captures: pcapng, and pcap in its byte orders and resolutions.
const MAGICS: [[u8; 4]; 5] = [
    [0x0a, 0x0d, 0x0d, 0x0a],
    [0xd4, 0xc3, 0xb2, 0xa1],
    [0xa1, 0xb2, 0xc3, 0xd4],
    [0x4d, 0x3c, 0xb2, 0xa1],
    [0xa1, 0xb2, 0x3c, 0x4d],
];

/// Why nothing can be captured to a path.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It cannot be opened or made.
    #[error("{path}: {source}{hint}", path = .path.display(), hint = hint(.source))]
    Io {
        /// It.
        path: PathBuf,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// It is there and holds something else.
    #[error("{path}: it is there and is no capture: remove it, or give another path", path = .0.display())]
    NotACapture(PathBuf),
    /// It is neither a file nor a FIFO.
    #[error("{path}: it is {what}: give the path of a file, a FIFO, or nothing yet", path = .path.display())]
    Kind {
        /// It.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another capture is written to it.
    #[error("{path}: another process captures to it: give another path", path = .0.display())]
    InUse(PathBuf),
}

/// What to do about some refusals.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
            "; where vunet may not write, `vunet ctl capture -` writes the capture as the client's"
        }
        _ => "",
    }
}

/// What a path led to.
#[derive(Debug)]
pub enum Opened {
    /// A file, empty, and written to by nobody else who asks.
    File(File),
    /// A FIFO, to be opened when it has a reader.
    Fifo(PathBuf),
}

fn kind(file_type: FileType) -> &'static str {
    match file_type {
        kind if kind.is_dir() => "a folder",
        kind if kind.is_symlink() => "a symbolic link",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_block_device() || kind.is_char_device() => "a device",
        _ => "neither a file nor a FIFO",
    }
}

/// Opens `path` for a capture: makes a file (mode 0600), or empties one that is a capture or empty, or finds a FIFO.
///
/// # Errors
/// [`OpenError`].
pub fn open(path: &Path) -> Result<Opened, OpenError> {
    let failed = |source| OpenError::Io { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file_type = match path.symlink_metadata() {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let file = options.create_new(true).mode(0o600).open(path).map_err(failed)?;
            lock(&file, path)?;
            return Ok(Opened::File(file));
        }
        Err(error) => return Err(failed(error)),
    };
    if file_type.is_fifo() {
        return Ok(Opened::Fifo(path.to_owned()));
    }
    if !file_type.is_file() {
        return Err(OpenError::Kind { path: path.to_owned(), what: kind(file_type) });
    }
    let mut file = options.read(true).open(path).map_err(failed)?;
    // It may be another one by now.
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(OpenError::Kind { path: path.to_owned(), what: kind(metadata.file_type()) });
    }
    lock(&file, path)?;
    if metadata.len() > 0 {
        let mut magic = [0; 4];
        let is_read = file.read_exact(&mut magic).is_ok();
        if !is_read || !MAGICS.contains(&magic) {
            return Err(OpenError::NotACapture(path.to_owned()));
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
    }
    Ok(Opened::File(file))
}

fn lock(file: &File, path: &Path) -> Result<(), OpenError> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(path.to_owned())),
        // A filesystem without locks is no reason to capture nothing.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// Where blocks are written.
#[derive(Debug)]
pub enum Sink {
    /// A file, and the bytes written to it.
    File(File, u64),
    /// A FIFO that has no reader yet.
    Waiting(PathBuf),
    /// One that has.
    Fifo(File),
    /// A client, in pieces.
    Stream(mpsc::Sender<Vec<u8>>),
}

/// Why blocks are not written.
#[derive(Debug)]
pub(super) enum SinkError {
    /// Nobody reads any more.
    Left,
    /// The kernel refuses.
    Io(io::Error),
    /// The writer waits no longer.
    GaveUp,
}

impl From<io::Error> for SinkError {
    fn from(error: io::Error) -> SinkError {
        if error.kind() == ErrorKind::BrokenPipe { SinkError::Left } else { SinkError::Io(error) }
    }
}

impl From<Opened> for Sink {
    fn from(opened: Opened) -> Sink {
        match opened {
            Opened::File(file) => Sink::File(file, 0),
            Opened::Fifo(path) => Sink::Waiting(path),
        }
    }
}

impl Sink {
    /// Whether it can be written to: false while a FIFO has no reader.
    pub(super) fn is_ready(&mut self) -> Result<bool, SinkError> {
        let Sink::Waiting(path) = self else { return Ok(true) };
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        match OpenOptions::new().write(true).custom_flags(flags).open(path) {
            Ok(file) if file.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo()) => {
                *self = Sink::Fifo(file);
                Ok(true)
            }
            Ok(_) => Err(SinkError::Io(io::Error::other("the FIFO was replaced"))),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(false),
            Err(error) => Err(SinkError::Io(error)),
        }
    }

    /// Writes whole blocks. A file that takes them no more ends with the last whole one. Who reads slowly is waited
    /// for until `give_up` says so.
    pub(super) fn write(
        &mut self,
        blocks: &[u8],
        mut give_up: impl FnMut() -> bool,
    ) -> Result<(), SinkError> {
        match self {
            Sink::File(file, written) => write_file(file, written, blocks),
            Sink::Waiting(_) => Ok(()),
            Sink::Fifo(file) => write_fifo(file, blocks, give_up),
            Sink::Stream(client) => {
                let mut piece = blocks.to_vec();
                loop {
                    match client.try_send(piece) {
                        Ok(()) => return Ok(()),
                        Err(TrySendError::Closed(_)) => return Err(SinkError::Left),
                        Err(TrySendError::Full(_)) if give_up() => return Err(SinkError::GaveUp),
                        Err(TrySendError::Full(again)) => piece = again,
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    /// Whether nobody reads any more, as far as that shows without writing.
    pub(super) fn is_left(&self) -> bool {
        matches!(self, Sink::Stream(client) if client.is_closed())
    }
}

fn write_file(file: &mut File, written: &mut u64, blocks: &[u8]) -> Result<(), SinkError> {
    let mut done = 0;
    while done < blocks.len() {
        match file.write(&blocks[done..]) {
            Ok(0) => return Err(SinkError::Io(ErrorKind::WriteZero.into())),
            Ok(len) => done += len,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                *written += whole_blocks(&blocks[..done]) as u64;
                // What is left of it is worth more whole; if that fails readers skip a cut block.
                let _ = file.set_len(*written).and_then(|()| file.seek(io::SeekFrom::End(0)));
                return Err(SinkError::Io(error));
            }
        }
    }
    *written += done as u64;
    Ok(())
}

fn write_fifo(file: &mut File, blocks: &[u8], mut give_up: impl FnMut() -> bool) -> Result<(), SinkError> {
    let mut left = blocks;
    while !left.is_empty() {
        match file.write(left) {
            Ok(len) => left = &left[len..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if give_up() {
                    return Err(SinkError::GaveUp);
                }
                std::thread::sleep(RETRY);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
