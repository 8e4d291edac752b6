//! How it is drawn.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table};

use super::State;
use super::sample::{Drop, Shown, short};

const TITLE: Style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD);
const HEAD: Style = Style::new().fg(Color::DarkGray);

/// Draws all of it, flows from the first that `state` has in sight.
pub(super) fn draw(frame: &mut Frame<'_>, shown: &Shown, state: &State) {
    let [head, curves, tables, flows, foot] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(6),
        Constraint::Length(8),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(header(shown), head);
    let [from, to] = Layout::horizontal([Constraint::Fill(1); 2]).areas(curves);
    curve(frame, from, "from guest", shown, 0);
    curve(frame, to, "to guest", shown, 1);
    let [queues, drops] = Layout::horizontal([Constraint::Fill(1); 2]).areas(tables);
    frame.render_widget(queue_table(shown), queues);
    frame.render_widget(drop_table(&shown.drops), drops);
    frame.render_widget(flow_table(shown, state), flows);
    let late = state.late_seconds.map(|seconds| format!(" no answer for {seconds} s  ")).unwrap_or_default();
    let halted = if state.halted { "halted   " } else { "" };
    let keys = format!(" {halted}q ends   p halts   s sorts   up, down, PageUp, PageDown: flows");
    let line = Line::from(vec![Span::styled(late, Style::new().fg(Color::Red)), Span::styled(keys, HEAD)]);
    frame.render_widget(Paragraph::new(line), foot);
}

fn header(shown: &Shown) -> Paragraph<'_> {
    let status = &shown.status;
    let facts = &status.facts;
    let attached = match status.attached {
        true => Span::styled("attached", Style::new().fg(Color::Green)),
        false => Span::styled("no front-end", Style::new().fg(Color::Yellow)),
    };
    let guest =
        status.guest_address.map_or_else(|| "no address yet".to_owned(), |address| address.to_string());
    let way = match &facts.nat {
        Some(nat) => format!("{} ({nat}) over {}", facts.mode, facts.uplink),
        None => format!("{} over {}", facts.mode, facts.uplink),
    };
    let first = Line::from(vec![
        Span::styled(format!(" vunet {} ", status.version), TITLE),
        format!(" process {}, up {}   {way}   ", status.pid, uptime(status.uptime_seconds)).into(),
        attached,
        if status.draining { Span::styled("   draining", Style::new().fg(Color::Yellow)) } else { "".into() },
    ]);
    let rates = &shown.rates;
    let second = format!(
        " guest {guest}   flows {} (+{}/s)   retransmits {}/s",
        status.flows,
        short(rates.flows_opened),
        short(rates.retransmits)
    );
    Paragraph::new(vec![first, second.into()])
}

fn uptime(seconds: f64) -> String {
    let seconds = seconds as u64;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// The curve of one direction, its newest value at the right.
fn curve(frame: &mut Frame<'_>, area: Rect, name: &str, shown: &Shown, at: usize) {
    let rates = &shown.rates;
    let title =
        format!(" {name}: {}bit/s, {} frames/s ", short_unit(rates.bits[at]), short(rates.frames[at]));
    let block = Block::bordered().title(Span::styled(title, TITLE));
    let width = usize::from(block.inner(area).width);
    let values = newest(&shown.history[at], width);
    frame.render_widget(
        Sparkline::default().block(block).data(values).style(Style::new().fg(Color::Green)),
        area,
    );
}

/// With the space before the unit even where there is no prefix.
fn short_unit(value: f64) -> String {
    let text = short(value);
    if text.contains(' ') { text } else { text + " " }
}

/// The newest values, as many as there is room for, at the right end.
fn newest(history: &VecDeque<u64>, width: usize) -> Vec<u64> {
    let skipped = history.len().saturating_sub(width);
    let values = history.iter().skip(skipped).copied();
    let missing = width.saturating_sub(history.len());
    std::iter::repeat_n(0, missing).chain(values).collect()
}

fn queue_table(shown: &Shown) -> Table<'_> {
    let rows = shown.status.rings.iter().map(|ring| {
        let used = if ring.size == 0 { 0 } else { usize::from(ring.available) * 10 / usize::from(ring.size) };
        let bar = "#".repeat(used) + &".".repeat(10 - used.min(10));
        let direction = if ring.index % 2 == 0 { "receive" } else { "transmit" };
        Row::new([
            Cell::from(ring.index.to_string()),
            Cell::from(direction),
            Cell::from(ring.worker.to_string()),
            Cell::from(format!("{bar} {}/{}", ring.available, ring.size)),
        ])
    });
    let widths = [Constraint::Length(5), Constraint::Length(9), Constraint::Length(6), Constraint::Min(10)];
    Table::new(rows, widths)
        .header(Row::new(["QUEUE", "DIRECTION", "WORKER", "AVAILABLE"]).style(HEAD))
        .block(Block::bordered().title(Span::styled(" virtqueues ", TITLE)))
}

fn drop_table(drops: &[Drop]) -> Table<'_> {
    let rows = drops.iter().map(|drop| {
        let style = if drop.a_second > 0.0 { Style::new().fg(Color::Red) } else { Style::new() };
        Row::new([drop.reason.clone(), drop.total.to_string(), short(drop.a_second)]).style(style)
    });
    let widths = [Constraint::Min(12), Constraint::Length(12), Constraint::Length(8)];
    Table::new(rows, widths)
        .header(Row::new(["REASON", "TOTAL", "A SECOND"]).style(HEAD))
        .block(Block::bordered().title(Span::styled(" drops ", TITLE)))
}

/// Bytes, where they are counted.
fn bytes(count: Option<u64>) -> String {
    count.map_or_else(|| "-".to_owned(), |count| short(count as f64) + "B")
}

fn flow_table<'a>(shown: &'a Shown, state: &State) -> Table<'a> {
    let scrolled = state.scrolled;
    let rows = shown.flows.iter().skip(scrolled).map(|flow| {
        let protocol = serde_json::to_value(flow.protocol).unwrap_or_default();
        Row::new([
            protocol.as_str().unwrap_or_default().to_owned(),
            flow.guest.to_string(),
            flow.remote.to_string(),
            flow.state.clone(),
            flow.began.clone().unwrap_or_default(),
            format!("{:.1} s", flow.idle_seconds),
            bytes(flow.from_guest_bytes),
            bytes(flow.to_guest_bytes),
        ])
    });
    let widths = [
        Constraint::Length(8),
        Constraint::Fill(1),
        Constraint::Fill(1),
        Constraint::Length(12),
        Constraint::Length(8),
        Constraint::Length(10),
        Constraint::Length(9),
        Constraint::Length(9),
    ];
    let order = state.order.text();
    let number = shown.flows.len();
    let of = if shown.has_more_flows { format!(" of {}", shown.status.flows) } else { String::new() };
    let title = format!(" flows, {order}: {number}{of} from {} on ", scrolled + 1);
    Table::new(rows, widths)
        .header(
            Row::new(["PROTOCOL", "GUEST", "REMOTE", "STATE", "BEGUN BY", "IDLE", "OUT", "IN"]).style(HEAD),
        )
        .block(Block::bordered().title(Span::styled(title, TITLE)))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::sample::tests::{counters, flow, status};
    use super::super::sample::{Order, Sampler};
    use super::*;
    use crate::control::api::status::Status;

    fn shown() -> Shown {
        let mut sampler = Sampler::new();
        let begun = Instant::now();
        sampler.take(begun, status(), counters(0, 0), (Vec::new(), false));
        let flows = vec![flow(40_001, 12.0), flow(40_002, 0.1)];
        let status = Status { flows: 70_000, ..status() };
        sampler.take(begun + Duration::from_secs(1), status, counters(125_000_000, 3), (flows, true))
    }

    /// The picture as text.
    fn picture(width: u16, height: u16, scrolled: usize) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let state = State { scrolled, halted: false, order: Order::default(), late_seconds: Some(7) };
        terminal.draw(|frame| draw(frame, &shown(), &state)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = (0..height).map(|y| {
            let line: String = (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect();
            line.trim_end().to_owned() + "\n"
        });
        lines.collect()
    }

    #[test]
    fn picture_has_rates_queues_drops_and_flows() {
        let picture = picture(100, 30, 0);
        for part in [
            "vunet 0.1.0",
            "up 1:02:03",
            "nat (sockets) over sockets",
            "attached",
            "guest 10.0.2.2",
            "from guest: 1.0 Gbit/s, 125 k frames/s",
            "to guest: 2.0 Gbit/s, 250 k frames/s",
            "#######... 192/256",
            "spoofed_source",
            "10.0.2.2:40002",
            "192.0.2.1:443",
            "established",
            "0.1 s",
            "40.0 MB",
            "no answer for 7 s",
            "used last first: 2 of 70000 from 1 on",
        ] {
            assert!(picture.contains(part), "{part} in\n{picture}");
        }
        assert!(picture.find(":40002") < picture.find(":40001"), "used last first\n{picture}");
    }

    #[test]
    fn flows_are_scrolled_and_small_terminals_are_no_matter() {
        let scrolled = picture(100, 30, 1);
        assert!(!scrolled.contains(":40002") && scrolled.contains(":40001"), "{scrolled}");
        for (width, height) in [(1, 1), (20, 5), (40, 12), (300, 100)] {
            picture(width, height, 0);
        }
    }
}
