//! The engine between a smoltcp guest and a scripted world, in virtual time.
//!
//! Everything random comes from one seed, which is printed with a failure and can be replayed:
//! `VUNET_SIM_SEED=n cargo test --test sim`. Frames between guest and engine are lost, repeated and
//! reordered; receive buffers run short; host sockets refuse bytes they promised to take. Every byte
//! and every final state is checked.

mod guest;
mod port;
mod scenario;
mod world;

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
