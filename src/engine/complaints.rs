//! What the user should hear of, and not a thousand times: one line of each kind a minute.

use std::time::Duration;

use crate::time::Instant;

/// Silence after a line, for lines of its kind.
const PAUSE: Duration = Duration::from_secs(60);

/// Kinds of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Complaint {
    /// No address is free.
    PoolExhausted,
    /// The guest holds as many as one may.
    ShareUsed,
    /// The store of leases cannot be read or written.
    LeaseStore,
    /// A guest gave itself a name that is another's.
    NameRefused,
    /// The guest comes with the MAC address of another.
    Elsewhere,
}

const KINDS: usize = 5;

/// When each was said last.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    said: [Option<Instant>; KINDS],
    withheld: [u64; KINDS],
}

impl Complaints {
    /// How many were withheld since the last one, if it is time for another.
    pub(super) fn due(&mut self, now: Instant, complaint: Complaint) -> Option<u64> {
        let kind = complaint as usize;
        if self.said[kind].is_some_and(|said| said + PAUSE > now) {
            self.withheld[kind] += 1;
            return None;
        }
        self.said[kind] = Some(now);
        Some(std::mem::take(&mut self.withheld[kind]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_said_once_a_minute_with_the_number_of_those_withheld() {
        let mut complaints = Complaints::default();
        let at = |seconds| Instant::ZERO + Duration::from_secs(seconds);
        assert_eq!(complaints.due(at(0), Complaint::PoolExhausted), Some(0));
        assert_eq!(complaints.due(at(0), Complaint::NameRefused), Some(0));
        for now in [1, 30, 59] {
            assert_eq!(complaints.due(at(now), Complaint::PoolExhausted), None);
        }
        assert_eq!(complaints.due(at(60), Complaint::PoolExhausted), Some(3));
        assert_eq!(complaints.due(at(60), Complaint::NameRefused), Some(0));
    }
}
