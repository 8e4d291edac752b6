//! The tracker beside Linux's conntrack, segment by segment: the kernel's verdicts were recorded (`conntrack.txt`), and where the
//! tracker differs it says so there.

use vunet::engine::packet::tcp_state::{Direction, Segment, TcpState, TcpTracker, TcpVerdict};
use vunet::wire::tcp::{Flags, SeqNumber};

const RECORDED: &str = include_str!("conntrack.txt");

fn flags(letters: &str) -> Flags {
    letters.chars().fold(Flags::NONE, |flags, letter| {
        flags
            | match letter {
                'S' => Flags::SYN,
                'A' => Flags::ACK,
                'F' => Flags::FIN,
                'R' => Flags::RST,
                'P' => Flags::PSH,
                'U' => Flags::URG,
                _ => Flags::NONE,
            }
    })
}

fn name(state: TcpState) -> &'static str {
    match state {
        TcpState::SynSent => "SYN_SENT",
        TcpState::SynSentBoth => "SYN_SENT2",
        TcpState::SynReceived => "SYN_RECV",
        TcpState::Established => "ESTABLISHED",
        TcpState::FinWait => "FIN_WAIT",
        TcpState::CloseWait => "CLOSE_WAIT",
        TcpState::LastAck => "LAST_ACK",
        TcpState::TimeWait => "TIME_WAIT",
        TcpState::Closed => "CLOSE",
    }
}

/// What the tracker makes of a segment, in the record's words.
fn judge(
    tracker: &mut Option<TcpTracker>,
    from: Direction,
    segment: &Segment,
) -> (&'static str, &'static str) {
    let passes = match tracker {
        Some(tracker) => tracker.take(from, segment, false) != TcpVerdict::Invalid,
        None => {
            *tracker = TcpTracker::begin(segment, true);
            tracker.is_some()
        }
    };
    let state = tracker.as_ref().map_or("-", |tracker| name(tracker.state()));
    (if passes { "pass" } else { "drop" }, state)
}

#[test]
fn segments_are_judged_as_by_conntrack_but_where_the_record_says_otherwise() {
    let mut tracker = None;
    let (mut title, mut alike, mut unlike, mut wrong) = ("", 0, 0, Vec::new());
    for line in RECORDED.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(next) = line.strip_prefix("= ") {
            (title, tracker) = (next, None);
            continue;
        }
        let (recorded, own) = line.split_once('|').map_or((line, None), |(linux, own)| (linux, Some(own)));
        let words: Vec<&str> = recorded.split_whitespace().collect();
        let [from, letters, seq, ack, len, verdict, state] = words[..] else { panic!("{line}") };
        let number = |text: &str| text.parse().expect("a number");
        let segment = Segment {
            seq: SeqNumber(number(seq)),
            ack: SeqNumber(number(ack)),
            flags: flags(letters),
            window: 1000,
            payload_bytes: number(len),
            window_scale: None,
        };
        let from = if from == ">" { Direction::Original } else { Direction::Reply };
        let got = judge(&mut tracker, from, &segment);
        let expected = match own {
            None => (verdict, state),
            Some(own) => {
                let words: Vec<&str> = own.split_whitespace().collect();
                assert!(words.len() > 3, "a difference says why: {line}");
                (words[0], words[1].trim_end_matches(':'))
            }
        };
        if got == (verdict, state) {
            alike += 1;
        } else {
            unlike += 1;
        }
        if got != expected {
            wrong.push(format!("{title}: {line} -> {} {}", got.0, got.1));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(alike > 8 * unlike && alike > 100, "{alike} alike, {unlike} unlike");
}
