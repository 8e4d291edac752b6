//! The transfer tool: it runs inside the test guests, and as the server of the "world" they reach.
//!
//! It is one static program without a C library's name service, because the guests' initramfs has
//! nothing but busybox, whose static wget and nslookup need libraries that are not there and whose
//! nc cannot judge a half-close. Bodies are made from a seed (`body`), both ends hash what they saw,
//! and the client fails unless the hashes are equal. Everything waits at most [`PATIENCE`].
//!
//! Read first: RFC 9112 for the little of HTTP that `client` and `server` speak, RFC 1035 for `dns`.

#![forbid(unsafe_code)]

mod body;
mod client;
mod dns;
mod server;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

/// What any part of this tool fails with: one line for a person.
type Failure = Box<dyn Error + Send + Sync>;

/// The longest a read, a write or a connect may wait: a stalled transfer fails its step rather than
/// its whole run, and emulated guests on a busy machine still pass.
const PATIENCE: Duration = Duration::from_secs(30);

const USAGE: &str = "usage:
  vunet-transfer serve ADDRESS:PORT            HTTP: GET /bytes/COUNT/SEED, PUT /bytes, GET /peer
  vunet-transfer udp-sink ADDRESS:PORT         count datagrams, print the total whenever it settles
  vunet-transfer resolve NAME [SERVER]         print the A records of NAME
  vunet-transfer download HOST:PORT BYTES      fetch a body and compare its SHA-256
  vunet-transfer upload HOST:PORT BYTES        send a body, half-close, compare the SHA-256 answered
  vunet-transfer upload-open HOST:PORT BYTES   the same with a Content-Length and no half-close
  vunet-transfer upload-hold HOST:PORT BYTES   send a body and never end it
  vunet-transfer udp-send ADDRESS:PORT COUNT   send numbered datagrams, a thousand a second
  vunet-transfer peer HOST:PORT                print the address the server sees";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<String, Failure> {
    match words {
        ["serve", listen] => server::serve(listen),
        ["udp-sink", listen] => server::udp_sink(listen),
        ["resolve", name] => client::resolve(name, None),
        ["resolve", name, server] => client::resolve(name, Some(server.parse()?)),
        ["download", host, count] => client::download(host, count.parse()?),
        ["upload", host, count] => client::upload(host, count.parse()?, client::End::HalfClose),
        ["upload-open", host, count] => client::upload(host, count.parse()?, client::End::Length),
        ["upload-hold", host, count] => client::hold(host, count.parse()?),
        ["udp-send", to, count] => client::udp_send(to, count.parse()?),
        ["peer", host] => client::peer(host),
        _ => Err(USAGE.into()),
    }
}
