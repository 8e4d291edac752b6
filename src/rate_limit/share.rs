//! One worker's way to a limit of one direction.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::bucket::FairShare;
use super::{Cost, Limit};
use crate::limits::{
    LIMIT_SENDER_IDLE, LIMIT_TURN, LIMIT_TURN_BYTES_MAX, LIMIT_TURN_BYTES_MIN, LIMIT_TURN_PACKETS_MAX,
    LIMIT_WINDOW, LIMIT_WINDOW_BYTES_MAX,
};
use crate::time::Instant;

/// Quarters of a bucket that are left for others by who is beyond its fair share.
const QUARTERS_LEFT: u64 = 2;

/// What is known of one flow whose packets cannot wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sender {
    share: FairShare,
    /// The period in which it was counted last.
    period: u32,
}

/// How many flows send of late, one worker's count.
#[derive(Debug, Default)]
struct Senders {
    period: u32,
    /// When the period ends.
    until: Instant,
    /// Counted in this period, and in the one before.
    now: u32,
    before: u32,
    /// What of it is in the sum of all workers.
    told: u32,
}

/// What was reserved, and when it may be used.
#[derive(Clone, Copy, Debug)]
struct Reserved {
    cost: Cost,
    at: Instant,
}

/// A worker's share of a limit.
#[derive(Debug, Default)]
pub struct Share {
    limit: Arc<Limit>,
    is_on: bool,
    turn: Cost,
    reserved: Option<Reserved>,
    senders: Senders,
}

impl Share {
    /// A share of `limit`.
    pub fn new(limit: Arc<Limit>) -> Share {
        let mut share = Share::default();
        share.limit = limit;
        share.refresh();
        share
    }

    /// Takes up what the limit was set to.
    pub fn refresh(&mut self) {
        self.release();
        let Limit { bytes, packets, .. } = &*self.limit;
        self.is_on = bytes.is_on() || packets.is_on();
        let in_a_turn = |per_second: u64| per_second / (1_000_000 / LIMIT_TURN.as_micros() as u64);
        let turn_bytes = match bytes.is_on() {
            true => in_a_turn(bytes.per_second()).clamp(LIMIT_TURN_BYTES_MIN, LIMIT_TURN_BYTES_MAX),
            false => LIMIT_TURN_BYTES_MAX,
        };
        let turn_packets = match packets.is_on() {
            true => in_a_turn(packets.per_second()).clamp(1, LIMIT_TURN_PACKETS_MAX),
            // No packet is without a byte.
            false => turn_bytes,
        };
        self.turn = Cost { bytes: turn_bytes, packets: turn_packets };
        self.count(0);
    }

    /// Whether bytes or packets are limited.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// Whether new flows are.
    pub fn limits_flows(&self) -> bool {
        self.limit.flows.is_on()
    }

    /// What one flow may use before the next one's turn.
    pub fn turn(&self) -> Cost {
        self.turn
    }

    /// Takes `cost` if it is there and nobody of this worker waits for what was reserved.
    pub fn take(&mut self, now: Instant, cost: Cost) -> bool {
        !self.is_on || (self.reserved.is_none() && self.limit.take(now, cost, 0))
    }

    /// Takes `cost` for who waits, or reserves it.
    ///
    /// # Errors
    /// When it will be there; to be asked again then.
    pub fn claim(&mut self, now: Instant, cost: Cost) -> Result<(), Instant> {
        if !self.is_on {
            return Ok(());
        }
        let (had, at) = match self.reserved {
            Some(Reserved { at, .. }) if at > now => return Err(at),
            Some(Reserved { cost, at }) => (cost, at),
            None => (Cost::default(), now),
        };
        let missing = cost.less(had);
        if self.limit.take(now, missing, 0) {
            let left = had.less(cost);
            self.reserved = (!left.is_zero()).then_some(Reserved { cost: left, at });
            return Ok(());
        }
        let at = self.limit.reserve(now, missing);
        let both = Cost { bytes: had.bytes + missing.bytes, packets: had.packets + missing.packets };
        self.reserved = Some(Reserved { cost: both, at });
        if at > now { Err(at) } else { self.claim_reserved(cost) }
    }

    /// Uses what is reserved and there.
    fn claim_reserved(&mut self, cost: Cost) -> Result<(), Instant> {
        if let Some(reserved) = self.reserved.take() {
            self.limit.give_back(reserved.cost.less(cost));
        }
        Ok(())
    }

    /// Takes what has passed already, into debt if need be.
    pub fn charge(&self, now: Instant, cost: Cost) {
        if self.is_on {
            self.limit.charge(now, cost);
        }
    }

    /// Gives back what was taken and not used.
    pub fn give_back(&self, cost: Cost) {
        if self.is_on {
            self.limit.give_back(cost);
        }
    }

    /// Nobody waits any more: what was reserved is everybody's again.
    pub fn release(&mut self) {
        if let Some(reserved) = self.reserved.take() {
            self.limit.give_back(reserved.cost);
        }
    }

    /// Whether a packet that cannot wait may pass: while there is plenty, and within its flow's fair share always. What
    /// it takes of that is taken before those who can wait have their turn.
    pub fn admit(&mut self, now: Instant, sender: &mut Sender, cost: Cost) -> bool {
        if !self.is_on {
            return true;
        }
        self.note_sender(now, sender);
        if self.reserved.is_none() && self.limit.take(now, cost, QUARTERS_LEFT) {
            return true;
        }
        let Limit { bytes, packets, .. } = &*self.limit;
        let sharers = self.limit.senders();
        let ticks = bytes.share_ticks(cost.bytes, sharers).max(packets.share_ticks(cost.packets, sharers));
        let burst = bytes.burst_ticks().max(packets.burst_ticks());
        let mut share = sender.share;
        if !share.take(now, ticks, burst) || !self.limit.take_owing(now, cost) {
            return false;
        }
        sender.share = share;
        true
    }

    /// A flow sends at `now`.
    pub fn note_sender(&mut self, now: Instant, sender: &mut Sender) {
        if !self.is_on {
            return;
        }
        self.end_period(now);
        if sender.period != self.senders.period {
            sender.period = self.senders.period;
            self.count(self.senders.now + 1);
        }
    }

    /// Begins another period if the one there was is over. To be called at [`Share::next_deadline`].
    pub fn end_period(&mut self, now: Instant) {
        let senders = &mut self.senders;
        if now < senders.until {
            return;
        }
        let is_next = now < senders.until + LIMIT_SENDER_IDLE;
        senders.before = if is_next { senders.now } else { 0 };
        senders.period = senders.period.wrapping_add(1).max(1);
        senders.until = now + LIMIT_SENDER_IDLE;
        self.count(0);
    }

    /// When the period is over, if anybody sent.
    pub fn next_deadline(&self) -> Option<Instant> {
        (self.senders.told > 0).then_some(self.senders.until)
    }

    /// `now` flows sent in this period.
    fn count(&mut self, now: u32) {
        let senders = &mut self.senders;
        senders.now = now;
        let count = now.max(senders.before);
        let all = &self.limit.senders;
        match count.checked_sub(senders.told) {
            Some(more) => all.fetch_add(more, Ordering::Relaxed),
            None => all.fetch_sub(senders.told - count, Ordering::Relaxed),
        };
        senders.told = count;
    }

    /// Takes one new flow.
    pub fn take_flow(&self, now: Instant) -> bool {
        self.limit.take_flow(now)
    }

    /// When a new flow may begin.
    pub fn flow_ready_at(&self, now: Instant) -> Instant {
        self.limit.flows.ready_at(now, 1)
    }

    /// How much more one flow's guest may be promised to send, in bytes, with `waiting` others waiting, of packets of
    /// `packet_bytes`: what passes before the guest takes it for lost.
    pub fn window(&self, waiting: usize, packet_bytes: usize) -> usize {
        let Limit { bytes, packets, .. } = &*self.limit;
        let of = |per_second: u64, each: u64| match per_second {
            0 => u64::MAX,
            rate => rate.saturating_mul(each) / (1000 / LIMIT_WINDOW.as_millis() as u64),
        };
        let all = of(bytes.per_second(), 1).min(of(packets.per_second(), packet_bytes as u64));
        let own = usize::try_from(all / (waiting as u64 + 1)).unwrap_or(usize::MAX);
        own.clamp(2 * packet_bytes, LIMIT_WINDOW_BYTES_MAX.max(2 * packet_bytes))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.release();
        self.senders.before = 0;
        self.count(0);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn limit(spec: &str) -> Arc<Limit> {
        let limit = Limit::default();
        limit.set(Instant::ZERO, spec.parse().unwrap());
        Arc::new(limit)
    }

    fn ms(n: u64) -> Instant {
        Instant::from_micros(n * 1000)
    }

    #[test]
    fn both_kinds_are_taken_or_none() {
        let mut share = Share::new(limit("rate=8mbit,burst=10000b,packets=1000,packets-burst=2"));
        let cost = Cost { bytes: 1000, packets: 1 };
        assert!(share.take(ms(0), cost) && share.take(ms(0), cost));
        assert!(!share.take(ms(0), cost), "two packets");
        // The bytes of the one refused are there still.
        assert!(share.take(ms(1), Cost { bytes: 9000, packets: 1 }));
        assert!(!share.take(ms(1), Cost { bytes: 1000, packets: 0 }));
    }

    #[test]
    fn workers_that_wait_are_served_in_turn() {
        let limit = limit("rate=8mbit,burst=2000b");
        let mut shares = [Share::new(Arc::clone(&limit)), Share::new(limit)];
        let cost = Cost::frame(1000);
        assert!(shares[0].take(ms(0), Cost::frame(2000)));
        let mut served = [0u32, 0];
        let mut due = [ms(0), ms(0)];
        let mut now = ms(0);
        while now < ms(1000) {
            // The first looks more often, and first.
            for at in [0, 0, 1] {
                if due[at] <= now {
                    match shares[at].claim(now, cost) {
                        Ok(()) => served[at] += 1,
                        Err(later) => due[at] = later,
                    }
                }
            }
            now = now + Duration::from_micros(100);
        }
        assert!(served[0] + served[1] >= 990, "{served:?}");
        assert!(served[0].abs_diff(served[1]) <= 2, "{served:?}");
    }

    #[test]
    fn what_was_reserved_and_not_used_is_everybodys_again() {
        let limit = limit("rate=8mbit,burst=2000b");
        let (mut one, mut other) = (Share::new(Arc::clone(&limit)), Share::new(limit));
        assert!(one.take(ms(0), Cost::frame(2000)));
        assert_eq!(one.claim(ms(0), Cost::frame(2000)), Err(ms(2)));
        assert!(!other.take(ms(2), Cost::frame(1000)));
        assert!(!one.take(ms(2), Cost::frame(1)), "it is for who waited");
        one.release();
        assert!(other.take(ms(2), Cost::frame(1000)));
        assert_eq!(one.claim(ms(2), Cost::frame(500)), Ok(()));
    }

    #[test]
    fn what_was_reserved_covers_smaller_ones_and_a_part_of_a_larger_one() {
        let mut share = Share::new(limit("rate=8mbit,burst=2000b"));
        assert!(share.take(ms(0), Cost::frame(2000)));
        assert_eq!(share.claim(ms(0), Cost { bytes: 1000, packets: 1 }), Err(ms(1)));
        assert_eq!(share.claim(ms(1), Cost { bytes: 400, packets: 1 }), Ok(()));
        assert_eq!(share.claim(ms(1), Cost { bytes: 1600, packets: 1 }), Err(ms(2)));
        assert_eq!(share.claim(ms(2), Cost { bytes: 1600, packets: 1 }), Ok(()));
    }

    /// Bytes of each sender that pass within a second, each offering so many bytes a millisecond.
    fn passed(share: &mut Share, offered: &[usize]) -> Vec<usize> {
        let mut senders = vec![Sender::default(); offered.len()];
        let mut passed = vec![0; offered.len()];
        for n in 0..2000 {
            for (at, sender) in senders.iter_mut().enumerate() {
                for _ in 0..offered[at] / 500 {
                    let is_in = share.admit(ms(n), sender, Cost::frame(500));
                    passed[at] += if is_in && n >= 1000 { 500 } else { 0 };
                }
            }
        }
        passed
    }

    #[test]
    fn what_cannot_wait_shares_evenly_and_uses_what_others_leave() {
        // A megabyte a second.
        let alone = passed(&mut Share::new(limit("rate=8mbit")), &[50_000]);
        assert!((950_000..=1_050_000).contains(&alone[0]), "{alone:?}");
        let both = passed(&mut Share::new(limit("rate=8mbit")), &[50_000, 1000, 500]);
        assert!(both[2] >= 300_000, "of a third of it: {both:?}");
        assert!(both[1] >= 300_000, "{both:?}");
        assert!(both.iter().sum::<usize>() <= 1_080_000, "{both:?}");
        let sparse = passed(&mut Share::new(limit("rate=8mbit")), &[50_000, 500]);
        assert!(sparse[1] >= 450_000, "{sparse:?}");
    }

    #[test]
    fn who_waits_has_what_a_flood_leaves_it() {
        let mut share = Share::new(limit("rate=8mbit"));
        let (mut flood, mut tcp) = (Sender::default(), Sender::default());
        let (mut by_flood, mut by_tcp) = (0, 0);
        for n in 0..2000 {
            let now = ms(n);
            share.note_sender(now, &mut tcp);
            for _ in 0..100 {
                by_flood += usize::from(share.admit(now, &mut flood, Cost::frame(1000)));
            }
            while share.claim(now, Cost::frame(1000)).is_ok() {
                by_tcp += 1;
            }
        }
        assert!((900..=1200).contains(&by_flood) && (900..=1200).contains(&by_tcp), "{by_flood} {by_tcp}");
    }

    #[test]
    fn senders_that_are_silent_share_no_more() {
        let limit = limit("rate=8mbit");
        let mut share = Share::new(Arc::clone(&limit));
        for _ in 0..10 {
            share.note_sender(ms(1), &mut Sender::default());
        }
        assert_eq!(limit.senders(), 10);
        let due = share.next_deadline().unwrap();
        share.end_period(due);
        assert_eq!(limit.senders(), 10, "those of the period before count");
        share.end_period(share.next_deadline().unwrap());
        assert_eq!((limit.senders(), share.next_deadline()), (1, None));
    }
}
