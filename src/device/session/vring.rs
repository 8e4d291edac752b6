//! What the session knows of one ring: the parts that come in separate messages, in any order.
//!
//! May touch: nothing. Read first: the vhost-user specification, "Ring states".

use std::os::fd::OwnedFd;

use crate::device::ring::RingAddrs;
use crate::device::sys::Notifier;
use crate::device::tx::Enabled;

/// How the front-end kicks a ring.
#[derive(Debug, Default)]
pub(super) enum Kick {
    /// Not said yet, or used up by a start: the ring does not start.
    #[default]
    Unset,
    /// By this descriptor.
    Descriptor(OwnedFd),
    /// Not at all (`NOFD`): the ring is to be polled.
    Polled,
}

/// The parts of a ring.
#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) size: Option<u16>,
    pub(super) addrs: Option<RingAddrs>,
    /// Where the ring stands while it is stopped: where we left it, or what the front-end said last.
    pub(super) base: u16,
    pub(super) kick: Kick,
    pub(super) call: Option<Notifier>,
    pub(super) err: Option<Notifier>,
    /// What `SET_VRING_ENABLE` said last; QEMU says it once, before anything else.
    enable: Option<bool>,
    /// It was enabled at some time since it was reset.
    was_enabled: bool,
    /// The worker runs it (or holds it stopped after a fault).
    pub(super) started: bool,
}

impl Vring {
    /// Takes the front-end's word.
    pub(super) fn set_enable(&mut self, on: bool) {
        self.enable = Some(on);
        self.was_enabled |= on;
    }

    /// Whether the ring carries frames. Without `PROTOCOL_FEATURES` there is no message for it, and
    /// a ring is enabled from its start.
    pub(super) fn enabled(&self, protocol_features: bool) -> Enabled {
        match self.enable {
            Some(true) => Enabled::Yes,
            None if !protocol_features => Enabled::Yes,
            Some(false) if self.was_enabled => Enabled::No,
            _ => Enabled::NotYet,
        }
    }

    /// Forgets all but the notification descriptors (`RESET_DEVICE`).
    pub(super) fn reset(&mut self) {
        let old = std::mem::take(self);
        (self.call, self.err) = (old.call, old.err);
    }

    /// Whether all that a start needs is there.
    pub(super) fn is_complete(&self) -> bool {
        self.size.is_some() && self.addrs.is_some() && !matches!(self.kick, Kick::Unset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_without_protocol_features_is_enabled_from_its_start() {
        let vring = Vring::default();
        assert_eq!(vring.enabled(false), Enabled::Yes);
        assert_eq!(vring.enabled(true), Enabled::NotYet);
    }

    #[test]
    fn early_enable_is_remembered_and_disable_after_it_discards() {
        let mut vring = Vring::default();
        vring.set_enable(false);
        assert_eq!(vring.enabled(true), Enabled::NotYet);
        vring.set_enable(true);
        assert_eq!(vring.enabled(true), Enabled::Yes);
        vring.set_enable(false);
        assert_eq!(vring.enabled(true), Enabled::No);
        vring.reset();
        assert_eq!(vring.enabled(true), Enabled::NotYet);
    }
}
