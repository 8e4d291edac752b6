//! `/metrics`: the same numbers for Prometheus, in its text format.
//!
//! Names follow its conventions: base units, `_total` for what only grows, one name with a label where things
//! add up. Nothing is counted twice for it: each scrape asks the workers for their numbers.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, StatusCode};
use prometheus::proto::{self, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder as _, TextEncoder};

use super::error::ErrorBody;
use super::{Api, ApiError, Shared};
use crate::control::dns_forward::DnsStats;
use crate::engine::counters::Limited;
use crate::histogram::Histogram;
use crate::requests::{Request, WorkerReport};

/// Microseconds in a second, which is Prometheus's unit of time.
const MICROS: f64 = 1e6;

/// What only grows, of one worker: name, help, a label besides the worker's, and its values.
type Count = (&'static str, &'static str, &'static str, fn(&WorkerReport) -> Vec<(&'static str, u64)>);

const COUNTS: [Count; 17] = [
    ("vunet_frames_total", "Ethernet frames moved.", "direction", |worker| {
        let counters = &worker.counters;
        both_ways(counters.frames_from_guest, counters.frames_to_guest)
    }),
    (
        "vunet_payload_bytes_total",
        "Payload moved between guest and sockets; on a link, whole frames.",
        "direction",
        |worker| {
            let counters = &worker.counters;
            both_ways(counters.payload_from_guest_bytes, counters.payload_to_guest_bytes)
        },
    ),
    ("vunet_virtqueue_frames_total", "Frames that passed the virtqueues.", "direction", |worker| {
        both_ways(worker.device.tx.frames, worker.device.rx.frames)
    }),
    ("vunet_virtqueue_bytes_total", "Bytes of frames that passed the virtqueues.", "direction", |worker| {
        both_ways(worker.device.tx.bytes, worker.device.rx.bytes)
    }),
    ("vunet_drops_total", "Frames, segments and datagrams dropped.", "reason", |worker| {
        worker.counters.drops().collect()
    }),
    ("vunet_limit_waits_total", "Times something had to wait for a rate limit.", "direction", |worker| {
        both_limits(worker, |limited| limited.waits)
    }),
    ("vunet_limit_dropped_packets_total", "Packets a rate limit dropped.", "direction", |worker| {
        both_limits(worker, |limited| limited.dropped_packets)
    }),
    ("vunet_limit_dropped_bytes_total", "Bytes of packets a rate limit dropped.", "direction", |worker| {
        both_limits(worker, |limited| limited.dropped_bytes)
    }),
    ("vunet_limit_refused_flows_total", "New flows a rate limit did not let begin.", "direction", |worker| {
        both_limits(worker, |limited| limited.refused_flows)
    }),
    ("vunet_flows_opened_total", "Flows that began.", "", |worker| one(worker.counters.flows_opened)),
    ("vunet_flows_ended_early_total", "Flows ended before their time.", "reason", |worker| {
        vec![("evicted", worker.counters.flows_evicted), ("stranded", worker.counters.flows_stranded)]
    }),
    ("vunet_tcp_retransmits_total", "TCP segments sent to the guest again.", "", |worker| {
        one(worker.counters.retransmits)
    }),
    ("vunet_guest_notifications_total", "Notifications sent to the guest (calls).", "direction", |worker| {
        both_ways(worker.device.tx.calls, worker.device.rx.calls)
    }),
    ("vunet_guest_kicks_total", "Notifications taken from the guest (kicks).", "", |worker| {
        one(worker.measures.kicks)
    }),
    ("vunet_wakeups_total", "Times a worker woke up.", "", |worker| one(worker.measures.wake_ups)),
    ("vunet_virtqueue_errors_total", "What the guest did wrong on its virtqueues.", "kind", queue_errors),
    (
        "vunet_guest_requests_total",
        "Questions of the guest to DHCP and DNS that were answered.",
        "service",
        |worker| {
            let counters = &worker.counters;
            vec![
                ("dhcp", counters.dhcp_answered),
                ("dns_local", counters.names_answered),
                ("dns_forwarded", counters.names_forwarded),
            ]
        },
    ),
];

/// A histogram of one worker: name, help, the unit's part of what is counted, and its values.
type Times = (&'static str, &'static str, f64, fn(&WorkerReport) -> &Histogram);

const TIMES: [Times; 3] = [
    (
        "vunet_connect_duration_seconds",
        "Time until a connect of a guest's TCP flow succeeded.",
        MICROS,
        |worker| &worker.counters.connect_time,
    ),
    (
        "vunet_batch_duration_seconds",
        "Time a worker worked after a wake-up that moved frames.",
        MICROS,
        |worker| &worker.measures.batch_time,
    ),
    ("vunet_batch_frames", "Frames moved after a wake-up that moved any.", 1.0, |worker| {
        &worker.measures.batch_frames
    }),
];

fn one(value: u64) -> Vec<(&'static str, u64)> {
    vec![("", value)]
}

fn both_ways(from_guest: u64, to_guest: u64) -> Vec<(&'static str, u64)> {
    vec![("from_guest", from_guest), ("to_guest", to_guest)]
}

fn both_limits(worker: &WorkerReport, of: fn(&Limited) -> u64) -> Vec<(&'static str, u64)> {
    both_ways(of(&worker.counters.limited_from_guest), of(&worker.counters.limited_to_guest))
}

fn queue_errors(worker: &WorkerReport) -> Vec<(&'static str, u64)> {
    let device = &worker.device;
    let chains =
        device.tx.bad_chains.total() + device.rx.bad_chains.total() + device.control.bad_chains.total();
    vec![
        ("bad_chain", chains),
        ("bad_length", device.tx.too_short + device.tx.too_long),
        ("bad_header", device.tx.bad_header),
        ("not_negotiated", device.tx.not_negotiated),
        ("buffers_too_small", device.rx.too_small),
        ("ring_broken", device.broken_rings),
    ]
}

/// A family of metrics, as it grows.
struct Family(MetricFamily, Vec<Metric>);

impl Family {
    fn new(name: &str, help: &str, kind: MetricType) -> Family {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        Family(family, Vec::new())
    }

    fn metric(&mut self, labels: &[(&str, &str)]) -> &mut Metric {
        let labels = labels.iter().filter(|(name, _)| !name.is_empty()).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        let mut metric = Metric::default();
        metric.set_label(labels.collect());
        self.1.push(metric);
        let last = self.1.len() - 1;
        &mut self.1[last]
    }

    fn count(&mut self, labels: &[(&str, &str)], value: u64) {
        let mut counter = proto::Counter::default();
        counter.set_value(value as f64);
        self.metric(labels).set_counter(counter);
    }

    fn gauge(&mut self, labels: &[(&str, &str)], value: f64) {
        let mut gauge = proto::Gauge::default();
        gauge.set_value(value);
        self.metric(labels).set_gauge(gauge);
    }

    fn histogram(&mut self, labels: &[(&str, &str)], values: &Histogram, per_unit: f64) {
        let mut all = proto::Histogram::default();
        all.set_sample_count(values.count());
        all.set_sample_sum(values.sum() as f64 / per_unit);
        let buckets = values.cumulative().map(|(largest, total)| {
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(largest as f64 / per_unit);
            bucket.set_cumulative_count(total);
            bucket
        });
        all.set_bucket(buckets.collect());
        self.metric(labels).set_histogram(all);
    }

    fn done(self) -> MetricFamily {
        let Family(mut family, metrics) = self;
        family.set_metric(metrics);
        family
    }
}

/// What the workers count, a family for each name.
fn of_workers(reports: &[WorkerReport]) -> Vec<MetricFamily> {
    let names: Vec<String> = (0..reports.len()).map(|worker| worker.to_string()).collect();
    let workers = || names.iter().map(String::as_str).zip(reports);
    let mut families = Vec::new();
    for (name, help, label, values) in COUNTS {
        let mut family = Family::new(name, help, MetricType::COUNTER);
        for (worker, report) in workers() {
            for (word, value) in values(report) {
                family.count(&[("worker", worker), (label, word)], value);
            }
        }
        families.push(family.done());
    }
    for (name, help, per_unit, values) in TIMES {
        let mut family = Family::new(name, help, MetricType::HISTOGRAM);
        for (worker, report) in workers() {
            family.histogram(&[("worker", worker)], values(report), per_unit);
        }
        families.push(family.done());
    }
    let mut flows = Family::new("vunet_flows", "Flows there are.", MetricType::GAUGE);
    let mut entries =
        Family::new("vunet_virtqueue_entries", "Entries of a virtqueue that runs.", MetricType::GAUGE);
    let help = "Entries of a virtqueue that the driver made available and that are not used yet.";
    let mut available = Family::new("vunet_virtqueue_available_entries", help, MetricType::GAUGE);
    for (worker, report) in workers() {
        flows.gauge(&[("worker", worker)], report.flows as f64);
        for ring in &report.rings {
            let index = ring.index.to_string();
            let labels = [("worker", worker), ("queue", index.as_str())];
            entries.gauge(&labels, f64::from(ring.size));
            available.gauge(&labels, f64::from(ring.available));
        }
    }
    families.extend([flows, entries, available].map(Family::done));
    families
}

/// What became of names that are not local.
fn of_names(stats: &DnsStats, times: &Histogram) -> Vec<MetricFamily> {
    let help = "Queries for names that are not local.";
    let mut queries = Family::new("vunet_dns_queries_total", help, MetricType::COUNTER);
    for (outcome, value) in
        [("cached", stats.cached), ("joined", stats.joined), ("over_bound", stats.over_bound)]
    {
        queries.count(&[("outcome", outcome)], value);
    }
    let asked = stats.queries.saturating_sub(stats.cached + stats.joined + stats.over_bound);
    queries.count(&[("outcome", "asked")], asked);
    let help = "Questions to upstream resolvers that came to an end.";
    let mut questions = Family::new("vunet_dns_questions_total", help, MetricType::COUNTER);
    for (outcome, value) in [("answered", stats.answered), ("failed", stats.failed)] {
        questions.count(&[("outcome", outcome)], value);
    }
    let help = "Tries of questions that failed.";
    let mut tries = Family::new("vunet_dns_failed_tries_total", help, MetricType::COUNTER);
    for (reason, value) in
        [("timeout", stats.timeouts), ("error", stats.errors), ("mismatch", stats.mismatched)]
    {
        tries.count(&[("reason", reason)], value);
    }
    let help = "Time until an upstream resolver answered a question.";
    let mut time = Family::new("vunet_dns_duration_seconds", help, MetricType::HISTOGRAM);
    time.histogram(&[], times, MICROS);
    [queries, questions, tries, time].map(Family::done).into()
}

impl Api {
    /// What captures came to.
    fn of_captures(&self) -> [MetricFamily; 3] {
        let (totals, is_running) = self.captures.totals();
        let mut running = Family::new("vunet_capture_running", "Whether a capture runs.", MetricType::GAUGE);
        running.gauge(&[], f64::from(u8::from(is_running)));
        let mut frames =
            Family::new("vunet_capture_frames_total", "Frames written to captures.", MetricType::COUNTER);
        frames.count(&[], totals.frames);
        let help = "Frames that are in no capture because it was written too slowly.";
        let mut lost = Family::new("vunet_capture_lost_frames_total", help, MetricType::COUNTER);
        lost.count(&[], totals.lost);
        [running, frames, lost].map(Family::done)
    }

    /// All metrics as text.
    async fn metrics(&self) -> Result<Vec<u8>, ApiError> {
        let reports = self.ask_all(Request::Report).await?;
        let mut build = Family::new("vunet_build_info", "The version that runs.", MetricType::GAUGE);
        build.gauge(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        let mut attached =
            Family::new("vunet_front_end_attached", "Whether a front-end is there.", MetricType::GAUGE);
        attached.gauge(&[], f64::from(u8::from(reports.iter().any(|report| report.attached))));
        let help = "Lines of the log lost, because standard error was not read in time.";
        let mut lost = Family::new("vunet_log_lines_lost_total", help, MetricType::COUNTER);
        lost.count(&[], self.log.lines_lost());
        let mut families = vec![build.done(), attached.done(), lost.done()];
        families.extend(of_workers(&reports));
        families.extend(self.of_captures());
        families.extend(of_names(&self.resolver.stats(), &self.resolver.times()));
        // A family without a metric is none: no virtqueue runs.
        families.retain(|family| !family.get_metric().is_empty());
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text).map_err(|error| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "no_text", error.to_string())
        })?;
        Ok(text)
    }
}

/// The same numbers in the text format of Prometheus
#[utoipa::path(
    get,
    path = "/metrics",
    responses(
        (status = 200, description = "Metrics", content_type = "text/plain", body = String),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn get(State(api): Shared) -> Result<([(HeaderName, &'static str); 1], Vec<u8>), ApiError> {
    Ok(([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], api.metrics().await?))
}
