//! Payload of the guest that cannot go into its socket yet: it came out of order, or the socket
//! refused it. It stays unacknowledged, so losing it costs a retransmission and nothing else.
//!
//! Pieces of one flow are kept sorted and do not overlap; what arrives twice is kept once.

use std::collections::VecDeque;

use crate::frame::Payload;
use crate::limits;
use crate::wire::tcp::{SACK_BLOCKS_MAX, SeqNumber};

/// First byte, and behind the last.
type Block = (SeqNumber, SeqNumber);

/// Bytes held by all flows of an engine.
#[derive(Debug, Default)]
pub(super) struct Budget {
    used_bytes: usize,
}

impl Budget {
    /// Bytes held now.
    pub(super) fn used_bytes(&self) -> usize {
        self.used_bytes
    }
}

/// Payload that follows a piece is added to it up to this length: writers of small segments have few pieces.
const SMALL_PIECE_BYTES: usize = 4096;

#[derive(Debug)]
struct Piece {
    seq: SeqNumber,
    bytes: Vec<u8>,
    /// Bytes already taken from the front.
    taken: usize,
}

impl Piece {
    fn start(&self) -> SeqNumber {
        self.seq + self.taken
    }
    fn end(&self) -> SeqNumber {
        self.seq + self.bytes.len()
    }
}

/// The held payload of one flow.
#[derive(Debug, Default)]
pub(super) struct Pool {
    pieces: VecDeque<Piece>,
    held_bytes: usize,
}

impl Pool {
    /// Bytes held.
    pub(super) fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Holds `payload`, which starts at `seq`; parts already held are skipped. Returns whether all
    /// of it is held now.
    pub(super) fn insert(&mut self, budget: &mut Budget, seq: SeqNumber, payload: &Payload<'_>) -> bool {
        let mut from = seq;
        let end = seq + payload.len();
        while from.before(end) {
            let at = self.pieces.iter().position(|p| p.end().after(from)).unwrap_or(self.pieces.len());
            let gap_end = match self.pieces.get(at) {
                Some(next) if next.start().at_or_before(from) => {
                    from = next.end();
                    continue;
                }
                Some(next) if next.start().before(end) => next.start(),
                _ => end,
            };
            let len = gap_end.distance_from(from) as usize;
            let grows = self.grows(at, from, len);
            if !self.has_room(budget, len, grows) {
                return false;
            }
            let part = payload.range(from.distance_from(seq) as usize, len);
            if grows {
                let bytes = &mut self.pieces[at - 1].bytes;
                let end = bytes.len();
                bytes.resize(end + len, 0);
                part.copy_to(&mut bytes[end..]);
            } else {
                let mut bytes = vec![0u8; len];
                part.copy_to(&mut bytes);
                self.pieces.insert(at, Piece { seq: from, bytes, taken: 0 });
            }
            self.held_bytes += len;
            budget.used_bytes += len;
            from = gap_end;
        }
        true
    }

    /// Whether the piece before place `at` takes `len` bytes more, from `from` on.
    fn grows(&self, at: usize, from: SeqNumber, len: usize) -> bool {
        let before = at.checked_sub(1).and_then(|at| self.pieces.get(at));
        before.is_some_and(|piece| piece.end() == from && piece.bytes.len() + len <= SMALL_PIECE_BYTES)
    }

    fn has_room(&self, budget: &Budget, len: usize, grows: bool) -> bool {
        self.held_bytes + len <= limits::TCP_POOL_FLOW_BYTES_MAX
            && budget.used_bytes + len <= limits::TCP_POOL_BYTES_MAX
            && (grows || self.pieces.len() < limits::TCP_POOL_SEGMENTS_MAX)
    }

    /// The bytes held from `seq` on without a gap, in one piece; what lies before `seq` is let go.
    pub(super) fn front(&mut self, budget: &mut Budget, seq: SeqNumber) -> Option<&[u8]> {
        while let Some(first) = self.pieces.front_mut() {
            if first.end().at_or_before(seq) {
                let left = first.bytes.len() - first.taken;
                self.held_bytes -= left;
                budget.used_bytes -= left;
                self.pieces.pop_front();
                continue;
            }
            if first.start().before(seq) {
                let skip = seq.distance_from(first.start()) as usize;
                first.taken += skip;
                self.held_bytes -= skip;
                budget.used_bytes -= skip;
            }
            break;
        }
        let first = self.pieces.front()?;
        (first.start() == seq).then(|| &first.bytes[first.taken..])
    }

    /// Behind the bytes held from `nxt` on without a gap.
    pub(super) fn reach(&self, nxt: SeqNumber) -> SeqNumber {
        let mut reach = nxt;
        for piece in &self.pieces {
            if piece.start().after(reach) {
                break;
            }
            if piece.end().after(reach) {
                reach = piece.end();
            }
        }
        reach
    }

    /// The runs of bytes held beyond the hole at `nxt`, as SACK blocks: the one with `newest` first, the
    /// others from the lowest on (RFC 2018, 4). Bytes that follow `nxt` at once are none: only their
    /// socket is awaited.
    pub(super) fn blocks(&self, nxt: SeqNumber, newest: SeqNumber) -> [Option<Block>; SACK_BLOCKS_MAX] {
        let mut blocks = [None; SACK_BLOCKS_MAX];
        let mut count = 1;
        let mut take = |run: Block| {
            if run.0.at_or_before(nxt) {
            } else if run.0.at_or_before(newest) && run.1.after(newest) {
                blocks[0] = Some(run);
            } else if count < SACK_BLOCKS_MAX {
                blocks[count] = Some(run);
                count += 1;
            }
        };
        let mut run: Option<Block> = None;
        for piece in &self.pieces {
            run = match run {
                Some((left, right)) if right == piece.start() => Some((left, piece.end())),
                before => {
                    before.into_iter().for_each(&mut take);
                    Some((piece.start(), piece.end()))
                }
            };
        }
        run.into_iter().for_each(&mut take);
        blocks
    }

    /// Comes into another worker's budget, held bytes and all.
    pub(super) fn enter(&self, budget: &mut Budget) {
        budget.used_bytes += self.held_bytes;
    }

    /// Leaves a worker's budget without losing anything.
    pub(super) fn leave(&self, budget: &mut Budget) {
        budget.used_bytes -= self.held_bytes;
    }

    /// Lets everything go.
    pub(super) fn clear(&mut self, budget: &mut Budget) {
        budget.used_bytes -= self.held_bytes;
        self.held_bytes = 0;
        self.pieces.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_that_overlap_are_held_once() {
        let (mut pool, mut budget) = (Pool::default(), Budget::default());
        let base = SeqNumber(u32::MAX - 5);
        assert!(pool.insert(&mut budget, base + 10, &Payload::from_host(b"klmno")));
        assert!(pool.insert(&mut budget, base + 2, &Payload::from_host(b"cdefghijklmnopq")));
        assert_eq!(budget.used_bytes(), 15);
        assert!(pool.front(&mut budget, base).is_none());
        let mut at = base + 2;
        let mut all = Vec::new();
        while let Some(bytes) = pool.front(&mut budget, at) {
            all.extend_from_slice(bytes);
            let len = bytes.len();
            at = at + len;
        }
        assert_eq!(all, b"cdefghijklmnopq");
        assert_eq!((pool.held_bytes(), budget.used_bytes()), (0, 0));
    }

    #[test]
    fn a_flow_at_its_bound_refuses_one_more_byte() {
        let (mut pool, mut budget) = (Pool::default(), Budget::default());
        let full = vec![0u8; limits::TCP_POOL_FLOW_BYTES_MAX];
        assert!(pool.insert(&mut budget, SeqNumber(0), &Payload::from_host(&full)));
        assert!(!pool.insert(&mut budget, SeqNumber(0) + full.len(), &Payload::from_host(b"x")));
        pool.clear(&mut budget);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn small_segments_in_order_take_few_pieces() {
        let (mut pool, mut budget) = (Pool::default(), Budget::default());
        let count = 4 * limits::TCP_POOL_SEGMENTS_MAX;
        for n in 0..count {
            assert!(pool.insert(&mut budget, SeqNumber(9) + 10 * n, &Payload::from_host(b"0123456789")));
        }
        assert!(pool.pieces.len() <= 10 * count / (SMALL_PIECE_BYTES - 10) + 1, "{}", pool.pieces.len());
        assert_eq!(pool.front(&mut budget, SeqNumber(14)).unwrap()[..10], *b"5678901234");
        assert_eq!(pool.reach(SeqNumber(14)), SeqNumber(9) + 10 * count);
    }

    proptest! {
        #[test]
        fn any_order_of_pieces_yields_the_stream(
            start: u32,
            cuts in proptest::collection::vec((0usize..3000, 1usize..900), 1..60),
        ) {
            let stream: Vec<u8> = (0..4000u32).map(|n| (n.wrapping_mul(31) >> 3) as u8).collect();
            let (mut pool, mut budget) = (Pool::default(), Budget::default());
            let base = SeqNumber(start);
            let mut covered = vec![false; stream.len()];
            for (from, len) in cuts {
                let part = &stream[from..from + len];
                prop_assert!(pool.insert(&mut budget, base + from, &Payload::from_host(part)));
                covered[from..from + len].fill(true);
            }
            let mut at = 0;
            while at < stream.len() {
                match pool.front(&mut budget, base + at).map(<[u8]>::to_vec) {
                    Some(bytes) => {
                        prop_assert_eq!(&bytes[..], &stream[at..at + bytes.len()]);
                        prop_assert!(covered[at..at + bytes.len()].iter().all(|c| *c));
                        at += bytes.len();
                    }
                    None => {
                        prop_assert!(!covered[at]);
                        at += 1;
                    }
                }
            }
            pool.front(&mut budget, base + stream.len());
            prop_assert_eq!(budget.used_bytes(), 0);
        }
    }
}
