//! A parent that opens a TAP and hands its queues down, as libvirt does.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::sys::process::keep_open;
use crate::sys::tap::{Offload, Tap};

/// Opens the TAP `name` with `queues` queues (with virtio-net headers, or `plain`) in the calling process's
/// namespace, and becomes `command`, in whose words `{fds}` stands for the descriptors joined by commas.
///
/// # Errors
/// If it cannot; on success it does not return.
pub fn run(name: &str, queues: usize, plain: bool, command: &[String]) -> io::Result<()> {
    let tap = match plain {
        true => Tap::open_plain(name)?,
        false => Tap::open(name, queues, 12, Offload::default())?,
    };
    tap.set_up()?;
    let fds: Vec<i32> = (0..if plain { 1 } else { queues }).map(|index| tap.fd(index)).collect();
    for fd in &fds {
        keep_open(*fd)?;
    }
    let fds: Vec<String> = fds.iter().map(i32::to_string).collect();
    let words: Vec<String> = command.iter().map(|word| word.replace("{fds}", &fds.join(","))).collect();
    let Some((program, args)) = words.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no command"));
    };
    Err(Command::new(program).args(args).exec())
}
