//! `vunet ctl capture`: what crosses the guest's device, to a file of the backend's or to standard output.

use std::io::{ErrorKind, IsTerminal as _, Write};
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hyper::Method;

use super::check::UsageError;
use super::ctl::list;
use crate::capture::filter::Protocol;
use crate::control::api::capture::{CaptureStatus, NewCapture, Wanted};
use crate::control::client::{Client, ClientError};

/// What is to happen to captures.
#[derive(Clone, Debug, Args)]
pub(super) struct CaptureArgs {
    /// `start FILE` has the backend write one, `stop` ends it, `status` shows the one that runs or the last, and `-` writes one to
    /// standard output until either side ends it: vunet ctl capture - | tcpdump -nr -
    #[arg(value_enum, hide_possible_values = true, value_name = "start|stop|status|-")]
    what: What,
    /// With start: a file to be made (mode 0600), an earlier capture, which is overwritten, or a FIFO
    #[arg(value_name = "FILE", required_if_eq("what", "start"))]
    file: Option<PathBuf>,
    #[command(flatten)]
    wanted: WantedArgs,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// To a file of the backend's.
    Start,
    /// Its end.
    Stop,
    /// How it is.
    Status,
    /// To standard output.
    #[value(name = "-")]
    Here,
}

/// What of the frames is wanted.
#[derive(Clone, Debug, Args)]
pub(super) struct WantedArgs {
    /// Bytes of each frame that are kept, at most [default: all]
    #[arg(long, value_name = "BYTES")]
    snaplen: Option<usize>,
    /// Bytes after which the capture ends
    #[arg(long, value_name = "BYTES")]
    max_bytes: Option<u64>,
    /// Seconds after which it ends
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Only frames of one protocol
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// Only frames from or to this address
    #[arg(long, value_name = "IP")]
    host: Option<IpAddr>,
    /// Only frames from or to this port of TCP or UDP
    #[arg(long)]
    port: Option<u16>,
}

impl From<&WantedArgs> for Wanted {
    fn from(args: &WantedArgs) -> Wanted {
        Wanted {
            snaplen: args.snaplen,
            max_bytes: args.max_bytes,
            duration_seconds: args.duration,
            protocol: args.protocol,
            host: args.host,
            port: args.port,
        }
    }
}

impl WantedArgs {
    /// The same as a query.
    fn query(&self) -> String {
        let protocol = self.protocol.and_then(|protocol| serde_json::to_value(protocol).ok());
        let fields = [
            self.snaplen.map(|value| format!("snaplen={value}")),
            self.max_bytes.map(|value| format!("max_bytes={value}")),
            self.duration.map(|value| format!("duration_seconds={value}")),
            protocol.and_then(|value| Some(format!("protocol={}", value.as_str()?))),
            self.host.map(|value| format!("host={value}")),
            self.port.map(|value| format!("port={value}")),
        ];
        fields.into_iter().flatten().collect::<Vec<_>>().join("&")
    }
}

impl CaptureArgs {
    /// Judges what was given together.
    ///
    /// # Errors
    /// What is of no use there.
    pub(super) fn check(&self) -> Result<(), UsageError> {
        let begins = matches!(self.what, What::Start | What::Here);
        let extra = match () {
            () if self.file.is_some() && self.what != What::Start => "FILE",
            () if !begins && Wanted::from(&self.wanted) != Wanted::default() => "what is to be captured",
            () => return Ok(()),
        };
        let what = self.what.to_possible_value().map(|value| value.get_name().to_owned());
        Err(UsageError::OfNoUse { command: format!("ctl capture {}", what.unwrap_or_default()), extra })
    }

    /// Does it and writes the answer to `out`.
    pub(super) fn run(&self, client: &Client, json: bool, out: &mut impl Write) -> Result<(), ClientError> {
        let answer = match self.what {
            What::Here => return here(client, &self.wanted, out),
            What::Start => {
                // The backend's folder is another.
                let path = self.file.clone().unwrap_or_default();
                let path = std::path::absolute(path).map_err(ClientError::Path)?;
                let body = NewCapture { path, wanted: (&self.wanted).into() };
                client.call(Method::POST, "/v1/capture", Some(&body))?
            }
            What::Stop => client.call(Method::DELETE, "/v1/capture", None::<&()>)?,
            What::Status => client.call(Method::GET, "/v1/capture", None::<&()>)?,
        };
        let status: CaptureStatus = serde_json::from_slice(&answer)?;
        let text = if json { serde_json::to_string_pretty(&status)? + "\n" } else { status_text(&status) };
        out.write_all(text.as_bytes()).map_err(ClientError::Write)
    }
}

/// Writes a capture to `out` as it comes. That nobody reads it any more is its usual end.
fn here(client: &Client, wanted: &WantedArgs, out: &mut impl Write) -> Result<(), ClientError> {
    if std::io::stdout().is_terminal() {
        return Err(ClientError::Terminal);
    }
    client.stream(&format!("/v1/capture/stream?{}", wanted.query()), |piece| {
        match out.write_all(piece).and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(ClientError::Write(error)),
        }
    })
}

fn status_text(status: &CaptureStatus) -> String {
    let count = |value: u64| if status.to.is_some() { value.to_string() } else { String::new() };
    let or_empty = |text: &Option<String>| text.clone().unwrap_or_default();
    list(&[
        ("state", status.state.clone()),
        ("to", or_empty(&status.to)),
        ("ended", or_empty(&status.ended)),
        ("error", or_empty(&status.error)),
        ("frames", count(status.frames)),
        ("bytes", count(status.bytes)),
        ("lost", count(status.lost_frames)),
        ("time", if status.to.is_some() { format!("{:.1} s", status.seconds) } else { String::new() }),
    ])
}
