//! Hand-over of a flow between workers in every order that frames and letters can come in.
//!
//! Real engines; what a scheduler could choose is chosen here, depth first: which worker takes its next
//! frame, or the next letter of which other worker (letters of one to another keep their order, as their
//! ring does). Each schedule is run from the start, as engines cannot be copied.

use std::collections::VecDeque;

use vunet::engine::placement::{Letter, Post};
use vunet::wire::tcp::Flags;

use crate::detached::Detached;
use crate::frames::{Seen, guest, world};
use crate::handover::exchange;
use crate::rig::{Peer, Rig, connected};

/// Steps after which a schedule counts as one that never ends.
const STEPS_MAX: usize = 80;

/// What the guest does on a connection that stands at worker 0: the worker of each frame, and what it
/// is, in the stream's order. Each worker takes its own in this order.
struct Story {
    workers: u8,
    frames: &'static [(usize, Flags, &'static str)],
    /// Letters lost on the way, which none may be: shows what is noticed.
    lost: Lost,
}

fn nothing_lost(_: &Letter<Detached, Detached>) -> bool {
    false
}

/// Something a scheduler may let happen next.
#[derive(Clone, Copy, Debug)]
enum Action {
    Frame(usize),
    Letter { from: usize, to: usize },
}

/// Which letters are lost on the way.
type Lost = fn(&Letter<Detached, Detached>) -> bool;

/// One schedule under way.
struct Schedule {
    rigs: Vec<Rig>,
    peer: Peer,
    /// By worker: frames to come.
    frames: Vec<VecDeque<Vec<u8>>>,
    /// By sender and receiver: letters under way.
    letters: Vec<Vec<VecDeque<Post<Detached, Detached>>>>,
    seen: Vec<Seen>,
    lost: Lost,
}

impl Schedule {
    fn new(story: &Story) -> Schedule {
        let workers = usize::from(story.workers);
        let mut rigs = Rig::workers(story.workers);
        let mut peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
        exchange(&mut rigs);
        let mut frames = vec![VecDeque::new(); workers];
        for (worker, flags, payload) in story.frames {
            frames[*worker].push_back(peer.seg(Flags::ACK | *flags, payload.as_bytes()).frame());
            peer.seq = peer.seq.wrapping_add(payload.len() as u32);
        }
        let row = || (0..workers).map(|_| VecDeque::new()).collect();
        let letters = (0..workers).map(|_| row()).collect();
        Schedule { rigs, peer, frames, letters, seen: Vec::new(), lost: story.lost }
    }

    fn enabled(&self) -> Vec<Action> {
        let with_frames = self.frames.iter().enumerate().filter(|(_, frames)| !frames.is_empty());
        let mut actions: Vec<Action> = with_frames.map(|(worker, _)| Action::Frame(worker)).collect();
        for (from, row) in self.letters.iter().enumerate() {
            let waiting = row.iter().enumerate().filter(|(_, letters)| !letters.is_empty());
            actions.extend(waiting.map(|(to, _)| Action::Letter { from, to }));
        }
        actions
    }

    fn act(&mut self, action: Action) {
        let worker = match action {
            Action::Frame(worker) => {
                let frame = self.frames[worker].pop_front().expect("it is enabled");
                self.rigs[worker].feed(&frame);
                worker
            }
            Action::Letter { from, to } => {
                let letter = self.letters[from][to].pop_front().expect("it is enabled");
                let rig = &mut self.rigs[to];
                rig.engine.letter(rig.now, &mut rig.port, letter);
                to
            }
        };
        self.seen.extend(self.rigs[worker].flush());
        while let Some((to, letter)) = self.rigs[worker].engine.next_letter() {
            if !(self.lost)(&letter.letter) {
                self.letters[worker][usize::from(to.0)].push_back(letter);
            }
        }
    }

    fn owners(&mut self) -> usize {
        self.rigs.iter_mut().map(|rig| rig.engine.nat().len()).sum()
    }

    fn taken(&self) -> Vec<u8> {
        self.rigs[0].conn(0).taken.clone()
    }
}

/// Runs `story` in every order and calls `check` at the end of each; returns how many there are.
fn every_schedule(story: &Story, mut check: impl FnMut(&mut Schedule)) -> usize {
    // The choice at each step, and out of how many.
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut count = 0;
    loop {
        let mut schedule = Schedule::new(story);
        for step in 0.. {
            let enabled = schedule.enabled();
            if enabled.is_empty() {
                break;
            }
            assert!(step < STEPS_MAX, "letters go round and round: {path:?}");
            if step == path.len() {
                path.push((0, enabled.len()));
            }
            schedule.act(enabled[path[step].0]);
        }
        check(&mut schedule);
        count += 1;
        while path.last().is_some_and(|(choice, of)| choice + 1 == *of) {
            path.pop();
        }
        let Some((choice, _)) = path.last_mut() else { break };
        *choice += 1;
    }
    println!("{count} schedules");
    count
}

/// Asserts that in every order one worker ends with the flow and the world with `stream`, and that
/// every frame is counted once.
fn assert_carried(story: &Story, stream: &[u8]) -> usize {
    let frames = story.frames.len() as u64;
    let mut before = None;
    every_schedule(story, |schedule| {
        assert_eq!(schedule.owners(), 1);
        assert_eq!(schedule.taken(), stream);
        let counted = |rig: &Rig| rig.engine.counters().frames_from_guest;
        let total: u64 = schedule.rigs.iter().map(counted).sum();
        // The handshake's frames are the same in each.
        assert_eq!(*before.get_or_insert(total - frames), total - frames);
        assert!(schedule.rigs.iter().all(|rig| rig.engine.counters().dropped_total() == 0));
        assert_eq!(schedule.rigs.iter_mut().map(|rig| rig.engine.nat().held_bytes()).sum::<usize>(), 0);
    })
}

#[test]
fn two_workers_with_frames_of_one_flow_end_with_one_owner_in_every_order() {
    let frames: &[(usize, Flags, &str)] =
        &[(1, Flags::PSH, "a"), (0, Flags::PSH, "b"), (1, Flags::PSH, "c"), (0, Flags::PSH, "d")];
    let count = assert_carried(&Story { workers: 2, frames, lost: nothing_lost }, b"abcd");
    assert!(count > 50, "{count} orders are too few to be all");
}

#[test]
fn three_workers_with_frames_of_one_flow_end_with_one_owner_in_every_order() {
    let frames: &[(usize, Flags, &str)] = &[(1, Flags::PSH, "a"), (2, Flags::PSH, "b"), (0, Flags::PSH, "c")];
    let count = assert_carried(&Story { workers: 3, frames, lost: nothing_lost }, b"abc");
    assert!(count > 50, "{count} orders are too few to be all");
}

#[test]
fn frames_of_one_worker_keep_their_order_however_the_flow_comes() {
    let frames: &[(usize, Flags, &str)] = &[(1, Flags::PSH, "a"), (1, Flags::PSH, "b"), (1, Flags::PSH, "c")];
    every_schedule(&Story { workers: 3, frames, lost: nothing_lost }, |schedule| {
        let acknowledged: Vec<u32> = schedule.seen.drain(..).map(|seen| seen.tcp().header.ack.0).collect();
        assert!(acknowledged.is_sorted_by(|a, b| a < b), "nothing came out of order: {acknowledged:?}");
        assert_eq!(schedule.taken(), b"abc");
    });
}

#[test]
fn a_flow_that_ends_while_it_is_wanted_leaves_nobody_waiting_in_any_order() {
    let frames: &[(usize, Flags, &str)] = &[(0, Flags::RST, ""), (1, Flags::PSH, "a"), (2, Flags::PSH, "b")];
    every_schedule(&Story { workers: 3, frames, lost: nothing_lost }, |schedule| {
        let owners = schedule.owners();
        // Data before the reset moves the window past it, and the connection lives on.
        assert_eq!(owners, usize::from(!schedule.taken().is_empty()));
        let mut peer = schedule.peer;
        for worker in 0..schedule.rigs.len() {
            let mut seen = peer.data(&mut schedule.rigs[worker], Flags::PSH, b"x");
            seen.extend(exchange(&mut schedule.rigs).into_iter().flatten());
            let was_reset = seen.into_iter().any(|seen| seen.tcp().has(Flags::RST));
            assert_eq!(was_reset, owners == 0, "worker {worker} answers");
        }
    });
}

#[test]
fn a_letter_that_is_lost_is_noticed() {
    let lost: [Lost; 2] =
        [|letter| matches!(letter, Letter::Want { .. }), |letter| matches!(letter, Letter::Flow(_))];
    for lost in lost {
        let frames: &[(usize, Flags, &str)] = &[(1, Flags::PSH, "a")];
        let mut incomplete = 0;
        every_schedule(&Story { workers: 2, frames, lost }, |schedule| {
            incomplete += usize::from(schedule.taken() != b"a");
        });
        assert!(incomplete > 0);
    }
}
