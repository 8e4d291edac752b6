//! Taking one sample of one scenario behind one back-end.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::load;
use super::procfs;
use super::scenario::{self as m, Exchange, Metric, Scenario};
use super::server::{BLAST_PORT, UNREAD_PORT};
use super::site::{Backend, BackendKind, BenchError, Site, during};
use super::stats::percentile;
use crate::lab::{SHORT, WORLD};

/// Figures of one sample.
pub(super) type Sample = Vec<(Metric, f64)>;

/// Ethernet, IPv4 and UDP headers in bytes.
const UDP_HEADERS_BYTES: u64 = 14 + 20 + 8;
/// What a back-end gets to settle down before it is called idle.
const SETTLE: Duration = Duration::from_secs(1);
/// Share of the rate at full load at which loss is measured, in percent.
const PACED_PERCENT: u64 = 70;

/// How samples are taken.
pub(super) struct Sampler<'a> {
    pub(super) integration: &'a std::path::Path,
    pub(super) seconds: f64,
    pub(super) guest_args: &'a [String],
}

/// CPU time since a moment.
struct CpuMark {
    pid: Option<u32>,
    backend: f64,
    machine: f64,
}

impl CpuMark {
    fn now(site: &Site) -> Result<CpuMark, BenchError> {
        let pid = site.backend_pid();
        let backend = pid.map_or(Ok(0.0), procfs::process_cpu_seconds);
        Ok(CpuMark {
            pid,
            backend: backend.map_err(during("CPU time of the back-end"))?,
            machine: procfs::machine_cpu_seconds().map_err(during("CPU time"))?,
        })
    }

    /// CPU seconds of the back-end, if there is one, and of the machine.
    fn since(&self, site: &Site) -> Result<(Option<f64>, f64), BenchError> {
        let now = CpuMark::now(site)?;
        Ok((self.pid.map(|_| now.backend - self.backend), now.machine - self.machine))
    }
}

fn number(value: &Value, what: &str) -> Result<f64, BenchError> {
    value.as_f64().ok_or_else(|| BenchError::Result(format!("no {what} in {value}")))
}

/// Bytes received by all flows, their seconds, and the slowest flow's share of the fastest's, from
/// iperf3's JSON.
fn read_iperf3(report: &Value) -> Result<(f64, f64, f64), BenchError> {
    if let Some(error) = report["error"].as_str() {
        return Err(BenchError::Result(format!("iperf3: {error}")));
    }
    let sum = &report["end"]["sum_received"];
    let bytes = number(&sum["bytes"], "bytes")?;
    let seconds = number(&sum["seconds"], "seconds")?;
    let flows = report["end"]["streams"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rates = flows.iter().map(|flow| flow["receiver"]["bytes"].as_f64().unwrap_or(0.0));
    let (slowest, fastest) = rates.fold((f64::INFINITY, 0.0f64), |(min, max), r| (min.min(r), max.max(r)));
    let fairness = if fastest > 0.0 { slowest / fastest } else { 0.0 };
    Ok((bytes, seconds, fairness))
}

/// Datagrams in frames that may hold several of them behind one header (UDP segmentation offload).
fn datagrams(frames: u64, bytes: u64, payload_bytes: u16) -> u64 {
    bytes.saturating_sub(frames * UDP_HEADERS_BYTES) / u64::from(payload_bytes)
}

fn latency(mut times: Vec<u64>, sample: &mut Sample) -> Result<(), BenchError> {
    let mut micros = |percent| {
        let nanos = percentile(&mut times, percent);
        nanos.map(|ns| ns as f64 / 1e3).ok_or_else(|| BenchError::Result("no exchange ended".into()))
    };
    sample.push((m::P50, micros(50)?));
    sample.push((m::P99, micros(99)?));
    Ok(())
}

impl Sampler<'_> {
    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// Takes one sample.
    ///
    /// # Errors
    /// [`BenchError::NotApplicable`] if the back-end has no part in the scenario.
    pub(super) fn sample(&self, backend: &Backend, scenario: Scenario) -> Result<Sample, BenchError> {
        let attaches = matches!(backend.kind, BackendKind::VhostUser(_));
        let applies = match scenario {
            Scenario::Udp { .. } | Scenario::Flows { .. } | Scenario::Idle | Scenario::Lease => attaches,
            _ => true,
        };
        if !applies {
            return Err(BenchError::NotApplicable);
        }
        let mut site = Site::new(self.integration)?;
        match scenario {
            Scenario::Udp { to_guest, payload_bytes } => {
                site.start(backend, scenario.ip_mtu())?;
                return if to_guest {
                    self.udp_to(&site, payload_bytes, backend)
                } else {
                    self.udp_from(&site, payload_bytes)
                };
            }
            Scenario::Lease => return self.lease(&mut site, backend),
            _ => site.ready(backend, scenario.ip_mtu(), self.guest_args)?,
        }
        match scenario {
            Scenario::Tcp { to_guest, flows, .. } => self.tcp(&mut site, to_guest, flows),
            Scenario::Latency(exchange) => self.latency(&site, exchange),
            Scenario::Connect { parallel } => self.connect(&site, parallel),
            Scenario::Flows { count } => self.flows(&site, count),
            _ => self.idle(&site),
        }
    }

    fn tcp(&self, site: &mut Site, to_guest: bool, flows: u16) -> Result<Sample, BenchError> {
        site.lab.start_iperf3()?;
        let (world, seconds, flows_text) =
            (WORLD.to_string(), format!("{}", self.seconds), flows.to_string());
        let mut words = vec!["iperf3", "-c", &world, "-J", "-t", &seconds, "-P", &flows_text];
        words.extend(["--connect-timeout", "3000"]);
        if to_guest {
            words.push("-R");
        }
        let mark = CpuMark::now(site)?;
        let output = site.lab.guest.run_any(&words, SHORT + self.duration())?;
        let (backend, machine) = mark.since(site)?;
        let report: Value = serde_json::from_str(&output.stdout)
            .map_err(|e| BenchError::Result(format!("iperf3: {e}: {}", output.stderr)))?;
        let (bytes, seconds, fairness) = read_iperf3(&report)?;
        if bytes < 1.0 {
            return Err(BenchError::Result("iperf3 carried nothing".into()));
        }
        let mut sample = vec![(m::RATE, bytes * 8.0 / seconds / 1e9)];
        sample.extend(backend.map(|cpu| (m::CPU_PER_GB, cpu * 1e9 / bytes)));
        sample.push((m::MACHINE_PER_GB, machine * 1e9 / bytes));
        if flows > 1 {
            sample.push((m::FAIRNESS, fairness));
        }
        Ok(sample)
    }

    /// Frames made in guest memory, counted where they reach a socket of the world.
    fn udp_from(&self, site: &Site, payload_bytes: u16) -> Result<Sample, BenchError> {
        let _server = site.serve(&[])?;
        let arrived = || site.lab.world.inside(procfs::udp_arrived).map_err(during("UDP counters"));
        let frame_bytes = u64::from(payload_bytes) + UDP_HEADERS_BYTES;
        let generate = format!("udp:{frame_bytes}:{WORLD}:{UNREAD_PORT}");
        let (mark, before) = (CpuMark::now(site)?, arrived()?);
        let said = site.frames(self.seconds, &["--generate", &generate])?;
        let (cpu, _) = mark.since(site)?;
        let arrived = (arrived()? - before) as f64;
        let (sent, seconds) = (number(&said["sent"], "sent")?, number(&said["seconds"], "seconds")?);
        let mut sample = vec![(m::PACKETS, arrived / seconds / 1e3)];
        sample.push((m::LOSS, (1.0 - arrived / sent.max(1.0)).max(0.0) * 100.0));
        sample.extend(cpu.map(|cpu| (m::CPU_PER_MILLION, cpu * 1e6 / arrived.max(1.0))));
        Ok(sample)
    }

    /// Datagrams a server sends to the guest's first one, as many as go; then, behind a fresh
    /// back-end, at a share of what arrived, to see whether that much passes without loss.
    fn udp_to(&self, site: &Site, payload_bytes: u16, backend: &Backend) -> Result<Sample, BenchError> {
        let (_, arrived, seconds, cpu) = self.blast(site, payload_bytes, 0)?;
        let mut sample = vec![(m::PACKETS, arrived / seconds / 1e3)];
        sample.extend(cpu.map(|cpu| (m::CPU_PER_MILLION, cpu * 1e6 / arrived.max(1.0))));
        let mut paced = Site::new(self.integration)?;
        paced.start(backend, 1500)?;
        let rate = (arrived / seconds) as u64 * PACED_PERCENT / 100;
        let (sent, arrived, _, _) = self.blast(&paced, payload_bytes, rate.max(1))?;
        sample.push((m::LOSS, (1.0 - arrived / sent.max(1.0)).max(0.0) * 100.0));
        Ok(sample)
    }

    /// Datagrams sent and received, the seconds they were sent for, CPU seconds of the back-end.
    fn blast(
        &self,
        site: &Site,
        payload_bytes: u16,
        rate: u64,
    ) -> Result<(f64, f64, f64, Option<f64>), BenchError> {
        let (bytes, millis) = (payload_bytes.to_string(), self.duration().as_millis().to_string());
        let server =
            site.serve(&["--blast-bytes", &bytes, "--blast-ms", &millis, "--blast-rate", &rate.to_string()])?;
        let knock = format!("udp:64:{WORLD}:{BLAST_PORT}");
        let mark = CpuMark::now(site)?;
        let said = site.frames(self.seconds + 1.0, &["--generate", &knock, "--frames-max", "1"])?;
        let (cpu, _) = mark.since(site)?;
        let line = server.wait_line(SHORT, "the datagrams' count", |line| line.contains("\"sent\""))?;
        let line: Value = serde_json::from_str(&line).map_err(|e| BenchError::Result(e.to_string()))?;
        let (sent, seconds) = (number(&line["sent"], "sent")?, number(&line["seconds"], "seconds")?);
        let of = |name: &str| said[name].as_u64().unwrap_or(0);
        let arrived = datagrams(of("received"), of("received_bytes"), payload_bytes);
        Ok((sent, arrived as f64, seconds, cpu))
    }

    fn latency(&self, site: &Site, exchange: Exchange) -> Result<Sample, BenchError> {
        let mark = CpuMark::now(site)?;
        let started = Instant::now();
        let duration = self.duration();
        let times = site.lab.guest.inside(|| match exchange {
            Exchange::Tcp => load::tcp_exchanges(duration),
            Exchange::Udp => load::udp_exchanges(duration),
            Exchange::Ping => load::pings(duration),
        });
        let times = times.map_err(during("exchanges"))?;
        let (cpu, _) = mark.since(site)?;
        let count = times.len() as f64;
        let mut sample = Vec::new();
        latency(times, &mut sample)?;
        if exchange != Exchange::Ping {
            sample.push((m::EXCHANGES, count / started.elapsed().as_secs_f64() / 1e3));
        }
        sample.extend(cpu.map(|cpu| (m::CPU_PER_EXCHANGE, cpu * 1e6 / count)));
        Ok(sample)
    }

    fn connect(&self, site: &Site, parallel: u16) -> Result<Sample, BenchError> {
        let _server = site.serve(&[])?;
        let mark = CpuMark::now(site)?;
        let duration = self.duration();
        let times = site.lab.guest.inside(|| {
            let clients: Vec<_> = (0..parallel)
                .map(|number| std::thread::spawn(move || load::connections(duration, number, parallel)))
                .collect();
            let joined = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
            joined.collect::<Result<Vec<_>, _>>()
        });
        let times = times.map_err(during("connections"))?.concat();
        let (cpu, _) = mark.since(site)?;
        let count = times.len() as f64;
        let mut sample = vec![(m::EXCHANGES, count / self.seconds / 1e3)];
        latency(times, &mut sample)?;
        sample.extend(cpu.map(|cpu| (m::CPU_PER_EXCHANGE, cpu * 1e6 / count)));
        Ok(sample)
    }

    fn flows(&self, site: &Site, count: u32) -> Result<Sample, BenchError> {
        let _server = site.serve(&[])?;
        let Some(pid) = site.backend_pid() else {
            return Err(BenchError::NotApplicable);
        };
        let resident = || procfs::resident_bytes(pid).map_err(during("memory of the back-end"));
        let before = resident()?;
        let opened = site.lab.guest.inside(|| load::open_flows(count));
        let (flows, took) = opened.map_err(during("opening flows"))?;
        std::thread::sleep(SETTLE);
        let grown = resident()?.saturating_sub(before);
        load::close_flows(flows);
        Ok(vec![
            (m::BYTES_PER_FLOW, grown as f64 / f64::from(count)),
            (m::OPENED, f64::from(count) / took.as_secs_f64() / 1e3),
        ])
    }

    fn idle(&self, site: &Site) -> Result<Sample, BenchError> {
        let Some(pid) = site.backend_pid() else {
            return Err(BenchError::NotApplicable);
        };
        std::thread::sleep(SETTLE);
        let sleeps = || procfs::sleeps(pid).map_err(during("context switches of the back-end"));
        let (before, started) = (sleeps()?, Instant::now());
        std::thread::sleep(self.duration());
        let wakes = (sleeps()? - before) as f64 / started.elapsed().as_secs_f64();
        let resident = procfs::resident_bytes(pid).map_err(during("memory of the back-end"))?;
        Ok(vec![(m::WAKES, wakes), (m::RESIDENT, resident as f64 / f64::from(1 << 20))])
    }

    /// The front-end is started at once and connects as soon as there is a socket.
    fn lease(&self, site: &mut Site, backend: &Backend) -> Result<Sample, BenchError> {
        let started = Instant::now();
        site.start(backend, 1500)?;
        let _guest = site.lab.start_guest(site.socket(), &["--ip-mtu", "1500"])?;
        site.lab.guest.inside(|| load::lease(SHORT)).map_err(during("a lease"))?;
        Ok(vec![(m::LEASE_MS, started.elapsed().as_secs_f64() * 1e3)])
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn iperf3s_report_gives_bytes_seconds_and_the_slowest_flows_share() {
        let flow = |bytes: u64| json!({ "receiver": { "bytes": bytes } });
        let sum = json!({ "bytes": 900, "seconds": 2.0 });
        let report = json!({ "end": { "streams": [flow(400), flow(500)], "sum_received": sum } });
        let (bytes, seconds, fairness) = read_iperf3(&report).unwrap();
        assert_eq!((bytes, seconds, fairness), (900.0, 2.0, 0.8));
        assert!(read_iperf3(&json!({ "error": "no route" })).is_err());
        assert!(read_iperf3(&json!({})).is_err());
    }

    #[test]
    fn coalesced_datagrams_are_counted_one_by_one() {
        assert_eq!(datagrams(3, 3 * (42 + 64), 64), 3);
        assert_eq!(datagrams(2, 42 + 10 * 64 + 42 + 64, 64), 11);
        assert_eq!(datagrams(0, 0, 64), 0);
    }
}
