//! Programs people use, through the NAT: what they do when they sit idle, half-close, multiplex or push.
//!
//! Servers are in the world, clients in the guest. Each idles only seconds here: what an idle flow lives for
//! is tested in virtual time.

mod quic;
mod shell;
mod tools;
mod web;

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use vunet_integration::lab::Netns;

use crate::bench::{Failure, Outcome, ensure, fail};

/// For how long a connection sits idle.
const IDLE: Duration = Duration::from_secs(4);
/// Seconds after which a program is ended that talks with a test.
const SECONDS_MAX: &str = "60";

/// A program in a namespace that a test talks with over its standard input and output.
struct Dialogue {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
}

impl Dialogue {
    fn start(netns: &Netns, words: &[&str]) -> Result<Dialogue, Failure> {
        let mut command = Command::new("timeout");
        command.args([SECONDS_MAX, "ip", "netns", "exec", netns.name()]).args(words);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("it was piped");
        Ok(Dialogue { child, stdin, stdout })
    }

    fn say(&mut self, text: &[u8]) -> Outcome {
        let stdin = self.stdin.as_mut().expect("nothing is said after the end");
        stdin.write_all(text)?;
        Ok(stdin.flush()?)
    }

    fn expect(&mut self, text: &[u8]) -> Outcome {
        let mut got = vec![0; text.len()];
        let read = self.stdout.read_exact(&mut got);
        read.map_err(|e| Failure(format!("instead of {:?}: {e}", String::from_utf8_lossy(text))))?;
        ensure!(
            got == text,
            "{:?} instead of {:?}",
            String::from_utf8_lossy(&got),
            String::from_utf8_lossy(text)
        );
        Ok(())
    }

    /// Ends the standard input; the rest of what it says, once it has ended well.
    fn end(mut self) -> Result<String, Failure> {
        self.stdin = None;
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest)?;
        let status = self.child.wait()?;
        if !status.success() {
            fail!("the program ended with {status}");
        }
        Ok(rest)
    }
}

impl Drop for Dialogue {
    fn drop(&mut self) {
        // It may have ended, which is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
