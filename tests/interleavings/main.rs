//! Protocols between threads that share nothing but memory words, in every interleaving that two or
//! three threads have under the C11 memory model (as far as loom knows it): a weaker machine than any
//! the tests run on. Each model is small and follows the code it names line by line; each is also run
//! with one line taken out, to show that it would notice.
//!
//! loom's limits: it treats `SeqCst` accesses as `AcqRel` ones, so the models use none; `SeqCst` fences
//! it knows.

mod letters;
mod notification;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a model came to.
#[derive(Debug, PartialEq, Eq)]
struct Explored {
    /// Interleavings tried.
    interleavings: usize,
    /// Those that ended with somebody asleep who had work.
    lost: usize,
}

/// Times a thread may be interrupted where all interleavings would take minutes.
const PREEMPTIONS_MAX: usize = 4;

/// Runs `model` in every interleaving; it returns whether a wake-up was lost.
fn explore(model: impl Fn() -> bool + Send + Sync + 'static) -> Explored {
    explore_by(&loom::model::Builder::new(), model)
}

/// Runs `model` in every interleaving of at most `preemptions_max` interruptions.
fn explore_within(preemptions_max: usize, model: impl Fn() -> bool + Send + Sync + 'static) -> Explored {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions_max);
    explore_by(&builder, model)
}

fn explore_by(builder: &loom::model::Builder, model: impl Fn() -> bool + Send + Sync + 'static) -> Explored {
    let (interleavings, lost) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (count, bad) = (Arc::clone(&interleavings), Arc::clone(&lost));
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        if model() {
            bad.fetch_add(1, Ordering::Relaxed);
        }
    });
    let explored =
        Explored { interleavings: interleavings.load(Ordering::Relaxed), lost: lost.load(Ordering::Relaxed) };
    println!("{explored:?}");
    explored
}

#[track_caller]
fn assert_sound(explored: &Explored) {
    assert!(explored.interleavings > 100, "too little was tried: {explored:?}");
    assert_eq!(explored.lost, 0, "{explored:?}");
}

#[track_caller]
fn assert_noticed(explored: &Explored) {
    assert!(explored.lost > 0, "what is missing was not missed: {explored:?}");
}
