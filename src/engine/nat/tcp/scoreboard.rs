//! What the guest holds beyond the oldest unacknowledged byte, as its SACK blocks say.
//!
//! Ranges are sorted and neither overlap nor touch. A retransmission goes over the holes between them;
//! after a time-out everything is forgotten, because a receiver may take back what it said.
//!
//! Read first: RFC 2018 sections 4, 5 and 8, RFC 6675 section 4.

use crate::limits;
use crate::wire::tcp::SeqNumber;

/// Segments' worth of bytes held beyond a hole that make it a loss (RFC 6675, 2: DupThresh).
const DUP_THRESH: usize = 3;

/// The ranges of one flow, each from its first byte to behind its last.
#[derive(Debug, Default)]
pub(super) struct Scoreboard {
    ranges: Vec<(SeqNumber, SeqNumber)>,
}

impl Scoreboard {
    /// Whether the guest said of nothing that it holds it.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Takes one block of an acknowledgement of `una`; `max` is the highest number ever sent. A block
    /// that is no range of bytes in flight tells nothing (RFC 2883's duplicates, an invention).
    pub(super) fn insert(&mut self, una: SeqNumber, max: SeqNumber, block: (SeqNumber, SeqNumber)) {
        let (mut left, mut right) = block;
        if !left.before(right) || !left.after(una) || right.after(max) {
            return;
        }
        let first = self.ranges.iter().position(|range| range.1.at_or_after(left));
        let first = first.unwrap_or(self.ranges.len());
        let touching = self.ranges[first..].iter().take_while(|range| range.0.at_or_before(right)).count();
        for range in self.ranges.drain(first..first + touching) {
            left = if range.0.before(left) { range.0 } else { left };
            right = if range.1.after(right) { range.1 } else { right };
        }
        if self.ranges.len() >= limits::TCP_SACKED_RANGES_MAX {
            // Sent again in vain, which costs bytes and no correctness.
            self.ranges.pop();
        }
        let at = first.min(self.ranges.len());
        if self.ranges.last().is_none_or(|last| at < self.ranges.len() || last.1.before(left)) {
            self.ranges.insert(at, (left, right));
        }
    }

    /// Everything before `una` is acknowledged.
    pub(super) fn advance(&mut self, una: SeqNumber) {
        let done = self.ranges.iter().take_while(|range| range.0.at_or_before(una)).count();
        self.ranges.drain(..done);
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Behind the last byte the guest holds.
    pub(super) fn highest(&self) -> Option<SeqNumber> {
        self.ranges.last().map(|range| range.1)
    }

    /// The first byte from `from` on that the guest lacks, and where the next range begins.
    pub(super) fn hole(&self, from: SeqNumber) -> (SeqNumber, Option<SeqNumber>) {
        let mut from = from;
        for range in &self.ranges {
            if range.0.after(from) {
                return (from, Some(range.0));
            }
            if range.1.after(from) {
                from = range.1;
            }
        }
        (from, None)
    }

    /// Whether what lies before the first range counts as lost (RFC 6675, 4, `IsLost`).
    pub(super) fn tells_loss(&self, mss: u16) -> bool {
        let held: usize = self.ranges.iter().map(|range| range.1.distance_from(range.0) as usize).sum();
        self.ranges.len() >= DUP_THRESH || held > (DUP_THRESH - 1) * usize::from(mss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNA: SeqNumber = SeqNumber(u32::MAX - 50);

    fn board(blocks: &[(usize, usize)]) -> Scoreboard {
        let mut board = Scoreboard::default();
        for (left, right) in blocks {
            board.insert(UNA, UNA + 10_000, (UNA + *left, UNA + *right));
        }
        board
    }

    #[test]
    fn blocks_that_touch_are_one_and_the_rest_are_holes() {
        let board = board(&[(100, 200), (300, 400), (200, 250), (240, 310)]);
        assert_eq!(board.ranges, [(UNA + 100, UNA + 400)]);
        assert_eq!(board.hole(UNA), (UNA, Some(UNA + 100)));
        assert_eq!(board.hole(UNA + 150), (UNA + 400, None));
    }

    #[test]
    fn blocks_of_nothing_in_flight_are_ignored() {
        for (left, right) in [(0, 100), (200, 200), (300, 200), (100, 10_001)] {
            assert!(board(&[(left, right)]).is_empty(), "{left}..{right}");
        }
        let mut board = Scoreboard::default();
        board.insert(UNA, UNA + 10_000, (UNA - 100, UNA - 50));
        assert!(board.is_empty(), "a duplicate's block");
    }

    #[test]
    fn ranges_are_bounded() {
        let blocks: Vec<_> = (1..=limits::TCP_SACKED_RANGES_MAX + 20).map(|n| (n * 10, n * 10 + 5)).collect();
        assert_eq!(board(&blocks).ranges.len(), limits::TCP_SACKED_RANGES_MAX);
    }

    proptest! {
        #[test]
        fn what_is_held_is_what_was_said(blocks in proptest::collection::vec((1usize..300, 1usize..40), 1..40)) {
            let blocks: Vec<_> = blocks.into_iter().map(|(left, len)| (left, left + len)).collect();
            let mut board = board(&blocks);
            for at in 0..400 {
                let said = blocks.iter().any(|(left, right)| (*left..*right).contains(&at));
                prop_assert_eq!(board.hole(UNA + at).0 != UNA + at, said, "{}", at);
            }
            board.advance(UNA + 150);
            prop_assert!(board.ranges.iter().all(|range| range.0.after(UNA + 150)));
        }
    }
}
