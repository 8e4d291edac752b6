//! `vunet ctl`: the control API for people (tables) and scripts (`--json`).

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::capture::CaptureArgs;
use super::check::UsageError;
use super::values;
use crate::config::LimitSpec;
use crate::control::api::counters::CountersAnswer;
use crate::control::api::flows::{FlowStatus, Flows};
use crate::control::api::leases::Leases;
use crate::control::api::limits::{DirectionLimits, Limits, NewLimits};
use crate::control::api::log_level::LogLevel;
use crate::control::api::names::Names;
use crate::control::api::ports::{NewPort, PortList};
use crate::control::api::status::Status;
use crate::control::api::stopping::Drain;
use crate::control::client::{Client, ClientError};

/// Ask a backend that runs, or tell it something
#[derive(Clone, Debug, Args)]
pub struct Ctl {
    /// Socket of the backend, as it was given with --control
    #[arg(long, value_name = "PATH", env = "VUNET_CONTROL", global = true)]
    control: Option<PathBuf>,
    /// JSON as the API has it, instead of tables
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

/// What is asked or told.
#[derive(Clone, Debug, Subcommand)]
enum What {
    /// The process, its network, who is attached
    Status,
    /// What was counted since the start
    Counters,
    /// Connections and exchanges under way
    Flows(FlowsArgs),
    /// End flows by the names `flows` shows; both ends see it, where the protocol can tell
    Kill {
        /// Names of flows
        #[arg(required = true, value_name = "FLOW")]
        flows: Vec<String>,
    },
    /// Ports of this host that lead to the guest
    Ports,
    /// Publish ports of the guest on this host, as --publish does; of a range all or none
    Publish {
        /// Ports, such as 8080:80, udp:127.0.0.1:5353:53 or 0:22 (0 picks a free one, which is shown)
        #[arg(required = true, value_name = "[tcp:|udp:][HOSTADDR][%INTERFACE:]HOSTPORT[-END]:GUESTPORT[-END]",
              value_parser = values::publish_text)]
        ports: Vec<String>,
    },
    /// Publish ports no more; their open connections are reset
    Unpublish {
        /// Their numbers as `ports` shows them, or tcp:HOSTPORT or udp:HOSTPORT, or all of it as --publish takes it
        #[arg(required = true, value_name = "PORT")]
        ports: Vec<String>,
        /// Let their open connections go on
        #[arg(long)]
        keep: bool,
    },
    /// Addresses that DHCP gave
    Leases,
    /// Local names, and what became of others
    Dns,
    /// Show or set how much the guest may send and be sent
    Limits(LimitsArgs),
    /// Show or set how much is logged
    LogLevel {
        /// off, error, warn, info, debug or trace, or MODULE=LEVEL, joined by commas
        level: Option<String>,
    },
    /// What happens, from now on
    Events {
        /// Each flow that begins or ends, too
        #[arg(long)]
        flows: bool,
    },
    /// What crosses the guest's device, as pcapng: to a file, or here; one capture at a time
    #[command(visible_alias = "pcap")]
    Capture(CaptureArgs),
    /// Let no flow begin any more, and end the process with the last
    Drain {
        /// Seconds after which it ends whatever flows are left; if it drains already, the shorter time counts
        #[arg(long, value_name = "SECONDS", default_value = "60")]
        timeout: f64,
    },
    /// End the process
    Stop,
}

#[derive(Clone, Debug, Args)]
struct LimitsArgs {
    #[command(subcommand)]
    what: Option<LimitsWhat>,
}

#[derive(Clone, Debug, Subcommand)]
enum LimitsWhat {
    /// Limit the guest from now on; what is not given stays as it is
    #[command(arg_required_else_help = true)]
    Set {
        /// What the guest sends, as --limit-from-guest takes it; or none
        #[arg(long, value_name = "LIMIT[,LIMIT…]")]
        from_guest: Option<LimitSpec>,
        /// What it is sent; or none
        #[arg(long, value_name = "LIMIT[,LIMIT…]")]
        to_guest: Option<LimitSpec>,
    },
}

#[derive(Clone, Debug, Args)]
struct FlowsArgs {
    /// Those of one protocol
    #[arg(long, value_parser = ["tcp", "udp", "icmp", "other"])]
    protocol: Option<String>,
    /// Those of one address of the guest
    #[arg(long, value_name = "IP")]
    guest: Option<IpAddr>,
    /// Those to one remote address
    #[arg(long, value_name = "IP")]
    remote: Option<IpAddr>,
    /// Those with this port at either end
    #[arg(long)]
    port: Option<u16>,
}

impl FlowsArgs {
    fn query(&self) -> String {
        let fields = [
            self.protocol.as_ref().map(|value| format!("protocol={value}")),
            self.guest.map(|value| format!("guest={value}")),
            self.remote.map(|value| format!("remote={value}")),
            self.port.map(|value| format!("port={value}")),
            Some("limit=1000".to_owned()),
        ];
        fields.into_iter().flatten().collect::<Vec<_>>().join("&")
    }
}

impl Ctl {
    /// Judges what was given together.
    ///
    /// # Errors
    /// [`UsageError`].
    pub(super) fn check(&self) -> Result<(), UsageError> {
        match (&self.control, &self.what) {
            (None, _) => Err(UsageError::NoControl),
            (_, What::Capture(capture)) => capture.check(),
            _ => Ok(()),
        }
    }

    /// Whether answers and errors are for programs.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Does what was asked and writes the answer to `out`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn run(&self, out: &mut impl Write) -> Result<(), ClientError> {
        let client = Client::new(self.control.as_deref().unwrap_or(Path::new("")))?;
        let text = match &self.what {
            What::Status => self.show(&client, "/v1/status", status_text)?,
            What::Counters => self.show(&client, "/v1/counters", counters_text)?,
            What::Flows(args) => return self.flows(&client, args, out),
            What::Kill { flows } => one_by_one(flows, |flow| {
                let resource = format!("/v1/flows/{}", path_segment(flow));
                client.call(Method::DELETE, &resource, None::<&()>)
            })?,
            What::Ports => self.show(&client, "/v1/ports", ports_text)?,
            What::Publish { ports } => return self.publish(&client, ports, out),
            What::Unpublish { ports, keep } => one_by_one(ports, |port| {
                let resource = format!("/v1/ports/{}?keep={keep}", path_segment(port));
                client.call(Method::DELETE, &resource, None::<&()>)
            })?,
            What::Leases => self.show(&client, "/v1/leases", leases_text)?,
            What::Dns => self.show(&client, "/v1/dns", names_text)?,
            What::Limits(LimitsArgs { what: None }) => self.show(&client, "/v1/limits", limits_text)?,
            What::Limits(LimitsArgs { what: Some(LimitsWhat::Set { from_guest, to_guest }) }) => {
                self.set_limits(&client, *from_guest, *to_guest)?
            }
            What::LogLevel { level: None } => {
                self.show(&client, "/v1/log-level", |LogLevel { level }: &LogLevel| format!("{level}\n"))?
            }
            What::LogLevel { level: Some(level) } => {
                client.call(Method::PUT, "/v1/log-level", Some(&LogLevel { level: level.clone() }))?;
                String::new()
            }
            What::Events { flows } => return self.follow(&client, *flows, out),
            What::Capture(capture) => return capture.run(&client, self.json, out),
            What::Drain { timeout } => {
                client.call(Method::POST, "/v1/drain", Some(&Drain { timeout_seconds: *timeout }))?;
                String::new()
            }
            What::Stop => {
                client.call(Method::POST, "/v1/stop", None::<&()>)?;
                String::new()
            }
        };
        out.write_all(text.as_bytes()).map_err(ClientError::Write)
    }

    /// A resource's answer, as text or as it came.
    fn show<T: DeserializeOwned + Serialize>(
        &self,
        client: &Client,
        resource: &str,
        text: impl FnOnce(&T) -> String,
    ) -> Result<String, ClientError> {
        let answer: T = client.get(resource)?;
        if self.json { Ok(serde_json::to_string_pretty(&answer)? + "\n") } else { Ok(text(&answer)) }
    }

    /// Publishes ports one after another and writes what was published, as text or JSON; before an error, what was published
    /// until then: those ports stay.
    fn publish(&self, client: &Client, ports: &[String], out: &mut impl Write) -> Result<(), ClientError> {
        let mut all = PortList { ports: Vec::new() };
        let mut published = || -> Result<(), ClientError> {
            for port in ports {
                let body = NewPort { publish: port.clone() };
                let made = client.call(Method::POST, "/v1/ports", Some(&body))?;
                all.ports.extend(serde_json::from_slice::<PortList>(&made)?.ports);
            }
            Ok(())
        };
        let outcome = published();
        if outcome.is_ok() || !all.ports.is_empty() {
            let text = if self.json { serde_json::to_string_pretty(&all)? + "\n" } else { ports_text(&all) };
            out.write_all(text.as_bytes()).map_err(ClientError::Write)?;
        }
        outcome
    }

    /// Sets limits; what holds from then on, as text or JSON.
    fn set_limits(
        &self,
        client: &Client,
        from_guest: Option<LimitSpec>,
        to_guest: Option<LimitSpec>,
    ) -> Result<String, ClientError> {
        let text = |spec: Option<LimitSpec>| spec.map(|spec| spec.to_string());
        let body = NewLimits { from_guest: text(from_guest), to_guest: text(to_guest) };
        let set: Limits = serde_json::from_slice(&client.call(Method::PUT, "/v1/limits", Some(&body))?)?;
        Ok(if self.json { serde_json::to_string_pretty(&set)? + "\n" } else { limits_text(&set) })
    }

    /// All pages of flows.
    fn flows(&self, client: &Client, args: &FlowsArgs, out: &mut impl Write) -> Result<(), ClientError> {
        let mut all = Flows { flows: Vec::new(), next: None };
        let mut cursor = String::new();
        loop {
            let page: Flows = client.get(&format!("/v1/flows?{}{cursor}", args.query()))?;
            all.flows.extend(page.flows);
            let Some(next) = page.next else { break };
            cursor = format!("&cursor={next}");
        }
        let text =
            if self.json { serde_json::to_string_pretty(&all)? + "\n" } else { flows_text(&all.flows) };
        out.write_all(text.as_bytes()).map_err(ClientError::Write)
    }

    fn follow(&self, client: &Client, flows: bool, out: &mut impl Write) -> Result<(), ClientError> {
        client.follow(&format!("/v1/events?flows={flows}"), |name, data| {
            let line = if self.json { format!("{data}\n") } else { event_text(name, data) };
            out.write_all(line.as_bytes()).and_then(|()| out.flush()).map_err(ClientError::Write)?;
            Ok(true)
        })
    }
}

/// Has something done to each of `names`. Where one fails, the error says which were done before.
fn one_by_one(
    names: &[String],
    mut does: impl FnMut(&str) -> Result<Vec<u8>, ClientError>,
) -> Result<String, ClientError> {
    for (n, name) in names.iter().enumerate() {
        match does(name) {
            Ok(_) => {}
            Err(source) if n > 0 => {
                return Err(ClientError::Partly { done: names[..n].to_vec(), source: Box::new(source) });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(String::new())
}

/// Rows under a head, each column as wide as its widest word; the last one as it is.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|word| word.len()).collect();
    for row in rows {
        for (width, word) in widths.iter_mut().zip(row) {
            *width = (*width).max(word.chars().count());
        }
    }
    let line = |words: &mut dyn Iterator<Item = &str>| {
        let padded = words.zip(&widths).map(|(word, width)| format!("{word:<width$}", width = *width));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text += &line(&mut row.iter().map(String::as_str));
    }
    text
}

/// Names and values, one a line.
pub(super) fn list(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = pairs.iter().filter(|(_, value)| !value.is_empty());
    lines.map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

fn or_none<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn status_text(status: &Status) -> String {
    let facts = &status.facts;
    let rings = status.rings.iter().map(|ring| {
        vec![
            ring.index.to_string(),
            if ring.index % 2 == 0 { "receive" } else { "transmit" }.to_owned(),
            ring.worker.to_string(),
            format!("{}/{}", ring.available, ring.size),
        ]
    });
    let rings: Vec<Vec<String>> = rings.collect();
    let mut text = list(&[
        ("version", status.version.clone()),
        ("process", format!("{}, up {:.0} s", status.pid, status.uptime_seconds)),
        ("mode", facts.mode.clone()),
        ("uplink", facts.uplink.clone()),
        ("nat", facts.nat.clone().unwrap_or_default()),
        ("network", facts.network.clone().unwrap_or_default()),
        ("subnet", facts.subnet.clone()),
        ("gateway", or_none(facts.gateway)),
        ("IP MTU", format!("{} bytes", facts.ip_mtu_bytes)),
        ("front-end", if status.attached { "attached" } else { "none" }.to_owned()),
        ("guest", or_none(status.guest_address)),
        ("flows", status.flows.to_string()),
        ("draining", if status.draining { "yes" } else { "" }.to_owned()),
        ("features", status.features.join(" ")),
    ]);
    if !rings.is_empty() {
        text += "\n";
        text += &table(&["QUEUE", "DIRECTION", "WORKER", "AVAILABLE"], &rings);
    }
    text
}

fn counters_text(counters: &CountersAnswer) -> String {
    let named = [
        ("frames_from_guest", counters.frames_from_guest),
        ("frames_to_guest", counters.frames_to_guest),
        ("payload_from_guest_bytes", counters.payload_from_guest_bytes),
        ("payload_to_guest_bytes", counters.payload_to_guest_bytes),
        ("flows_opened", counters.flows_opened),
        ("flows_evicted", counters.flows_evicted),
        ("flows_stranded", counters.flows_stranded),
        ("retransmits", counters.retransmits),
    ];
    let limited = [("from_guest", &counters.limited_from_guest), ("to_guest", &counters.limited_to_guest)];
    let limited = limited.into_iter().flat_map(|(way, limited)| {
        let named = [
            ("waits", limited.waits),
            ("dropped packets", limited.dropped_packets),
            ("dropped bytes", limited.dropped_bytes),
            ("refused flows", limited.refused_flows),
        ];
        named.map(|(name, count)| (format!("limit {way}: {name}"), count))
    });
    let drops = counters.drops.iter().map(|(reason, count)| (format!("dropped: {reason}"), *count));
    let limited = limited.filter(|(_, count)| *count > 0);
    let all = named.into_iter().map(|(name, count)| (name.to_owned(), count)).chain(limited).chain(drops);
    let rows: Vec<Vec<String>> = all.map(|(name, count)| vec![name, count.to_string()]).collect();
    table(&["COUNTER", "VALUE"], &rows)
}

fn flows_text(flows: &[FlowStatus]) -> String {
    let rows = flows.iter().map(|flow| {
        let protocol = serde_json::to_value(flow.protocol).unwrap_or_default();
        vec![
            flow.id.clone(),
            protocol.as_str().unwrap_or_default().to_owned(),
            flow.guest.to_string(),
            flow.remote.to_string(),
            flow.state.clone(),
            or_none(flow.began.as_deref()),
            format!("{:.1}s", flow.idle_seconds),
            or_none(flow.from_guest_bytes),
            or_none(flow.to_guest_bytes),
        ]
    });
    let head = ["FLOW", "PROTOCOL", "GUEST", "REMOTE", "STATE", "BEGUN BY", "IDLE", "BYTES OUT", "BYTES IN"];
    table(&head, &rows.collect::<Vec<_>>())
}

fn ports_text(list: &PortList) -> String {
    let rows = list.ports.iter().map(|port| {
        vec![
            port.id.to_string(),
            port.protocol.clone(),
            SocketAddr::new(port.host_address, port.host_port).to_string(),
            or_none(port.interface.as_deref()),
            port.guest_port.to_string(),
        ]
    });
    table(&["PORT", "PROTOCOL", "HOST", "INTERFACE", "GUEST PORT"], &rows.collect::<Vec<_>>())
}

fn limits_text(limits: &Limits) -> String {
    let row = |direction: &str, limits: &DirectionLimits| {
        let with_burst = |rate: Option<u64>, burst: Option<u64>| match (rate, burst) {
            (Some(rate), Some(burst)) => format!("{rate}/s, burst {burst}"),
            _ => "-".to_owned(),
        };
        vec![
            direction.to_owned(),
            with_burst(limits.rate_bytes_per_second, limits.burst_bytes),
            with_burst(limits.packets_per_second, limits.packets_burst),
            with_burst(limits.flows_per_second, limits.flows_burst),
            limits.limit.clone(),
        ]
    };
    let rows = [row("from guest", &limits.from_guest), row("to guest", &limits.to_guest)];
    table(&["DIRECTION", "BYTES", "PACKETS", "NEW FLOWS", "LIMIT"], &rows)
}

/// A text as one segment of a path (RFC 3986, 2.1).
fn path_segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn leases_text(leases: &Leases) -> String {
    let rows = leases.leases.iter().map(|lease| {
        vec![
            lease.address.to_string(),
            lease.mac.clone(),
            or_none(lease.host_name.as_deref()),
            lease.state.clone(),
            lease.left_seconds.map_or_else(|| "-".to_owned(), |left| format!("{left:.0}s")),
        ]
    });
    table(&["ADDRESS", "MAC", "NAME", "STATE", "LEFT"], &rows.collect::<Vec<_>>())
}

fn names_text(names: &Names) -> String {
    let rows = names.records.iter().map(|record| vec![record.name.clone(), record.address.to_string()]);
    let forwarded = names.forwarded;
    let counts = [
        ("queries", forwarded.queries),
        ("cached", forwarded.cached),
        ("joined", forwarded.joined),
        ("answered", forwarded.answered),
        ("failed", forwarded.failed),
        ("over bound", forwarded.over_bound),
        ("timeouts", forwarded.timeouts),
        ("errors", forwarded.errors),
    ];
    let counts = counts.map(|(name, count)| vec![name.to_owned(), count.to_string()]);
    table(&["NAME", "ADDRESS"], &rows.collect::<Vec<_>>()) + "\n" + &table(&["FORWARDED", "COUNT"], &counts)
}

/// An event on one line: its name, and its fields as `name=value`.
fn event_text(name: &str, data: &str) -> String {
    let fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(data).unwrap_or_default();
    let words = fields.iter().filter(|(field, _)| *field != "event").map(|(field, value)| match value {
        serde_json::Value::String(text) => format!(" {field}={text}"),
        other => format!(" {field}={other}"),
    });
    name.to_owned() + &words.collect::<String>() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_a_port_is_one_segment_of_a_path_whatever_is_in_it() {
        assert_eq!(path_segment("udp:[::1]%lo:80:80"), "udp:%5B::1%5D%25lo:80:80");
        assert_eq!(path_segment("../x?y#z"), "..%2Fx%3Fy%23z");
    }
}
