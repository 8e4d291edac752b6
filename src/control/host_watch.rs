//! The host's network as it changes, told to those who depend on it once it has settled.
//!
//! A change comes in dozens of messages within a moment (link, addresses, routes, rules), so it is told of
//! when there was silence for a while. An address that went may come back (a lease renewed, a cable moved),
//! so what depends on it is given a grace; a link that flaps puts both off, but not for ever.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::uplink::host_news::HostNews;
use crate::uplink::sys::readable::Readable;

/// Silence after which a change is told ...
const SETTLE_TIME: Duration = Duration::from_millis(200);
/// ... and the longest it is waited for.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long an address may be gone before its connections are given up ...
const ADDRESS_GRACE: Duration = Duration::from_secs(5);
/// ... and the longest that addresses which go one after the other put that off.
const ADDRESS_GRACE_MAX: Duration = Duration::from_secs(20);

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostChange {
    /// Packets may take another way.
    Way,
    /// Addresses that went did not come back.
    AddressesGone,
}

/// Tells of changes for as long as it is polled; without a way to hear of them, ends.
pub async fn follow(tell: impl FnMut(HostChange)) {
    let Err(error) = listen(tell).await;
    tracing::warn!(%error, "changes of the host's network are not seen; connections they break end by time-outs");
}

async fn listen(mut tell: impl FnMut(HostChange)) -> io::Result<Infallible> {
    let mut news = HostNews::new()?;
    let readable = Readable::of(news.as_fd())?;
    let mut way = Settling::of(SETTLE_TIME, SETTLE_TIME_MAX);
    let mut gone = Settling::of(ADDRESS_GRACE, ADDRESS_GRACE_MAX);
    loop {
        let (settled_at, given_up_at) = (way.until, gone.until);
        tokio::select! {
            change = readable.read(|| news.read()) => {
                let (change, now) = (change?, Instant::now());
                if change.way {
                    way.go_on(now);
                }
                if change.address_gone {
                    gone.go_on(now);
                }
            }
            () = sleep_to(settled_at), if settled_at.is_some() => {
                way.end();
                tell(HostChange::Way);
            }
            () = sleep_to(given_up_at), if given_up_at.is_some() => {
                gone.end();
                tell(HostChange::AddressesGone);
            }
        }
    }
}

async fn sleep_to(at: Option<Instant>) {
    if let Some(at) = at {
        sleep_until(at).await;
    }
}

/// A change under way: told after silence, or at the latest.
#[derive(Debug)]
struct Settling {
    /// Silence after which it is told, and the longest it is waited for.
    silence: Duration,
    silence_max: Duration,
    /// When it is told at the latest.
    at_latest: Option<Instant>,
    /// When it is told.
    until: Option<Instant>,
}

impl Settling {
    fn of(silence: Duration, silence_max: Duration) -> Settling {
        Settling { silence, silence_max, at_latest: None, until: None }
    }

    fn go_on(&mut self, now: Instant) {
        let at_latest = *self.at_latest.get_or_insert(now + self.silence_max);
        self.until = Some(at_latest.min(now + self.silence));
    }

    fn end(&mut self) {
        (self.at_latest, self.until) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_after_silence_or_after_two_seconds() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut way = Settling::of(SETTLE_TIME, SETTLE_TIME_MAX);
        way.go_on(at(0));
        assert_eq!(way.until, Some(at(200)));
        way.go_on(at(150));
        assert_eq!(way.until, Some(at(350)));
        for ms in (300..2_000).step_by(150) {
            way.go_on(at(ms));
        }
        assert_eq!(way.until, Some(at(2_000)));
        way.end();
        way.go_on(at(2_100));
        assert_eq!(way.until, Some(at(2_300)));
    }

    #[test]
    fn an_interface_that_flaps_puts_the_end_of_what_is_lost_off_for_so_long_only() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut gone = Settling::of(ADDRESS_GRACE, ADDRESS_GRACE_MAX);
        for s in (0..18).step_by(3) {
            gone.go_on(at(s));
            assert_eq!(gone.until, Some(at((s + 5).min(20))));
        }
        gone.go_on(at(18));
        assert_eq!(gone.until, Some(at(20)));
    }
}
