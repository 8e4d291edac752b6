//! The engine between a smoltcp guest and a scripted world, in virtual time.
//!
//! Everything random comes from one seed, which is printed with a failure and can be replayed:
//! `VUNET_SIM_SEED=n cargo test --test sim`. Frames between guest and engine are lost, repeated and
//! reordered; receive buffers run short, rings stop, offloads change; applications stop reading; host
//! sockets refuse bytes they promised to take. Every byte and every final state is checked.
//!
//! Read first: `docs/simulation.md`.

mod bytes;
mod datagrams;
#[path = "../support/detached.rs"]
mod detached;
mod guest;
mod link;
mod live;
mod plan;
mod port;
#[path = "../support/random.rs"]
mod random;
mod run;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use live::Live;
use plan::{Ending, LinkFaults, Plan, Shape};
use run::Outcome;

/// Seeds of the ordinary run, and of the long one.
const SEEDS: u64 = 1_000;
const SEEDS_LONG: u64 = 10_000;
/// Threads over which seeds are spread.
const THREADS: usize = 2;

fn run(plan: &Plan) -> Outcome {
    match std::panic::catch_unwind(|| run::run(plan)) {
        Ok(outcome) => outcome,
        Err(panic) => {
            eprintln!("failed with VUNET_SIM_SEED={}: {plan:#?}", plan.seed);
            std::panic::resume_unwind(panic);
        }
    }
}

/// The one seed asked for, or all below `count`.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("VUNET_SIM_SEED") {
        Ok(seed) => vec![seed.parse().expect("VUNET_SIM_SEED is a number")],
        Err(_) => (0..count).collect(),
    }
}

/// Failing seeds after which no further one is tried, unless `VUNET_SIM_FAILURES_MAX` says otherwise.
const FAILURES_MAX: usize = 20;

/// Runs hostile plans of many seeds over [`THREADS`] threads; panics with all seeds that fail.
fn run_hostile(seeds: &[u64]) -> Vec<Outcome> {
    let failures_max = std::env::var("VUNET_SIM_FAILURES_MAX")
        .map_or(FAILURES_MAX, |max| max.parse().expect("VUNET_SIM_FAILURES_MAX is a number"));
    let next = AtomicUsize::new(0);
    let (outcomes, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let work = || {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            let plan = Plan::hostile(*seed);
            let outcome = std::panic::catch_unwind(|| {
                let outcome = run(&plan);
                let is_judged = outcome.faults >= 3 || outcome.guest_spun;
                assert!(is_judged, "seed {seed} went through {} faults", outcome.faults);
                outcome
            });
            match outcome {
                Ok(outcome) => outcomes.lock().expect("no thread died").push(outcome),
                Err(_) => {
                    let mut failed = failed.lock().expect("no thread died");
                    failed.push(*seed);
                    if failed.len() >= failures_max {
                        return next.store(seeds.len(), Ordering::Relaxed);
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    let (outcomes, mut failed) = (outcomes.into_inner().unwrap(), failed.into_inner().unwrap());
    failed.sort_unstable();
    let tried = outcomes.len() + failed.len();
    assert!(failed.is_empty(), "of {tried} seeds these failed (VUNET_SIM_SEED=n replays one): {failed:?}");
    outcomes
}

/// That what seeds choose at random did take place in some of them.
fn check_coverage(outcomes: &[Outcome]) {
    if outcomes.len() < 100 {
        return;
    }
    let count = |what: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| what(outcome)).count();
    let spun = count(|outcome| outcome.guest_spun);
    let rounds_max = outcomes.iter().map(|outcome| outcome.rounds).max().unwrap_or(0);
    eprintln!(
        "{} seeds passed; of at most {rounds_max} rounds; the guest's stack spun in {spun}",
        outcomes.len()
    );
    assert!(
        spun * 500 <= outcomes.len(),
        "in {spun} runs the guest's own stack spun: too many to be its fault"
    );
    let tenth = outcomes.len() / 10;
    assert!(count(|outcome| outcome.wrapped.0) > tenth, "the guest's sequence numbers wrapped too rarely");
    assert!(count(|outcome| outcome.wrapped.1) > tenth, "the engine's sequence numbers wrapped too rarely");
    assert!(count(|outcome| outcome.retransmits > 0) > tenth, "too little was sent again");
    assert!(count(|outcome| outcome.letters > 20) > tenth, "too few flows moved between workers");
    assert!(count(|outcome| outcome.datagrams > 10) > tenth, "too few datagrams came");
    assert!(count(|outcome| outcome.limit_waits > 100) > tenth, "too few flows waited for a limit");
    assert!(count(|outcome| outcome.largest_frame > 10_000) > tenth, "too few large frames");
}

#[test]
fn every_byte_and_every_end_is_right_whatever_goes_wrong() {
    check_coverage(&run_hostile(&seeds(SEEDS)));
}

#[test]
#[ignore = "takes minutes; runs with --long"]
fn every_byte_and_every_end_is_right_in_ten_thousand_seeds() {
    let seeds: Vec<u64> = (SEEDS..SEEDS_LONG + SEEDS).collect();
    check_coverage(&run_hostile(&seeds));
}

#[test]
fn every_byte_arrives_both_ways_on_a_clean_link() {
    let outcome = run(&Plan::clean(1, 4, 256 << 10));
    assert_eq!(outcome.retransmits, 0, "nothing was lost, so nothing is sent twice");
}

#[test]
fn an_upload_ended_by_half_close_gets_its_late_answer() {
    for seed in 0..20 {
        let outcome = run(&Plan::clean(seed, 3, 150_000).with(Shape::GuestFirst, Ending::Full));
        assert_eq!(outcome.retransmits, 0);
    }
}

#[test]
fn a_download_ended_by_the_world_leaves_the_guests_direction_open() {
    for seed in 0..20 {
        let outcome = run(&Plan::clean(seed, 3, 150_000).with(Shape::WorldFirst, Ending::Full));
        assert_eq!(outcome.retransmits, 0);
    }
}

#[test]
fn guests_that_stop_reading_for_a_minute_lose_nothing() {
    for seed in 0..20 {
        run(&Plan { guest_pauses: 0.01, ..Plan::clean(seed, 3, 150_000) });
    }
}

#[test]
fn rings_that_stop_and_offloads_that_change_lose_nothing() {
    for seed in 0..20 {
        run(&Plan { ring_stops: 0.02, offloads_change: 0.05, ..Plan::clean(seed, 3, 150_000) });
    }
}

#[test]
fn a_socket_that_refuses_what_it_promised_loses_nothing() {
    for seed in 0..20 {
        run(&Plan { refuse: 0.5, ..Plan::clean(seed, 3, 200 << 10) });
    }
}

#[test]
fn few_receive_buffers_slow_the_guest_and_lose_nothing() {
    for seed in 0..20 {
        run(&Plan { buffers: 2, repost_us: 500, ..Plan::clean(seed, 4, 100 << 10) });
    }
}

#[test]
fn losses_both_ways_cost_retransmissions_and_nothing_else() {
    let mut retransmits = 0;
    let lossy = LinkFaults { lose: 0.08, ..LinkFaults::NONE };
    for seed in 0..20 {
        retransmits += run(&Plan { up: lossy, down: lossy, ..Plan::clean(seed, 3, 64 << 10) }).retransmits;
    }
    assert!(retransmits > 0, "the faults must have cost something, or they were not there");
}

#[test]
fn a_guest_with_segmentation_offload_gets_large_frames_intact() {
    for seed in 0..20 {
        let outcome = run(&Plan { offload: true, ..Plan::clean(seed, 3, 150_000) });
        assert!(outcome.largest_frame > 10_000, "no large frame was sent");
    }
}

#[test]
fn limits_take_the_time_their_rates_say_and_neither_side_sends_anything_twice() {
    for (seed, limits, shape) in [
        (0, ["rate=8mbit", "none"], Shape::GuestFirst),
        (1, ["none", "rate=8mbit"], Shape::WorldFirst),
        (2, ["rate=8mbit", "rate=8mbit"], Shape::Both),
        (3, ["packets=690", "none"], Shape::GuestFirst),
    ] {
        for offload in [false, true] {
            let mut plan =
                Plan { limits, offload, ..Plan::clean(seed, 3, 400_000).with(shape, Ending::Full) };
            // No other window closes: smoltcp takes a second to notice that one opened again.
            plan.flows.iter_mut().for_each(|flow| flow.send_max = 1 << 20);
            let outcome = run(&plan);
            assert_eq!((outcome.guest_resent, outcome.retransmits), (0, 0), "{limits:?}");
            assert!(outcome.limit_waits > 10, "{limits:?}");
            // 1.2 MB at 1 MB a second, and headers, less the burst.
            let seconds = outcome.elapsed_us as f64 / 1e6;
            assert!((1.05..1.4).contains(&seconds), "{limits:?}: {seconds} s");
        }
    }
}

#[test]
fn flows_that_move_between_workers_go_on_within_one_limit() {
    for seed in 0..10 {
        let plan = Plan {
            limits: ["rate=8mbit", "rate=8mbit"],
            workers: 3,
            queue_moves: 0.02,
            ..Plan::clean(seed, 6, 200_000)
        };
        let outcome = run(&plan);
        let seconds = outcome.elapsed_us as f64 / 1e6;
        assert!((1.15..2.0).contains(&seconds), "{seconds} s");
    }
}

#[test]
fn a_world_that_resets_is_seen_as_reset_by_the_guest() {
    for seed in 0..20 {
        run(&Plan::clean(seed, 3, 150_000).with(Shape::Both, Ending::WorldResets(75_000)));
    }
}

#[test]
fn a_guest_that_resets_is_seen_as_reset_by_the_world() {
    for seed in 0..20 {
        run(&Plan::clean(seed, 3, 150_000).with(Shape::Both, Ending::GuestAborts(75_000)));
    }
}

#[test]
fn a_refused_connect_reaches_the_guest_as_reset() {
    let mut plan = Plan::clean(3, 3, 1000).with(Shape::Both, Ending::Refused);
    for flow in &mut plan.flows {
        flow.connect_errors = vec![libc::ECONNREFUSED];
    }
    run(&plan);
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
