//! The engine between a smoltcp guest and a scripted world, in virtual time.
//!
//! Everything random comes from one seed, which is printed with a failure and can be replayed:
//! `VUNET_SIM_SEED=n cargo test --test sim`. Frames between guest and engine are lost, repeated and
//! reordered; receive buffers run short, rings stop, offloads change; applications stop reading; host
//! sockets refuse bytes they promised to take. Every byte and every final state is checked.

mod guest;
mod live;
mod port;
mod scenario;
mod world;

use live::Live;
use scenario::{Faults, Outcome, Scenario};

/// Seeds run by default.
const SEEDS: u64 = 150;

fn run(scenario: &Scenario) -> Outcome {
    match std::panic::catch_unwind(|| scenario.run()) {
        Ok(outcome) => outcome,
        Err(panic) => {
            eprintln!("failed with VUNET_SIM_SEED={}: {scenario:?}", scenario.seed);
            std::panic::resume_unwind(panic);
        }
    }
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("VUNET_SIM_SEED") {
        Ok(seed) => vec![seed.parse().expect("VUNET_SIM_SEED is a number")],
        Err(_) => (0..count).collect(),
    }
}

#[test]
fn every_byte_arrives_both_ways_on_a_clean_link() {
    let outcome = run(&Scenario { flows: 4, bytes: 256 << 10, ..Scenario::clean(1) });
    assert_eq!(outcome.retransmits, 0, "nothing was lost, so nothing is sent twice");
}

#[test]
fn every_byte_arrives_both_ways_whatever_is_lost_repeated_or_reordered() {
    let mut retransmits = 0;
    for seed in seeds(SEEDS) {
        retransmits += run(&Scenario::hostile(seed)).retransmits;
    }
    assert!(retransmits > 0, "the faults must have cost something, or they were not there");
}

#[test]
fn an_upload_ended_by_half_close_gets_its_late_answer() {
    for seed in seeds(20) {
        let outcome = run(&Scenario { answers_late: true, ..Scenario::clean(seed) });
        assert_eq!(outcome.retransmits, 0);
    }
}

#[test]
fn guests_that_stop_reading_for_a_minute_lose_nothing() {
    for seed in seeds(20) {
        let faults = Faults { guest_pauses: 0.01, ..Faults::NONE };
        run(&Scenario { faults, ..Scenario::clean(seed) });
    }
}

#[test]
fn rings_that_stop_and_offloads_that_change_lose_nothing() {
    for seed in seeds(20) {
        let faults = Faults { ring_stops: 0.02, offloads_change: 0.05, ..Faults::NONE };
        run(&Scenario { faults, ..Scenario::clean(seed) });
    }
}

#[test]
fn a_socket_that_refuses_what_it_promised_loses_nothing() {
    for seed in seeds(20) {
        let faults = Faults { refuse: 0.5, ..Faults::NONE };
        run(&Scenario { faults, flows: 3, bytes: 200 << 10, ..Scenario::clean(seed) });
    }
}

#[test]
fn few_receive_buffers_slow_the_guest_and_lose_nothing() {
    for seed in seeds(20) {
        run(&Scenario { buffers: 2, flows: 4, bytes: 100 << 10, ..Scenario::clean(seed) });
    }
}

#[test]
fn a_guest_with_segmentation_offload_gets_large_frames_intact() {
    for seed in seeds(20) {
        let outcome = run(&Scenario { offload: true, ..Scenario::clean(seed) });
        assert!(outcome.largest_frame > 10_000, "no large frame was sent");
    }
}

#[test]
fn a_world_that_resets_is_seen_as_reset_by_the_guest() {
    for seed in seeds(20) {
        run(&Scenario { world_resets: true, ..Scenario::clean(seed) });
    }
}

#[test]
fn a_guest_that_vanishes_is_seen_as_reset_by_the_world() {
    for seed in seeds(20) {
        run(&Scenario { guest_vanishes: true, ..Scenario::clean(seed) });
    }
}

#[test]
fn a_refused_connect_reaches_the_guest_as_reset() {
    run(&Scenario { refused: true, ..Scenario::clean(3) });
}

/// Runs with both ways of peeking and with and without offloads.
fn live_each_way(live: Live) {
    for peek_offset in [true, false] {
        for offload in [false, true] {
            if !live::run(Live { peek_offset, offload, ..live }) {
                eprintln!("this kernel has no SO_PEEK_OFF for TCP: only peeking from the front is tested");
            }
        }
    }
}

const LIVE: Live = Live {
    seed: 1,
    peek_offset: true,
    offload: false,
    flows: 4,
    bytes: 1 << 20,
    buffers: 256,
    lose: 0.0,
    slow_world: false,
};

#[test]
fn over_the_kernels_sockets_every_byte_arrives_both_ways() {
    live_each_way(LIVE);
}

#[test]
fn over_the_kernels_sockets_a_slow_world_loses_nothing() {
    live_each_way(Live { slow_world: true, seed: 2, ..LIVE });
}

#[test]
fn over_the_kernels_sockets_losses_and_few_buffers_lose_nothing() {
    live_each_way(Live { lose: 0.005, buffers: 8, bytes: 300_000, seed: 3, ..LIVE });
}

#[test]
fn over_the_kernels_sockets_stalled_flows_wake_nobody() {
    for peek_offset in [true, false] {
        let live = Live { peek_offset, flows: 20, bytes: usize::MAX, ..LIVE };
        if let Some(wakeups) = live::wakeups_while_stalled(live) {
            // Probes of either side, each answered; a flow that spins has thousands.
            assert!(wakeups < 20 * 10, "{wakeups} wake-ups in a second");
        }
    }
}
