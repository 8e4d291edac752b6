//! Keeps a named network as it must be while this process uses it.
//!
//! Others flush rules, move the default route, switch forwarding, and die. Each of it is told by the kernel
//! (netlink, inotify), and once it has settled everything is looked at and put right
//! ([`Joined::restore`]): rules put back, the new uplink used, ports of the dead removed. What is put right
//! tells of itself once more, and then nothing is amiss.
//!
//! One process of the network does so, its keeper: fifty that did would cost as much again each. When a user's
//! file is closed or removed the keeper may have gone, so the others try to take its place, and once more
//! a second later, because its lock may be released after its file.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use inotify::{Inotify, WatchMask};
use tokio::time::{Instant, sleep_until};

use crate::network::manager::Joined;
use crate::network::users::is_user_file;
use crate::uplink::network_news::NetworkNews;
use crate::uplink::sys::readable::Readable;

/// Silence after which it is looked ...
const SETTLE_TIME: Duration = Duration::from_millis(50);
/// ... and the longest it is waited for.
const SETTLE_TIME_MAX: Duration = Duration::from_millis(500);
/// Pause after a failure: what fails now fails again at once.
const RETRY_TIME: Duration = Duration::from_secs(5);
/// After the end of a user, when the keeper's place is free if it was the keeper.
const SUCCESSION_TIME: Duration = Duration::from_secs(1);
/// Bytes of file events taken at once.
const EVENTS_BYTES: usize = 4096;

/// This process's place in a network, for all tasks that change or look after it.
pub type SharedJoined = Arc<Mutex<Joined>>;

/// Looks after the network for as long as it is polled; without a way to hear of changes, ends.
pub async fn follow(joined: SharedJoined) {
    let Err(error) = watch(&joined).await;
    tracing::warn!(%error, "changes of the host's firewall and routes are not seen: what others take away stays away");
}

async fn watch(joined: &SharedJoined) -> io::Result<Infallible> {
    let run_folder = joined.lock().unwrap_or_else(PoisonError::into_inner).run_folder();
    let (mut firewall, mut routes) = (NetworkNews::of_firewall()?, NetworkNews::of_routes()?);
    let (firewall_ready, routes_ready) = (Readable::of(firewall.as_fd())?, Readable::of(routes.as_fd())?);
    let mut users = Inotify::init()?;
    users.watches().add(&run_folder, WatchMask::CLOSE_WRITE | WatchMask::DELETE)?;
    let users_ready = Readable::of(users.as_fd())?;
    // Whatever came before there was news of it.
    let mut at_latest = Some(Instant::now());
    let mut due = at_latest;
    let mut user_left = false;
    loop {
        let due_at = due;
        tokio::select! {
            news = firewall_ready.read(|| firewall.read()) => news?,
            news = routes_ready.read(|| routes.read()) => news?,
            news = users_ready.read(|| user_news(&mut users)) => {
                if !news? {
                    continue;
                }
                user_left = true;
            }
            () = sleep_to(due_at), if due_at.is_some() => {
                at_latest = None;
                let outcome = restore(joined).await;
                due = match outcome {
                    Restored::Well => None,
                    Restored::Failed => Some(Instant::now() + RETRY_TIME),
                    Restored::ByAnother => std::mem::take(&mut user_left).then(|| Instant::now() + SUCCESSION_TIME),
                };
                continue;
            }
        }
        let now = Instant::now();
        let latest = *at_latest.get_or_insert(now + SETTLE_TIME_MAX);
        due = Some(latest.min(now + SETTLE_TIME));
    }
}

async fn sleep_to(at: Option<Instant>) {
    if let Some(at) = at {
        sleep_until(at).await;
    }
}

/// What became of looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restored {
    /// All is well.
    Well,
    /// It could not be made well.
    Failed,
    /// Another process looks.
    ByAnother,
}

/// Puts right what is amiss, on a thread that may wait, if this process is the keeper.
async fn restore(joined: &SharedJoined) -> Restored {
    let shared = Arc::clone(joined);
    let work = move || {
        let mut joined = shared.lock().unwrap_or_else(PoisonError::into_inner);
        joined.is_keeper().then(|| joined.restore())
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(None) => Restored::ByAnother,
        Ok(Some(Ok(changed))) => {
            if changed {
                tracing::info!("the network's firewall rules were brought up to date");
            }
            Restored::Well
        }
        Ok(Some(Err(error))) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(%error, cause, "the network cannot be put right; tried again in 5 s");
            Restored::Failed
        }
        Err(_) => Restored::Failed,
    }
}

/// Takes what waits; whether any of it is about a user's file: closed, as by a process that died, or removed.
fn user_news(inotify: &mut Inotify) -> io::Result<bool> {
    let mut buffer = [0; EVENTS_BYTES];
    let mut events = inotify.read_events(&mut buffer)?;
    Ok(events.any(|event| event.name.is_none_or(|name| name.to_str().is_some_and(is_user_file))))
}
