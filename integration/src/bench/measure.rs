//! Taking one sample of one scenario behind one back-end.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cpu::RunCpu;
use super::dhcp::DhcpClient;
use super::load;
use super::procfs;
use super::scenario::{self as m, Exchange, Metric, Scenario};
use super::site::{Backend, BackendKind, BenchError, Site, during};
use super::stats::percentile;
use super::udp::Blast;
use crate::lab::{Netns, SHORT, WORLD};

/// Figures of one sample.
pub(super) type Sample = Vec<(Metric, f64)>;

/// What a back-end gets to settle down before it is looked at.
pub(super) const SETTLE: Duration = Duration::from_secs(1);
/// Bytes of one read or write where a back-end would stand: the longest frame's payload, about.
const SOCKET_CALL_BYTES: &str = "65536";

/// How samples are taken.
pub(super) struct Sampler<'a> {
    pub(super) integration: &'a std::path::Path,
    pub(super) cpu: &'a RunCpu,
    pub(super) seconds: f64,
    pub(super) front_end_args: &'a [String],
    pub(super) congestion: Option<&'a str>,
}

/// CPU time since a moment.
pub(super) struct CpuMark<'a> {
    run: &'a RunCpu,
    pids: Vec<u32>,
    backend: f64,
    machine: f64,
}

impl CpuMark<'_> {
    /// From now on, of back-ends of these processes.
    fn of(run: &RunCpu, pids: Vec<u32>) -> Result<CpuMark<'_>, BenchError> {
        let each = pids.iter().map(|&pid| procfs::process_cpu_seconds(pid));
        let backend: std::io::Result<f64> = each.sum();
        Ok(CpuMark {
            run,
            backend: backend.map_err(during("CPU time of the back-end"))?,
            machine: run.seconds().map_err(during("CPU time"))?,
            pids,
        })
    }

    /// CPU seconds of the back-end, if there is one, and of the machine.
    pub(super) fn since(&self) -> Result<(Option<f64>, f64), BenchError> {
        let now = CpuMark::of(self.run, self.pids.clone())?;
        let backend = (!self.pids.is_empty()).then_some(now.backend - self.backend);
        Ok((backend, now.machine - self.machine))
    }
}

pub(super) fn number(value: &Value, what: &str) -> Result<f64, BenchError> {
    value.as_f64().ok_or_else(|| BenchError::Result(format!("no {what} in {value}")))
}

/// What iperf3's JSON says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Iperf3 {
    /// Bytes received by all flows.
    pub(super) bytes: f64,
    /// The time they took.
    pub(super) seconds: f64,
    /// The slowest flow's share of the fastest's.
    pub(super) fairness: f64,
    /// CPU time of the client's process in seconds.
    client_cpu_seconds: f64,
}

impl Iperf3 {
    fn read(report: &Value) -> Result<Iperf3, BenchError> {
        if let Some(error) = report["error"].as_str() {
            return Err(BenchError::Result(format!("iperf3: {error}")));
        }
        let end = &report["end"];
        let bytes = number(&end["sum_received"]["bytes"], "bytes")?;
        let seconds = number(&end["sum_received"]["seconds"], "seconds")?;
        let percent = number(&end["cpu_utilization_percent"]["host_total"], "CPU time")?;
        let flows = end["streams"].as_array().map(Vec::as_slice).unwrap_or_default();
        let rates = flows.iter().map(|flow| flow["receiver"]["bytes"].as_f64().unwrap_or(0.0));
        let (slowest, fastest) =
            rates.fold((f64::INFINITY, 0.0f64), |(min, max), r| (min.min(r), max.max(r)));
        let fairness = if fastest > 0.0 { slowest / fastest } else { 0.0 };
        Ok(Iperf3 { bytes, seconds, fairness, client_cpu_seconds: percent / 100.0 * seconds })
    }
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
    /// CPU time from now on.
    pub(super) fn mark(&self, site: &Site) -> Result<CpuMark<'_>, BenchError> {
        self.mark_of(site.backend_pid().into_iter().collect())
    }

    /// The same for back-ends of several processes.
    pub(super) fn mark_of(&self, pids: Vec<u32>) -> Result<CpuMark<'_>, BenchError> {
        CpuMark::of(self.cpu, pids)
    }

    pub(super) fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// Takes one sample.
    ///
    /// # Errors
    /// [`BenchError::NotApplicable`] if the back-end has no part in the scenario.
    pub(super) fn sample(
        &self,
        backend: &Backend,
        scenario: Scenario,
        repetition: u32,
    ) -> Result<Sample, BenchError> {
        if !backend.takes_part(scenario) {
            return Err(BenchError::NotApplicable);
        }
        let link_args = match scenario {
            Scenario::Wan(wan) => Some(wan.link_args(repetition)),
            _ => None,
        };
        let mut site = self.site(link_args.as_deref())?;
        let sample = match scenario {
            Scenario::Wan(wan) => self.wan(&mut site, backend, wan)?,
            Scenario::UdpFrom { payload_bytes, .. } => {
                self.udp_from(&mut site, backend, scenario, payload_bytes)?
            }
            Scenario::UdpTo { payload_bytes, runs } => {
                let blast = Blast { payload_bytes, runs, rate: 0 };
                self.udp_to(&mut site, backend, scenario, blast)?
            }
            Scenario::Quiet(quiet) => self.quiet(&mut site, backend, scenario, quiet)?,
            Scenario::Lease => self.lease(&mut site, backend, scenario)?,
            Scenario::Between => self.between(&mut site, backend)?,
            Scenario::LeasesTogether { guests } => self.leases_together(&site, guests)?,
            _ => {
                site.ready(backend, scenario, &[])?;
                self.with_guest(&mut site, backend, scenario)?
            }
        };
        site.check_backend()?;
        Ok(sample)
    }

    /// An empty site, with a faulty link if there are arguments for one.
    pub(super) fn site(&self, link_args: Option<&[String]>) -> Result<Site, BenchError> {
        Site::new(self.integration, self.front_end_args, link_args)
    }

    fn with_guest(
        &self,
        site: &mut Site,
        backend: &Backend,
        scenario: Scenario,
    ) -> Result<Sample, BenchError> {
        match scenario {
            Scenario::Tcp { to_guest, flows, .. } => self.tcp(site, backend, to_guest, flows),
            Scenario::Latency(exchange) => self.latency(site, exchange),
            Scenario::Connect { parallel } => self.connect(site, parallel),
            Scenario::Flows { count } => self.flows(site, count),
            _ => Err(BenchError::NotApplicable),
        }
    }

    fn tcp(
        &self,
        site: &mut Site,
        backend: &Backend,
        to_guest: bool,
        flows: u16,
    ) -> Result<Sample, BenchError> {
        let bare = backend.kind == BackendKind::Sockets;
        let mark = self.mark(site)?;
        let said = self.iperf3(site, bare, to_guest, flows, SHORT)?;
        let (cpu, machine) = mark.since()?;
        let cpu = if bare { Some(said.client_cpu_seconds) } else { cpu };
        let mut sample = vec![(m::RATE, said.bytes * 8.0 / said.seconds / 1e9)];
        sample.extend(cpu.map(|cpu| (m::CPU_PER_GB, cpu * 1e9 / said.bytes)));
        sample.push((m::MACHINE_PER_GB, machine * 1e9 / said.bytes));
        if flows > 1 {
            sample.push((m::FAIRNESS, said.fairness));
        }
        Ok(sample)
    }

    /// Has iperf3 carry what goes, from where a back-end stands if `bare`, else from the guest; its set-up
    /// and end may take `patience`.
    pub(super) fn iperf3(
        &self,
        site: &mut Site,
        bare: bool,
        to_guest: bool,
        flows: u16,
        patience: Duration,
    ) -> Result<Iperf3, BenchError> {
        site.lab.start_iperf3()?;
        let client = if bare { &site.lab.host } else { &site.lab.guest };
        let mut args = if to_guest { vec!["-R"] } else { vec![] };
        if bare {
            args.extend(["-l", SOCKET_CALL_BYTES]);
        }
        self.iperf3_client(client, WORLD, &args, flows, patience)
    }

    /// Runs iperf3 in `client`, with further arguments, to the server at `to`.
    pub(super) fn iperf3_client(
        &self,
        client: &Netns,
        to: Ipv4Addr,
        args: &[&str],
        flows: u16,
        patience: Duration,
    ) -> Result<Iperf3, BenchError> {
        // iperf3 knows whole seconds only, and 0 means for ever.
        let seconds = format!("{}", self.seconds.ceil());
        let (to, flows_text) = (to.to_string(), flows.to_string());
        let connect_ms = (patience.as_millis() / 3).to_string();
        let mut words = vec!["iperf3", "-c", &to, "-J", "-t", &seconds, "-P", &flows_text];
        words.extend(["--connect-timeout", &connect_ms]);
        words.extend(args);
        let output = client.run_any(&words, patience + self.duration())?;
        let report: Value = serde_json::from_str(&output.stdout)
            .map_err(|e| BenchError::Result(format!("iperf3: {e}: {}", output.stderr)))?;
        let said = Iperf3::read(&report)?;
        if said.bytes < 1.0 {
            return Err(BenchError::Result("iperf3 carried nothing".into()));
        }
        Ok(said)
    }

    fn latency(&self, site: &Site, exchange: Exchange) -> Result<Sample, BenchError> {
        let mark = self.mark(site)?;
        let started = Instant::now();
        let duration = self.duration();
        let times = site.lab.guest.inside(|| match exchange {
            Exchange::Tcp => load::tcp_exchanges(duration),
            Exchange::Udp => load::udp_exchanges(duration),
            Exchange::Ping => load::pings(duration),
        });
        let times = times.map_err(during("exchanges"))?;
        let (cpu, _) = mark.since()?;
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
        let mark = self.mark(site)?;
        let duration = self.duration();
        let times = site.lab.guest.inside(|| {
            let clients: Vec<_> = (0..parallel)
                .map(|number| std::thread::spawn(move || load::connections(duration, number, parallel)))
                .collect();
            let joined = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
            joined.collect::<Result<Vec<_>, _>>()
        });
        let times = times.map_err(during("connections"))?.concat();
        let (cpu, _) = mark.since()?;
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
        let (flows, took) = site.lab.guest.inside(|| load::open_flows(count));
        let held = flows.len() as f64;
        if held < 1.0 {
            return Err(BenchError::Result("no flow could be opened".into()));
        }
        std::thread::sleep(SETTLE);
        let grown = resident()?.saturating_sub(before);
        load::close_flows(flows);
        Ok(vec![
            (m::HELD, held),
            (m::BYTES_PER_FLOW, grown as f64 / held),
            (m::OPENED, held / took.as_secs_f64() / 1e3),
        ])
    }

    /// The front-end is started at once and connects as soon as there is a socket.
    fn lease(&self, site: &mut Site, backend: &Backend, scenario: Scenario) -> Result<Sample, BenchError> {
        let started = Instant::now();
        site.start(backend, scenario)?;
        let _guest = site.start_guest(scenario, &[])?;
        site.lab.guest.inside(|| DhcpClient::HASTY.lease(SHORT)).map_err(during("a lease"))?;
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
        let cpu = json!({ "host_total": 25.0, "remote_total": 90.0 });
        let end =
            json!({ "streams": [flow(400), flow(500)], "sum_received": sum, "cpu_utilization_percent": cpu });
        let said = Iperf3::read(&json!({ "end": end })).unwrap();
        let want = Iperf3 { bytes: 900.0, seconds: 2.0, fairness: 0.8, client_cpu_seconds: 0.5 };
        assert_eq!(said, want);
        assert!(Iperf3::read(&json!({ "error": "no route" })).is_err());
        assert!(Iperf3::read(&json!({})).is_err());
    }
}
