//! What a pair's worker counted. One writer, many readers, so plain loads and stores suffice.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A counter with a single writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub(crate) fn add(&self, n: u64) {
        // One writer: no read-modify-write needed.
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Replaces the value.
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Live counters of one queue pair.
        #[derive(Debug, Default)]
        pub(crate) struct PairCounters {
            $($(#[doc = $doc])+ pub(crate) $name: Counter,)+
        }

        /// Counters at one moment, of one pair or summed.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl PairCounters {
            /// The values now.
            pub(crate) fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.get(),)+ }
            }
        }

        impl std::ops::Add for Counters {
            type Output = Counters;
            fn add(self, other: Counters) -> Counters {
                Counters { $($name: self.$name + other.$name,)+ }
            }
        }
    };
}

counters! {
    /// Frames offered on the transmit ring.
    frames_from_guest,
    /// Their bytes, without headers of the device.
    bytes_from_guest,
    /// Those that are to be segmented.
    gso_from_guest,
    /// Frames written to the TAP.
    frames_to_guest,
    /// Their bytes, without headers of the device.
    bytes_to_guest,
    /// Those longer than a segment.
    gso_to_guest,
    /// Frames spread over more than one receive buffer.
    merged_to_guest,
    /// Frames whose checksum is partial.
    needs_csum_to_guest,
    /// Frames flagged DATA_VALID.
    data_valid_to_guest,
    /// Frames the TAP refused with an error.
    tap_refused,
    /// Frames dropped in either direction because that was asked for.
    dropped_on_request,
    /// Chains of nonsense offered because that was asked for.
    garbage_offered,
    /// Times the transmit ring was full while the guest had frames.
    tx_stuck,
    /// Notifications sent to the device.
    kicks,
    /// Times the worker woke.
    wakes,
    /// Breach: a used element named no chain in flight.
    fault_unknown_id,
    /// Breach: a used length beyond the buffer.
    fault_bad_len,
    /// Breach: completion out of order under IN_ORDER.
    fault_out_of_order,
    /// Breach: a used index ahead of what is in flight.
    fault_index_ahead,
    /// Breach: a frame without a whole header.
    fault_short_frame,
    /// Breach: a header that uses what was not negotiated or has impossible values.
    fault_header,
    /// Breach: `num_buffers` zero, or not one without MRG_RXBUF under VERSION_1.
    fault_num_buffers,
    /// Breach: a frame longer than MTU and Ethernet header without segmentation.
    fault_too_long,
}

impl Counters {
    /// Breaches of the specification by the device.
    pub fn faults(&self) -> u64 {
        self.fault_unknown_id
            + self.fault_bad_len
            + self.fault_out_of_order
            + self.fault_index_ahead
            + self.fault_short_frame
            + self.fault_header
            + self.fault_num_buffers
            + self.fault_too_long
    }
}
