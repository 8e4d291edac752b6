//! Datagrams as many as go: made, or counted, in guest memory.

use serde_json::Value;

use super::measure::{Sample, Sampler, number};
use super::procfs::{self, LinkCounters};
use super::scenario::{self as m, PAIRS_FLOWS, Scenario};
use super::server::{BLAST_PORT, UNREAD_PORT};
use super::site::{Backend, BenchError, Site, during};
use crate::lab::{BLACKHOLE, SHORT, WORLD};

/// Ethernet, IPv4 and UDP headers in bytes.
const UDP_HEADERS_BYTES: u64 = 14 + 20 + 8;
/// Share of the rate at full load at which loss is measured, in percent.
const PACED_PERCENT: u64 = 70;
/// Datagrams the server sends with one system call, where it sends runs of them, as far as they fit.
const RUN: &str = "64";

/// What a server sends to the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blast {
    /// UDP payload in bytes.
    pub(super) payload_bytes: u16,
    /// Many datagrams with one system call, else one.
    pub(super) runs: bool,
    /// Datagrams a second at most; 0 for as many as go.
    pub(super) rate: u64,
}

/// What came of it.
struct Blasted {
    sent: f64,
    arrived: f64,
    /// For how long was sent.
    seconds: f64,
    /// Of the back-end.
    cpu_seconds: Option<f64>,
    /// Of everything.
    machine_cpu_seconds: f64,
}

/// Datagrams in frames that may hold several of them behind one header (UDP segmentation offload).
fn datagrams(frames: u64, bytes: u64, payload_bytes: u16) -> u64 {
    bytes.saturating_sub(frames * UDP_HEADERS_BYTES) / u64::from(payload_bytes)
}

/// What a million datagrams that arrived took of the back-end and of everything.
fn per_million(sample: &mut Sample, backend: Option<f64>, machine: f64, arrived: f64) {
    let each = 1e6 / arrived.max(1.0);
    sample.extend(backend.map(|cpu| (m::CPU_PER_MILLION, cpu * each)));
    sample.push((m::MACHINE_PER_MILLION, machine * each));
}

/// Share of `sent` that did not arrive, in percent.
fn loss_percent(sent: f64, arrived: f64) -> f64 {
    (1.0 - arrived / sent.max(1.0)).max(0.0) * 100.0
}

impl Sampler<'_> {
    /// Frames made in guest memory, counted where they arrive in the world.
    pub(super) fn udp_from(
        &self,
        site: &mut Site,
        backend: &Backend,
        scenario: Scenario,
        payload_bytes: u16,
    ) -> Result<Sample, BenchError> {
        site.start(backend, scenario)?;
        let _server = site.serve(&[])?;
        let frame_bytes = u64::from(payload_bytes) + UDP_HEADERS_BYTES;
        // Where pairs are compared the cores are short: what arrives is dropped before a socket.
        let (flows, to) = match scenario {
            Scenario::UdpFrom { pairs: Some(_), .. } => (PAIRS_FLOWS, BLACKHOLE),
            _ => (1, WORLD),
        };
        let generate = format!("udp:{frame_bytes}:{to}:{UNREAD_PORT}");
        let count = || site.lab.world.inside(|| arrived(to == BLACKHOLE, payload_bytes));
        let (mark, before) = (self.mark(site)?, count()?);
        let args = ["--generate", &generate, "--flows", &flows.to_string()];
        let said = site.frames(scenario, self.seconds, &args)?;
        let (cpu, machine) = mark.since()?;
        let arrived = (count()? - before) as f64;
        let (sent, seconds) = (number(&said["sent"], "sent")?, number(&said["seconds"], "seconds")?);
        let mut sample = vec![(m::PACKETS, arrived / seconds / 1e3)];
        sample.push((m::LOSS, loss_percent(sent, arrived)));
        per_million(&mut sample, cpu, machine, arrived);
        Ok(sample)
    }

    /// Datagrams a server sends to the guest's first one, as many as go; then, behind a fresh
    /// back-end, at a share of what arrived, to see whether that much passes without loss.
    pub(super) fn udp_to(
        &self,
        site: &mut Site,
        backend: &Backend,
        scenario: Scenario,
        blast: Blast,
    ) -> Result<Sample, BenchError> {
        site.start(backend, scenario)?;
        let Blasted { arrived, seconds, cpu_seconds, machine_cpu_seconds, .. } =
            self.blast(site, scenario, blast)?;
        let mut sample = vec![(m::PACKETS, arrived / seconds / 1e3)];
        per_million(&mut sample, cpu_seconds, machine_cpu_seconds, arrived);
        let mut site = self.site(None)?;
        site.start(backend, scenario)?;
        let rate = (arrived / seconds) as u64 * PACED_PERCENT / 100;
        let paced = self.blast(&site, scenario, Blast { rate: rate.max(1), ..blast })?;
        site.check_backend()?;
        sample.push((m::LOSS, loss_percent(paced.sent, paced.arrived)));
        Ok(sample)
    }

    fn blast(&self, site: &Site, scenario: Scenario, blast: Blast) -> Result<Blasted, BenchError> {
        let bytes = blast.payload_bytes.to_string();
        let millis = self.duration().as_millis().to_string();
        let rate = blast.rate.to_string();
        let run = if blast.runs { RUN } else { "1" };
        let args =
            ["--blast-bytes", &bytes, "--blast-ms", &millis, "--blast-rate", &rate, "--blast-run", run];
        let server = site.serve(&args)?;
        let knock = format!("udp:64:{WORLD}:{BLAST_PORT}");
        let mark = self.mark(site)?;
        let said = site.frames(scenario, self.seconds + 1.0, &["--generate", &knock, "--frames-max", "1"])?;
        let (cpu_seconds, machine_cpu_seconds) = mark.since()?;
        let line = server.wait_line(SHORT, "the datagrams' count", |line| line.contains("\"sent\""))?;
        let line: Value = serde_json::from_str(&line).map_err(|e| BenchError::Result(e.to_string()))?;
        let of = |name: &str| said[name].as_u64().unwrap_or(0);
        let arrived = datagrams(of("received"), of("received_bytes"), blast.payload_bytes) as f64;
        Ok(Blasted {
            sent: number(&line["sent"], "sent")?,
            arrived,
            seconds: number(&line["seconds"], "seconds")?,
            cpu_seconds,
            machine_cpu_seconds,
        })
    }
}

/// Datagrams that arrived in the calling thread's namespace: at UDP sockets, or at all.
fn arrived(at_all: bool, payload_bytes: u16) -> Result<u64, BenchError> {
    if !at_all {
        return procfs::udp_arrived().map_err(during("UDP counters"));
    }
    let LinkCounters { rx_frames, rx_bytes } =
        procfs::link_counters(WORLD_LINK).map_err(during("counters of the world's link"))?;
    Ok(datagrams(rx_frames, rx_bytes, payload_bytes))
}

/// The world's interface.
const WORLD_LINK: &str = "e0";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coalesced_datagrams_are_counted_one_by_one() {
        assert_eq!(datagrams(3, 3 * (42 + 64), 64), 3);
        assert_eq!(datagrams(2, 42 + 10 * 64 + 42 + 64, 64), 11);
        assert_eq!(datagrams(0, 0, 64), 0);
    }

    #[test]
    fn loss_is_a_share_of_what_was_sent_and_never_negative() {
        assert_eq!(loss_percent(200.0, 150.0), 25.0);
        assert_eq!([loss_percent(10.0, 11.0), loss_percent(0.0, 0.0)], [0.0, 100.0]);
    }
}
