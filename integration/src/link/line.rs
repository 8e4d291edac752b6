//! One direction of a link, without I/O or clock.
//!
//! Frames go in with [`Line::offer`], and come out of [`Line::take_due`] when their time has come;
//! [`Line::next_due`] says when to look again. Time is an argument: the time since the link began.
//!
//! What befalls a segment is drawn from the seed, always the same number of draws, so that the fate of
//! segment N depends on the seed and N alone. A frame of several segments stays together as far as they
//! share their fate and their time, within [`TOGETHER`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::segments::{self, Shape};
use super::settings::Settings;
use crate::world::pattern::Pattern;

/// Segments of one frame that are due within this time stay one frame, which comes when the last of them
/// is due: well below the shortest delay anybody measures here, a millisecond.
const TOGETHER: Duration = Duration::from_micros(250);
/// Bytes on their way: three times 1 Gbit/s for 300 ms and some queue. More are dropped.
const FLIGHT_BYTES_MAX: usize = 128 << 20;

/// What happened to segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Offered by the sender.
    pub offered: u64,
    /// Handed to the receiver.
    pub delivered: u64,
    /// Lost on purpose.
    pub lost: u64,
    /// Dropped because the queue was full.
    pub queue_full: u64,
    /// Dropped because too many bytes were on their way.
    pub flight_full: u64,
    /// Held back.
    pub reordered: u64,
    /// Doubled.
    pub duplicated: u64,
    /// Damaged.
    pub corrupted: u64,
}

/// What befalls one segment.
#[derive(Clone, Copy, Debug)]
struct Fate {
    lost: bool,
    reordered: bool,
    duplicated: bool,
    /// The bit that is inverted, if one is.
    corrupted: Option<u64>,
    jitter: Duration,
}

impl Fate {
    fn is_usual(&self) -> bool {
        !self.lost && !self.reordered && !self.duplicated && self.corrupted.is_none()
    }
}

/// A frame on its way.
#[derive(Debug)]
struct Flight {
    frame: Vec<u8>,
    segments: u64,
}

/// Segments of one frame that go on together.
#[derive(Clone, Debug)]
struct Run {
    segments: Range<usize>,
    first_due: Duration,
    last_due: Duration,
}

/// One direction of a link.
#[derive(Debug)]
pub struct Line {
    settings: Settings,
    draws: Pattern,
    /// When the bottleneck will have sent all it has taken.
    busy_until: Duration,
    /// When the last frame that keeps its place is due.
    last_due: Duration,
    flights: BTreeMap<(Duration, u64), Flight>,
    flight_bytes: usize,
    numbered: u64,
    counters: Counters,
}

impl Line {
    /// A direction that does what `settings` say, with the fates `seed` has in it.
    pub fn new(settings: Settings, seed: u64) -> Line {
        Line {
            settings,
            draws: Pattern::new(seed),
            busy_until: Duration::ZERO,
            last_due: Duration::ZERO,
            flights: BTreeMap::new(),
            flight_bytes: 0,
            numbered: 0,
            counters: Counters::default(),
        }
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// When [`Self::take_due`] next has something.
    pub fn next_due(&self) -> Option<Duration> {
        self.flights.first_key_value().map(|((due, _), _)| *due)
    }

    /// The next frame that is due at `now`.
    pub fn take_due(&mut self, now: Duration) -> Option<Vec<u8>> {
        let due = self.flights.first_entry().filter(|entry| entry.key().0 <= now)?;
        let flight = due.remove();
        self.flight_bytes -= flight.frame.len();
        self.counters.delivered += flight.segments;
        Some(flight.frame)
    }

    /// Takes a frame, with a virtio-net header of 12 bytes in front, from the sender at `now`, which must
    /// not go back.
    pub fn offer(&mut self, now: Duration, frame: &[u8]) {
        let shape = Shape::of(frame);
        let mut run: Option<Run> = None;
        for index in 0..shape.count() {
            let fate = self.fate();
            self.counters.offered += 1;
            let Some(sent) = self.pass_bottleneck(now, shape.wire_bytes(index)) else {
                self.counters.queue_full += 1;
                self.depart(frame, &shape, run.take());
                continue;
            };
            if !fate.is_usual() {
                self.depart(frame, &shape, run.take());
                self.depart_unusual(frame, &shape, index, sent, fate);
                continue;
            }
            let due = self.in_order(sent + self.settings.delay + fate.jitter);
            match &mut run {
                Some(run) if due - run.first_due <= TOGETHER => {
                    run.segments.end = index + 1;
                    run.last_due = due;
                }
                _ => {
                    self.depart(frame, &shape, run.take());
                    run = Some(Run { segments: index..index + 1, first_due: due, last_due: due });
                }
            }
        }
        self.depart(frame, &shape, run);
    }

    fn fate(&mut self) -> Fate {
        let [loss, reorder, duplicate, corrupt, bit, jitter] = std::array::from_fn(|_| self.draws.next_u64());
        let settings = &self.settings;
        // The upper 32 bits as a fraction of the jitter.
        let jitter = (settings.jitter.as_nanos() * u128::from(jitter >> 32)) >> 32;
        Fate {
            lost: settings.loss.is_hit(loss),
            reordered: settings.reorder.is_hit(reorder),
            duplicated: settings.duplicate.is_hit(duplicate),
            corrupted: settings.corrupt.is_hit(corrupt).then_some(bit),
            jitter: Duration::from_nanos(u64::try_from(jitter).expect("less than a minute")),
        }
    }

    /// When the bottleneck will have sent `bytes` more; `None` if its queue does not take them.
    fn pass_bottleneck(&mut self, now: Duration, bytes: usize) -> Option<Duration> {
        let Some(rate) = self.settings.rate else {
            return Some(now);
        };
        let rate = u128::from(rate);
        let waiting = self.busy_until.saturating_sub(now).as_nanos() * rate / 8_000_000_000;
        let bytes = bytes as u128;
        if waiting + bytes > u128::from(self.settings.queue_bytes) {
            return None;
        }
        let nanos = (bytes * 8_000_000_000).div_ceil(rate);
        let nanos = u64::try_from(nanos).expect("a frame at 1 kbit/s takes minutes");
        self.busy_until = self.busy_until.max(now) + Duration::from_nanos(nanos);
        Some(self.busy_until)
    }

    /// `due`, or later if what went before is due later.
    fn in_order(&mut self, due: Duration) -> Duration {
        self.last_due = self.last_due.max(due);
        self.last_due
    }

    fn depart_unusual(&mut self, frame: &[u8], shape: &Shape, index: usize, sent: Duration, fate: Fate) {
        if fate.lost {
            self.counters.lost += 1;
            return;
        }
        let mut segment = shape.cut(frame, index..index + 1);
        if let Some(bit) = fate.corrupted {
            segments::corrupt(&mut segment, bit);
            self.counters.corrupted += 1;
        }
        let due = sent + self.settings.delay + fate.jitter;
        let due = if fate.reordered {
            self.counters.reordered += 1;
            due + self.settings.reorder_by
        } else {
            self.in_order(due)
        };
        if fate.duplicated {
            self.counters.duplicated += 1;
            self.fly(due, segment.clone(), 1);
        }
        self.fly(due, segment, 1);
    }

    fn depart(&mut self, frame: &[u8], shape: &Shape, run: Option<Run>) {
        if let Some(run) = run {
            let count = run.segments.len() as u64;
            self.fly(run.last_due, shape.cut(frame, run.segments), count);
        }
    }

    fn fly(&mut self, due: Duration, frame: Vec<u8>, segments: u64) {
        if self.flight_bytes + frame.len() > FLIGHT_BYTES_MAX {
            self.counters.flight_full += segments;
            return;
        }
        self.flight_bytes += frame.len();
        self.numbered += 1;
        self.flights.insert((due, self.numbered), Flight { frame, segments });
    }
}

#[cfg(test)]
mod tests {
    use super::super::segments::tests::tso_frame;
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const US: Duration = Duration::from_micros(1);

    fn line(settings: &str, seed: u64) -> Line {
        Line::new(settings.parse().unwrap(), seed)
    }

    /// Frame `number`, of `bytes` on the wire.
    fn numbered(number: u32, bytes: usize) -> Vec<u8> {
        let mut frame = vec![0; 12 + bytes];
        frame[12 + 14..12 + 18].copy_from_slice(&number.to_be_bytes());
        frame
    }

    fn number(frame: &[u8]) -> u32 {
        u32::from_be_bytes(frame[26..30].try_into().unwrap())
    }

    /// Everything on its way, with the time it comes at.
    fn drain(line: &mut Line) -> Vec<(Duration, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some(due) = line.next_due() {
            assert!(due.is_zero() || line.take_due(due - Duration::from_nanos(1)).is_none(), "too early");
            while let Some(frame) = line.take_due(due) {
                all.push((due, frame));
            }
        }
        all
    }

    /// Numbers that come out of `count` frames of 100 bytes, sent a millisecond apart.
    fn numbers(settings: &str, seed: u64, count: u32) -> (Vec<u32>, Counters) {
        let mut line = line(settings, seed);
        for number in 0..count {
            line.offer(number * MS, &numbered(number, 100));
        }
        let numbers = drain(&mut line).iter().map(|(_, frame)| number(frame)).collect();
        let c = line.counters();
        assert_eq!(c.delivered + c.lost + c.queue_full + c.flight_full, c.offered + c.duplicated);
        (numbers, c)
    }

    #[test]
    fn a_perfect_link_hands_frames_on_at_once_as_they_are() {
        let mut line = line("", 1);
        let frame = numbered(7, 1514);
        line.offer(3 * MS, &frame);
        assert_eq!(drain(&mut line), [(3 * MS, frame)]);
    }

    #[test]
    fn the_delay_is_exact() {
        let mut line = line("delay=25ms", 1);
        line.offer(2 * MS, &numbered(1, 60));
        line.offer(9 * MS, &numbered(2, 60));
        let times: Vec<Duration> = drain(&mut line).iter().map(|(due, _)| *due).collect();
        assert_eq!(times, [27 * MS, 34 * MS]);
    }

    #[test]
    fn jitter_spreads_delays_over_its_width_and_keeps_the_order() {
        let mut line = line("delay=10ms,jitter=5ms", 4);
        for number in 0..2000 {
            // Further apart than the jitter, so that each delay is seen by itself.
            line.offer(number * 10 * MS, &numbered(number, 60));
        }
        let all = drain(&mut line);
        let mean: Duration = (0..).zip(&all).map(|(n, (due, _))| *due - n * 10 * MS).sum::<Duration>() / 2000;
        assert!((12_300 * US..12_700 * US).contains(&mean), "{mean:?}");
        assert!((0..).zip(&all).all(|(n, (due, _))| (10 * MS..15 * MS).contains(&(*due - n * 10 * MS))));
        let (order, _) = numbers("jitter=50ms", 4, 1000);
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_share_of_losses_is_what_was_asked_for() {
        for (settings, share) in [("loss=0.1%", 0.001), ("loss=1%", 0.01), ("loss=30%", 0.3)] {
            let (_, counters) = numbers(settings, 11, 200_000);
            let expected: f64 = 200_000.0 * share;
            // Four standard deviations of a binomial distribution.
            let spread = 4.0 * (expected * (1.0 - share)).sqrt();
            assert!((counters.lost as f64 - expected).abs() < spread, "{settings}: {counters:?}");
        }
        assert_eq!(numbers("loss=100%", 11, 10).1.lost, 10);
    }

    #[test]
    fn the_same_seed_loses_the_same_frames_and_another_seed_others() {
        let (one, again, other) =
            (numbers("loss=5%", 1, 1000), numbers("loss=5%", 1, 1000), numbers("loss=5%", 2, 1000));
        assert_eq!(one, again);
        assert_ne!(one.0, other.0);
    }

    #[test]
    fn losses_depend_on_a_frames_number_and_on_no_other_setting() {
        let plain = numbers("loss=5%", 1, 1000).0;
        for more in ["delay=3ms", "jitter=9ms", "rate=1mbit"] {
            assert_eq!(plain, numbers(&format!("loss=5%,{more}"), 1, 1000).0, "{more}");
        }
        let damaged = numbers("loss=5%,corrupt=10%,duplicate=10%", 1, 1000).1;
        assert_eq!(damaged.lost, 1000 - plain.len() as u64);
    }

    #[test]
    fn a_frame_held_back_is_overtaken_for_just_so_long() {
        let (order, counters) = numbers("reorder=10%,reorder-by=2500us", 3, 1000);
        assert!((60..140).contains(&counters.reordered), "{counters:?}");
        let overtaken = |number: &u32| {
            let at = order.iter().position(|other| other == number).expect("nothing is lost");
            order[..at].iter().any(|other| other > number)
        };
        let held = (0..1000).filter(overtaken).count() as u64;
        // Held back next to each other, or at the end, they are not overtaken by two, or by any.
        assert!(held <= counters.reordered && held >= counters.reordered * 9 / 10, "{held} of {counters:?}");
        let furthest = (0..).zip(&order).map(|(at, n): (i64, _)| at - i64::from(*n)).max();
        assert_eq!(furthest, Some(2), "a frame each millisecond: two pass in 2.5 ms");
        assert_eq!(numbers("reorder=0%", 3, 1000).0, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn doubled_frames_come_twice_in_a_row() {
        let (order, counters) = numbers("duplicate=10%", 3, 1000);
        let twice = order.windows(2).filter(|pair| pair[0] == pair[1]).count() as u64;
        assert!(twice == counters.duplicated && (60..140).contains(&twice), "{counters:?}");
        assert_eq!(order.len() as u64, 1000 + twice);
    }

    #[test]
    fn corrupted_frames_differ_in_one_bit() {
        let mut line = line("corrupt=100%", 3);
        line.offer(MS, &numbered(5, 200));
        let (_, got) = drain(&mut line).remove(0);
        let bits: u32 = got.iter().zip(numbered(5, 200)).map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!((bits, line.counters().corrupted), (1, 1));
    }

    #[test]
    fn the_rate_is_kept_to_the_microsecond() {
        // 1,250 bytes at 10 Mbit/s: a millisecond each.
        let mut line = line("rate=10mbit,delay=7ms", 1);
        for number in 0..100 {
            line.offer(Duration::ZERO, &numbered(number, 1250));
        }
        let times: Vec<Duration> = drain(&mut line).iter().map(|(due, _)| *due).collect();
        assert_eq!(times, (1..=100).map(|n| (n + 7) * MS).collect::<Vec<_>>());
        // A pause is not saved up.
        line.offer(500 * MS, &numbered(0, 1250));
        assert_eq!(line.next_due(), Some(508 * MS));
    }

    #[test]
    fn the_queue_takes_its_bytes_and_not_one_more() {
        // A byte each microsecond.
        let mut line = line("rate=8mbit,queue=3000B", 1);
        for number in 0..4 {
            line.offer(Duration::ZERO, &numbered(number, 1000));
        }
        assert_eq!((line.counters().offered, line.counters().queue_full), (4, 1));
        line.offer(999 * US, &numbered(5, 1000));
        assert_eq!(line.counters().queue_full, 2, "2,001 bytes wait still");
        line.offer(1000 * US, &numbered(6, 1000));
        assert_eq!(line.counters().queue_full, 2);
        let order: Vec<u32> = drain(&mut line).iter().map(|(_, frame)| number(frame)).collect();
        assert_eq!(order, [0, 1, 2, 6]);
    }

    #[test]
    fn bytes_on_their_way_are_bounded() {
        let mut line = line("delay=10s", 1);
        let frame = numbered(0, 65_536 - 12);
        let fit = FLIGHT_BYTES_MAX / frame.len();
        for _ in 0..fit {
            line.offer(Duration::ZERO, &frame);
        }
        assert_eq!(line.counters().flight_full, 0);
        line.offer(Duration::ZERO, &frame);
        assert_eq!(line.counters().flight_full, 1);
        assert_eq!(drain(&mut line).len(), fit);
        line.offer(11 * Duration::from_secs(1), &frame);
        assert_eq!(line.counters().flight_full, 1, "room again");
    }

    #[test]
    fn a_segmented_frame_crosses_whole_unless_a_fate_divides_it() {
        let frame = tso_frame(40_000, 1000);
        let mut whole = line("delay=1ms", 1);
        whole.offer(Duration::ZERO, &frame);
        assert_eq!(drain(&mut whole), [(MS, frame.clone())]);
        let mut lossy = line("loss=10%", 5);
        lossy.offer(Duration::ZERO, &frame);
        let counters = lossy.counters();
        let got: usize = drain(&mut lossy).iter().map(|(_, frame)| Shape::of(frame).count()).sum();
        assert!(counters.offered == 40 && (1..12).contains(&counters.lost), "{counters:?}");
        assert_eq!(got as u64, 40 - counters.lost);
    }

    #[test]
    fn segments_of_one_frame_are_lost_as_frames_of_their_own_would_be() {
        let mut segmented = line("loss=10%", 5);
        for _ in 0..100 {
            segmented.offer(Duration::ZERO, &tso_frame(10_000, 1000));
        }
        assert_eq!(segmented.counters().lost, numbers("loss=10%", 5, 1000).1.lost);
    }

    #[test]
    fn a_slow_link_spreads_a_segmented_frame_over_its_time() {
        // 1,054 bytes take 0.84 ms at 10 Mbit/s, and 8.4 us at 1 Gbit/s.
        let mut slow = line("rate=10mbit", 1);
        slow.offer(Duration::ZERO, &tso_frame(10_000, 1000));
        assert_eq!(drain(&mut slow).len(), 10);
        let mut fast = line("rate=1gbit", 1);
        fast.offer(Duration::ZERO, &tso_frame(60_000, 1000));
        let parts = drain(&mut fast);
        assert_eq!(parts.len(), 2, "30 segments that are 8.4 us apart are due within 250 us");
        assert_eq!(parts[1].0, Duration::from_nanos(60 * 8432));
    }
}
